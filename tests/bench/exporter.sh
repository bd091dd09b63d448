#!/usr/bin/env bash
# Measures lag-exporter against postgres_exporter. See --help.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly results="$cache/bench/exporter.tsv"

rounds=5
sweeps=200
phase=120
interval=15
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/exporter.sh [OPTIONS]

Lets lag-exporter and Debian's postgres_exporter take turns at the same three servers (a PostgreSQL 17
primary and two standbys, all in one container), and prints what a sweep costs. A sweep covers the three
servers: three scrapes of postgres_exporter, which runs once for each of them, or one of lag-exporter.

  default      postgres_exporter as it comes
  replication  postgres_exporter with nothing but its replication collectors
  ours         lag-exporter, which asks each server every second, scraped or not

Measured are the latency of a scrape, the CPU time of exporters and servers, memory, statements and
connections, with one sweep after the other and with one every 15 seconds (less what the servers cost
without any exporter); and what is said of a standby that is down, whose postmaster is stopped, whose every
process is stopped, or whose WAL receiver is stopped while rows are written.

  --rounds N      turns of each [5]
  --sweeps N      one after the other, in a turn [200]
  --phase N       seconds of a turn with a sweep every --interval [120]
  --interval N    seconds [15]
  --binary FILE   a lag-exporter to measure [target/release/lag-exporter, built first]
  -h, --help      this text

Exit: 0 measured, whether or not the aims are met; 1 something failed; 2 wrong use.
TEXT
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --rounds) rounds=$(positive "$@") ;;
        --sweeps) sweeps=$(positive "$@") ;;
        --phase) phase=$(positive "$@") ;;
        --interval) interval=$(positive "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
    ((phase >= interval)) || wrong_use "--phase must not be shorter than --interval"
}

# The measurements: CONTESTANT OPERATION ROUND MEASURE VALUE. The least of all rounds counts.
print_table() {
    awk '
        function ratio(a, b) { return b > 0 ? sprintf("%.3f", a / b) : "-" }
        function row(operation, measure, title, base,   i, value, line) {
            line = sprintf("%-44s", title)
            for (i = 1; i <= 3; i++) {
                value[i] = best[name[i], operation, measure] - base
                line = line sprintf(" %11.2f", value[i])
            }
            print line " | " sprintf("%8s %8s", ratio(value[3], value[1]), ratio(value[3], value[2]))
        }
        function said(fault, title,   i, line) {
            line = sprintf("%-44s", title)
            for (i = 1; i <= 3; i++) line = line sprintf("  %6.2f s %-10s", seconds[name[i], fault], words[name[i], fault])
            print line
        }
        BEGIN { FS = "\t"; split("default replication ours", name, " ") }
        $4 == "said" { words[$1, $2] = $5; next }
        $4 == "seconds" { seconds[$1, $2] = $5; next }
        {
            key = $1 SUBSEP $2 SUBSEP $4
            if (!(key in best) || $5 < best[key]) best[key] = $5 + 0
        }
        END {
            printf "\n%-44s %11s %11s %11s | %8s %8s\n", "", "default", "replication", "ours", "ours/def", "ours/rep"
            row("sweep", "median", "scrape, median ms")
            row("sweep", "p95", "scrape, 95th percentile ms (aim: 5)")
            row("sweep", "statements", "statements a sweep")
            row("sweep", "connections", "new connections a sweep (aim: 0)")
            row("sweep", "series", "series of the three servers")
            row("sweep", "memory", "memory, most, MiB (aim: 24)")
            row("sweep", "exporter", "exporter CPU s / 1000 sweeps at once")
            row("sweep", "server", "server CPU s / 1000 sweeps at once (aim: 0.1)")
            idle = best["none", "interval", "server"]
            row("interval", "exporter", "exporter CPU s / 1000 sweeps at intervals")
            row("interval", "server", "server CPU s / 1000 sweeps at intervals", idle)
            printf "(the servers without any exporter, for as long: %.2f s)\n", idle
            printf "\n%-44s  %-19s  %-19s  %-19s\n", "slowest scrape; up and lag of the standby, -: nothing", "default", "replication", "ours"
            said("down", "standby down for 15 s")
            said("postmaster", "its postmaster stopped")
            said("all", "all its processes stopped")
            said("receiver", "its WAL receiver stopped, rows written")
        }' "$results"
}

main() {
    parse_options "$@"
    binary=${binary:-$(release lag-exporter lag-exporter)}
    ensure_tests_image
    mkdir -p "${results%/*}"
    inside bench/exporter-inside.sh --volume "$binary:/usr/local/bin/lag-exporter:ro" \
        --env ROUNDS="$rounds" --env SWEEPS="$sweeps" --env PHASE="$phase" --env INTERVAL="$interval" >"$results" ||
        die "the contest ended early" "see the lines above"
    say "measured; all measurements: ${results#"$root"/}"
    print_table
}

main "$@"
