#!/usr/bin/env bash
# Writes the generated files. `e2e/generate.sh --check` writes nothing and fails when one differs from its source.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# FILE <- COMMAND, one pair per generated file.
generated=(
  "charts/plat/crd/crds.yaml" "cargo run -q -p plat-crds --bin crdgen"
  "docs/reference.md" "cargo run -q -p plat-crds --bin crdref"
  "charts/plat/README.md" "charts/readme.sh"
)

differ=0
for ((i = 0; i < ${#generated[@]}; i += 2)); do
  file=${generated[i]} command=${generated[i + 1]}
  if [[ ${1:-} != --check ]]; then
    $command >"$file.tmp" && mv "$file.tmp" "$file" && echo "generated $file"
  elif ! diff -u "$file" <($command) >&2; then
    echo "FAIL $file differs from its source: run 'make generate'"; differ=$((differ + 1))
  else
    echo "ok   $file equals its source"
  fi
done
if [[ ${1:-} == --check ]]; then echo "$((${#generated[@]} / 2 - differ)) passed, $differ failed"; fi
exit $((differ > 0))
