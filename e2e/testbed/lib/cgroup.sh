# shellcheck shell=bash
# The cgroups of a cluster: testbed-$TB/<box>, in every hierarchy of the machine. Whatever runs in a box
# is in the box's cgroup, which is how teardown finds it.
#
# Two kinds of machine: cgroup v1 or hybrid, one hierarchy per controller; and pure cgroup2, one tree in
# which processes may sit only in leaves. Of the second kind this is tested: the writes on a fake tree, and
# boxes on the cgroup2 tree of a hybrid machine, which has no controllers. A kubelet on a pure cgroup2 machine
# was not run.
CGROUP_ROOT=${CGROUP_ROOT:-/sys/fs/cgroup}

cgroup_is_pure_v2() { [[ -e $CGROUP_ROOT/cgroup.controllers ]]; }

# cgroup_hierarchies: the folders under CGROUP_ROOT that are hierarchies; "." on pure cgroup2.
cgroup_hierarchies() {
  if cgroup_is_pure_v2; then echo .; return; fi
  awk -v root="$CGROUP_ROOT/" '{
    for (i = 7; i < NF; i++) if ($i == "-") type = $(i + 1)
    name = substr($5, length(root) + 1)
    if (type ~ /^cgroup2?$/ && index($5, root) == 1 && name !~ "/") print name
  }' /proc/self/mountinfo
}

# cgroup_make BOX: makes the box's cgroups; harmless when they exist.
cgroup_make() {
  local h dir level
  for h in $(cgroup_hierarchies); do
    dir=$CGROUP_ROOT/$h
    for level in "testbed-$TB" "$1"; do
      if cgroup_is_pure_v2; then cgroup_enable_controllers "$dir"; fi
      dir=$dir/$level
      mkdir -p "$dir"
      # A v1 cpuset takes no process before it is told CPUs and memory.
      if [[ $h == *cpuset* ]]; then
        cat "$CGROUP_ROOT/$h/cpuset.cpus" >"$dir/cpuset.cpus"
        cat "$CGROUP_ROOT/$h/cpuset.mems" >"$dir/cpuset.mems"
      fi
    done
  done
}

# cgroup_enable_controllers DIR: hands every controller that DIR has to its children (cgroup2 only). A
# controller that cannot be handed on is left out: the kubelet names those that it misses.
cgroup_enable_controllers() {
  local c
  for c in $(<"$1/cgroup.controllers"); do echo "+$c" >>"$1/cgroup.subtree_control" 2>/dev/null || true; done
}

# cgroup_join BOX: puts the calling (sub)shell into the box's cgroups.
cgroup_join() {
  local h dir
  for h in $(cgroup_hierarchies); do
    dir=$CGROUP_ROOT/$h/testbed-$TB/$1
    [[ -d $dir/init ]] && cgroup_is_pure_v2 && dir=$dir/init
    echo "$BASHPID" >"$dir/cgroup.procs"
  done
}

# cgroup_delegate BOX: on cgroup2, once PID 1 has its cgroup namespace: moves everything into the leaf
# `init`, so that the kubelet may make cgroups beside it.
cgroup_delegate() {
  local dir=$CGROUP_ROOT/testbed-$TB/$1 pid
  cgroup_is_pure_v2 || return 0
  mkdir -p "$dir/init"
  for pid in $(<"$dir/cgroup.procs"); do echo "$pid" >>"$dir/init/cgroup.procs"; done
  cgroup_enable_controllers "$dir"
}

# cgroup_step: puts the calling script, and so all that it starts, into the cluster's cgroup for scripts at
# work: a teardown ends it too, whoever started it. One hierarchy suffices to be found.
cgroup_step() {
  local h; read -r h < <(cgroup_hierarchies)
  cgroup_make steps
  echo $$ >"$CGROUP_ROOT/$h/testbed-$TB/steps/cgroup.procs"
}

# cgroup_leave: takes the calling script out again, so that it can start a teardown and outlive it.
cgroup_leave() {
  local h; read -r h < <(cgroup_hierarchies)
  echo $$ >"$CGROUP_ROOT/$h/cgroup.procs"
}

# cgroup_boxes: the boxes that have a cgroup, and "steps".
cgroup_boxes() {
  local h
  for h in $(cgroup_hierarchies); do
    find "$CGROUP_ROOT/$h/testbed-$TB" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' 2>/dev/null || true
  done | sort -u
}

cgroup_pids() {
  local h
  for h in $(cgroup_hierarchies); do
    find "$CGROUP_ROOT/$h/testbed-$TB/$1" -name cgroup.procs -exec cat {} + 2>/dev/null || true
  done | sort -u
}

# cgroup_kill BOX: SIGKILL to all in the box's cgroups; succeeds once there is nobody left.
cgroup_kill() {
  local pids; pids=$(cgroup_pids "$1")
  [[ -z $pids ]] && return 0
  # shellcheck disable=SC2086
  kill -9 $pids 2>/dev/null || true
  return 1
}

# cgroup_remove [BOX]: removes the box's cgroups, or without BOX the cluster's; succeeds once they are gone.
cgroup_remove() {
  local h dir left=0
  for h in $(cgroup_hierarchies); do
    dir=$CGROUP_ROOT/$h/testbed-$TB${1:+/$1}
    [[ -d $dir ]] || continue
    find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [[ ! -d $dir ]] || left=1
  done
  return $left
}
