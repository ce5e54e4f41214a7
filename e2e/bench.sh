#!/usr/bin/env bash
# `make bench`: builds for release and measures. Figures go to target/bench/*.json, a line of JSON each with
# name, ours, peer, peersFigure, ratio (ours by theirs) and unit; a table goes to standard output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $EUID == 0 ]] || { echo "bench: needs root: it makes network namespaces" >&2; exit 1; }
target=${CARGO_TARGET_DIR:-target}
tools=${PLAT_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/plat/tools}
images=${PLAT_IMAGES:-$target/images}
[[ -x $images/bin/plat ]] || e2e/images/build.sh
echo "bench: building ..." >&2
cargo build --release --quiet -p plat-rig --bin floor --bin bench
echo "bench: CNI ADD and DEL, taking turns with the reference plugins and the floor (about 2 min) ..." >&2
"$target/release/bench" --plat "$images/bin/plat" --floor "$target/release/floor" --reference "$tools/cni" \
  --out "$target/bench" "$@"
