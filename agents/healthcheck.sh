#!/usr/bin/env bash
# HEALTHCHECK of the agents: asks this container's own agent, and nobody else, whether it lives.
# Exit 0 healthy, 1 not (Docker reserves other codes).
set -euo pipefail

exec 3<>"/dev/tcp/127.0.0.1/${PGMESH_ADMIN_PORT:?the port of the agent\'s admin server}" || exit 1
printf 'GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
IFS=' ' read -r -t 4 _ status _ <&3 || exit 1
[[ $status == 200 ]] || exit 1
