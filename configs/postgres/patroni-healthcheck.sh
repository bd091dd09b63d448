#!/usr/bin/env bash
# Health check of a database server in the stack: asks this container's own Patroni whether its loop
# turns. Not whether PostgreSQL takes connections: a standby that copies a large primary takes none for
# hours, and must not be killed for it. Exit 0 healthy, 1 not.
set -euo pipefail

# GET and all of the answer: any other method is answered as if for another question, and Patroni logs a
# trace for each connection that is closed before it has sent everything.
answer=$(printf 'GET /liveness HTTP/1.0\r\n\r\n' | timeout 4 openssl s_client -quiet -connect 127.0.0.1:8008 2>/dev/null) || exit 1
[[ $answer == HTTP/1.?' 200 '* ]] || exit 1
