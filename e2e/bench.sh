#!/usr/bin/env bash
# `make bench`: builds for release and measures. Figures go to target/bench/*.json, a line of JSON each with
# name, ours, peer, peersFigure, ratio (ours by theirs), unit, and the goal where there is one; a table goes to
# standard output and to target/bench/table.md.
#
#   RECORD=1   write the table into docs/benchmarks.md, with machine, load and date
#   ONLY=cni|pods|ipam|routes   that part alone (nothing is recorded)
#   BENCH_IPAM_NODES=500,2000,5000   numbers of nodes; bench-ipam --help names more of the kind
#   BENCH_ROUTES_NODES=500,2000,5000   the same for routes; bench-routes --help names more of the kind
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $EUID == 0 ]] || { echo "bench: needs root: it makes network namespaces" >&2; exit 1; }
target=${CARGO_TARGET_DIR:-target}
tools=${PLAT_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/plat/tools}
images=${PLAT_IMAGES:-$target/images}
triple=$(rustc -vV | sed -n 's/^host: //p')
# Always built anew: figures of an old program are worse than none.
e2e/images/build.sh
echo "bench: building ..." >&2
# Static, as the CNI binary is: a dynamic linker would be no floor.
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
  cargo build --release --quiet --target "$triple" -p plat-rig --bin floor --bin bench
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
  cargo build --release --quiet --target "$triple" -p plat-e2e --bin bench-ipam --bin bench-routes
mkdir -p "$target/bench"
load=$(cut -d' ' -f1 /proc/loadavg)
: >"$target/bench/table.md"
part() { [[ -z ${ONLY:-} || $ONLY == "$1" ]]; }
if part cni; then
  echo "bench: CNI ADD and DEL, taking turns with the reference plugins and the floor (1 to 2 min) ..." >&2
  "$target/$triple/release/bench" --plat "$images/bin/plat" --floor "$target/$triple/release/floor" \
    --reference "$tools/cni" --out "$target/bench" "$@" | tee -a "$target/bench/table.md"
fi
if part pods; then
  echo "bench: ten pods at once through kubelet, in turns with the reference plugins (2 min) ..." >&2
  BENCH_OUT=$(realpath "$target/bench") cargo test -q -p plat-e2e --test pod_start -- --ignored >&2
  { echo; cat "$target/bench/pods.md"; } | tee -a "$target/bench/table.md"
fi
if part ipam; then
  echo "bench: blocks for nodes, beside kube-controller-manager's node IPAM controller (6 min) ..." >&2
  { echo; "$target/$triple/release/bench-ipam" --operator "$images/bin/plat-operator" --out "$target/bench"; } |
    tee -a "$target/bench/table.md"
fi
if part routes; then
  PLAT_PEERS=1 e2e/tools/build >/dev/null
  echo "bench: routes, beside flannel's host-gw backend (8 min) ..." >&2
  { echo; "$target/$triple/release/bench-routes" --agent "$images/bin/plat-agent" --plugin "$images/bin/plat" \
    --flannel "$tools/flannel-hostgw" --out "$target/bench"; } | tee -a "$target/bench/table.md"
fi

if [[ ${RECORD:-} && -z ${ONLY:-} ]]; then
  cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
  said="$(date -u +%F), $(nproc) × ${cpu:-$(uname -m)}, Linux $(uname -r), load $load before the run, commit $(git rev-parse --short HEAD)."
  # Between the two markers stands what the last recorded run printed.
  awk -v table="$target/bench/table.md" -v said="$said" '
    /<!-- figures end -->/ { inside = 0 }
    !inside { print }
    /<!-- figures begin -->/ { inside = 1; print said "\n"; while ((getline line < table) > 0) print line }
  ' docs/benchmarks.md >"$target/bench/benchmarks.md"
  cp "$target/bench/benchmarks.md" docs/benchmarks.md
fi
