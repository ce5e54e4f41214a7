#!/usr/bin/env bash
# kubectl of the cluster $TB, as admin.
. "$(dirname "$0")/lib/settings.sh"
[[ -e /run/netns/$TB-cp ]] || die "cluster '$TB' is not up"
k "$@"
