#!/usr/bin/env bash
# Builds static programs and packs them into OCI archives, without an engine, under target/images:
#
#   plat-operator.tar  localhost/plat-operator:<version>   /plat-operator
#   plat-agent.tar     localhost/plat-agent:<version>      /plat-agent, and /plat, the CNI binary it installs
#   pause.tar          localhost/pause:1                   holds a pod's namespaces (testbed)
#   plat-test.tar      localhost/plat-test:1               busybox and `probe` (tests, demo, benchmarks)
#
# Load one with `ctr -n k8s.io images import FILE` or `docker load -i FILE`. The programs themselves are in
# target/images/bin. A program that its crate does not have (yet) is left out, with a line that says so.
#
#   PLAT_PROFILE   cargo profile (default release)
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$repo"
out=${PLAT_IMAGES:-${CARGO_TARGET_DIR:-target}/images}
profile=${PLAT_PROFILE:-release}
# Static glibc. The target is named so that build scripts and macros stay ordinary programs.
triple=$(rustc -vV | sed -n 's/^host: //p')
built=${CARGO_TARGET_DIR:-target}/$triple/$([[ $profile == dev ]] && echo debug || echo "$profile")
mkdir -p "$out/bin"

metadata=$(cargo metadata --no-deps --format-version 1)
version=$(jq -r '.packages[] | select(.name == "plat-crds") | .version' <<<"$metadata")
has() { jq -e --arg p "$1" --arg b "$2" '.packages[] | select(.name == $p) | .targets[] | select(.name == $b and .kind == ["bin"])' >/dev/null <<<"$metadata"; }

# build PACKAGE PROGRAM...: each package on its own, or cargo would give the CNI binary the features that
# others want of its dependencies.
build() {
  local package=$1 program; shift
  for program in "$@"; do
    has "$package" "$program" || { echo "images: $package has no program $program yet: left out" >&2; return 1; }
  done
  # The CNI binary is read anew for each call: the smaller, the faster it starts. The lease format's checksums are
  # worth their size. The operator's program would be a third of its memory, and it takes no more processor time so.
  local small=()
  if [[ $profile == release ]]; then
    case $package in
      plat-cni | plat-operator) small=(--config 'profile.release.opt-level="s"' --config 'profile.release.lto="fat"') ;;&
      plat-cni) small+=(--config 'profile.release.package.plat-crds.opt-level=3') ;;
    esac
  fi
  RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
    cargo build "${small[@]}" --locked --quiet --profile "$profile" --target "$triple" -p "$package" "${@/#/--bin=}" || exit 1
  for program in "$@"; do
    cmp -s "$built/$program" "$out/bin/$program" || install -m 755 "$built/$program" "$out/bin/$program"
  done
}
image() {
  "$out/bin/mkimage" --name "$1" --entrypoint "$2" "${@:3}" \
    --label org.opencontainers.image.licenses=Apache-2.0 "$out/$(basename "${1%:*}").tar"
}
step() { local start=$SECONDS; echo "images: $1 ..." >&2; "${@:2}" && echo "images: $1 done after $((SECONDS - start)) s" >&2; }

step "image maker and test programs" build plat-rig mkimage pause probe
image localhost/pause:1 /bin/pause --file "$out/bin/pause=/bin/pause"

busybox=$(command -v busybox) || { echo "images: busybox is missing; install busybox-static" >&2; exit 1; }
ldd "$busybox" 2>/dev/null | grep -q '=>' && { echo "images: $busybox is not static; install busybox-static" >&2; exit 1; }
mapfile -t links < <("$busybox" --list | grep -vx busybox | sed 's|.*|--link=/bin/&=/bin/busybox|')
image localhost/plat-test:1 /bin/sh --file "$busybox=/bin/busybox" --file "$out/bin/probe=/bin/probe" "${links[@]}"

if step "CNI binary" build plat-cni plat && step "agent" build plat-agent plat-agent; then
  image "localhost/plat-agent:$version" /plat-agent --file "$out/bin/plat-agent=/plat-agent" --file "$out/bin/plat=/plat"
fi
if step "operator" build plat-operator plat-operator; then
  image "localhost/plat-operator:$version" /plat-operator --file "$out/bin/plat-operator=/plat-operator"
fi
