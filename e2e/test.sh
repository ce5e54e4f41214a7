#!/usr/bin/env bash
# `make test`: every check, cheapest first. Goes on after a failure, so that one run names them all; ends with
# one line `N passed, N failed` over all steps. `e2e/test.sh NAME...` runs only the named steps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TERM_COLOR=never RUST_BACKTRACE=1
log=$(mktemp -d); trap 'rm -rf "$log"' EXIT
passed=0 failed=0 broken=()

# add FILE: sums the closing lines of cargo's and our own runners in FILE.
add() {
  local p f
  read -r p f < <(awk '
    /^test result: / { for (i = 1; i <= NF; i++) { if ($i ~ /^passed/) p += $(i-1); if ($i ~ /^failed/) f += $(i-1) } }
    /^[0-9]+ passed, [0-9]+ failed/ { p += $1; f += $3 }
    END { print p + 0, f + 0 }' "$1")
  passed=$((passed + p)) failed=$((failed + f)); counted=$((p + f)) bad=$f
}

# step NAME COMMAND...: runs one step. A step that counts no tests of its own counts as one.
step() {
  local name=$1 start=$SECONDS rc; shift
  if (( ${#only[@]} )) && [[ " ${only[*]} " != *" $name "* ]]; then return; fi
  echo "=== $name: $*"
  "$@" 2>&1 | tee "$log/$name"; rc=${PIPESTATUS[0]}
  add "$log/$name"
  if (( counted == 0 && rc == 0 )); then passed=$((passed + 1)); fi
  if (( rc != 0 && bad == 0 )); then failed=$((failed + 1)); fi
  if (( rc != 0 )); then broken+=("$name"); fi
  echo "=== $name: $([[ $rc == 0 ]] && echo ok || echo FAILED) after $((SECONDS - start)) s"
}

# The demo, as a newcomer runs it; a prefix of its own keeps it from a demo that is being looked at.
demo() {
  local rc=0
  TB=demotest e2e/demo.sh up || rc=1
  TB=demotest e2e/demo.sh down || rc=1
  return $rc
}

only=("$@")
for name in "${only[@]}"; do
  grep -qE "^step $name " "${BASH_SOURCE[0]}" || { echo "no step is called '$name'" >&2; exit 2; }
done
export PLAT_TOOLS=${PLAT_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/plat/tools}
step setup        e2e/setup.sh
step format       cargo fmt --all --check
step lints        cargo clippy -q --workspace --all-targets -- -D warnings
step generated    e2e/generate.sh --check
step dependencies cargo test -q -p plat-e2e --test dependencies
step unit         cargo test --no-fail-fast -p plat-crds -p plat-operator -p plat-agent -p plat-cni -p plat-rig -p plat-e2e --lib --bins
step cni          cargo test --no-fail-fast -p plat-cni --test '*'
step fuzz         e2e/fuzz.sh
step agent        cargo test --no-fail-fast -p plat-agent --test '*'
step chart        charts/test.sh
step images       e2e/images/build.sh
step testbed      cargo test -p plat-e2e --test testbed -- --test-threads=1
step objects      cargo test -p plat-e2e --test objects
step operator     cargo test --no-fail-fast -p plat-operator --test '*'
step demo         demo
step cluster      cargo test --no-fail-fast -p plat-e2e --test 'cluster_*' -- --test-threads=1

if (( ${#broken[@]} )); then echo "failed steps: ${broken[*]}"; fi
echo "$passed passed, $failed failed"
exit $((failed > 0))
