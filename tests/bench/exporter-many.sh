#!/usr/bin/env bash
# Measures lag-exporter with hundreds of nodes. See --help.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly results="$cache/bench/exporter-many.tsv"

nodes='325 1000'
scrapes=200
phase=60
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/exporter-many.sh [OPTIONS]

Lets one lag-exporter watch many nodes, each by a connection of its own that is asked every second, and prints
what that costs. The names lead to four servers (a PostgreSQL 17 primary and three standbys, all in one
container): of each group the first to the primary, the others to the standbys. 325 nodes are 32 groups of 10
and one of 5; other numbers are groups of 10, and one of what is left.

  well      all servers answer
  hanging   every process of the server that a third of the standbys lead to is stopped

Measured are the latency of a scrape, the exporter's memory, and its CPU time while it is scraped every 15
seconds. In each of these scrapes it is checked, and anything else is a failure, that all nodes whose server
answers are up, were asked within the last two seconds and are never further behind than two; and that the
others, as soon as that can be known, are down and have no lag.

  --nodes "N …"   how many, one number after the other [325 1000]
  --scrapes N     of which the latency is measured, ten a second [200]
  --phase N       seconds over which CPU time is measured [60]
  --binary FILE   a lag-exporter to measure [target/release/lag-exporter, built first]
  -h, --help      this text

Exit: 0 measured, whether or not the aims are met; 1 something failed; 2 wrong use.
TEXT
}

# numbers OPTION VALUE: the value, if it is numbers of nodes.
numbers() {
    [[ ${2:-} =~ ^[1-9][0-9]*( [1-9][0-9]*)*$ ]] || wrong_use "$1 needs numbers above 0"
    printf '%s' "$2"
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --nodes) nodes=$(numbers "$@") ;;
        --scrapes) scrapes=$(positive "$@") ;;
        --phase) phase=$(positive "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
    ((phase >= 15)) || wrong_use "--phase must not be shorter than 15 s"
}

# The measurements: NODES STATE MEASURE VALUE.
print_table() {
    awk '
        BEGIN { FS = "\t" }
        !(($1, $2) in seen) { seen[$1, $2] = 1; which[++rows] = $1 SUBSEP $2 }
        { value[$1, $2, $3] = $4 }
        END {
            printf "\n%-16s %9s %9s %9s %9s %9s %11s\n", "", "p50 ms", "p95 ms", "longest", "MiB", "CPU %", "series"
            for (i = 1; i <= rows; i++) {
                split(which[i], key, SUBSEP)
                printf "%5d %-10s", key[1], key[2]
                printf " %9.2f %9.2f %9.2f %9.2f %9.2f %11d\n", value[which[i], "p50"], value[which[i], "p95"],
                    value[which[i], "longest"], value[which[i], "memory"], value[which[i], "cpu"], value[which[i], "series"]
            }
            printf "%-16s %9s %9s %9s %9s %9s\n", "aims", "", "20", "", "48", "5"
        }' "$results"
}

main() {
    parse_options "$@"
    binary=${binary:-$(release lag-exporter lag-exporter)}
    ensure_tests_image
    mkdir -p "${results%/*}"
    inside bench/exporter-many-inside.sh --volume "$binary:/usr/local/bin/lag-exporter:ro" \
        --env NODES="$nodes" --env SCRAPES="$scrapes" --env PHASE="$phase" >"$results" ||
        die "the measurement ended early" "see the lines above"
    say "measured; all measurements: ${results#"$root"/}"
    print_table
}

main "$@"
