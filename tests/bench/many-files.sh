#!/usr/bin/env bash
# Measures the memory that backup-agent takes for a cluster of very many files. See --help.
#
# This half runs on the host: it prepares the program and the image, starts one container, in which
# many-files-inside.sh makes the cluster and measures, and prints the table.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Of one process, whatever the size of the database.
readonly peak_mebibytes_max=256

file_count=300000
noise=1024
binary=''

usage() {
    cat <<'TEXT'
Usage: tests/bench/many-files.sh [OPTIONS]

Makes a PostgreSQL cluster with very many small files and some bulk, backs it up to a directory, verifies
and restores the backup, and prints the most memory that each of the three took (resident, with what it
maps of its own program). Everything happens in one container, which is removed at the end.

  --files N       small files beside those that initdb makes [300000]; 0: none
  --noise N       MiB of random bytes in one file, so that all buffers fill up [1024]
  --binary FILE   a backup-agent to measure [target/release/backup-agent, built first]
  -h, --help      this text

A file system needs an inode and 4 KiB for each file, twice. 300000 files take about two minutes.

Exit: 0 measured, whether or not the aim is met; 1 something failed; 2 wrong use.
TEXT
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --files) file_count=$(number "$@") ;;
        --noise) noise=$(number "$@") ;;
        --binary) binary=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

print_table() {
    awk -v max="$peak_mebibytes_max" '
        BEGIN { printf "\n%-10s %8s %10s  %s\n", "operation", "wall s", "peak MiB", "aim" }
        {
            peak = $3 / 1024
            printf "%-10s %8.1f %10.1f  <= %d: %s\n", $1, $2, peak, max, peak <= max ? "met" : "NOT MET"
        }'
}

main() {
    local measurements
    parse_options "$@"
    binary=${binary:-$(release backup-agent backup-agent)}
    ensure_tests_image
    # OPERATION, SECONDS, PEAK in KiB.
    measurements=$(inside bench/many-files-inside.sh --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --env FILES="$file_count" --env NOISE="$noise") ||
        die "the measurement ended early" "see the lines above"
    print_table <<<"$measurements"
}

main "$@"
