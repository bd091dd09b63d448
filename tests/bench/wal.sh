#!/usr/bin/env bash
# Compares how fast WAL comes back, with pgBackRest and with a plain copy. See --help.
#
# This half runs on the host: it prepares the program and the image, starts one container, in which
# wal-inside.sh makes the WAL and measures, and prints the table. As in backup.sh, the container's cgroup's CPU
# account is the whole cost of an operation, the contestants take turns, and the best of all rounds counts.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../init-scripts/lib.sh"

readonly container="pgmesh-bench-wal-$$"
# The volume of the image, which belongs to the user postgres: on a real disk, and not on overlayfs.
readonly work=/var/lib/postgresql/17
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

wrong_use() {
    printf '%s: %s (see --help)\n' "${0##*/}" "$1" >&2
    exit 2
}

# positive OPTION VALUE: the value, if it is a number above 0.
positive() {
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || wrong_use "$1 needs a number above 0"
    printf '%s' "$2"
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --rounds) rounds=$(positive "$@") ;;
        --segments) segments=$(positive "$@") ;;
        --scale) scale=$(positive "$@") ;;
        --ahead) ahead=$(positive "$@") ;;
        --binary)
            [[ -x ${2:-} ]] || wrong_use "--binary needs a program"
            binary=$(realpath "$2")
            ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

# --- preparation ----------------------------------------------------------------------------------

ensure_binary() {
    local quiet=()
    [[ -z $binary ]] || return 0
    [[ -t 2 ]] || quiet=(--quiet)
    ensure_cargo
    say "builds backup-agent"
    (cd "$root" && cargo build --release --locked "${quiet[@]}" --package backup-agent --bin backup-agent) ||
        die "backup-agent does not build" "see the lines above"
    binary="${CARGO_TARGET_DIR:-$root/target}/release/backup-agent"
}

ensure_images() {
    ensure_docker
    ensure_base_image
    ensure_postgres_image
    ensure_tests_image
}

# The WAL four times: the server's, archived, in pg_wal of a recovery, in the repositories; the database three times.
require_disk() {
    local needed=$((segments * 16 * 4 + scale * 15 * 3 + 1024)) free
    free=$(docker run --rm "$tests_image" df --output=avail --block-size=1M "$work" | tail -n 1)
    ((free > needed)) || die "$needed MiB of disk are needed, $free are free" "use fewer --segments"
}

# --- the contest ----------------------------------------------------------------------------------

remove_container() {
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true
}

# What wal-inside.sh prints on standard output are the measurements; on standard error it says what it does.
run_contest() {
    mkdir -p "${results%/*}"
    trap remove_container EXIT
    docker run --name "$container" --init --network none --shm-size 1g --user "$postgres_uid" \
        --volume "$work" --workdir "$work" \
        --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --volume "$root/tests/bench/wal-inside.sh:/usr/local/bin/wal-inside:ro" \
        --env ROUNDS="$rounds" --env SCALE="$scale" --env SEGMENTS="$segments" --env PAUSES="$pauses" \
        --env AHEAD="$ahead" \
        "$tests_image" bash /usr/local/bin/wal-inside >"$results" ||
        die "the contest ended early" "see the lines above"
    remove_container
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
    ensure_binary
    ensure_images
    require_disk
    run_contest
    say "measured; all measurements: ${results#"$root"/}"
    print_table
}

main "$@"
