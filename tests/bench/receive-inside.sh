#!/usr/bin/env bash
# The half of receive.sh that runs inside the container; not to be started by hand.
# Settings come from the environment: SECONDS_OF_LOAD, CLIENTS, RATE.
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly data="$work/data"
readonly samples="$work/samples"

start_server() {
    initdb --data-checksums --auth=trust --username=postgres --pgdata="$data" >"$log"
    cat >>"$data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
max_wal_size = 4GB
shared_buffers = 512MB
${SETTINGS:-}
CONF
    pg_ctl --pgdata="$data" --log="$work/server.log" --wait start >>"$log"
    pgbench --initialize --scale=50 --quiet >>"$log" 2>&1
}

start_s3() {
    mkdir "$work/s3"
    printf 'key\n' >"$work/id"
    printf 'secret-of-the-benchmark\n' >"$work/secret"
    s3-server --listen 127.0.0.1:9000 --directory "$work/s3" --bucket pgmesh \
        --access-key-id-file "$work/id" --secret-access-key-file "$work/secret" >>"$log" 2>&1 &
}

start_agent() {
    backup-agent new-key "$work/key" >>"$log"
    cat >"$work/agent.toml" <<TOML
cluster = "bench"
admin_address = "127.0.0.1:9632"
[postgres]
user = "postgres"
tls = "disable"
[[nodes]]
name = "postgres-1"
host = "$work"
port = 5432
[repository.s3]
endpoint = "http://127.0.0.1:9000"
region = "us-east-1"
bucket = "pgmesh"
path_style = true
access_key_id_file = "$work/id"
secret_access_key_file = "$work/secret"
[encryption]
write_key = "k1"
[[encryption.keys]]
id = "k1"
file = "$work/key"
TOML
    backup-agent --config "$work/agent.toml" run >"$work/agent.log" 2>&1 &
    agent=$!
    until [[ $(sql "SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= pg_current_wal_flush_lsn()") == 1 ]]; do
        kill -0 "$agent" || { cat "$work/agent.log" >&2 && exit 1; }
        sleep 0.2
    done
}

# CPU of the agent so far, in clock ticks.
ticks() {
    awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$agent/stat"
}

sample() {
    psql --quiet --no-align --tuples-only --no-psqlrc --field-separator=' ' >"$samples" <<'SQL'
SELECT extract(epoch FROM clock_timestamp()), pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0'),
       (SELECT pg_wal_lsn_diff(flush_lsn, '0/0') FROM pg_stat_replication WHERE application_name = 'pgmesh_backup')
\watch 0.05
SQL
}

# Each position that was seen on the server's disk, and when it was first seen as stored.
report() {
    awk -v bytes="$1" -v ticks="$2" -v hertz="$(getconf CLK_TCK)" -v seconds="$SECONDS_OF_LOAD" '
        NF >= 2 { count++; at[count] = $1; written[count] = $2; stored[count] = NF == 3 ? $3 : 0 }
        END {
            j = 1
            for (i = 1; i <= count; i++) {
                while (j <= count && (j < i || stored[j] < written[i])) j++
                if (j > count) break
                delay[++n] = at[j] - at[i]
            }
            for (i = 1; i <= n; i++) print delay[i] | "sort -n >sorted"
            close("sort -n >sorted")
            n = 0
            while ((getline line <"sorted") > 0) d[++n] = line
            printf "WAL                      %.0f MiB in %d s, %.1f MiB/s\n", bytes / 1048576, seconds, bytes / 1048576 / seconds
            printf "delay to the repository  median %.2f s, 99th percentile %.2f s, most %.2f s, of %d samples (aim: p99 <= 2 s)\n", d[int(n / 2) + 1], d[int(n * 0.99) + 1], d[n], n
            printf "CPU of the agent         %.1f ms for each 16 MiB of WAL (aim: <= 60 ms), %.2f %% of a core\n", ticks / hertz * 1000 / (bytes / 16777216), ticks / hertz / (seconds + 3) * 100
        }' "$samples"
}

main() {
    local pgbench_options=(--no-vacuum --client="$CLIENTS" --jobs=2 --time="$SECONDS_OF_LOAD")
    ((RATE == 0)) || pgbench_options+=(--rate="$RATE")
    start_server
    start_s3
    start_agent
    sample &
    local sampler=$! wal_before wal_after ticks_before
    wal_before=$(sql "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")
    ticks_before=$(ticks)
    pgbench "${pgbench_options[@]}" >"$work/pgbench.log" 2>&1
    wal_after=$(sql "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")
    sleep 3
    kill "$sampler"
    grep '^tps' "$work/pgbench.log"
    report "$((wal_after - wal_before))" "$(($(ticks) - ticks_before))"
    awk '/VmHWM/ { printf "memory of the agent      at most %.0f MiB\n", $2 / 1024 }' "/proc/$agent/status"
}

main
