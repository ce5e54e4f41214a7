#!/usr/bin/env bash
# Takes the cluster down when whoever holds our standard input lets go of it: on purpose, by a panic, or
# because it was killed. Tests start it in a session of its own, so that Ctrl-C does not reach it.
. "$(dirname "$0")/lib/settings.sh"
cat >/dev/null
exec "$TESTBED/down.sh"
