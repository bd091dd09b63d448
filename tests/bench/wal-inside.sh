#!/usr/bin/env bash
# The half of wal.sh that runs inside the container; not to be started by hand.
#
# Makes a base backup and WAL after it, stores the WAL in each contestant's repository, lets them take
# turns, and prints one line a measurement on standard output: CONTESTANT, OPERATION, ROUND, MEASURE,
# VALUE, separated by tabs (rate in segments a second; cpu in milliseconds a segment; for the recovery also
# redo, the CPU time of PostgreSQL's startup process in milliseconds a segment), and lines "#", TEXT for
# people. Standard error says what is going on.
#
# Settings come from the environment: ROUNDS, SCALE, SEGMENTS, PAUSES (milliseconds), AHEAD (segments).
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly data="$work/data"
readonly base="$work/base"          # the base backup that every recovery starts from
readonly plain="$work/plain"        # the segments, as the server wrote them
readonly consumer="$work/consumer"  # looks like a data directory in recovery
readonly restored="$work/restored"

logs+=("$work/server.log")
contestants=(pgbackrest ours alone plain)
count=0
expected=''

# --- the database ---------------------------------------------------------------------------------

# No checkpoints and no vacuum by time: they would hit whoever runs just then.
start_server() {
    initdb --data-checksums --auth=trust --username=postgres --pgdata="$data" >>"$log"
    cat >>"$data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
archive_mode = on
archive_command = 'cp %p $plain/%f'
autovacuum = off
checkpoint_timeout = 1h
max_wal_size = 64GB
shared_buffers = 512MB
synchronous_commit = off
CONF
    mkdir "$plain"
    pg_ctl --pgdata="$data" --log="$work/server.log" --wait start >>"$log"
}

# What was archived since the base backup began.
stored_segments() {
    local first
    first=$(sed -n 's/^START WAL LOCATION: .* (file \([0-9A-F]*\))$/\1/p' "$base/backup_label")
    find "$plain" -type f -regextype posix-extended -regex '.*/[0-9A-F]{24}' -printf '%f\n' | sort |
        awk -v first="$first" '$1 >= first'
}

state() {
    sql "SELECT count(*), sum(delta), (SELECT sum(abalance) FROM pgbench_accounts) FROM pgbench_history"
}

# A base backup, and after it the WAL of pgbench's transactions. Frequent checkpoints, so that it holds about
# as many page images as that of a busy server.
make_wal() {
    local load
    say "fills the database: pgbench scale $SCALE"
    pgbench --initialize --scale="$SCALE" --quiet >>"$log" 2>&1
    pg_basebackup --wal-method=none --checkpoint=fast --no-sync --pgdata="$base" >>"$log" 2>&1
    say "makes $SEGMENTS WAL segments"
    pgbench --client=4 --protocol=prepared --time=3600 >>"$log" 2>&1 &
    load=$!
    until [[ $(stored_segments | wc -l) -ge $SEGMENTS ]]; do
        kill -0 "$load" 2>/dev/null || die "pgbench ended early"
        sql CHECKPOINT
        sleep 2
    done
    kill "$load"
    wait "$load" 2>/dev/null || true
    sql "SELECT pg_switch_wal()" >/dev/null
    until [[ -z $(find "$data/pg_wal/archive_status" -name '*.ready' -print -quit) ]]; do sleep 0.2; done
    expected=$(state)
    stored_segments >"$work/names"
    count=$(wc -l <"$work/names")
    pg_ctl --pgdata="$data" --mode=fast stop >>"$log"
}

# --- the contestants ------------------------------------------------------------------------------

prepare_pgbackrest() {
    export PGBACKREST_CONFIG="$work/pgbackrest.conf" PGBACKREST_STANZA=contest
    mkdir -p "$work/repository/pgbackrest"
    cat >"$work/pgbackrest.conf" <<CONF
[global]
repo1-path=$work/repository/pgbackrest
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass=$(head --bytes=32 /dev/urandom | base64)
compress-type=zst
compress-level=3
process-max=2
archive-async=y
archive-get-queue-max=$((AHEAD * 16))MiB
spool-path=$work/spool
log-path=$work
log-level-file=off
log-level-console=warn
[contest]
pg1-path=$data
pg1-socket-path=$work
CONF
    pgbackrest --no-online stanza-create >>"$log" 2>&1 || die "pgbackrest cannot make its stanza"
}

# prepare_ours NAME AHEAD
prepare_ours() {
    mkdir -p "$work/repository/ours"
    [[ -e $work/key ]] || backup-agent new-key "$work/key" >>"$log"
    cat >"$work/$1.toml" <<TOML
cluster = "contest"
[postgres]
user = "postgres"
tls = "disable"
[repository.directory]
path = "$work/repository/ours"
[encryption]
write_key = "contest"
[[encryption.keys]]
id = "contest"
file = "$work/key"
[wal]
prefetch_segments = $2
TOML
}

# restore_command CONTESTANT: as PostgreSQL has it, with %f and %p.
restore_command() {
    case $1 in
    pgbackrest) echo "pgbackrest --config=$work/pgbackrest.conf --stanza=contest --pg1-path=$2 archive-get %f %p" ;;
    plain) echo "cp $plain/%f %p" ;;
    *) echo "backup-agent --config $work/$1.toml wal-fetch %f %p" ;;
    esac
}

# Into both repositories, from what looks like a data directory.
store_wal() {
    local sender="$work/sender"
    say "stores $count segments in both repositories"
    prepare_pgbackrest
    prepare_ours ours "$AHEAD"
    prepare_ours alone 0
    mkdir -p "$sender/global" "$sender/pg_wal/archive_status"
    cp "$data/global/pg_control" "$sender/global"
    (cd "$plain" && xargs ln --target-directory="$sender/pg_wal" <"$work/names")
    (cd "$sender/pg_wal/archive_status" && sed 's/$/.ready/' "$work/names" | xargs touch)
    cd "$sender"
    xargs -a "$work/names" -I '{}' pgbackrest --pg1-path="$sender" archive-push 'pg_wal/{}' >>"$log" 2>&1 ||
        die "pgbackrest does not store"
    xargs -a "$work/names" -I '{}' backup-agent --config "$work/ours.toml" wal-push 'pg_wal/{}' >>"$log" 2>&1 ||
        die "backup-agent does not store"
    cd "$work"
    wait_for_background
    rm -r "$sender"
}

# --- measuring ------------------------------------------------------------------------------------

# CPU time of this container since it began, in microseconds.
cpu_microseconds() {
    if [[ -e /sys/fs/cgroup/cpuacct/cpuacct.usage ]]; then
        echo $(($(</sys/fs/cgroup/cpuacct/cpuacct.usage) / 1000))
    else
        sed -n 's/^usage_usec //p' /sys/fs/cgroup/cpu.stat
    fi
}

settle() {
    rm -rf "$work/spool"
    mkdir "$work/spool"
    sync --file-system "$work"
    sleep 1
}

# record MEASURE VALUE
record() {
    printf '%s\t%s\t%s\t%s\t%s\n' "$contestant" "$operation" "$round" "$1" "$2"
}

divide() {
    awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a / b }'
}

# What fetches ahead outlives the command that started it, and belongs to its cost.
wait_for_background() {
    while pgrep --exact pgbackrest >/dev/null || pgrep --full wal-prefetch >/dev/null; do sleep 0.05; done
}

# --- a consumer without a replay ------------------------------------------------------------------

# What a command sees of PostgreSQL in recovery. The process in postmaster.pid need not exist.
new_consumer() {
    rm -rf "$consumer"
    mkdir -p "$consumer/global" "$consumer/pg_wal"
    cp "$base/global/pg_control" "$consumer/global"
    touch "$consumer/recovery.signal"
    printf '%s\n' 4194999 "$consumer" "${EPOCHREALTIME/.*/}" >"$consumer/postmaster.pid"
}

# consume PAUSE [DIRECTORY]: asks for each segment as PostgreSQL does, and moves it away.
consume() {
    local pause=$1 to=${2:-} name template command
    template=$(restore_command "$contestant" "$consumer")
    cd "$consumer"
    while read -r name; do
        command=${template//%f/$name}
        sh -c "${command//%p/pg_wal/RECOVERYXLOG}" 2>>"$log" || die "$contestant does not fetch $name"
        mv pg_wal/RECOVERYXLOG "${to:-pg_wal}/$name"
        [[ -n $to ]] || rm "pg_wal/$name"
        [[ $pause == 0 ]] || sleep "$pause"
    done <"$work/names"
    cd "$work"
}

# Once, and not measured: what comes is what the server wrote.
check_contestants() {
    local contestant name
    for contestant in "${contestants[@]}"; do
        say "compares what comes from $contestant"
        settle
        new_consumer
        mkdir "$work/fetched"
        consume 0 "$work/fetched"
        while read -r name; do
            cmp "$plain/$name" "$work/fetched/$name" || die "$contestant fetched something else than was stored"
        done <"$work/names"
        rm "$consumer/recovery.signal"
        wait_for_background
        rm -r "$work/fetched"
    done
}

run_consumer() {
    local milliseconds=$1 operation="fetch-$1ms" began_at began_cpu wall
    settle
    new_consumer
    began_at=${EPOCHREALTIME/./} began_cpu=$(cpu_microseconds)
    consume "$(divide "$milliseconds" 1000 | sed 's/^0.000$/0/')"
    wall=$((${EPOCHREALTIME/./} - began_at))
    # The end of the recovery, upon which ours ends too.
    rm "$consumer/recovery.signal"
    wait_for_background
    record rate "$(divide "$((count * 1000000))" "$wall")"
    record cpu "$(divide "$(($(cpu_microseconds) - began_cpu))" "$((count * 1000))")"
    say "round $round: $operation, $contestant: $((wall / 1000)) ms"
}

# --- a recovery -----------------------------------------------------------------------------------

# PostgreSQL itself says how long its redo took and how much CPU time that cost it.
run_recovery() {
    local operation=recovery began_cpu cpu redo elapsed
    rm -rf "$restored"
    cp --archive "$base" "$restored"
    touch "$restored/recovery.signal"
    cat >>"$restored/postgresql.conf" <<CONF
archive_mode = off
restore_command = '$(restore_command "$contestant" "$restored")'
recovery_target_timeline = 'current'
CONF
    : >"$work/server.log"
    settle
    began_cpu=$(cpu_microseconds)
    pg_ctl --pgdata="$restored" --log="$work/server.log" --timeout=600 --wait start >>"$log" ||
        die "the server does not start"
    until grep -q 'redo done' "$work/server.log"; do
        pg_ctl --pgdata="$restored" status >>"$log" || die "the recovery of $contestant failed"
        sleep 0.1
    done
    until [[ $(sql "SELECT pg_is_in_recovery()") == f ]]; do sleep 0.1; done
    [[ $(state) == "$expected" ]] || die "$contestant recovered to another state"
    wait_for_background
    pg_ctl --pgdata="$restored" --mode=immediate stop >>"$log"
    cpu=$(($(cpu_microseconds) - began_cpu))
    read -r redo elapsed < <(sed -n 's/.*redo done.*user: \([0-9.]*\) s, system: \([0-9.]*\) s, elapsed: \([0-9.]*\) s.*/\1 \2 \3/p' \
        "$work/server.log" | awk '{ print $1 + $2, $3 }')
    record rate "$(divide "$count" "$elapsed")"
    record cpu "$(divide "$cpu" "$((count * 1000))")"
    record redo "$(divide "$redo" "$count" | awk '{ print $1 * 1000 }')"
    say "round $round: recovery, $contestant: $elapsed s, of which $redo s CPU of the replay"
}

# --- the rounds -----------------------------------------------------------------------------------

describe() {
    printf '#\t%s\n' \
        "$(postgres --version | sed 's/ (Debian.*//'), $(pgbackrest version), zst level 3, aes-256-cbc, archive-async, process-max 2, queue of $AHEAD segments" \
        "$(nproc) cores of $(sed -n 's/^model name\s*: //p;T;q' /proc/cpuinfo), load average $(cut -d ' ' -f 1-3 /proc/loadavg)" \
        "$count segments, $ROUNDS rounds, base backup of $(($(du --summarize --bytes "$base" | cut -f 1) >> 20)) MiB"
}

main() {
    local round pause contestant
    start_server
    make_wal
    store_wal
    describe
    check_contestants
    for ((round = 1; round <= ROUNDS; round++)); do
        for pause in $PAUSES; do
            for contestant in "${contestants[@]}"; do run_consumer "$pause"; done
        done
        for contestant in "${contestants[@]}"; do run_recovery; done
        # Another one begins in each round: who comes later may find memory and disk in another state.
        contestants=("${contestants[@]:1}" "${contestants[0]}")
    done
}

main
