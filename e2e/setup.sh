#!/usr/bin/env bash
# Makes this machine ready for tests, demo and benchmarks: installs the Debian packages that are missing
# and builds the Kubernetes programs. Quick and silent when there is nothing to do. Where it cannot help,
# it says in one line what is missing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export PATH=$PATH:/usr/sbin:/sbin

# PROGRAM PACKAGE, as Debian and Ubuntu name them.
needed="
  cc gcc
  runc runc
  iptables iptables
  nft nftables
  conntrack conntrack
  ip iproute2
  jq jq
  openssl openssl
  busybox busybox-static
  tcpdump tcpdump
  nsenter util-linux
  sysctl procps
"
missing=() packages=()
while read -r program package; do
  [[ -z $program ]] || command -v "$program" >/dev/null || { missing+=("$program"); packages+=("$package"); }
done <<<"$needed"
# busybox must be static: it is put into an image that has no libraries.
if command -v busybox >/dev/null && ldd "$(command -v busybox)" 2>/dev/null | grep -q '=>'; then
  missing+=("static busybox"); packages+=(busybox-static)
fi
# Programs are linked statically, which needs the C library's archive.
[[ -n $(cc -print-file-name=libc.a 2>/dev/null | grep /) ]] || { missing+=(libc.a); packages+=(libc6-dev); }

if ((${#packages[@]})); then
  as_root=(); [[ $EUID == 0 ]] || as_root=(sudo)
  command -v apt-get >/dev/null || { echo "setup: missing: ${missing[*]}; install them with your package manager" >&2; exit 1; }
  if ((${#as_root[@]})) && ! command -v sudo >/dev/null; then
    echo "setup: missing: ${missing[*]}; as root, run: apt-get install ${packages[*]}" >&2; exit 1
  fi
  echo "setup: installing ${packages[*]} ..." >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null 2>&1 || true
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${packages[@]}" >/dev/null ||
    { echo "setup: could not install ${packages[*]} (missing: ${missing[*]})" >&2; exit 1; }
fi
command -v cargo >/dev/null || { echo "setup: 'cargo' is missing; install Rust from https://rustup.rs" >&2; exit 1; }

"$here/tools/build" >/dev/null
[[ $EUID == 0 ]] || echo "setup: kernel tests, cluster tests and the demo need root: run make as root for them" >&2
