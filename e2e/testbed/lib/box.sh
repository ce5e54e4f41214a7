# shellcheck shell=bash
# Boxes: a "machine" made of namespaces (network, mount, uts, ipc, pid, cgroup) with one PID 1. The root
# network namespace is never touched.
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
. "$TESTBED/lib/cgroup.sh"

# box_start BOX: makes the box and waits until its PID 1 has mounted everything.
box_start() {
  local box=$1 dir=$TB_RUN/$1 outer
  mkdir -p "$dir"
  rm -f "$dir/ready" "$dir/pid"
  ip netns add "$TB-$box"
  cgroup_make "$box"
  ( cgroup_join "$box"
    exec setsid nsenter --net="/run/netns/$TB-$box" -- \
      unshare -m -u -i -C -p --fork --kill-child --propagation private -- \
      bash "$TESTBED/box-init.sh" "$box" "$dir" "$(box_kept_folders)" \
        "$(cgroup_is_pure_v2 && echo v2 || cgroup_hierarchies | xargs)"
  ) >"$dir/init.log" 2>&1 </dev/null &
  outer=$!; disown $outer
  wait_for 60 test -e "$dir/ready" || { cat "$dir/init.log" >&2; return 1; }
  cgroup_delegate "$box"
  tr -d ' ' <"/proc/$outer/task/$outer/children" >"$dir/pid"
}

# box_kept_folders: what must stay visible in a box although it may lie under /tmp, /run or /var, which a
# box covers with its own: the run folder, tools (also linked ones) and images.
box_kept_folders() {
  { echo "$TB_RUN"; echo "$PLAT_TOOLS"; echo "$PLAT_IMAGES"
    find "$PLAT_TOOLS" -type l -exec readlink -f {} + | xargs -r -n1 dirname
  } | sort -u | while read -r dir; do if [[ -d $dir ]]; then echo "$dir"; fi; done | paste -sd:
}

box_exists() { [[ -s $TB_RUN/$1/pid && -e /run/netns/$TB-$1 ]]; }

# box_run BOX COMMAND...: runs a command in the box, in all its namespaces and cgroups.
box_run() {
  local box=$1 pid; shift
  pid=$(<"$TB_RUN/$box/pid")
  ( cgroup_join "$box"; exec nsenter -t "$pid" -m -u -i -n -p -C -- "$@" )
}

# daemon_start BOX NAME COMMAND...: the same in the background. Output goes to <run>/BOX/NAME.log, the PID
# (as the box sees it) to <run>/BOX/NAME.pid.
daemon_start() {
  local box=$1 name=$2; shift 2
  # shellcheck disable=SC2016
  ( box_run "$box" setsid sh -c 'echo $$ >"$0"; exec "$@"' "$TB_RUN/$box/$name.pid" "$@" ) \
    >>"$TB_RUN/$box/$name.log" 2>&1 </dev/null &
  disown $!
  wait_for 10 test -s "$TB_RUN/$box/$name.pid"
}

# daemon_kill BOX NAME [SIGNAL]: ends a daemon (default SIGKILL) and waits until it is gone.
daemon_kill() {
  local box=$1 name=$2 signal=${3:-KILL} pid
  pid=$(cat "$TB_RUN/$box/$name.pid" 2>/dev/null) || die "$name does not run in $box"
  box_run "$box" kill "-$signal" "$pid" 2>/dev/null || true
  # shellcheck disable=SC2016
  wait_for 20 box_run "$box" sh -c '! kill -0 "$0"' "$pid"
  rm -f "$TB_RUN/$box/$name.pid"
}

# box_stop BOX: kills what is in the box's own cgroup, and nothing else, until it is empty. Its namespaces,
# and with them all mounts and links, end with the processes. Works on half a box too.
box_stop() {
  local box=$1
  wait_for 20 cgroup_kill "$box"
  ip netns del "$TB-$box" 2>/dev/null || true
  wait_for 10 cgroup_remove "$box"
  rm -f "$TB_RUN/$box"/{pid,ready} "$TB_RUN/$box"/*.pid
}
