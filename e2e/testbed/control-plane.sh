#!/usr/bin/env bash
# The control plane, in the box `cp`: etcd and kube-apiserver, and with `full` kube-controller-manager and
# kube-scheduler, without which no pod is placed.
#
#   control-plane.sh up core|full     starts it and waits until the API server is ready
#   control-plane.sh kill NAME        SIGKILL to etcd, apiserver, kcm or scheduler
#   control-plane.sh start NAME       starts it again (apiserver: waits until it is ready)
#   control-plane.sh snapshot FILE    saves etcd
#   control-plane.sh restore FILE     puts etcd back to FILE: every component that holds a cache of it is
#                                     restarted, revision numbers go back, as after a real disaster
. "$(dirname "$0")/lib/box.sh"
need_root
cgroup_step
pki=$TB_RUN/pki

start_etcd() {
  daemon_start cp etcd etcd --data-dir "$(cat "$TB_RUN/cp/etcd-data" 2>/dev/null || echo /var/lib/etcd/first)" \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --unsafe-no-fsync --log-level warn
}

# audit_flags: with AUDIT=1, a line for each request that was answered: by whom, verb, resource.
audit_flags() {
  [[ ${AUDIT:-} == 1 ]] || return 0
  echo '{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "omitManagedFields": true,
    "rules": [{"level": "Metadata"}]}' >"$TB_RUN/cp/audit-policy.json"
  echo "--audit-policy-file=$TB_RUN/cp/audit-policy.json --audit-log-path=$TB_RUN/cp/audit.log"
}

start_apiserver() {
  # shellcheck disable=SC2046
  daemon_start cp apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
    --secure-port=6443 --bind-address=:: --advertise-address=$CP4 --service-cluster-ip-range=$SERVICES4,$SERVICES6 \
    --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --kubelet-client-certificate="$pki/kubelet-client.crt" --kubelet-client-key="$pki/kubelet-client.key" \
    --kubelet-preferred-address-types=InternalIP --token-auth-file="$pki/tokens.csv" \
    --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$pki/sa.key" --service-account-signing-key-file="$pki/sa.key" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    $(audit_flags)
  wait_for 90 k get --raw /readyz || { tail -5 "$TB_RUN/cp/apiserver.log" >&2; return 1; }
}

# The default of 20 requests a second delays the first service account by seconds; the long grace keeps
# a busy test machine from looking like dead nodes.
start_kcm() {
  daemon_start cp kcm kube-controller-manager --kubeconfig="$TB_RUN/kcm.kubeconfig" --leader-elect=false \
    --use-service-account-credentials --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" \
    --allocate-node-cidrs=false --node-monitor-grace-period=20s --secure-port=0 \
    --kube-api-qps=200 --kube-api-burst=400 --flex-volume-plugin-dir=/var/lib/kcm-flex
}

start_scheduler() {
  daemon_start cp scheduler kube-scheduler --kubeconfig="$TB_RUN/scheduler.kubeconfig" --leader-elect=false --secure-port=0
}

up() {
  local mode=$1 begin; begin=$(now_ms)
  "$TESTBED/pki.sh"
  box_start cp
  "$TESTBED/network.sh" control-plane
  start_etcd
  start_apiserver
  k create clusterrolebinding apiserver-kubelet --clusterrole=system:kubelet-api-admin --user=apiserver-kubelet >/dev/null
  if [[ $mode == full ]]; then start_kcm; start_scheduler; fi
  say "API server ready after $(since "$begin")"
}

etcdctl_snapshot() { box_run cp "$PLAT_TOOLS/etcdctl" --endpoints http://127.0.0.1:2379 snapshot save "$1"; }

restore() {
  local file=$1 name data; data=/var/lib/etcd/restored-$(now_ms)
  local was=(); for name in apiserver kcm scheduler; do [[ ! -e $TB_RUN/cp/$name.pid ]] || was+=("$name"); done
  for name in "${was[@]}" etcd; do daemon_kill cp "$name"; done
  box_run cp "$PLAT_TOOLS/etcdutl" snapshot restore "$file" --data-dir "$data" >/dev/null 2>&1
  echo "$data" >"$TB_RUN/cp/etcd-data"
  start_etcd
  for name in "${was[@]}"; do "start_$name"; done
}

# inside FILE: snapshots are written and read within the box, so they must be in the run folder.
inside() { local f; f=$(realpath -m "$1"); [[ $f == "$TB_RUN"/* ]] || die "$1 must be under $TB_RUN"; echo "$f"; }

case "${1:-} ${2:-}" in
  "up core" | "up full") up "$2" ;;
  "kill "?*) daemon_kill cp "$2" ;;
  "start etcd" | "start apiserver" | "start kcm" | "start scheduler") "start_$2" ;;
  "snapshot "?*) etcdctl_snapshot "$(inside "$2")" >/dev/null ;;
  "restore "?*) restore "$(inside "$2")" ;;
  *) die "usage: control-plane.sh up core|full | kill NAME | start NAME | snapshot FILE | restore FILE" ;;
esac
