#!/usr/bin/env bash
# Takes a cluster down, whatever is left of it: found by cgroup and namespace name, never by recorded
# PIDs, so it works after a crash and half-way, and again when there is nothing left.
#
#   KEEP_LOGS=1   leaves the run folder
. "$(dirname "$0")/lib/box.sh"
need_root
begin=$(now_ms)
wait_for 20 cgroup_kill steps             # scripts that are still at work would make new boxes
boxes=$({ cgroup_boxes; ip netns list | awk '{print $1}' | sed -n "s/^$TB-//p"; } | grep -xE 'cp|n[0-9]+' | sort -u || true)
stops=()
for box in $boxes; do box_stop "$box" & stops+=($!); done
for stop in "${stops[@]}"; do wait "$stop"; done
wait_for 10 cgroup_remove
[[ ${KEEP_LOGS:-} ]] || clear_run_folder
say "down after $(since "$begin")"
