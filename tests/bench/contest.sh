#!/usr/bin/env bash
# The half of backup.sh that runs inside the container; not to be started by hand.
#
# Makes a PostgreSQL server with the database, lets the contestants take turns, and prints one line a
# measurement on standard output: CONTESTANT, OPERATION, ROUND, MEASURE, VALUE, separated by tabs (wall,
# cpu, user, system in seconds, or in milliseconds a segment for WAL; stored in MiB, or in KiB a segment;
# peak in MiB), and lines "#", TEXT for people. Standard error says what is going on.
#
# Settings come from the environment: ROUNDS, SCALE, SEGMENTS, LEVEL, WORKERS.
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly data="$work/data"
readonly sender="$work/sender"      # looks like a data directory: with the WAL segments to push
readonly fetched="$work/fetched"    # where they are fetched to
readonly restored="$work/restored"

contestants=(pgbackrest pipe ours)
((LEVEL == 3)) || contestants+=(ours-3)

# --- the database ---------------------------------------------------------------------------------

# What happens by itself, vacuum and checkpoints by time, would be counted to whoever runs just then.
start_server() {
    initdb --data-checksums --auth=trust --username=postgres --pgdata="$data" >>"$log"
    cat >>"$data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
archive_mode = on
archive_command = 'true'
autovacuum = off
checkpoint_timeout = 1h
max_wal_size = 4GB
shared_buffers = 512MB
synchronous_commit = off
CONF
    pg_ctl --pgdata="$data" --log="$work/server.log" --wait start >>"$log"
}

# About 15 MB of pgbench's tables and 7 MiB of random bytes for each unit of scale. The random rows go
# to TOAST tables, uncompressed.
fill_database() {
    say "fills the database: pgbench scale $SCALE and $((SCALE * 7)) MiB of random bytes"
    pgbench --initialize --scale="$SCALE" --quiet >>"$log" 2>&1
    sql "CREATE TABLE noise (content bytea STORAGE EXTERNAL)"
    head --bytes="$((SCALE * 7))M" /dev/urandom | basenc --base16 --wrap=16000 | sed 's/^/\\\\x/' |
        psql --quiet --command "COPY noise FROM STDIN"
}

# Real segments, of pgbench's transactions. Frequent checkpoints, so that they hold about as many page
# images as those of a busy server.
make_segments() {
    local load
    say "makes $SEGMENTS WAL segments"
    mkdir "$work/archived"
    archive_by "cp %p $work/archived/%f"
    pgbench --client=4 --protocol=prepared --time=3600 >>"$log" 2>&1 &
    load=$!
    until [[ $(segments_in "$work/archived" | wc -l) -gt $SEGMENTS ]]; do
        kill -0 "$load" 2>/dev/null || die "pgbench ended early"
        sql CHECKPOINT
        sleep 2
    done
    kill "$load"
    wait "$load" 2>/dev/null || true
    archive_by true
    # The first is of the time before the load.
    segments_in "$work/archived" | sed 1d | head -n "$SEGMENTS" >"$work/names"
    make_sender
}

# The segments as the server would have them: the tools look at pg_control too, and at what is ready.
make_sender() {
    mkdir -p "$sender/global" "$sender/pg_wal/archive_status"
    cp "$data/global/pg_control" "$sender/global"
    (cd "$work/archived" && xargs mv --target-directory="$sender/pg_wal" <"$work/names")
    (cd "$sender/pg_wal/archive_status" && sed 's/$/.ready/' "$work/names" | xargs touch)
    rm -r "$work/archived"
}

segments_in() {
    find "$1" -type f -regextype posix-extended -regex '.*/[0-9A-F]{24}' -printf '%f\n' | sort
}

# archive_by COMMAND: the server's archive_command from now on, once it has archived what there is.
archive_by() {
    sql "SELECT pg_switch_wal()" >/dev/null
    until [[ -z $(find "$data/pg_wal/archive_status" -name '*.ready' -print -quit) ]]; do sleep 0.2; done
    sql "ALTER SYSTEM SET archive_command = '$1'"
    sql "SELECT pg_reload_conf()" >/dev/null
    sleep 0.5
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

# Nothing of the last measurement is left to do: everything is on disk, the server has no checkpoint to
# make. What is cached stays cached.
settle() {
    sql CHECKPOINT
    sync --file-system "$work"
    sleep 1
}

# measure CONTESTANT OPERATION COMMAND…: the wall time, the CPU time of the container, and what the
# kernel says about the command and its children.
measure() {
    local contestant=$1 operation=$2 per=1 digits=6 began_at began_cpu wall cpu user system peak
    shift 2
    # Seconds, or milliseconds a segment.
    [[ $operation != wal-* ]] || per=$SEGMENTS digits=3
    settle
    began_at=${EPOCHREALTIME/./} began_cpu=$(cpu_microseconds)
    /usr/bin/time --output="$work/usage" --format='%U %S %M' "$@" >>"$log" 2>&1 ||
        die "$operation failed for $contestant"
    wall=$((${EPOCHREALTIME/./} - began_at))
    [[ $operation != *-async ]] || wait_for_background
    cpu=$(($(cpu_microseconds) - began_cpu))
    read -r user system peak <"$work/usage"
    record wall "$wall" "$((per * 10 ** digits))"
    record cpu "$cpu" "$((per * 10 ** digits))"
    record user "$user" "$per" "$((10 ** (6 - digits)))"
    record system "$system" "$per" "$((10 ** (6 - digits)))"
    record peak "$peak" 1024
    say "round $round: $operation, $contestant: $((wall / 1000)) ms wall, $((cpu / 1000)) ms CPU"
}

# record MEASURE VALUE DIVISOR [FACTOR]: one line of output about what is being measured.
record() {
    awk -v value="$2" -v divisor="$3" -v factor="${4:-1}" \
        -v line="$contestant\t$operation\t$round\t$1" 'BEGIN { printf "%s\t%.4f\n", line, value * factor / divisor }'
}

# pgBackRest's asynchronous processes outlive the command that started them, and belong to its cost.
wait_for_background() {
    while pgrep --exact pgbackrest >/dev/null; do sleep 0.05; done
}

bytes_below() {
    find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { printf "%d\n", sum }'
}

# --- the contestants ------------------------------------------------------------------------------

repository() {
    echo "$work/repository/$1"
}

prepare_pgbackrest() {
    cat >"$work/pgbackrest.conf" <<CONF
[global]
repo1-path=$(repository pgbackrest)
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass=$(head --bytes=32 /dev/urandom | base64)
repo1-retention-full=9
compress-type=zst
compress-level=3
process-max=2
start-fast=y
spool-path=$work/spool
log-path=$work
log-level-file=off
log-level-console=warn
[contest]
pg1-path=$data
pg1-socket-path=$work
CONF
}

# prepare_ours NAME LEVEL
prepare_ours() {
    [[ -e $work/key ]] || backup-agent new-key "$work/key" >>"$log"
    cat >"$work/$1.toml" <<TOML
cluster = "contest"
[postgres]
user = "postgres"
tls = "disable"
[[nodes]]
name = "postgres-1"
host = "$work"
port = 5432
[repository.directory]
path = "$(repository "$1")"
[encryption]
write_key = "contest"
[[encryption.keys]]
id = "contest"
file = "$work/key"
[backup]
prefer = "primary"
compression_level = $2
workers = $WORKERS
[wal]
compression_level = $2
TOML
}

prepare_contestants() {
    export PGBACKREST_CONFIG="$work/pgbackrest.conf" PGBACKREST_STANZA=contest
    prepare_pgbackrest
    prepare_ours ours "$LEVEL"
    ((LEVEL == 3)) || prepare_ours ours-3 3
    head --bytes=32 /dev/urandom | base64 >"$work/passphrase"
    chmod 0600 "$work/passphrase"
}

seal_pipe() {
    echo "openssl enc -aes-256-ctr -pbkdf2 -pass file:$work/passphrase"
}

# archive_command CONTESTANT: with which the server archives during its backup.
archive_command() {
    case $1 in
    pgbackrest) echo "pgbackrest --config=$work/pgbackrest.conf --stanza=contest archive-push %p" ;;
    pipe) echo "zstd -q -3 -c %p | $(seal_pipe) -out $(repository pipe)/%f" ;;
    *) echo "backup-agent --config $work/$1.toml wal-push %p" ;;
    esac
}

# A repository with nothing in it.
new_repository() {
    rm -rf "$(repository "$1")"
    mkdir -p "$(repository "$1")"
    [[ $1 != pgbackrest ]] || pgbackrest stanza-create >>"$log" 2>&1 || die "pgbackrest cannot make its stanza"
}

# run_backup CONTESTANT: the pipe has to be asked for what the others do by themselves, to be on disk.
run_backup() {
    local object
    object="$(repository pipe)/base.tar.zst.enc"
    case $1 in
    pgbackrest) measure "$1" backup pgbackrest --type=full backup ;;
    pipe) measure "$1" backup bash -o pipefail -c \
        "pg_basebackup -Ft -X none -c fast -D - | zstd -q -3 -T2 | $(seal_pipe) -out $object && sync $object" ;;
    *) measure "$1" backup backup-agent --config "$work/$1.toml" backup --json ;;
    esac
}

run_restore() {
    case $1 in
    pgbackrest) measure "$1" restore pgbackrest --pg1-path="$restored" --type=immediate restore ;;
    pipe) measure "$1" restore bash -o pipefail -c \
        "$(seal_pipe) -d -in $(repository pipe)/base.tar.zst.enc | zstd -q -d | tar -x -C $restored &&
            find $restored -print0 | xargs -0 sync" ;;
    *) measure "$1" restore backup-agent --config "$work/$1.toml" restore --archive-mode off --to "$restored" --target immediate --json ;;
    esac
}

# One process a segment, as PostgreSQL starts them: in the data directory.
each_segment() {
    local contestant=$1 operation=$2
    shift 2
    measure "$contestant" "$operation" env -C "$sender" xargs -a "$work/names" -I '{}' "$@"
}

run_push() {
    local command=(pgbackrest --pg1-path="$sender" archive-push)
    [[ $1 == pgbackrest ]] || command=(backup-agent --config "$work/$1.toml" wal-push)
    each_segment "$1" wal-push "${command[@]}" 'pg_wal/{}'
}

run_fetch() {
    local command=(pgbackrest --pg1-path="$sender" archive-get)
    [[ $1 == pgbackrest ]] || command=(backup-agent --config "$work/$1.toml" wal-fetch)
    each_segment "$1" wal-fetch "${command[@]}" '{}' "$fetched/{}"
}

run_push_async() {
    each_segment pgbackrest wal-push-async pgbackrest --pg1-path="$sender" --archive-async archive-push 'pg_wal/{}'
}

run_fetch_async() {
    each_segment pgbackrest wal-fetch-async pgbackrest --pg1-path="$sender" --archive-async archive-get '{}' "$fetched/{}"
}

# --- the rounds -----------------------------------------------------------------------------------

# Another one begins in each round: who comes later may find memory and disk in another state.
rotate() {
    contestants=("${contestants[@]:1}" "${contestants[0]}")
}

backups() {
    local contestant operation=backup
    for contestant in "${contestants[@]}"; do
        new_repository "$contestant"
        archive_by "$(archive_command "$contestant")"
        run_backup "$contestant"
        record stored "$(bytes_below "$(repository "$contestant")")" "$((1 << 20))"
        archive_by true
    done
}

restores() {
    local contestant
    for contestant in "${contestants[@]}"; do
        mkdir -m 0700 "$restored"
        run_restore "$contestant"
        check_restored "$contestant"
        rm -r "$restored"
    done
}

# The copies must be what was backed up: the tables are as large as the server's, and, once, ours agrees
# with the server's own manifest.
check_restored() {
    local source copy
    source=$(bytes_below "$data/base") copy=$(bytes_below "$restored/base")
    [[ $copy -ge $((source * 99 / 100)) ]] || die "$1 restored $copy bytes below base/ of $source"
    ((round == 1)) && [[ $1 == ours* ]] || return 0
    pg_verifybackup --no-parse-wal "$restored" >>"$log" 2>&1 || die "pg_verifybackup does not like what $1 restored"
}

pushes() {
    local contestant operation=wal-push before
    for contestant in "${contestants[@]}"; do
        [[ $contestant != pipe ]] || continue
        before=$(bytes_below "$(repository "$contestant")")
        run_push "$contestant"
        record stored "$(($(bytes_below "$(repository "$contestant")") - before))" "$((SEGMENTS << 10))"
    done
}

fetches() {
    local contestant
    for contestant in "${contestants[@]}"; do
        [[ $contestant != pipe ]] || continue
        mkdir "$fetched"
        run_fetch "$contestant"
        check_fetched "$contestant"
    done
}

check_fetched() {
    diff --recursive --brief --exclude=archive_status "$sender/pg_wal" "$fetched" >>"$log" ||
        die "$1 fetched something else than was pushed"
    rm -r "$fetched"
}

# Into a new repository, because what is there already would not be pushed again.
asynchronous() {
    rm -rf "$work/spool"
    mkdir "$work/spool" "$fetched"
    new_repository pgbackrest
    run_push_async
    run_fetch_async
    check_fetched pgbackrest
}

describe() {
    printf '#\t%s\n' \
        "$(postgres --version | sed 's/ (Debian.*//'), $(pgbackrest version), $(zstd --version | grep -o 'v[0-9.]*' | sed 's/^/zstd /'), $(openssl version | cut -d ' ' -f 1,2)" \
        "$(nproc) cores of $(sed -n 's/^model name\s*: //p;T;q' /proc/cpuinfo), load average $(cut -d ' ' -f 1-3 /proc/loadavg), nice $(nice)" \
        "database of $(($(bytes_below "$data/base") >> 20)) MiB in $(find "$data/base" -type f | wc -l) files, $ROUNDS rounds; WAL per segment, of $SEGMENTS"
}

main() {
    local round
    start_server
    fill_database
    make_segments
    sql "VACUUM" && sql CHECKPOINT
    prepare_contestants
    describe
    for ((round = 1; round <= ROUNDS; round++)); do
        backups
        restores
        pushes
        fetches
        asynchronous
        rotate
    done
    pg_ctl --pgdata="$data" --mode=immediate stop >>"$log"
}

main
