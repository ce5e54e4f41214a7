#!/usr/bin/env bash
# Tests of the chart: what helm makes of it, and what a real API server makes of that. Prints one `ok` or `FAIL` line per
# claim and ends with `N passed, N failed`.
#
#   charts/test.sh            everything; the second half needs root (it starts etcd and kube-apiserver in a namespace)
#   charts/test.sh offline    only what needs no API server
#
# PLAT_TOOLS is the folder of helm, kubectl, etcd and kube-apiserver, as e2e/tools/build leaves them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PLAT_TOOLS=${PLAT_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/plat/tools}
export PATH=$PLAT_TOOLS:$PATH
for program in helm jq; do
  command -v $program >/dev/null || { echo "charts/test.sh needs $program; e2e/tools/build makes helm, jq is a package"; exit 2; }
done
chart=charts/plat
work=$(mktemp -d)
cleanup=("rm -rf $work"); trap 'for step in "${cleanup[@]}"; do $step; done' EXIT
export HELM_CACHE_HOME=$work/cache HELM_CONFIG_HOME=$work/config HELM_DATA_HOME=$work/data

passed=0 failed=0
pass() { echo "ok   $1"; passed=$((passed + 1)); }
fail() { echo "FAIL $1"; [[ -z ${2:-} ]] || sed 's/^/       /' <<<"$2"; failed=$((failed + 1)); }
# holds CLAIM COMMAND...: the command succeeds.
holds() { local claim=$1 out; shift; if out=$("$@" 2>&1); then pass "$claim"; else fail "$claim" "$out"; fi; }
# refused CLAIM TEXT COMMAND...: the command fails and says TEXT.
refused() {
  local claim=$1 text=$2 out; shift 2
  if out=$("$@" 2>&1); then fail "$claim" "it was accepted: $out"
  elif [[ $out == *"$text"* ]]; then pass "$claim"; else fail "$claim" "no '$text' in: $out"; fi
}
# says CLAIM TEXT COMMAND...: the command succeeds and prints TEXT.
says() {
  local claim=$1 text=$2 out; shift 2
  if ! out=$("$@" 2>&1); then fail "$claim" "$out"
  elif [[ $out == *"$text"* ]]; then pass "$claim"; else fail "$claim" "no '$text' in: $out"; fi
}
render() { helm template plat $chart -n plat-system "$@"; }
# without_monitors: leaves out the kinds of the Prometheus operator, which a bare API server does not know.
without_monitors() { awk 'BEGIN { RS = "---\n"; ORS = "" } !/kind: (PodMonitor|PrometheusRule)/ { print "---\n" $0 }'; }

# ---------------------------------------------------------------- what helm makes of it

holds "helm lint --strict finds nothing" helm lint --strict $chart
for file in "$chart"/ci/*-values.yaml; do
  profile=$(basename "$file" -values.yaml)
  holds "profile $profile passes helm lint --strict" helm lint --strict $chart -f "$file"
  if out=$(render -f "$file" 2>&1 >"$work/$profile.yaml"); then pass "profile $profile renders"; else fail "profile $profile renders" "$out"; fi
done

# Every object of the schema is closed, so a misspelt value is refused wherever it stands.
paths=$(jq -r '. as $root
  | def target: if has("$ref") then $root.definitions[.["$ref"] | ltrimstr("#/definitions/")] else . end;
    def below: target | select(has("properties")) | .properties | to_entries[] | .key as $key
      | .value | (target | select(has("properties")) | $key), (below | $key + "." + .);
    below' $chart/values.schema.json)
for path in "" $paths; do
  refused "a misspelt value at '${path:-the top}' is refused" "not allowed" render --set "${path:+$path.}missspelt=1"
done
[[ $(wc -w <<<"$paths") -ge 12 ]] && pass "the schema has its objects" || fail "the schema has its objects" "found only: $paths"

declared=$(jq -c '[.. | objects | select(.additionalProperties == null and has("properties"))] | length' $chart/values.schema.json)
[[ $declared == 0 ]] && pass "no object of the schema is open" || fail "no object of the schema is open" "$declared are"

while IFS='|' read -r claim text values; do
  refused "$claim" "$text" render --set "$values"
done <<'CASES'
a range with host bits is refused|host bits|clusterCIDRs={10.244.0.1/16}
an octet above 255 is refused|more than 255|clusterCIDRs={10.300.0.0/16}
a range that is no range is refused|does not match|clusterCIDRs={pods}
two ranges of one family are refused|at most one per family|clusterCIDRs={10.0.0.0/16,10.1.0.0/16}
a range smaller than a block is refused|smaller than one block|clusterCIDRs={10.244.0.0/26}
a range that is too large is refused|must be /8 to /30|clusterCIDRs={0.0.0.0/4}
more than 2^24 blocks are refused|2^24|clusterCIDRs={fd00::/16}
a bridge name that the kernel refuses is refused|bridge|bridge=abcdefghijklmnop
a port of the API server without its address is refused|without k8sServiceHost|k8sServicePort=6443
a listen address without a port is refused|listen|agent.listen=0.0.0.0
CASES

refused "an empty list of ranges is refused" "minItems" render --set-json 'clusterCIDRs=[]'
for list in 'image.pullSecrets=[{"nam":"x"}]' 'agent.tolerations=[{"ky":"x"}]' 'operator.extraEnv=[{"name":"x","valu":"y"}]'; do
  refused "a misspelt key in ${list%%=*} is refused" "not allowed" render --set-json "$list"
done

says "the notes count the nodes of the range" "10.244.0.0/16 holds 256 nodes" helm install plat $chart --dry-run=client
says "the notes count the nodes of an IPv6 range" "fd00:10:244::/48 holds 65536 nodes" helm install plat $chart --dry-run=client -f $chart/ci/dual-stack-values.yaml
says "the notes say what Plat does not do" "NetworkPolicy, encryption or Windows" helm install plat $chart --dry-run=client
says "the notes say how to remove it" "--set cleanup=true" helm install plat $chart --dry-run=client

kinds() { grep -c '^kind: CustomResourceDefinition' <<<"$1"; }
[[ $(kinds "$(<"$work/default.yaml")") == 4 ]] && pass "four kinds are installed" || fail "four kinds are installed"
[[ $(grep -c 'helm.sh/resource-policy: keep' "$work/default.yaml") == 4 ]] && pass "each kind is kept on uninstall" || fail "each kind is kept on uninstall"
[[ $(render --set crds.keep=false | grep -c 'resource-policy: keep') == 0 ]] && pass "crds.keep=false keeps none" || fail "crds.keep=false keeps none"
[[ $(kinds "$(render --set crds.enabled=false)") == 0 ]] && pass "crds.enabled=false installs none" || fail "crds.enabled=false installs none"
says "image.registry re-tags both images" "registry.example/net/plat-agent:0.1" render --set image.registry=registry.example/net,image.tag=0.1
says "a digest goes before the tag" "localhost/plat-operator@sha256:$(printf 'a%.0s' {1..64})" render --set operator.image.digest=sha256:$(printf 'a%.0s' {1..64})
says "the address of the API server reaches the programs" "KUBERNETES_SERVICE_HOST, value: \"172.30.0.1\"" render --set k8sServiceHost=172.30.0.1,k8sServicePort=6443
says "cleanup turns the agents round" "- --stay" cat "$work/cleanup.yaml"

# Every metric of the alerts and of the documentation is one that a program has; every flag of the chart too.
sources=$(cat operator/src/telemetry.rs node-agent/src/telemetry.rs node-agent/src/probe/metrics.rs)
for metric in $(grep -ohE 'plat_(operator|agent|ipam|build)_[a-z_]+' "$work/metrics.yaml" docs/operations.md | sort -u); do
  [[ $sources == *"\"$(sed -E 's/_(total|info)$//; s/_seconds$//' <<<"$metric")\""* ]] && pass "metric $metric exists" || fail "metric $metric exists"
done
# So is every reason, both ways.
words() { grep -ohE "$1" "${@:2}" | grep -oE '[A-Z][A-Za-z]+' | sort -u; }
undocumented="" unknown=""
for word in $(words '&str = "[A-Z][A-Za-z]+"' operator/src/reason.rs crds/src/condition.rs); do
  grep -q "\`$word\`" docs/operations.md || undocumented+=" $word"
done
for word in $(words '`[A-Z][a-z]+[A-Za-z]*`' docs/operations.md); do
  grep -rqE "\"$word\"|^ +$word," operator/src node-agent/src crds/src || unknown+=" $word"
done
[[ -z $undocumented ]] && pass "every condition and reason is documented" || fail "every condition and reason is documented" "not in docs/operations.md:$undocumented"
[[ -z $unknown ]] && pass "every documented reason exists" || fail "every documented reason exists" "in no program:$unknown"
help() { cargo run -q -p "$1" -- "${@:2}" --help; }
flags() { # CLAIM KIND TEXT: the flags that objects of that kind give are in the text
  local flag missing=""
  for flag in $(awk -v kind="kind: $2" 'BEGIN { RS = "---\n" } $0 ~ kind "\n"' "$work"/*.yaml | grep -oE -- ' - "?--[a-z0-9-]+' | grep -oE -- '--[a-z0-9-]+' | sort -u); do
    [[ $3 == *"$flag"* ]] || missing+=" $flag"
  done
  [[ -z $missing ]] && pass "$1" || fail "$1" "unknown:$missing"
}
if command -v cargo >/dev/null; then
  flags "the operator has every flag that the chart gives it" Deployment "$(help plat-operator)"
  flags "the agent has every flag that the chart gives it" DaemonSet "$(help plat-agent run; help plat-agent cleanup)"
  # What is told by the environment holds for every command that somebody runs in the container, such as `check`.
  agent_env=$(awk 'BEGIN { RS = "---\n" } /kind: DaemonSet\n/' "$work"/*.yaml | grep -oE 'name: PLAT_[A-Z_]+' | cut -d' ' -f2 | sort -u)
  wanted=$(help plat-agent check | grep -oE 'env: PLAT_[A-Z_]+' | cut -d' ' -f2 | grep -v PLAT_CHECK_ | sort -u)
  known=$(help plat-agent run; help plat-agent cleanup)
  unknown=""; for name in $agent_env; do [[ $known == *"[env: $name="* ]] || unknown+=" $name"; done
  [[ -n $agent_env && -z $unknown ]] && pass "the agent has every variable that the chart gives it" || fail "the agent has every variable that the chart gives it" "unknown:$unknown"
  [[ $wanted == *PLAT_CNI_CONF_DIR* ]] && pass "check says which variables it takes" || fail "check says which variables it takes" "$wanted"
  for file in "$work"/*.yaml; do
    missing="" daemonset=$(awk 'BEGIN { RS = "---\n" } /kind: DaemonSet\n/' "$file")
    for name in $wanted; do [[ $daemonset == *"{name: $name, value: "* ]] || missing+=" $name"; done
    claim="profile $(basename "$file" .yaml) tells 'kubectl exec … /plat-agent check' where everything is"
    [[ -z $missing ]] && pass "$claim" || fail "$claim" "not in the environment:$missing"
  done
  flags "the test has every flag that the chart gives it" Pod "$(help plat-agent selftest check)"
fi

# The agent has NET_ADMIN and nothing else, the operator nothing.
agent() { awk 'BEGIN { RS = "---\n" } /kind: DaemonSet/' "$work/default.yaml"; }
says "the agent has NET_ADMIN alone" "capabilities: {drop: [ALL], add: [NET_ADMIN]}" agent
for text in "privileged: false" "allowPrivilegeEscalation: false" "readOnlyRootFilesystem: true"; do says "the agent is $text" "$text" agent; done
[[ $(grep -cE 'privileged: true|hostPID|hostIPC' "$work/default.yaml") == 0 ]] && pass "nothing is privileged" || fail "nothing is privileged"

# Each path of the node that the environment names is where a volume is mounted.
for path in $(agent | grep -oE 'PLAT_[A-Z]+(_[A-Z]+)*_DIR, value: "?[^"}]+' | sed -E 's/.*value: "?//'); do
  says "the agent finds $path where it is mounted" "mountPath: $path}" agent
done

# ---------------------------------------------------------------- what an API server makes of it

finish() { echo "$passed passed, $failed failed"; exit $((failed > 0)); }
if [[ ${1:-} == offline ]]; then finish; fi
if [[ $EUID != 0 || ! -x $PLAT_TOOLS/kube-apiserver ]]; then
  fail "the API server's half ran" "it needs root and $PLAT_TOOLS/kube-apiserver (e2e/tools/build); 'charts/test.sh offline' leaves it out"
  finish
fi

export TB=chart$((BASHPID % 100000)); export TB_RUN=$PWD/e2e/run/$TB
cleanup=("e2e/testbed/down.sh" "${cleanup[@]}")
e2e/testbed/up.sh core || { fail "the API server starts"; finish; }
run=$TB_RUN
in_cluster() { nsenter --net="/run/netns/$TB-cp" -- "$@"; }
k() { in_cluster kubectl --kubeconfig "$run/admin.kubeconfig" "$@"; }
h() { in_cluster helm --kubeconfig "$run/admin.kubeconfig" "$@"; }
# as TOKEN ARGS...: kubectl with a service account's token.
as() {
  local token=$1; shift
  in_cluster kubectl --kubeconfig /dev/null --server https://172.30.0.1:6443 --certificate-authority "$run/pki/ca.crt" --token "$token" "$@"
}
# within SECONDS COMMAND...: repeats it until it succeeds.
within() {
  local end=$((SECONDS + $1)) out; shift
  until out=$("$@" 2>&1); do ((SECONDS < end)) || { echo "$out"; return 1; }; sleep 0.1; done
  echo "$out"
}
dry_run() { without_monitors <"$1" | k apply --server-side --force-conflicts --dry-run=server --validate=strict --warnings-as-errors -f -; }

k create namespace plat-system >/dev/null
k create serviceaccount plat-test -n plat-system >/dev/null    # a pod needs its account, also in a dry run
holds "helm install without values is accepted" h install plat $chart -n plat-system
holds "the kinds are served" within 10 k get plat
for file in "$chart"/ci/*-values.yaml; do
  profile=$(basename "$file" -values.yaml)
  holds "profile $profile passes the API server's strict validation without a warning" dry_run "$work/$profile.yaml"
done

for node in n1 n2; do
  k create -f - >/dev/null <<END
{apiVersion: v1, kind: Node, metadata: {name: $node}}
END
  k create -f - >/dev/null <<END
{apiVersion: v1, kind: Pod, metadata: {name: agent-$node, namespace: plat-system}, spec: {nodeName: $node, serviceAccountName: plat-agent, containers: [{name: agent, image: none}]}}
END
done
operator=$(k create token plat-operator -n plat-system)
agent1=$(k create token plat-agent -n plat-system --bound-object-kind Pod --bound-object-name agent-n1)
agent2=$(k create token plat-agent -n plat-system --bound-object-kind Node --bound-object-name n2)
unbound=$(k create token plat-agent -n plat-system)

# report TOKEN NODE: what an agent does, a server-side apply of a NodeNetwork's status.
report() { as "$1" apply --server-side --subresource=status --field-manager=plat-agent --validate=ignore -f - <<<"{apiVersion: plat.network/v1alpha1, kind: NodeNetwork, metadata: {name: $2}, status: {mtu: 1500}}"; }
create() { as "$1" create --validate=ignore -f - <<<"$2"; }
for node in n1 n2; do
  holds "the operator creates the report of $node" create "$operator" "{apiVersion: plat.network/v1alpha1, kind: NodeNetwork, metadata: {name: $node}}"
done
denied() { report "$agent1" n2 2>&1 | grep -q "may not write the report"; }
within 10 denied >/dev/null                                # a policy takes a moment to come into force
holds "the agent of n1 writes the report of n1" report "$agent1" n1
refused "the agent of n1 may not write the report of n2" "the agent of node n1 may not write the report of node n2" report "$agent1" n2
refused "a token bound to node n2 may not write the report of n1" "the agent of node n2 may not" report "$agent2" n1
refused "a token that names no node writes no report" "names no node" report "$unbound" n1
refused "an agent may not change the report's metadata" "cannot patch" as "$agent1" apply --server-side --validate=ignore -f - <<<'{apiVersion: plat.network/v1alpha1, kind: NodeNetwork, metadata: {name: n1, labels: {a: b}}}'
refused "an agent may not delete its report" "cannot delete" as "$agent1" delete nodenetwork n1

# The operator's and the users' parts of a PodCIDR.
block='{apiVersion: plat.network/v1alpha1, kind: PodCIDR, metadata: {name: 10-244-1-0-24}, spec: {cidr: 10.244.1.0/24, clusterCIDR: default-v4, nodeName: n1, nodeAddresses: [172.30.0.11]}}'
patch() { k patch podcidr 10-244-1-0-24 --type merge -p "$1"; }
not_created() { k create --dry-run=server -f - <<<"$block" 2>&1 | grep -q "operator alone"; }
within 10 not_created >/dev/null
refused "an administrator may not create a PodCIDR" "created by Plat's operator alone" k create -f - <<<"$block"
holds "the operator creates a PodCIDR" create "$operator" "$block"
holds "an administrator sets spec.routing" patch '{"spec":{"routing":{"metric":7}}}'
holds "an administrator takes spec.routing back" patch '{"spec":{"routing":null}}'
holds "an administrator annotates a PodCIDR" patch '{"metadata":{"annotations":{"a":"b"}}}'
refused "an administrator may not change the state" "only spec.routing" patch '{"spec":{"state":"Quarantined"}}'
refused "an administrator may not add a field" "only spec.routing" patch '{"spec":{"nodeUID":"x"}}'
refused "an administrator may not remove a field" "only spec.routing" patch '{"spec":{"nodeAddresses":null}}'
refused "an administrator may not write the status" "written by Plat's operator alone" k patch podcidr 10-244-1-0-24 --subresource status --type merge -p '{"status":{"used":1}}'
refused "an administrator may not delete a PodCIDR" "deleted by Plat's operator alone" k delete podcidr 10-244-1-0-24
refused "an administrator may not delete all PodCIDRs" "deleted by Plat's operator alone" k delete podcidr --all
holds "the operator writes the status" as "$operator" apply --server-side --subresource=status --field-manager=plat-operator --validate=ignore -f - <<<'{apiVersion: plat.network/v1alpha1, kind: PodCIDR, metadata: {name: 10-244-1-0-24}, status: {used: 1}}'
holds "the operator changes the state" as "$operator" patch podcidr 10-244-1-0-24 --type merge -p '{"spec":{"state":"Draining"}}'

# Rights. yes or no, program, verb, resource.
while read -r answer who verb resource; do
  IFS=/ read -r kind part <<<"$resource"
  got=$(k auth can-i "$verb" "$kind" ${part:+--subresource="$part"} --as "system:serviceaccount:plat-system:plat-$who" 2>/dev/null)
  if [[ $got == "$answer" ]]; then pass "may the $who $verb $resource: $answer"; else fail "may the $who $verb $resource: $answer" "the API server says $got"; fi
done <<'RIGHTS'
yes agent watch podcidrs.plat.network
yes agent watch clustercidrs.plat.network
yes agent watch routingpolicies.plat.network
yes agent patch nodenetworks.plat.network/status
no agent patch nodenetworks.plat.network
no agent create nodenetworks.plat.network
no agent patch podcidrs.plat.network
no agent get nodes
no agent get pods
no agent get secrets
no agent create events.events.k8s.io
no agent create serviceaccounts/token
yes operator watch nodes
yes operator patch nodes
yes operator patch nodes/status
yes operator create podcidrs.plat.network
yes operator delete podcidrs.plat.network
yes operator patch clustercidrs.plat.network/status
yes operator watch routingpolicies.plat.network
yes operator patch routingpolicies.plat.network/status
no operator patch routingpolicies.plat.network
no operator delete clustercidrs.plat.network
no operator delete nodes
no operator update podcidrs.plat.network
no operator get pods
no operator get secrets
no operator create serviceaccounts/token
no operator update leases.coordination.k8s.io
yes operator list servicecidrs.networking.k8s.io
no operator list endpointslices.discovery.k8s.io
RIGHTS
says "the operator holds its own Lease" yes k auth can-i update leases.coordination.k8s.io/plat-operator -n plat-system --as system:serviceaccount:plat-system:plat-operator
says "the operator writes Events in default" yes k auth can-i create events.events.k8s.io -n default --as system:serviceaccount:plat-system:plat-operator
k create clusterrolebinding reader --clusterrole=plat-view --user=reader >/dev/null
says "who has the view role sees the map" yes k auth can-i list podcidrs.plat.network --as reader
says "the view role is part of the cluster's own" true k get clusterrole plat-view -o 'jsonpath={.metadata.labels.rbac\.authorization\.k8s\.io/aggregate-to-view}'

# Upgrade, uninstall, reinstall.
newer=$work/newer; cp -r $chart "$newer"
sed -E 's/^( +)nextHop:$/\1later:\n\1  type: string\n\1nextHop:/' $chart/crd/crds.yaml >"$newer/crd/crds.yaml"
holds "helm upgrade takes a chart with a new field" h upgrade plat "$newer" -n plat-system
says "the new field is there after the upgrade" "later" within 10 k explain podcidr.spec.routing.later
holds "the new field can be set" within 10 patch '{"spec":{"routing":{"later":"x"}}}'
holds "helm upgrade with cleanup=true is accepted" h upgrade plat "$newer" -n plat-system --set cleanup=true
holds "helm rollback is accepted" h rollback plat 1 -n plat-system
refused "a second release is refused and names the first" 'release "plat" in namespace "plat-system"' h install other $chart -n other --create-namespace
refused "a second release is refused with --take-ownership too" 'release "plat" in namespace "plat-system"' h install other $chart -n other --create-namespace --take-ownership

says "helm uninstall says what it keeps" "podcidrs.plat.network" h uninstall plat -n plat-system
holds "the blocks outlive the release" k get podcidr 10-244-1-0-24
# none_named WORD KINDS: objects of these kinds can be listed, and none has the word in its name.
none_named() { local names; names=$(k get "$2" -A -o name) && ! grep "$1" <<<"$names"; }
holds "no policy, role or binding outlives it" none_named plat validatingadmissionpolicies,validatingadmissionpolicybindings,clusterroles,clusterrolebindings,roles,rolebindings
refused "another name is refused over the kept kinds" "invalid ownership metadata" h install other $chart -n other --create-namespace
holds "--take-ownership cures that" h install other $chart -n other --create-namespace --take-ownership
holds "the blocks outlive the new release's start" k get podcidr 10-244-1-0-24
holds "the name of a release can be replaced" h uninstall other -n other
holds "the old name takes them back" h install plat $chart -n plat-system --take-ownership

# Deleting the kind deletes its objects past the policy: the API server itself does it.
within 10 not_created >/dev/null
holds "the kind can be deleted while the policy protects its objects" k delete crd podcidrs.plat.network --timeout=30s
holds "helm upgrade brings a deleted kind back" h upgrade plat $chart -n plat-system
holds "and serves it" within 10 k get podcidrs
holds "helm upgrade with crds.keep=false is accepted" h upgrade plat $chart -n plat-system --set crds.keep=false
# While an API server is still opening a kind's storage, it takes minutes to delete the kind.
holds "and every kind can be listed" within 30 k get clustercidrs,podcidrs,routingpolicies,nodenetworks
holds "helm uninstall then removes the kinds" h uninstall plat -n plat-system --wait
holds "no kind is left" none_named plat.network crd
finish
