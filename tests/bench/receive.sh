#!/usr/bin/env bash
# Measures how long a commit takes to the repository while WAL is received. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../init-scripts/lib.sh"

readonly container="pgmesh-bench-receive-$$"
readonly work=/var/lib/postgresql/17
readonly results="$cache/bench/receive.txt"

seconds=600
clients=4
rate=0
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/receive.sh [OPTIONS]

Runs pgbench against a PostgreSQL 17 server whose WAL a backup-agent receives into an S3 server, all in
one container, and prints

  the delay     from a position of the WAL being on the server's disk until the agent reports it as stored
                (pg_stat_replication.flush_lsn), looked at 20 times a second: median, 99th percentile, most
  CPU           of the agent, in milliseconds for each 16 MiB of WAL
  memory        the most that the agent took

  --seconds N     how long the load lasts [600]
  --clients N     of pgbench [4]
  --rate N        transactions a second; 0 for as many as possible [0]
  --binary FILE   a backup-agent to measure [target/release/backup-agent, built first]
  -h, --help      this text

Exit: 0 measured, whether or not the aims are met; 1 something failed; 2 wrong use.
TEXT
}

wrong_use() {
    printf '%s: %s (see --help)\n' "${0##*/}" "$1" >&2
    exit 2
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --seconds | --clients | --rate)
            [[ ${2:-} =~ ^[0-9]+$ ]] || wrong_use "$1 needs a number"
            printf -v "${1#--}" '%s' "$2"
            ;;
        --binary)
            [[ -x ${2:-} ]] || wrong_use "--binary needs a program"
            binary=$(realpath "$2")
            ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

# The two are built one after the other: together, the S3 server's features would get into the agent.
ensure_programs() {
    local target="${CARGO_TARGET_DIR:-$root/target}/release"
    ensure_cargo
    say "builds backup-agent and the S3 server"
    cd "$root"
    if [[ -z $binary ]]; then
        cargo build --release --locked --quiet --package backup-agent --bin backup-agent ||
            die "backup-agent does not build" "see the lines above"
        binary="$target/backup-agent"
    fi
    cargo build --release --locked --quiet --package cluster-tests --bin s3-server ||
        die "s3-server does not build" "see the lines above"
    s3_server="$target/s3-server"
}

ensure_images() {
    ensure_docker
    ensure_base_image
    ensure_postgres_image
    ensure_tests_image
}

remove_container() {
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true
}

main() {
    parse_options "$@"
    ensure_programs
    ensure_images
    mkdir -p "${results%/*}"
    trap remove_container EXIT
    docker run --name "$container" --init --network none --shm-size 1g --user "$postgres_uid" \
        --volume "$work" --workdir "$work" \
        --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --volume "$s3_server:/usr/local/bin/s3-server:ro" \
        --volume "$root/tests/bench/receive-inside.sh:/usr/local/bin/receive-inside:ro" \
        --env SECONDS_OF_LOAD="$seconds" --env CLIENTS="$clients" --env RATE="$rate" \
        "$tests_image" bash /usr/local/bin/receive-inside | tee "$results"
}

main "$@"
