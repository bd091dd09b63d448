#!/usr/bin/env bash
# The half of wal.sh that runs inside the container; not to be started by hand.
# Settings come from the environment: ROUNDS, SEED, WRITERS.
set -euo pipefail

readonly work=$PWD
readonly data="$work/data"           # of the primary
readonly standby="$work/standby"
readonly restored="$work/restored"
readonly host="$work/host"           # all that the agent has on disk
readonly apart="$work/apart"         # the agent's configuration, kept where nothing is killed
readonly acknowledged="$work/acknowledged"
readonly log="$work/log"
# Between two base backups, in rounds.
readonly backup_every=5
# What was acknowledged longer ago must be in the repository: ship_interval and 2 s, in seconds.
readonly delay_max=3
export PGHOST="$work" PGUSER=postgres PGDATABASE=postgres

agent=''
s3=''
writing=()
tried_all=0
lost_all=0
longest=0

say() {
    printf '[%4ds] %s\n' "$SECONDS" "$*"
}

die() {
    printf '\nsoak: %s; the ends of the logs:\n' "$1" >&2
    tail -n 15 "$log" "$work"/*.log >&2
    exit 1
}

# sql STATEMENT [PORT]: on the primary, unless a port is given.
sql() {
    psql --quiet --no-align --tuples-only --no-psqlrc --field-separator=' ' --port="${2:-5432}" \
        --set ON_ERROR_STOP=1 --command "$1"
}

# wait_for SECONDS WHAT COMMAND…
wait_for() {
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" 2>>"$log"; do
        ((SECONDS < until)) || die "not in time: $what"
        sleep 0.1
    done
}

# --- servers --------------------------------------------------------------------------------------

# start_server DIRECTORY PORT NAME [OPTIONS]
start_server() {
    pg_ctl --pgdata="$1" --log="$work/$3.log" --timeout=120 --wait --options="-p $2 ${4:-}" start >>"$log" 2>&1 ||
        die "the $3 does not start"
}

# kill9 DIRECTORY: every process of a server.
kill9() {
    local postmaster
    postmaster=$(head -n 1 "$1/postmaster.pid")
    # shellcheck disable=SC2046  # one number a word
    kill -KILL "$postmaster" $(pgrep -P "$postmaster") 2>/dev/null || true
    wait_for 10 "the killed server is gone" gone "$postmaster"
}

gone() {
    ! kill -0 "$1" 2>/dev/null
}

# The moments of a crash count, not those of the disk: what the kernel was given survives a SIGKILL.
make_primary() {
    initdb --data-checksums --auth=trust --username=postgres --pgdata="$data" >>"$log"
    cat >>"$data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
fsync = off
shared_buffers = 64MB
max_wal_size = 256MB
CONF
    start_server "$data" 5432 primary
    sql "CREATE TABLE marks (writer int, n bigint, text text, PRIMARY KEY (writer, n)); CREATE TABLE bulk (text text)"
}

make_standby() {
    pg_basebackup --no-sync --checkpoint=fast --write-recovery-conf --pgdata="$standby" \
        --dbname="host=$work port=5432 application_name=standby1" >>"$log" 2>&1
    start_server "$standby" 5434 standby
}

make_s3() {
    mkdir "$work/s3"
    printf 'key\n' >"$apart/id"
    printf 'secret-of-the-soak-test\n' >"$apart/secret"
    s3-server --listen 127.0.0.1:9000 --directory "$work/s3" --bucket pgmesh \
        --access-key-id-file "$apart/id" --secret-access-key-file "$apart/secret" >"$work/s3.log" 2>&1 &
    s3=$!
}

# --- the agent ------------------------------------------------------------------------------------

# write_config DIRECTORY: where its files are.
write_config() {
    cat >"$1/agent.toml" <<TOML
cluster = "soak"
admin_address = "127.0.0.1:9632"
[postgres]
user = "postgres"
tls = "disable"
[[nodes]]
name = "postgres-1"
host = "$work"
port = 5432
[[nodes]]
name = "postgres-2"
host = "$work"
port = 5434
[repository.s3]
endpoint = "http://127.0.0.1:9000"
region = "us-east-1"
bucket = "pgmesh"
path_style = true
access_key_id_file = "$1/id"
secret_access_key_file = "$1/secret"
[encryption]
write_key = "k1"
[[encryption.keys]]
id = "k1"
file = "$1/key"
TOML
}

start_agent() {
    if [[ ! -e $host ]]; then
        mkdir "$host"
        cp "$apart/id" "$apart/secret" "$apart/key" "$host"
        write_config "$host"
    fi
    # Nothing that it may write without being told where outlives its host.
    env -C "$host" HOME="$host" TMPDIR="$host" backup-agent --config "$host/agent.toml" run >>"$work/agent.log" 2>&1 &
    agent=$!
}

kill_agent() {
    kill -KILL "$agent"
    wait "$agent" 2>/dev/null || true
}

# What the primary was told is stored, in bytes from the beginning of the WAL; 0 if it was told nothing.
reported() {
    sql "SELECT coalesce(max(flush_lsn - '0/0'), 0) FROM pg_stat_replication WHERE application_name = 'pgmesh_backup'" ||
        echo 0
}

caught_up() {
    [[ $(sql "SELECT count(*) FROM pg_stat_replication
              WHERE application_name = 'pgmesh_backup' AND flush_lsn >= pg_current_wal_flush_lsn()") == 1 ]]
}

# Whether the agent has noticed that commits wait for it: then it ships at once.
commits_wait() {
    exec 3<>/dev/tcp/127.0.0.1/9632
    printf 'GET /status HTTP/1.0\r\n\r\n' >&3
    sed '1,/^\r$/d' <&3 | jq --exit-status '.groups["0"].wal.commits_wait' >>"$log"
}

set_mode() {
    local names=''
    [[ $1 != sync ]] || names='ANY 1 (pgmesh_backup)'
    sql "ALTER SYSTEM SET synchronous_standby_names = '$names'"
    sql "SELECT pg_reload_conf()" >>"$log"
    [[ $1 != sync ]] || wait_for 30 "commits wait for the repository" commits_wait
}

backup() {
    backup-agent --config "$apart/agent.toml" backup >>"$log" 2>&1 || die "the base backup failed"
}

# --- the load -------------------------------------------------------------------------------------

# write_rows WRITER: writes one row after the other, and notes each that was acknowledged: its number, when,
# and a position of the WAL at or after its commit.
write_rows() {
    local writer=$1 from n lsn
    from=$(sql "SELECT coalesce(max(n), 0) + 1 FROM marks WHERE writer = $writer")
    awk -v writer="$writer" -v n="$from" 'BEGIN {
        for (;; n++) {
            printf "INSERT INTO marks VALUES (%d, %d, md5(%d || '\'' '\'' || %d));\n", writer, n, writer, n
            printf "SELECT %d, pg_current_wal_flush_lsn() - '\''0/0'\'';\n", n
        }
    }' | psql --quiet --no-align --tuples-only --no-psqlrc --field-separator=' ' --set ON_ERROR_STOP=1 2>>"$log" |
        while read -r n lsn; do printf '%s %s %s\n' "$n" "$EPOCHREALTIME" "$lsn"; done >"$acknowledged/$writer"
}

# So that segments become complete, too: some 10 MB a second. It goes on while the writers wait for the
# repository, so that what they wait for may be in a segment that is complete and not stored.
write_bulk() {
    {
        echo "SET synchronous_commit = local;"
        while sleep 0.05; do
            echo "INSERT INTO bulk SELECT repeat(md5(random()::text), 20) FROM generate_series(1, 600);"
        done
    } | psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 >>"$log" 2>&1
}

start_writers() {
    local writer
    rm -rf "$acknowledged"
    mkdir "$acknowledged"
    writing=()
    # Job control: each is a process group, which can be ended as a whole.
    set -m
    for ((writer = 1; writer <= WRITERS; writer++)); do
        write_rows "$writer" &
        writing+=($!)
    done
    write_bulk &
    writing+=($!)
    set +m
}

stop_writers() {
    local group
    for group in "${writing[@]}"; do
        kill -KILL -- "-$group" 2>/dev/null || true
        wait "$group" 2>/dev/null || true
    done
}

nobody_writes() {
    [[ $(sql "SELECT count(*) FROM pg_stat_activity
              WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND query ~ '^INSERT'") == 0 ]]
}

# --- a round --------------------------------------------------------------------------------------

recovered() {
    [[ $(sql "SELECT pg_is_in_recovery()" 5433) == f ]]
}

# Restores to the end of what the repository has; leaves the restored server running.
restore() {
    rm -rf "$restored"
    backup-agent --config "$apart/agent.toml" restore --to "$restored" --archive-mode off \
        --target-action promote >>"$log" 2>&1 || die "the restore failed"
    start_server "$restored" 5433 restored "-c synchronous_standby_names="
    wait_for 120 "the restored server ends its recovery" recovered
}

# compare MODE KILLED_AT REPORTED DELAY_MAX: prints the commits that were tried, those that are lost, and how
# long ago the oldest that is missing was acknowledged, in seconds.
compare() {
    local mode=$1 killed_at=$2 reported=$3 limit=$4 writer restored_to lines=''
    for ((writer = 1; writer <= WRITERS; writer++)); do
        # One after the other was written, so there is no hole, and nothing else.
        restored_to=$(sql "SELECT CASE WHEN count(*) = coalesce(max(n), 0)
                                        AND coalesce(bool_and(text = md5(writer || ' ' || n)), true)
                                  THEN coalesce(max(n), 0) ELSE -1 END FROM marks WHERE writer = $writer" 5433)
        echo "$restored_to" >"$work/restored-to-$writer"
        [[ $restored_to != -1 ]] || die "the rows of writer $writer are not those that were written"
        lines+=$(sed "s/^/$restored_to /" "$acknowledged/$writer")$'\n'
    done
    awk -v mode="$mode" -v killed_at="$killed_at" -v reported="$reported" -v limit="$limit" '
        # Without its line end, it was being noted when the writer was killed.
        NF < 4 || $3 > killed_at { next }
        { tried++ }
        $2 > $1 {
            delay = killed_at - $3
            if (delay > longest) longest = delay
            if (mode == "sync" || delay > limit || $4 <= reported) lost++
        }
        END { printf "%d %d %.2f\n", tried, lost, longest }' <<<"$lines"
}

# The primary has everything that was written: nothing that was restored may be more.
require_written() {
    local writer restored_to
    for ((writer = 1; writer <= WRITERS; writer++)); do
        restored_to=$(<"$work/restored-to-$writer")
        [[ $(sql "SELECT coalesce(max(n), 0) >= $restored_to FROM marks WHERE writer = $writer") == t ]] ||
            die "the repository had rows of writer $writer that were never written"
    done
}

# random LIMIT: 0 to LIMIT - 1, into the variable "chosen"; not by output, which would be another process.
random() {
    chosen=$((RANDOM % $1))
}

# pause MILLISECONDS: at least one second, and up to so much more, by chance.
pause() {
    random "$1"
    sleep "$(printf '%d.%03d' $((1 + chosen / 1000)) $((chosen % 1000)))"
}

# strike VICTIM
strike() {
    case $1 in
    agent) kill_agent ;;
    host) kill_agent && rm -rf "$host" ;;
    primary) kill9 "$data" ;;
    esac
}

revive() {
    case $1 in
    agent | host) start_agent ;;
    primary) start_server "$data" 5432 primary ;;
    esac
}

round() {
    local number=$1 mode=async victims=(agent host primary) victim killed_at told verdict tried lost delay
    local hangs='' limit=$delay_max
    ((number % 2)) || mode=sync
    random 3
    victim=${victims[chosen]}
    set_mode "$mode"
    sql "TRUNCATE bulk"
    start_writers
    pause 4000
    random 3
    if ((chosen == 0)); then
        # What is acknowledged now is not stored; how long it hangs, the delay may be.
        hangs=', the store hung' limit=1000000
        kill -STOP "$s3"
        pause 2000
    fi

    told=$(reported)
    killed_at=$EPOCHREALTIME
    strike "$victim"
    stop_writers
    kill -CONT "$s3"
    restore
    verdict=$(compare "$mode" "$killed_at" "$told" "$limit")
    read -r tried lost delay <<<"$verdict"
    pg_ctl --pgdata="$restored" --mode=immediate stop >>"$log" 2>&1

    revive "$victim"
    wait_for 90 "the agent catches up" caught_up
    wait_for 30 "no commit waits any more" nobody_writes
    require_written
    tried_all=$((tried_all + tried))
    lost_all=$((lost_all + lost))
    [[ -n $hangs ]] || longest=$(awk -v a="$longest" -v b="$delay" 'BEGIN { print (b > a) ? b : a }')
    say "round $number: $mode, $victim killed$hangs; $tried commits, $lost lost, delay $delay s"
}

main() {
    local number
    RANDOM=$SEED
    mkdir "$apart"
    backup-agent new-key "$apart/key" >>"$log"
    write_config "$apart"
    say "seed $SEED, $ROUNDS rounds, $WRITERS writers"
    make_s3
    make_primary
    make_standby
    start_agent
    wait_for 60 "WAL is received" caught_up
    for ((number = 1; number <= ROUNDS; number++)); do
        (((number - 1) % backup_every)) || backup
        round "$number"
    done
    backup-agent --config "$apart/agent.toml" list --wal || die "there is a gap in the WAL"
    printf '\nrounds          %s\ncommits tried   %s\ncommits lost    %s\nlongest delay   %s s\n' \
        "$ROUNDS" "$tried_all" "$lost_all" "$longest"
    ((lost_all == 0))
}

main
