# shellcheck shell=bash
# Settings of one cluster, from the environment. Every script of the testbed sources this file first.
#
#   TB           name of the cluster (default plat); two clusters of different names never meet
#   TB_RUN       its run folder: logs, keys, kubeconfigs (default e2e/run/$TB)
#   PLAT_TOOLS   etcd, kube-apiserver, kubelet, containerd, ... as e2e/tools/build leaves them
#   PLAT_IMAGES  OCI archives that every node gets (default target/images; none if the folder is missing)
#   NODES        number of nodes (default 3)
#   PROXY        kube-proxy mode: nftables (default), iptables, or none for no kube-proxy
#   POD_CIDRS    what kube-proxy takes for pod addresses (default 10.244.0.0/16,fd00:10:244::/48)
#   UNDERLAY     l2 (default): all nodes on one bridge; l3: each behind the router in a subnet of its own
#   AUDIT        1: the API server writes an audit log, <run>/cp/audit.log
#   SNAPSHOTTER  containerd snapshotter: overlayfs (default) or native
set -euo pipefail

TESTBED=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
REPO=$(cd "$TESTBED/../.." && pwd -P)

TB=${TB:-plat}
# The name becomes part of namespace and cgroup names, and teardown kills by them.
[[ $TB =~ ^[a-z][a-z0-9]{0,15}$ ]] || { echo "testbed: TB must be 1 to 16 of a-z0-9, not '$TB'" >&2; exit 2; }
TB_RUN=$(realpath -m "${TB_RUN:-$REPO/e2e/run/$TB}")
PLAT_TOOLS=$(realpath -m "${PLAT_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/plat/tools}")
PLAT_IMAGES=$(realpath -m "${PLAT_IMAGES:-${CARGO_TARGET_DIR:-$REPO/target}/images}")
NODES=${NODES:-3}
PROXY=${PROXY:-nftables}
POD_CIDRS=${POD_CIDRS:-10.244.0.0/16,fd00:10:244::/48}
UNDERLAY=${UNDERLAY:-l2}
SNAPSHOTTER=${SNAPSHOTTER:-overlayfs}
export TB TB_RUN PLAT_TOOLS PLAT_IMAGES NODES PROXY POD_CIDRS UNDERLAY SNAPSHOTTER
export PATH=$PLAT_TOOLS:$PATH

# Addresses live in namespaces of the cluster's own, so they are the same for every cluster.
CP4=172.30.0.1 CP6=fd00:30::1
SERVICES4=10.96.0.0/16 SERVICES6=fd00:96::/108
# An address that is neither node, pod nor Service: "the internet" behind the nodes' default gateway.
OUTSIDE4=192.0.2.1 OUTSIDE6=2001:db8::1
API=https://$CP4:6443

# node_ip4 I, node_ip6 I: the InternalIPs of node nI.
node_ip4() { if [[ $UNDERLAY == l3 ]]; then echo "172.30.$((100 + $1)).10"; else echo "172.30.0.$((10 + $1))"; fi; }
node_ip6() { if [[ $UNDERLAY == l3 ]]; then printf 'fd00:30:0:%x::10\n' $((100 + $1)); else printf 'fd00:30::%x\n' $((16 + $1)); fi; }

say() { printf '[%s] %s\n' "$TB" "$*" >&2; }
die() { say "$*"; exit 1; }
now_ms() { echo $(($(date +%s%N) / 1000000)); }
since() { local ms=$(($(now_ms) - $1)); printf '%d.%02d s' $((ms / 1000)) $((ms % 1000 / 10)); }

# wait_for SECONDS COMMAND...: repeats the command until it succeeds; fails with its name at the deadline.
wait_for() {
  local end=$(($(now_ms) + $1 * 1000)); shift
  until "$@" >/dev/null 2>&1; do
    (($(now_ms) < end)) || { say "gave up waiting for: $*"; return 1; }
    sleep 0.05
  done
}

# in_cluster COMMAND...: runs a command of this machine in the control plane's network namespace, from
# where every node, pod and the API server can be reached.
in_cluster() { nsenter --net="/run/netns/$TB-cp" -- "$@"; }
k() { in_cluster kubectl --kubeconfig "$TB_RUN/admin.kubeconfig" "$@"; }

# clear_run_folder: removes the run folder, if it is one of ours: TB_RUN may have been set by mistake.
clear_run_folder() {
  [[ ! -e $TB_RUN || -e $TB_RUN/.testbed || -z $(ls -A "$TB_RUN") ]] || die "$TB_RUN exists and is no run folder of a testbed: set TB_RUN"
  rm -rf "$TB_RUN"
}
make_run_folder() { mkdir -p "$TB_RUN"; touch "$TB_RUN/.testbed"; }

need_root() { [[ $EUID == 0 ]] || die "needs root: it makes namespaces, cgroups and mounts"; }
