#!/usr/bin/env bash
# Compares backup-agent with pgBackRest and with a plain pipe, on one database. See --help.
#
# This half runs on the host: it prepares the program and the image, starts one container, in which
# contest.sh makes the database and measures, and prints the table. Everything that counts (the server, the
# tools, the repositories) is in that container, so its cgroup's CPU account is the whole cost of an
# operation, archiving by the server included. Neighbours on the machine can only add to a measurement:
# therefore the contestants take turns, and the minimum of all rounds is what is compared.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly results="$cache/bench/backup.tsv"
# Free disk space needed for each unit of scale: database, WAL, four repositories, one restored copy.
readonly mebibytes_per_scale=130

rounds=5
scale=160
level=1
workers=2
segments=64
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/backup.sh [OPTIONS]

Measures full backup, restore, and push and fetch of WAL segments with

  pgBackRest   of Debian 13: zst level 3, aes-256-cbc, process-max 2; WAL also in its asynchronous mode
  pipe         pg_basebackup -Ft -X none -D - | zstd -3 -T2 | openssl enc -aes-256-ctr, and back
  ours         backup-agent at its default compression level, and once more at level 3

each to a directory on the local disk, alternately, and prints the minimum of wall time and of CPU time
(of the tool's processes and of the PostgreSQL server, as the container's cgroup counts it) over all
rounds, and how they compare. Everything happens in one container, which is removed at the end.

  --rounds N      how often each contestant runs each operation [5]
  --scale N       of pgbench; the database takes about 22 MB for each: two thirds pgbench's tables, one
                  third random bytes, which nothing can compress [160]
  --segments N    WAL segments to push and fetch, one by one [64]
  --level N       zstd level of ours [1]
  --workers N     threads of ours that compress and encrypt [2, as the others have]
  --binary FILE   a backup-agent to measure [target/release/backup-agent, built first]
  -h, --help      this text

A quick try: tests/bench/backup.sh --scale 10 --rounds 1 --segments 8
All measurements, one a line, are left in .cache/bench/backup.tsv.

Exit: 0 measured, whether or not the aims are met; 1 something failed; 2 wrong use.
TEXT
}

# --- options --------------------------------------------------------------------------------------

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --rounds) rounds=$(positive "$@") ;;
        --scale) scale=$(positive "$@") ;;
        --segments) segments=$(positive "$@") ;;
        --level) level=$(positive "$@") ;;
        --workers) workers=$(positive "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

# --- the table ------------------------------------------------------------------------------------

# A line of the table: OPERATION MEASURE UNIT, then, for lines that have one, the aim: the limit of
# "ratio" (ours to pgBackRest's) or of "value" (ours), and that limit.
# "never behind" is an aim of every operation: a ratio of at most 1.
table_rows() {
    cat <<'ROWS'
backup wall s ratio 0.90
backup cpu s ratio 0.75
backup stored MiB
backup peak MiB value 256
restore wall s ratio 0.80
restore cpu s ratio 1.00
restore peak MiB value 256
wal-push wall ms ratio 1.00
wal-push cpu ms value 50
wal-push stored KiB
wal-push-async wall ms ratio 1.00
wal-push-async cpu ms ratio 1.00
wal-fetch wall ms ratio 1.00
wal-fetch cpu ms ratio 1.00
wal-fetch-async wall ms ratio 1.00
wal-fetch-async cpu ms ratio 1.00
wal-push peak MiB value 256
wal-fetch peak MiB value 256
ROWS
}

# The measurements: CONTESTANT OPERATION ROUND MEASURE VALUE, per segment for WAL. Of each the minimum
# counts, except of "peak" (the most memory that one process of ours took), where the maximum does.
print_table() {
    awk -v level="$level" -v rows="$(table_rows)" '
        function put(row) { print row }
        # The asynchronous modes are of pgBackRest alone; ours is compared with both of its modes.
        function value(contestant, operation, measure) {
            if (contestant != "pgbackrest") sub(/-async$/, "", operation)
            return (contestant SUBSEP operation SUBSEP measure) in best ? best[contestant, operation, measure] : ""
        }
        function number(x, unit) {
            return x == "" ? "-" : sprintf(unit == "s" ? "%.2f" : "%.1f", x)
        }
        function ratio(a, b) { return a == "" || b == "" || b == 0 ? "-" : sprintf("%.2f", a / b) }
        function verdict(kind, limit, ours, theirs) {
            if (kind == "" || ours == "" || (kind == "ratio" && theirs == "")) return ""
            met = (kind == "ratio" ? ours / theirs : ours) <= limit
            return sprintf("%s <= %s: %s", kind == "ratio" ? "ratio" : "ours", limit, met ? "met" : "NOT MET")
        }
        BEGIN { FS = "\t" }
        $1 == "#" { put($2); next }
        {
            key = $1 SUBSEP $2 SUBSEP $4
            if (!(key in best) || ($4 == "peak" ? $5 > best[key] : $5 < best[key])) best[key] = $5 + 0
        }
        END {
            format = "%-16s %-7s %-4s %10s %8s %8s %8s | %6s %6s | %6s %6s | %s\n"
            printf "\n" format, "", "", "", "pgBackRest", "pipe", "ours", "ours", "ours/", "ours/", "lvl 3/", "lvl 3/", ""
            printf format, "operation", "measure", "unit", "zst 3", "zstd 3", "level " level, "level 3", "pgBR", "pipe", "pgBR", "pipe", "aim"
            count = split(rows, row, "\n")
            for (i = 1; i <= count; i++) {
                split(row[i], f, " ")
                theirs = f[2] == "peak" ? "" : value("pgbackrest", f[1], f[2])
                pipe = f[2] == "peak" ? "" : value("pipe", f[1], f[2])
                ours = value("ours", f[1], f[2])
                three = value(level == 3 ? "ours" : "ours-3", f[1], f[2])
                printf format, f[1], f[2], f[3], number(theirs, f[3]), number(pipe, f[3]), number(ours, f[3]),
                    number(three, f[3]), ratio(ours, theirs), ratio(ours, pipe), ratio(three, theirs),
                    ratio(three, pipe), verdict(f[4], f[5], ours, theirs)
            }
        }' "$results"
}

# Where the CPU time of the whole went: the tool, by rusage, and the rest, which is mostly the server.
print_shares() {
    printf '\nLeast CPU of the whole: of the tool (user + system), and of the rest (the server, what runs in the background)\n'
    awk '
        BEGIN { FS = "\t" }
        $1 == "#" { next }
        { measured[$1, $2, $3, $4] = $5 }
        $4 == "cpu" {
            key = $1 SUBSEP $2
            if (!(key in least) || $5 + 0 < least[key]) { least[key] = $5 + 0; round[key] = $3 }
            if (!(key in seen)) { seen[key] = 1; keys[++count] = key }
        }
        END {
            for (i = 1; i <= count; i++) {
                split(keys[i], k, SUBSEP)
                user = measured[k[1], k[2], round[keys[i]], "user"]
                system_ = measured[k[1], k[2], round[keys[i]], "system"]
                rest = least[keys[i]] - user - system_
                unit = k[2] ~ /^wal/ ? "ms" : "s "
                printf "  %-16s %-11s %8.2f %s = %7.2f + %7.2f, rest %7.2f\n", k[2], k[1], least[keys[i]], unit, user, system_, rest < 0 ? 0 : rest
            }
        }' "$results" | sort --stable --key=1,1
}

main() {
    parse_options "$@"
    binary=${binary:-$(release backup-agent backup-agent)}
    ensure_tests_image
    require_disk $((scale * mebibytes_per_scale)) "use a smaller --scale"
    mkdir -p "${results%/*}"
    inside bench/contest.sh --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --env ROUNDS="$rounds" --env SCALE="$scale" --env SEGMENTS="$segments" \
        --env LEVEL="$level" --env WORKERS="$workers" >"$results" ||
        die "the contest ended early" "see the lines above"
    say "measured; all measurements: ${results#"$root"/}"
    print_table
    print_shares
}

main "$@"
