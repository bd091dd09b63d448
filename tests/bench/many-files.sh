#!/usr/bin/env bash
# Measures the memory that backup-agent takes for a cluster of very many files. See --help.
#
# This half runs on the host: it prepares the program and the image, starts one container, in which
# many-files-inside.sh makes the cluster and measures, and prints the table.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../init-scripts/lib.sh"

readonly container="pgmesh-many-files-$$"
# The volume of the image, which belongs to the user postgres: on a real disk, and not on overlayfs.
readonly work=/var/lib/postgresql/17
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

wrong_use() {
    printf '%s: %s (see --help)\n' "${0##*/}" "$1" >&2
    exit 2
}

# number OPTION VALUE: the value, if it is a number.
number() {
    [[ ${2:-} =~ ^[0-9]+$ ]] || wrong_use "$1 needs a number"
    printf '%s' "$2"
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --files) file_count=$(number "$@") ;;
        --noise) noise=$(number "$@") ;;
        --binary)
            [[ -x ${2:-} ]] || wrong_use "--binary needs a program"
            binary=$(realpath "$2")
            ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

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

remove_container() {
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true
}

# What the container prints: OPERATION, SECONDS, PEAK in KiB.
measure() {
    trap remove_container EXIT
    docker run --name "$container" --init --network none --shm-size 1g --user "$postgres_uid" \
        --volume "$work" --workdir "$work" \
        --volume "$binary:/usr/local/bin/backup-agent:ro" \
        --volume "$root/tests/bench/many-files-inside.sh:/usr/local/bin/many-files-inside:ro" \
        --env FILES="$file_count" --env NOISE="$noise" \
        "$tests_image" bash /usr/local/bin/many-files-inside ||
        die "the measurement ended early" "see the lines above"
    remove_container
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
    ensure_binary
    ensure_images
    measurements=$(measure)
    print_table <<<"$measurements"
}

main "$@"
