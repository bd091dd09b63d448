#!/usr/bin/env bash
# Measures what a health-monitor costs that has nothing to tell. See --help.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly results="$cache/bench/monitor.tsv"

nodes='12:1 325:5'
phase=180
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/monitor.sh [OPTIONS]

Lets one health-monitor watch many nodes that are well, and prints what that costs. The names lead to four
servers (a PostgreSQL 17 primary and three standbys, all in one container): of each group the first to the
primary, the others to the standbys. Each node has a connection of its own, and each is asked what changes
slowly on another, once a minute. Groups have four nodes, the last what is left. Something writes all
the time, and a scrape of /metrics and a look at /status come every 15 seconds. At the end all must be well:
anything else is a failure.

  --nodes "N:S …"   how many, and how many seconds between two questions, one after the other [12:1 325:5]
  --phase N         seconds over which CPU time is measured [180]
  --binary FILE     a health-monitor to measure [target/release/health-monitor, built first]
  -h, --help        this text

Exit: 0 measured, whether or not the aims are met; 1 something failed; 2 wrong use.
TEXT
}

# pairs OPTION VALUE: the value, if it is numbers of nodes with seconds.
pairs() {
    [[ ${2:-} =~ ^[1-9][0-9]*:[1-9][0-9]*( [1-9][0-9]*:[1-9][0-9]*)*$ ]] || wrong_use "$1 needs pairs like 12:1"
    printf '%s' "$2"
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --nodes) nodes=$(pairs "$@") ;;
        --phase) phase=$(positive "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
    ((phase >= 60)) || wrong_use "--phase must not be shorter than 60 s"
}

# The measurements: NODES INTERVAL MEASURE VALUE.
print_table() {
    awk '
        BEGIN { FS = "\t"; aim[12, 1] = "24 MiB, 1 %"; aim[325, 5] = "10 %" }
        !(($1, $2) in seen) { seen[$1, $2] = 1; which[++rows] = $1 SUBSEP $2 }
        { value[$1, $2, $3] = $4 }
        END {
            printf "\n%9s %9s %9s %9s %9s %9s   %s\n", "nodes", "every s", "MiB", "longest", "CPU %", "checks", "aims"
            for (i = 1; i <= rows; i++) {
                split(which[i], key, SUBSEP)
                printf "%9d %9d %9.1f %9.1f %9.2f %9d   %s\n", key[1], key[2], value[which[i], "memory"],
                    value[which[i], "longest"], value[which[i], "cpu"], value[which[i], "checks"], aim[which[i]]
            }
        }' "$results"
}

main() {
    parse_options "$@"
    binary=${binary:-$(release health-monitor health-monitor)}
    ensure_tests_image
    mkdir -p "${results%/*}"
    inside bench/monitor-inside.sh --volume "$binary:/usr/local/bin/health-monitor:ro" \
        --env NODES="$nodes" --env PHASE="$phase" >"$results" ||
        die "the measurement ended early" "see the lines above"
    say "measured; all measurements: ${results#"$root"/}"
    print_table
}

main "$@"
