#!/usr/bin/env bash
# Measures how long a commit takes to the repository while WAL is received. See --help.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

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

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --seconds) seconds=$(positive "$@") ;;
        --clients) clients=$(positive "$@") ;;
        --rate) rate=$(number "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

main() {
    local s3_server
    parse_options "$@"
    binary=${binary:-$(release backup-agent backup-agent)}
    s3_server=$(release cluster-tests s3-server)
    ensure_tests_image
    mkdir -p "${results%/*}"
    inside bench/receive-inside.sh --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --volume "$s3_server:/usr/local/bin/s3-server:ro" \
        --env SECONDS_OF_LOAD="$seconds" --env CLIENTS="$clients" --env RATE="$rate" | tee "$results"
}

main "$@"
