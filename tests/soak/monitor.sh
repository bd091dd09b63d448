#!/usr/bin/env bash
# Lets a health-monitor watch a cluster that is well, for an hour, and counts its false alerts. See --help.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../bench/lib.sh"

readonly results="$cache/soak/monitor.txt"

minutes=60
every=180
monitor=''

usage() {
    cat <<'TEXT'
Usage: tests/soak/monitor.sh [OPTIONS]

Proves that a health-monitor does not cry wolf. In one container, which is removed at the end: Patroni with
two groups (three members and two), three members of etcd, PgBouncer, HAProxy, pgbench with both groups, and a
health-monitor as it comes, which tells a webhook. Patroni has its default timing.

  - Every few minutes a standby is restarted, in turns by Patroni (POST /restart) and with its Patroni, as a
    container is.
  - In the middle all of it is updated under a declared maintenance (health-monitor silence): each member of
    etcd, PgBouncer, HAProxy, each standby, and each primary after a switchover; a member of Patroni is away
    for 15 s. The maintenance ends when all is well.
  - At the end a standby is lost with its Patroni for 30 s. That must be told, and that it is over: otherwise
    the silence before would prove nothing.

An alert is false unless one of these restarts took longer than notify.after (10 s), from the stop until all is
well again, and the alert is of what was restarted or depends on it: the same server or its Patroni, its group,
or HAProxy. During the maintenance, and after it, every alert is false.

  --minutes N     how long, without the start and the end [60]
  --every N       seconds between two restarts of a standby [180]
  --monitor FILE  a health-monitor to test [target/release/health-monitor, built first]
  -h, --help      this text

The last lines are the number of restarts, of checks, of changes that were noticed and of false alerts. All
lines are left in .cache/soak/monitor.txt too, with what the monitor logged beside it.

Exit: 0 there was no false alert; 1 there was one, or something failed; 2 wrong use.
TEXT
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --minutes) minutes=$(positive "$@") ;;
        --every) every=$(positive "$@") ;;
        --monitor) monitor=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

main() {
    local status=0
    parse_options "$@"
    monitor=${monitor:-$(release health-monitor health-monitor)}
    ensure_tests_image
    mkdir -p "${results%/*}"
    inside soak/monitor-inside.sh --volume "$monitor:/usr/local/bin/health-monitor:ro" \
        --env MINUTES="$minutes" --env EVERY="$every" | tee "$results" || status=$?
    docker cp "$container:$work/monitor.log" "${results%.txt}.log" >/dev/null || true
    exit "$status"
}

main "$@"
