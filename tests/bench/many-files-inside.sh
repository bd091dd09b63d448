#!/usr/bin/env bash
# The half of many-files.sh that runs inside the container; not to be started by hand.
#
# Prints one line for each of backup, verify and restore on standard output: OPERATION, SECONDS, PEAK in
# KiB. Standard error says what is going on. Settings come from the environment: FILES, NOISE.
set -euo pipefail

# shellcheck source=tests/bench/inside.sh
source "${BASH_SOURCE[0]%/*}/inside.sh"

readonly data="$work/data"

configure() {
    backup-agent new-key "$work/key" >>"$log"
    mkdir "$work/repository"
    cat >"$work/backup-agent.toml" <<TOML
cluster = "many-files"
[postgres]
user = "postgres"
tls = "disable"
[[nodes]]
name = "postgres-1"
host = "$work"
port = 5432
[repository.directory]
path = "$work/repository"
[encryption]
write_key = "many-files"
[[encryption.keys]]
id = "many-files"
file = "$work/key"
TOML
}

# Without page checksums: what the server would say about each file that holds no pages is not our subject.
start_server() {
    initdb --auth=trust --username=postgres --pgdata="$data" >>"$log"
    cat >>"$data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
archive_mode = on
archive_command = 'backup-agent --config $work/backup-agent.toml wal-push %p'
CONF
    make_files
    pg_ctl --pgdata="$data" --log="$work/server.log" --wait start >>"$log"
}

# The server sends every file below base/, whether or not a table knows it; these are named as its own are.
make_files() {
    say "makes $FILES files and $NOISE MiB of random bytes"
    head --bytes="${NOISE}M" /dev/urandom >"$data/base/5/20000000"
    ((FILES > 0)) || return 0
    seq "$FILES" | split --lines=1 --suffix-length=7 --numeric-suffixes - "$data/base/5/1"
}

# measure OPERATION COMMAND…
measure() {
    local operation=$1
    shift
    /usr/bin/time --output="$work/usage" --format='%e %M' "$@" >>"$log" 2>&1 || die "$operation failed"
    say "$operation: $(sed 's/ /s, /; s/$/ KiB/' "$work/usage")"
    echo "$operation $(<"$work/usage")"
}

# What came back must be what was backed up, or its cost says nothing.
check_restored() {
    pg_verifybackup --no-parse-wal "$work/restored" >>"$log" 2>&1 || die "pg_verifybackup does not like what was restored"
}

main() {
    configure
    start_server
    measure backup backup-agent --config "$work/backup-agent.toml" backup --json
    pg_ctl --pgdata="$data" --mode=immediate stop >>"$log"
    rm -r "$data"
    measure verify backup-agent --config "$work/backup-agent.toml" verify --json
    measure restore backup-agent --config "$work/backup-agent.toml" restore --archive-mode off \
        --to "$work/restored" --target immediate --json
    check_restored
}

main
