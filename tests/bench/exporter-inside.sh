#!/usr/bin/env bash
# The half of exporter.sh that runs inside the container; not to be started by hand.
#
# Makes a primary with two standbys, lets the exporters take turns, and prints one line a measurement on
# standard output: CONTESTANT, OPERATION, ROUND, MEASURE, VALUE, separated by tabs, and lines "#", TEXT for
# people. Standard error says what is going on.
#
# postgres_exporter runs once for each server, as it is deployed; lag-exporter once for the three. A sweep is
# one scrape of every process of a contestant, so that it always covers the three servers.
#
# Settings come from the environment: ROUNDS, SWEEPS, PHASE (seconds), INTERVAL (seconds).
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly ports=(5432 5433 5434)
readonly role=monitor

contestants=(default replication ours)
pids=()     # the processes of the contestant that runs
urls=()     # and where they answer

measured() {
    printf '%s\t%s\t%s\t%s\t%s\n' "$@"
}

# --- the servers ----------------------------------------------------------------------------------

start_servers() {
    local port
    initdb --auth=trust --username=postgres --pgdata="$work/5432" >>"$log"
    cat >>"$work/5432/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
unix_socket_directories = '$work'
shared_preload_libraries = 'pg_stat_statements'
autovacuum = off
checkpoint_timeout = 1h
wal_receiver_status_interval = 1s
log_connections = on
CONF
    pg_ctl --pgdata="$work/5432" --options="-p 5432" --log="$work/5432.log" --wait start >>"$log"
    PGPORT=5432 sql "CREATE EXTENSION pg_stat_statements; CREATE TABLE written (at timestamptz);
        CREATE ROLE $role LOGIN IN ROLE pg_monitor;"
    for port in 5433 5434; do
        pg_basebackup --port=5432 --pgdata="$work/$port" --write-recovery-conf --checkpoint=fast \
            --create-slot --slot="standby_$port" >>"$log" 2>&1
        pg_ctl --pgdata="$work/$port" --options="-p $port" --log="$work/$port.log" --wait start >>"$log"
    done
}

postmaster() {
    head -n 1 "$work/$1/postmaster.pid"
}

# CPU time of everything that is PostgreSQL, in nanoseconds: exactly of what lives, and in clock ticks of the
# processes that ended.
server_cpu() {
    local port comm
    {
        for comm in /proc/[0-9]*/comm; do
            [[ $(cat "$comm" 2>/dev/null) != postgres ]] || cat "${comm%comm}schedstat" 2>/dev/null || true
        done
        for port in "${ports[@]}"; do
            awk '{ sub(/.*\) /, ""); print ($14 + $15) * 10000000 }' "/proc/$(postmaster "$port")/stat"
        done
    } | awk '{ sum += $1 } END { printf "%.0f\n", sum }'
}

# Statements and connections of the monitoring role, on the three servers.
statements() {
    local port
    for port in "${ports[@]}"; do
        PGPORT=$port sql "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE userid = '$role'::regrole"
    done | awk '{ sum += $1 } END { print sum }'
}

connections() {
    cat "$work"/543?.log | grep -c "connection authorized: user=$role" || true
}

# --- the contestants ------------------------------------------------------------------------------

# postgres_exporter OPTION…: one for each server.
start_postgres_exporters() {
    local i
    for i in 0 1 2; do
        DATA_SOURCE_NAME="postgresql://$role@127.0.0.1:${ports[i]}/postgres?sslmode=disable" \
            prometheus-postgres-exporter --web.listen-address="127.0.0.1:$((9187 + i))" "$@" >>"$log" 2>&1 &
        pids+=("$!")
        urls+=("http://127.0.0.1:$((9187 + i))/metrics")
    done
}

start_ours() {
    mkdir -p "$work/state"
    cat >"$work/lag-exporter.toml" <<TOML
cluster = "bench"
admin_address = "127.0.0.1:9633"
state_directory = "$work/state"
[postgres]
user = "$role"
tls = "disable"
$(for port in "${ports[@]}"; do
        printf '[[nodes]]\nname = "postgres-%d"\nhost = "127.0.0.1"\nport = %d\n' "$port" "$port"
    done)
TOML
    lag-exporter --config "$work/lag-exporter.toml" run >>"$log" 2>&1 &
    pids+=("$!")
    urls+=("http://127.0.0.1:9633/metrics")
    wait_for "lag-exporter is not ready" curl --silent --fail --output /dev/null http://127.0.0.1:9633/readyz
}

start() {
    pids=() urls=()
    case $1 in
    none) ;;
    default) start_postgres_exporters ;;
    replication)
        start_postgres_exporters --disable-default-metrics --disable-settings-metrics \
            --no-collector.{database,locks,roles,stat_bgwriter,stat_database,stat_user_tables,statio_user_tables,wal}
        ;;
    ours) start_ours ;;
    esac
    [[ $1 == none ]] || wait_until_up
}

wait_until_up() {
    local url
    for url in "${urls[@]}"; do
        wait_for "$url does not answer" curl --silent --fail --output /dev/null --max-time 5 "$url"
    done
    sweep 3 >/dev/null
}

stop() {
    local pid
    for pid in "${pids[@]}"; do
        kill "$pid"
        wait "$pid" || true
    done
}

exporter_cpu() {
    local pid
    for pid in "${pids[@]}"; do cat /proc/"$pid"/task/*/schedstat; done | awk '{ sum += $1 } END { printf "%.0f\n", sum }'
}

# sweep COUNT: milliseconds of each scrape, over connections that are kept, as Prometheus keeps them.
sweep() {
    local i url requests=()
    for ((i = 0; i < $1; i++)); do
        for url in "${urls[@]}"; do requests+=(--output /dev/null "$url"); done
    done
    curl --silent --fail --write-out '%{time_total}\n' "${requests[@]}" | awk '{ print $1 * 1000 }'
}

# --- measurements ---------------------------------------------------------------------------------

# One scrape after the other.
measure_sweeps() {
    local name=$1 round=$2 server exporter statements connections series=0 url
    start "$name"
    server=$(server_cpu) exporter=$(exporter_cpu) statements=$(statements) connections=$(connections)
    sweep "$SWEEPS" | sort -n >"$work/times"
    server=$(($(server_cpu) - server)) exporter=$(($(exporter_cpu) - exporter))
    connections=$(($(connections) - connections)) statements=$(($(statements) - statements))
    measured "$name" sweep "$round" median "$(awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }' "$work/times")"
    measured "$name" sweep "$round" p95 "$(awk '{ t[NR] = $1 } END { print t[int(NR * 0.95 + 0.5)] }' "$work/times")"
    per_thousand "$name" sweep "$round" exporter "$exporter" "$SWEEPS"
    per_thousand "$name" sweep "$round" server "$server" "$SWEEPS"
    measured "$name" sweep "$round" statements "$(awk "BEGIN { print $statements / $SWEEPS }")"
    measured "$name" sweep "$round" connections "$(awk "BEGIN { print $connections / $SWEEPS }")"
    for url in "${urls[@]}"; do series=$((series + $(curl --silent "$url" | grep -vc '^#'))); done
    measured "$name" sweep "$round" series "$series"
    measured "$name" sweep "$round" memory \
        "$(for pid in "${pids[@]}"; do awk '/VmHWM/ { print $2 / 1024 }' "/proc/$pid/status"; done | awk '{ sum += $1 } END { print sum }')"
    stop
}

# per_thousand NAME OPERATION ROUND MEASURE NANOSECONDS SWEEPS: CPU seconds for a thousand.
per_thousand() {
    measured "$1" "$2" "$3" "$4" "$(awk "BEGIN { print $5 / $6 / 1000000 }")"
}

# As Prometheus scrapes: what it costs per sweep, with everything that happens between two of them.
measure_interval() {
    local name=$1 round=$2 server exporter=0 times=$((PHASE / INTERVAL)) i
    start "$name"
    server=$(server_cpu)
    [[ $name == none ]] || exporter=$(exporter_cpu)
    for ((i = 0; i < times; i++)); do
        sleep "$INTERVAL"
        [[ $name == none ]] || sweep 1 >/dev/null
    done
    server=$(($(server_cpu) - server))
    per_thousand "$name" interval "$round" server "$server" "$times"
    if [[ $name != none ]]; then
        per_thousand "$name" interval "$round" exporter "$(($(exporter_cpu) - exporter))" "$times"
    fi
    stop
}

# --- faults ---------------------------------------------------------------------------------------

# Each of them is done to the standby at port 5434, while rows are written.
processes_of() {
    local main
    main=$(postmaster 5434)
    echo "$main"
    pgrep --parent "$main"
}

receiver_of() {
    pgrep --parent "$(postmaster 5434)" --full 'walreceiver'
}

break_it() {
    case $1 in
    down) pg_ctl --pgdata="$work/5434" --mode=immediate --wait stop >>"$log" ;;
    postmaster) kill -STOP "$(postmaster 5434)" ;;
    all) { processes_of | xargs kill -STOP; } 2>>"$log" || true ;; # a backend may end meanwhile
    receiver) kill -STOP "$(receiver_of)" ;;
    esac
}

mend_it() {
    case $1 in
    down) pg_ctl --pgdata="$work/5434" --options="-p 5434" --log="$work/5434.log" --wait start >>"$log" ;;
    *) { processes_of | xargs kill -CONT; } 2>>"$log" || true ;;
    esac
    wait_for "the standbys do not catch up" caught_up
}

caught_up() {
    [[ $(PGPORT=5432 sql "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_flush_lsn()") == 2 ]]
}

# What a contestant says of that standby: is it up, and how far behind. A dash where it says nothing.
said_of_it() {
    local up lag page="$work/page"
    if [[ $1 == ours ]]; then
        up=$(awk '/^pgmesh_lag_target_up[{].*node="postgres-5434"/ { print $2 }' "$page")
        lag=$(awk '/^pgmesh_lag_replay_lag_seconds[{].*node="postgres-5434"/ { print $2 }' "$page")
    else
        up=$(awk '/^pg_up/ { print $2 }' "$page")
        lag=$(awk '/^pg_replication_lag_seconds/ { print $2 }' "$page")
    fi
    printf '%s %s' "${up:--}" "${lag:--}"
}

measure_fault() {
    local name=$1 fault=$2 took slowest=0 url i
    start "$name"
    break_it "$fault"
    for ((i = 0; i < 30; i++)); do
        PGPORT=5432 sql "INSERT INTO written VALUES (clock_timestamp())"
        sleep 0.5
    done
    : >"$work/page"
    for url in "${urls[@]}"; do
        # The last one is the broken standby's, or the only one.
        took=$(curl --silent --max-time 30 --output "$work/page" --write-out '%{time_total}' "$url") || : >"$work/page"
        slowest=$(awk "BEGIN { print ($took > $slowest) ? $took : $slowest }")
    done
    measured "$name" "$fault" 1 seconds "$slowest"
    measured "$name" "$fault" 1 said "$(said_of_it "$name")"
    stop
    mend_it "$fault"
}

main() {
    local round name fault
    start_servers
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in "${contestants[@]}"; do
            say "round $round: $SWEEPS sweeps, $name"
            measure_sweeps "$name" "$round"
        done
    done
    for ((round = 1; round <= ROUNDS; round++)); do
        for name in none "${contestants[@]}"; do
            say "round $round: a sweep each $INTERVAL s for $PHASE s, $name"
            measure_interval "$name" "$round"
        done
    done
    for fault in down postmaster all receiver; do
        for name in "${contestants[@]}"; do
            say "fault $fault, $name"
            measure_fault "$name" "$fault"
        done
    done
}

main
