#!/usr/bin/env bash
# Prints charts/plat/README.md, made from Chart.yaml and the "# --" comments of values.yaml (see `make generate`). Fails
# when a value has no comment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/plat"
chart() { awk -v key="$1:" '$1 == key { sub(/^[^:]*: */, ""); gsub(/"/, ""); print; exit }' Chart.yaml; }

cat <<END
# Plat chart

$(chart description)

Made by \`make generate\` from \`values.yaml\`; do not edit. Chart $(chart version), Plat $(chart appVersion), Kubernetes $(chart kubeVersion).

    helm install plat charts/plat -n plat-system --create-namespace --wait

The images are \`localhost/plat-operator\` and \`localhost/plat-agent\` of the chart's version: \`make images\` builds them,
\`image.registry\` takes them from somewhere else. If the cluster enforces Pod Security, label the namespace first, as
agents need the host's network and folders:

    kubectl create namespace plat-system
    kubectl label namespace plat-system pod-security.kubernetes.io/enforce=privileged

Operation, upgrade, rollback and removal: [docs/operations.md](../../docs/operations.md). Ready-made sets of values are in
[ci](ci).

## Values

A misspelt value is refused. \`helm upgrade\` applies changed ones, except where the text says otherwise.

| value | default | meaning |
|---|---|---|
END

awk '
  function leave(depth) { while (deep > 0 && indent[deep] >= depth) deep-- }
  /^ *# -- / { text = $0; sub(/^ *# -- /, "", text); open = 1; next }
  /^ *#/     { if (open) { more = $0; sub(/^ *# */, "", more); text = text " " more } next }
  /^ *$/     { if (open) { print "values.yaml: a comment stands above no value: " text >"/dev/stderr"; bad = 1 } open = 0; next }
  {
    match($0, /^ */); leave(RLENGTH)
    key = $1; sub(/:$/, "", key)
    value = $0; sub(/^ *[^:]*: */, "", value); if ($0 ~ /^ *[^ :]+:$/) value = ""
    path = ""; for (i = 1; i <= deep; i++) path = path name[i] "."
    if (value == "" && !open) { deep++; indent[deep] = RLENGTH; name[deep] = key; next }
    if (!open) { print "values.yaml: " path key " has no \"# --\" comment" >"/dev/stderr"; bad = 1; next }
    gsub(/\|/, "\\|", value)
    printf "| `%s%s` | `%s` | %s |\n", path, key, value, text
    open = 0
  }
  END { exit bad }' values.yaml
