#!/usr/bin/env bash
# The underlay: a bridge in the control plane's namespace, a veth to each node.
#
#   network.sh control-plane   bridge tb0 with the API server's addresses, and "the internet" on lo
#   network.sh node I          eth0 of node I (its MAC never changes: a node that comes back must not meet
#                              stale neighbour entries), default gateway at the control plane
#   network.sh cut I           takes node I's cable out
#   network.sh mend I          puts it back
. "$(dirname "$0")/lib/settings.sh"
need_root

control_plane() {
  local cp="ip -n $TB-cp"
  $cp link add tb0 type bridge forward_delay 0 mcast_snooping 0
  $cp addr add $CP4/24 dev tb0
  $cp addr add $CP6/64 dev tb0 nodad
  $cp link set tb0 up
  $cp addr add $OUTSIDE4/32 dev lo
  $cp addr add $OUTSIDE6/128 dev lo nodad
  ip netns exec "$TB-cp" sysctl -qe -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
}

node() {
  local i=$1 node="ip -n $TB-n$1" cp="ip -n $TB-cp" gw4=$CP4 gw6=$CP6
  $cp link del "n$i" 2>/dev/null || true
  $cp link add "n$i" type veth peer name eth0 netns "$TB-n$i"
  $node link set eth0 address "$(printf '02:30:00:00:00:%02x' "$i")"
  if [[ $UNDERLAY == l3 ]]; then
    gw4=172.30.$((100 + i)).1 gw6=$(printf 'fd00:30:0:%x::1' $((100 + i)))
    $cp addr add "$gw4/24" dev "n$i"
    $cp addr add "$gw6/64" dev "n$i" nodad
  else
    $cp link set "n$i" master tb0
  fi
  $cp link set "n$i" up
  $node addr add "$(node_ip4 "$i")/24" dev eth0
  $node addr add "$(node_ip6 "$i")/64" dev eth0 nodad
  $node link set eth0 up
  $node route add default via "$gw4"
  $node -6 route add default via "$gw6"
}

case ${1:-} in
  control-plane) control_plane ;;
  node) node "$2" ;;
  cut) ip -n "$TB-cp" link set "n$2" down ;;
  mend) ip -n "$TB-cp" link set "n$2" up ;;
  *) die "usage: network.sh control-plane | node I | cut I | mend I" ;;
esac
