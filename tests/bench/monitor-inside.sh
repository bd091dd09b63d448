#!/usr/bin/env bash
# The half of monitor.sh that runs inside the container; not to be started by hand.
#
# Makes a primary with three standbys, lets health-monitor watch them by many names, and prints one line a
# measurement on standard output: NODES, INTERVAL, MEASURE, VALUE, separated by tabs. Standard error says what
# is going on.
#
# Settings come from the environment: NODES (numbers, each with an interval), PHASE (seconds).
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly primary=5432
readonly standbys=(5433 5434 5435)
readonly role=monitor
readonly url=http://127.0.0.1:9631
# Between two scrapes of Prometheus, in seconds.
readonly scrape=15

monitor='' # its process
writer=''  # what writes all the time

start_servers() {
    local port most=0 pair
    # shellcheck disable=SC2153  # from the environment
    for pair in $NODES; do ((${pair%:*} <= most)) || most=${pair%:*}; done
    initdb --data-checksums --auth=trust --username=postgres --pgdata="$work/$primary" >>"$log"
    cat >>"$work/$primary/postgresql.conf" <<CONF
listen_addresses = '*'
unix_socket_directories = '$work'
max_connections = $((4 * most + 50))
shared_buffers = 64MB
CONF
    echo 'host all all 127.0.0.0/8 trust' >>"$work/$primary/pg_hba.conf"
    pg_ctl --pgdata="$work/$primary" --options="-p $primary" --log="$work/$primary.log" --wait start >>"$log"
    sql "CREATE TABLE written (at timestamptz); CREATE ROLE $role LOGIN IN ROLE pg_monitor;"
    for port in "${standbys[@]}"; do
        pg_basebackup --port="$primary" --pgdata="$work/$port" --write-recovery-conf --checkpoint=fast \
            --create-slot --slot="standby_$port" >>"$log" 2>&1
        pg_ctl --pgdata="$work/$port" --options="-p $port" --log="$work/$port.log" --wait start >>"$log"
    done
    { while sleep 0.2; do echo 'INSERT INTO written VALUES (clock_timestamp());'; done | psql --quiet --port="$primary"; } &
    writer=$!
}

# nodes COUNT: as the configuration has them. No address may be listed twice, but a host has many.
nodes() {
    local i port
    for ((i = 0; i < $1; i++)); do
        port=$primary
        ((i % 4 == 0)) || port=${standbys[i % 4 - 1]}
        printf '[[nodes]]\ngroup = %d\nname = "n%d-%d"\nhost = "127.1.%d.%d"\nport = %d\n' \
            $((i / 4)) "$i" "$port" $((i / 250)) $((i % 250 + 1)) "$port"
    done
}

# start_monitor COUNT SECONDS
start_monitor() {
    cat >"$work/health-monitor.toml" <<TOML
cluster = "bench"
admin_address = "127.0.0.1:9631"
interval = "${2}s"
[postgres]
user = "$role"
tls = "disable"
$(nodes "$1")
TOML
    health-monitor --config "$work/health-monitor.toml" --log-format json run >>"$log" 2>&1 &
    monitor=$!
    wait_for "health-monitor is not ready" curl --silent --fail --output /dev/null "$url/readyz"
}

look() {
    curl --silent --fail "$url/status" >"$work/status"
    curl --silent --fail --output /dev/null "$url/metrics"
}

# Of the components: one primary of many groups has slots and standbys that are of no group's business.
well() {
    look && jq --exit-status '.verdict.status == "ok"' "$work/status" >/dev/null
}

# The CPU time of the monitor, in ticks of 10 ms.
cpu() {
    awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$monitor/stat"
}

# mebibytes FIELD
mebibytes() {
    awk -v field="$1:" '$1 == field { print $2 / 1024 }' "/proc/$monitor/status"
}

# measure NODES SECONDS
measure() {
    local before i
    before=$(cpu)
    for ((i = 0; i < PHASE / scrape; i++)); do
        sleep "$scrape"
        look
    done
    printf "$1\t$2\t%s\t%s\n" cpu "$(awk "BEGIN { print ($(cpu) - $before) / ($i * $scrape) }")" \
        memory "$(mebibytes VmRSS)" longest "$(mebibytes VmHWM)" \
        checks "$(jq '[.components[].checks[]] | length' "$work/status")"
    well || die "not all is well: $(jq --compact-output '[.components[].checks[] | select(.status != "ok") | .reading.reason][:5]' "$work/status")"
}

main() {
    local pair
    start_servers
    for pair in $NODES; do
        say "${pair%:*} nodes, each asked every ${pair#*:} s"
        start_monitor "${pair%:*}" "${pair#*:}"
        wait_for "all is well" well
        # What changes slowly was asked as well.
        sleep 60
        measure "${pair%:*}" "${pair#*:}"
        kill "$monitor"
        wait "$monitor"
    done
    kill "$writer"
}

main
