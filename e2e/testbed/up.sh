#!/usr/bin/env bash
# Brings up a cluster: control plane and $NODES nodes, registered and NotReady (there is no network yet).
# Takes down what it made if it fails or is interrupted.
#
#   up.sh [core|full]   full (default), or core: etcd and API server alone, no nodes
. "$(dirname "$0")/lib/box.sh"
need_root
mode=${1:-full}
[[ ! -e /run/netns/$TB-cp ]] || die "cluster '$TB' is already up; take it down with: TB=$TB $TESTBED/down.sh"

begin=$(now_ms) steps=()
give_up() {
  local code=$?
  trap - EXIT INT TERM
  cgroup_leave || true
  say "bringing the cluster up failed; logs are in $TB_RUN"
  KEEP_LOGS=1 "$TESTBED/down.sh"
  exit $((code ? code : 1))
}
trap give_up EXIT
trap 'exit 130' INT TERM

cgroup_step
clear_run_folder
make_run_folder
"$TESTBED/pki.sh"
if [[ $mode == core ]]; then
  "$TESTBED/control-plane.sh" up core
else
  "$TESTBED/control-plane.sh" up full & steps+=($!)
  wait_for 20 ip -n "$TB-cp" link show tb0
  for i in $(seq 1 "$NODES"); do "$TESTBED/node.sh" add "$i" & steps+=($!); done
  for step in "${steps[@]}"; do wait "$step"; done
  # Pods are refused until these two exist.
  wait_for 30 k -n default get serviceaccount default
  wait_for 30 k -n default get configmap kube-root-ca.crt
  for i in $(seq 1 "$NODES"); do wait_for 60 k get node "n$i"; done
  say "$NODES nodes registered after $(since "$begin")"
fi
trap - EXIT INT TERM
