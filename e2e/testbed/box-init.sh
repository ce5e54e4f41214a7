#!/usr/bin/env bash
# PID 1 of a box: mounts what a machine has of its own, then reaps. Everything it mounts is in the box's
# mount namespace and ends with it.
#
#   box-init.sh NAME FOLDER KEPT HIERARCHIES
#     FOLDER       the box's part of the run folder; `ready` appears there when all is mounted
#     KEPT         folders (a:b:c) that stay visible although the box covers /etc /opt /var /run /tmp
#     HIERARCHIES  names of the cgroup v1 hierarchies, or "v2"
set -euo pipefail
name=$1 folder=$2 kept=$3 hierarchies=$4

# Hold the kept folders open by descriptor before anything covers their paths.
declare -A held
IFS=: read -ra dirs <<<"$kept"
for dir in "${dirs[@]}"; do exec {fd}<"$dir"; held[$dir]=$fd; done

mount_kernel_views() {
  umount -R /run/netns 2>/dev/null || true      # our copy only: do not keep other namespaces alive
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  if [[ $hierarchies == v2 ]]; then mount -t cgroup2 cgroup2 /sys/fs/cgroup; return; fi
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  local h
  for h in $hierarchies; do
    mkdir "/sys/fs/cgroup/$h"
    case $h in
      unified) mount -t cgroup2 cgroup2 "/sys/fs/cgroup/$h" ;;
      systemd) mount -t cgroup -o none,name=systemd cgroup "/sys/fs/cgroup/$h" ;;
      *) mount -t cgroup -o "$h" cgroup "/sys/fs/cgroup/$h" ;;
    esac
  done
}

# The box's disk is a tmpfs: /etc /opt /var are copy-on-write views of this machine's, so that any
# hostPath works and none reaches the machine.
mount_disk() {
  local dir
  mkdir -p "$folder/disk"
  mount -t tmpfs -o mode=755,size=6g tmpfs "$folder/disk"
  cd "$folder/disk"
  for dir in etc opt var; do
    mkdir -p upper/$dir work/$dir
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=upper/$dir,workdir=work/$dir" /$dir
  done
  for dir in run tmp; do mount -t tmpfs -o mode=755 tmpfs /$dir; done
  chmod 1777 /tmp
  mkdir -p /run/netns /run/lock /etc/cni/net.d /opt/cni/bin /var/log/pods /var/log/containers
  # An overlay cannot be another overlay's upper layer, and containerd keeps such layers here.
  for dir in lib/containerd lib/kubelet lib/cni lib/etcd; do
    mkdir -p plain/$dir /var/$dir
    mount --bind plain/$dir /var/$dir
  done
}

# The kubelet sets these for the whole machine: give it files that look like them.
hide_machine_sysctls() {
  local entry path
  mkdir -p sysctl
  for entry in vm/overcommit_memory:1 vm/panic_on_oom:0 kernel/panic:10 kernel/panic_on_oops:1 \
               kernel/keys/root_maxkeys:1000000 kernel/keys/root_maxbytes:25000000; do
    path=/proc/sys/${entry%:*}
    [[ -e $path ]] || continue
    echo "${entry#*:}" >"sysctl/${path//\//_}"
    mount --bind "sysctl/${path//\//_}" "$path"
  done
}

name_the_machine() {
  hostname "$name"
  echo "$name" >/etc/hostname
  printf '127.0.0.1 localhost %s\n::1 localhost\n' "$name" >/etc/hosts
  rm -f /etc/resolv.conf /etc/machine-id
  echo "nameserver 127.0.0.1" >/etc/resolv.conf
  printf '%s' "$name" | md5sum | cut -c1-32 >/etc/machine-id
}

bring_up_network() {
  ip link set lo up
  # Duplicate address detection would delay every new IPv6 address by a second.
  sysctl -qe -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0
}

mount_kernel_views
mount_disk
hide_machine_sysctls
name_the_machine
bring_up_network
for dir in "${dirs[@]}"; do
  mkdir -p "$dir" 2>/dev/null || true           # it exists unless it was just covered
  mount --no-canonicalize --bind "/proc/self/fd/${held[$dir]}" "$dir"
  fd=${held[$dir]}; exec {fd}<&-
done
mount -o remount,bind,ro /                      # a stray write fails instead of reaching the machine
mount --make-rshared /                          # as systemd does; HostToContainer mounts need it
cd /
touch "$folder/ready"
trap : TERM INT                                 # only a SIGKILL from outside ends a machine
while :; do sleep 3600 & wait $! || true; done
