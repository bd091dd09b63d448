#!/usr/bin/env bash
# The half of exporter-many.sh that runs inside the container; not to be started by hand.
#
# Makes a primary with three standbys, lets lag-exporter watch them by many names, and prints one line a
# measurement on standard output: NODES, STATE, MEASURE, VALUE, separated by tabs. Standard error says what is
# going on.
#
# Settings come from the environment: NODES (numbers), SCRAPES, PHASE (seconds).
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly page="$work/page"
readonly primary=5432
readonly standbys=(5433 5434 5435)
readonly hanging=5435
readonly role=monitor
readonly url=http://127.0.0.1:9633
# Between two scrapes of Prometheus, in seconds.
readonly interval=15

exporter='' # its process
writer=''   # what writes all the time

# --- the servers ----------------------------------------------------------------------------------

start_servers() {
    local port most=0 count
    # shellcheck disable=SC2153  # from the environment
    for count in $NODES; do ((count <= most)) || most=$count; done
    initdb --auth=trust --username=postgres --pgdata="$work/$primary" >>"$log"
    cat >>"$work/$primary/postgresql.conf" <<CONF
listen_addresses = '*'
unix_socket_directories = '$work'
max_connections = $((most + 50))
shared_buffers = 32MB
autovacuum = off
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

# The postmaster of the standby that hangs, and all its processes.
processes() {
    local main
    main=$(head -n 1 "$work/$hanging/postmaster.pid")
    echo "$main"
    pgrep --parent "$main"
}

# --- the exporter ---------------------------------------------------------------------------------

# nodes COUNT: as the configuration has them. No address may be listed twice, but a host has many.
nodes() {
    local i port
    for ((i = 0; i < $1; i++)); do
        port=$primary
        ((i % 10 == 0)) || port=${standbys[i % ${#standbys[@]}]}
        printf '[[nodes]]\ngroup = %d\nname = "n%d-%d"\nhost = "127.1.%d.%d"\nport = %d\n' \
            $((i / 10)) "$i" "$port" $((i / 250)) $((i % 250 + 1)) "$port"
    done
}

start_exporter() {
    cat >"$work/lag-exporter.toml" <<TOML
cluster = "bench"
admin_address = "127.0.0.1:9633"
[postgres]
user = "$role"
tls = "disable"
$(nodes "$1")
TOML
    lag-exporter --config "$work/lag-exporter.toml" run >>"$log" 2>&1 &
    exporter=$!
    wait_for "lag-exporter is not ready" curl --silent --fail --output /dev/null "$url/readyz"
    wait_for "not every node has a lag" every_node_is_known "$1"
}

stop_exporter() {
    kill "$exporter"
    wait "$exporter"
}

every_node_is_known() {
    curl --silent "$url/metrics" >"$page"
    awk -v nodes="$1" '
        /^pgmesh_lag_target_up[{].* 1(\.0)?$/ { up++ }
        /^pgmesh_lag_lag_state[{].*state="(ok|caught_up)".* 1(\.0)?$/ { known++ }
        END { exit !(up == nodes && known == nodes - int((nodes + 9) / 10)) }' "$page"
}

# CPU time of the exporter, in nanoseconds.
cpu() {
    cat /proc/"$exporter"/task/*/schedstat | awk '{ sum += $1 } END { printf "%.0f\n", sum }'
}

# --- measurements ---------------------------------------------------------------------------------

# check NODES PORT: the scrape says of the nodes at PORT that they are down, and of all others what is true.
check() {
    awk -v nodes="$1" -v silent="$2" -v now="$(date +%s.%N)" '
        function wrong(what) { print what ": " $0 > "/dev/stderr"; failed = 1 }
        /^pgmesh_lag_(target_up|target_last_success_timestamp_seconds|replay_lag_seconds|lag_state)[{]/ {
            hangs = silent != "" && index($1, "-" silent "\"")
            value = $NF + 0
        }
        /^pgmesh_lag_target_up[{]/ { seen++; if (value != !hangs) wrong("up") }
        /^pgmesh_lag_target_last_success_timestamp_seconds[{]/ && !hangs && now - value > 2 { wrong("not asked for 2 s") }
        /^pgmesh_lag_replay_lag_seconds[{]/ && hangs { wrong("a lag of a server that hangs") }
        /^pgmesh_lag_replay_lag_seconds[{]/ && !hangs && value > 2 { wrong("too far behind") }
        /^pgmesh_lag_lag_state[{].*state="(ok|caught_up)"/ && value == 1 { known++; if (hangs) wrong("a state") }
        /^pgmesh_lag_lag_state[{].*state="unreachable"/ && value != !!hangs { wrong("reachable or not") }
        /^pgmesh_lag_lag_state[{].*state="unreachable"/ && hangs { silenced++ }
        END {
            if (seen != nodes) { print seen " nodes of " nodes > "/dev/stderr"; failed = 1 }
            if (known + silenced != nodes - int((nodes + 9) / 10)) { print known " known, " silenced " silent" > "/dev/stderr"; failed = 1 }
            exit failed
        }' "$page" || die "the scrape above is wrong"
}

scrape() {
    curl --silent --fail --output "$page" "$url/metrics"
}

# measure NODES STATE PORT: PORT is that of the server that hangs.
measure() {
    local nodes=$1 state=$2 port=$3 p50 p95 longest before i requests=()
    before=$(cpu)
    for ((i = 0; i < PHASE / interval; i++)); do
        sleep "$interval"
        scrape
        check "$nodes" "$port"
    done
    measured "$nodes" "$state" cpu "$(awk "BEGIN { print ($(cpu) - $before) / 1e7 / ($i * $interval) }")"
    for ((i = 0; i < SCRAPES; i++)); do requests+=(--output "$page" "$url/metrics"); done
    # Over a connection that is kept, as Prometheus keeps it.
    curl --silent --fail --rate 10/s --write-out '%{time_total}\n' "${requests[@]}" | sort -n >"$work/times"
    check "$nodes" "$port"
    awk '{ t[NR] = $1 * 1000 } END { print t[int((NR + 1) / 2)], t[int(NR * 0.95 + 0.5)], t[NR] }' "$work/times" >"$work/said"
    read -r p50 p95 longest <"$work/said"
    measured "$nodes" "$state" p50 "$p50"
    measured "$nodes" "$state" p95 "$p95"
    measured "$nodes" "$state" longest "$longest"
    measured "$nodes" "$state" memory "$(awk '/VmHWM/ { print $2 / 1024 }' "/proc/$exporter/status")"
    measured "$nodes" "$state" series "$(grep -vc '^#' "$page")"
}

measured() {
    printf '%s\t%s\t%s\t%s\n' "$@"
}

main() {
    local count
    start_servers
    for count in $NODES; do
        say "$count nodes"
        start_exporter "$count"
        measure "$count" well ''
        say "$count nodes, a third of them hanging"
        { processes | xargs kill -STOP; } 2>>"$log" || true # a backend may end meanwhile
        sleep 10
        measure "$count" hanging "$hanging"
        { processes | xargs kill -CONT; } 2>>"$log" || true
        wait_for "the nodes that hung do not come back" every_node_is_known "$count"
        stop_exporter
    done
    kill "$writer"
}

main
