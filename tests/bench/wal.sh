#!/usr/bin/env bash
# Compares how fast WAL comes back, with pgBackRest and with a plain copy. See --help.
#
# This half runs on the host: it prepares the program and the image, starts one container, in which
# wal-inside.sh makes the WAL and measures, and prints the table. As in backup.sh, the container's cgroup's CPU
# account is the whole cost of an operation, the contestants take turns, and the best of all rounds counts.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly results="$cache/bench/wal.tsv"

rounds=5
scale=20
segments=128
pauses='0 20'
ahead=16
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/wal.sh [OPTIONS]

Measures how fast a recovery gets its WAL from

  pgBackRest   of Debian 13: zst level 3, aes-256-cbc, archive-async, process-max 2
  ours         backup-agent, which fetches ahead
  alone        backup-agent, each segment fetched only when it is asked for
  plain        cp from a directory on the same disk: no compression, no encryption

alternately, in one container, which is removed at the end:

  fetch-0ms    one command after the other, as PostgreSQL starts them, without a replay
  fetch-20ms   the same, with a pause of 20 ms after each segment
  recovery     PostgreSQL recovers a base backup; its own account of the redo is what is measured. With
               "plain" it shows what the replay is capable of by itself; "redo" is the CPU time of the
               replay, and 1000 divided by it the most segments a second that any tool could bring about

Prints the most segments a second of all rounds and the median, and the least CPU time of everything for each
segment. Before, what each contestant fetches is compared with what the server wrote; after each recovery
the tables are compared with the server's.

  --rounds N      how often each contestant runs each operation [5]
  --segments N    WAL segments, at least [128]
  --scale N       of pgbench; the base backup takes about 15 MB for each [20]
  --ahead N       segments to fetch ahead, of both [16]
  --binary FILE   a backup-agent to measure [target/release/backup-agent, built first]
  -h, --help      this text

A quick try: tests/bench/wal.sh --rounds 1 --segments 16
All measurements, one a line, are left in .cache/bench/wal.tsv.

Exit: 0 measured, whether or not the aims are met; 1 something failed; 2 wrong use.
TEXT
}

# --- options --------------------------------------------------------------------------------------

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --rounds) rounds=$(positive "$@") ;;
        --segments) segments=$(positive "$@") ;;
        --scale) scale=$(positive "$@") ;;
        --ahead) ahead=$(positive "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

# --- the table ------------------------------------------------------------------------------------

# The measurements: CONTESTANT OPERATION ROUND MEASURE VALUE. The highest rate counts, and the least CPU time.
print_table() {
    awk '
        function median(key, n, i, j, t, v) {
            n = split(all[key], v, " ")
            for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j] + 0 < v[j - 1] + 0; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
            return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
        }
        function ratio(a, b) { return b > 0 ? sprintf("%.2f", a / b) : "-" }
        function row(operation, measure, title, kind,   k, i, key, value, line) {
            line = sprintf("%-11s %-24s", operation, title)
            for (i = 1; i <= 4; i++) {
                key = name[i] SUBSEP operation SUBSEP measure
                value[i] = kind == "median" ? median(key) : best[key]
                line = line sprintf(" %10.1f", value[i])
            }
            print line " | " sprintf("%6s %6s", ratio(value[2], value[1]), ratio(value[2], value[4]))
        }
        BEGIN { FS = "\t"; split("pgbackrest ours alone plain", name, " ") }
        $1 == "#" { print $2; next }
        {
            key = $1 SUBSEP $2 SUBSEP $4
            all[key] = all[key] " " $5
            if (!(key in best) || ($4 == "rate" ? $5 > best[key] : $5 < best[key])) best[key] = $5 + 0
            if (!($2 in seen)) { seen[$2] = 1; operation[++operations] = $2 }
        }
        END {
            printf "\n%-11s %-24s %10s %10s %10s %10s | %6s %6s\n", "", "", "pgBackRest", "ours", "alone", "plain", "ours/", "ours/"
            printf "%-11s %-24s %10s %10s %10s %10s | %6s %6s\n", "operation", "measure", "", "", "", "", "pgBR", "plain"
            for (i = 1; i <= operations; i++) {
                row(operation[i], "rate", "segments a second, best", "best")
                row(operation[i], "rate", "segments a second, median", "median")
                row(operation[i], "cpu", "CPU ms a segment", "best")
                if (operation[i] == "recovery") row("recovery", "redo", "of it, the replay", "best")
            }
            theirs = best["pgbackrest", "recovery", "rate"]; ours = best["ours", "recovery", "rate"]
            limit = 1000 / best["plain", "recovery", "redo"]; plain = best["plain", "recovery", "rate"]
            printf "\nrecovery: ours is %.2f times as fast as pgBackRest; from a plain directory it is %.2f times as fast.\n", ours / theirs, plain / theirs
            printf "The replay alone takes a core for %.1f ms a segment: %.1f segments a second at most; ours reaches %.0f %% of that.\n", 1000 / limit, limit, 100 * ours / limit
            met = ours >= 2 * theirs ? "met" : ours >= 0.9 * plain ? "the replay is the limit" : "NOT MET"
            printf "Aim: twice the segments a second, or the replay is the limit (within a tenth of the plain directory): %s\n", met
        }' "$results"
}

main() {
    parse_options "$@"
    binary=${binary:-$(release backup-agent backup-agent)}
    ensure_tests_image
    # The WAL four times (the server's, archived, in pg_wal of a recovery, in the repositories), the database three times.
    require_disk $((segments * 16 * 4 + scale * 15 * 3 + 1024)) "use fewer --segments"
    mkdir -p "${results%/*}"
    inside bench/wal-inside.sh --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --env ROUNDS="$rounds" --env SCALE="$scale" --env SEGMENTS="$segments" --env PAUSES="$pauses" \
        --env AHEAD="$ahead" >"$results" ||
        die "the contest ended early" "see the lines above"
    say "measured; all measurements: ${results#"$root"/}"
    print_table
}

main "$@"
