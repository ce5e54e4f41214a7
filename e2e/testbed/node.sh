#!/usr/bin/env bash
# Nodes: box nI with containerd, kubelet and kube-proxy. A node stays NotReady until something writes a
# CNI configuration into its /etc/cni/net.d.
#
#   node.sh add I            a fresh machine that joins as node nI
#   node.sh remove I         takes the machine away (power off); its Node object stays
#   node.sh kubelet-stop I   SIGKILL to its kubelet; pods go on
#   node.sh kubelet-start I
#   node.sh containerd-kill I   SIGKILL to its containerd; pods go on
#   node.sh containerd-start I  starts it again and waits until it answers
#   node.sh proxy I MODE     restarts its kube-proxy as nftables or iptables
#   node.sh run I COMMAND... runs a command on the node
#   node.sh load I FILE...   imports image archives
. "$(dirname "$0")/lib/box.sh"
need_root

containerd_conf() {
  cat <<C
version = 3
oom_score = 0
disabled_plugins = ['io.containerd.nri.v1.nri', 'io.containerd.snapshotter.v1.blockfile',
  'io.containerd.snapshotter.v1.btrfs', 'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.erofs', 'io.containerd.snapshotter.v1.zfs']
[plugins.'io.containerd.cri.v1.images']
  snapshotter = '$SNAPSHOTTER'
  pinned_images = { sandbox = 'localhost/pause:1' }
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE (virtual machines, containers) a lower score cannot be set.
  restrict_oom_score_adj = true
  cni = { bin_dirs = ['/opt/cni/bin'], conf_dir = '/etc/cni/net.d', use_internal_loopback = true }
  containerd = { runtimes = { runc = { runtime_type = 'io.containerd.runc.v2', options = { SystemdCgroup = false } } } }
C
}

# Eviction limits must be above zero to be accepted, and out of the way: all nodes share one disk.
kubelet_conf() {
  cat <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $TB_RUN/pki/ca.crt}}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
enforceNodeAllocatable: []
failSwapOn: false
oomScoreAdj: 0
evictionHard: {memory.available: "1Mi", nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%"}
imageGCHighThresholdPercent: 100
volumePluginDir: /var/lib/kubelet/volumeplugins
resolvConf: /etc/resolv.conf
nodeStatusUpdateFrequency: 4s
C
}

proxy_conf() {
  cat <<C
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: $TB_RUN/proxy.kubeconfig}
hostnameOverride: n$1
mode: $2
oomScoreAdj: 0
metricsBindAddress: 127.0.0.1:10249
detectLocalMode: ClusterCIDR
clusterCIDR: $POD_CIDRS
conntrack: {maxPerCore: 0, min: 0}
C
}

start_containerd() {
  daemon_start "n$1" containerd containerd -c "$TB_RUN/n$1/containerd.toml" -l warn
  wait_for 30 box_run "n$1" ctr version
}

start_kubelet() {
  daemon_start "n$1" kubelet kubelet --config="$TB_RUN/n$1/kubelet.yaml" --kubeconfig="$TB_RUN/n$1.kubeconfig" \
    --hostname-override="n$1" --node-ip="$(node_ip4 "$1"),$(node_ip6 "$1")" --root-dir=/var/lib/kubelet
}

start_proxy() {
  proxy_conf "$1" "$2" >"$TB_RUN/n$1/proxy.yaml"
  daemon_start "n$1" kube-proxy kube-proxy --config="$TB_RUN/n$1/proxy.yaml"
}

load() {
  local i=$1 file; shift
  for file in "$@"; do
    # The transfer service that `import` uses without --local knows overlayfs alone.
    box_run "n$i" ctr -n k8s.io images import --local --snapshotter "$SNAPSHOTTER" "$file" >>"$TB_RUN/n$i/import.log" 2>&1 ||
      { tail -3 "$TB_RUN/n$i/import.log" >&2; die "n$i: cannot import $file"; }
  done
}

# Box, containerd and images come up while the API server still starts; the kubelet waits for it.
add() {
  local i=$1 dir=$TB_RUN/n$1
  box_start "n$i"
  "$TESTBED/network.sh" node "$i"
  containerd_conf >"$dir/containerd.toml"
  kubelet_conf >"$dir/kubelet.yaml"
  start_containerd "$i"
  shopt -s nullglob
  load "$i" "$PLAT_IMAGES"/*.tar
  wait_for 90 k get --raw /readyz
  start_kubelet "$i"
  [[ $PROXY == none ]] || start_proxy "$i" "$PROXY"
}

remove() {
  box_stop "n$1"
  ip -n "$TB-cp" link del "n$1" 2>/dev/null || true
}

action=${1:-} i=${2:-}
[[ $i =~ ^[1-9][0-9]?$ ]] ||
  die "usage: node.sh add|remove|kubelet-stop|kubelet-start|containerd-kill|containerd-start|proxy|run|load I ..."
case $action in
  add) cgroup_step; add "$i" ;;
  remove) cgroup_step; remove "$i" ;;
  kubelet-stop) cgroup_step; daemon_kill "n$i" kubelet ;;
  kubelet-start) cgroup_step; start_kubelet "$i" ;;
  containerd-kill) cgroup_step; daemon_kill "n$i" containerd ;;
  containerd-start) cgroup_step; start_containerd "$i" ;;
  proxy) cgroup_step; daemon_kill "n$i" kube-proxy; start_proxy "$i" "$3" ;;
  run) box_run "n$i" "${@:3}" ;;
  load) cgroup_step; load "$i" "${@:3}" ;;
  *) die "unknown action '$action'" ;;
esac
