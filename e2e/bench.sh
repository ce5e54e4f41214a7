#!/usr/bin/env bash
# `make bench`: builds for release and measures. Figures go to target/bench/*.json, a line of JSON each with
# name, ours, peer, peersFigure, ratio (ours by theirs), unit, and the goal where there is one; a table goes to
# standard output and to target/bench/table.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $EUID == 0 ]] || { echo "bench: needs root: it makes network namespaces" >&2; exit 1; }
target=${CARGO_TARGET_DIR:-target}
tools=${PLAT_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/plat/tools}
images=${PLAT_IMAGES:-$target/images}
triple=$(rustc -vV | sed -n 's/^host: //p')
[[ -x $images/bin/plat ]] || e2e/images/build.sh
echo "bench: building ..." >&2
# Static, as the CNI binary is: a dynamic linker would be no floor.
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
  cargo build --release --quiet --target "$triple" -p plat-rig --bin floor --bin bench
echo "bench: CNI ADD and DEL, taking turns with the reference plugins and the floor (about a minute) ..." >&2
mkdir -p "$target/bench"
"$target/$triple/release/bench" --plat "$images/bin/plat" --floor "$target/$triple/release/floor" \
  --reference "$tools/cni" --out "$target/bench" "$@" | tee "$target/bench/table.md"
