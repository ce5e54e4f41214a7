{{/* Names. A release called plat gives plat-operator and plat-agent. */}}
{{- define "plat.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "plat.fullname" -}}
{{- $name := include "plat.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels of every object. Called with (list $ "component"). */}}
{{- define "plat.labels" -}}
{{- $ := index . 0 }}
{{- include "plat.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: plat
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" }}
{{- with $.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels that select a component's pods; they never change. Called with (list $ "component"). */}}
{{- define "plat.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ include "plat.name" $ }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Image of a component. Called with (list $ .Values.operator.image). */}}
{{- define "plat.image" -}}
{{- $ := index . 0 }}
{{- $image := index . 1 }}
{{- $path := printf "%s/%s" ($.Values.image.registry | trimSuffix "/") $image.repository | trimPrefix "/" }}
{{- if $image.digest }}
{{- printf "%s@%s" $path $image.digest }}
{{- else }}
{{- printf "%s:%s" $path (coalesce $image.tag $.Values.image.tag $.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* User name by which the API server knows a component. Called with (list $ "operator"). */}}
{{- define "plat.user" -}}
{{- $ := index . 0 -}}
system:serviceaccount:{{ $.Release.Namespace }}:{{ include "plat.fullname" $ }}-{{ index . 1 }}
{{- end }}

{{/* Environment of both programs: the address of the API server, if given, and extraEnv. Called with (list $ .Values.operator.extraEnv). */}}
{{- define "plat.env" -}}
{{- $ := index . 0 }}
{{- with $.Values.k8sServiceHost }}
- {name: KUBERNETES_SERVICE_HOST, value: {{ . | quote }}}
{{- end }}
{{- with $.Values.k8sServicePort }}
- {name: KUBERNETES_SERVICE_PORT, value: {{ . | toString | quote }}}
{{- end }}
{{- with index . 1 }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Port of an address:port text. */}}
{{- define "plat.port" -}}
{{- regexFind "[0-9]+$" . }}
{{- end }}

{{/* Prefix length of a CIDR text. */}}
{{- define "plat.prefix" -}}
{{- splitList "/" . | last }}
{{- end }}

{{/* Number of blocks in a range, so of nodes that it can hold. Called with (list $ "10.244.0.0/16"). */}}
{{- define "plat.blocks" -}}
{{- $ := index . 0 }}
{{- $cidr := index . 1 }}
{{- $block := ternary $.Values.blockPrefixLength.ipv6 $.Values.blockPrefixLength.ipv4 (contains ":" $cidr) | int }}
{{- $count := 1 }}
{{- range until (sub $block (include "plat.prefix" $cidr | int) | int) }}
{{- $count = mul $count 2 }}
{{- end }}
{{- $count }}
{{- end }}

{{/* What the pods of the test have in common. */}}
{{- define "plat.test.pod" }}
dnsPolicy: Default
terminationGracePeriodSeconds: 0
nodeSelector: {kubernetes.io/os: linux}
tolerations: [{key: node-role.kubernetes.io/control-plane, operator: Exists}]
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* What their containers have in common. */}}
{{- define "plat.test.container" }}
image: {{ include "plat.image" (list . .Values.agent.image) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Annotations of what surrounds the test's pod. Called with the weight, that is the order. */}}
{{- define "plat.test.hook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
