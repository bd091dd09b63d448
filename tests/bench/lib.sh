# shellcheck shell=bash
# shellcheck disable=SC2034  # constants for the scripts that source this file
# What the scripts of tests/bench and tests/soak share: each prepares programs and the tests' image on the
# host, starts one container, in which its other half (…-inside.sh) does the work, and prints what came out.
# Sourced, never run.

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../init-scripts/lib.sh"

# The volume of the image, which belongs to the user postgres: on a real disk, and not on overlayfs.
readonly work=/var/lib/postgresql/17
container="pgmesh-$(basename "$(dirname "$0")")-$(basename "$0" .sh)-$$"
readonly container

# --- options --------------------------------------------------------------------------------------

wrong_use() {
    printf '%s: %s (see --help)\n' "${0##*/}" "$1" >&2
    exit 2
}

# number OPTION VALUE: the value, if it is a number.
number() {
    [[ ${2:-} =~ ^[0-9]+$ ]] || wrong_use "$1 needs a number"
    printf '%s' "$2"
}

# positive OPTION VALUE: the value, if it is a number above 0.
positive() {
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || wrong_use "$1 needs a number above 0"
    printf '%s' "$2"
}

# program OPTION FILE: the whole path of a program.
program() {
    [[ -f ${2:-} && -x ${2:-} ]] || wrong_use "$1 needs a program"
    realpath "$2"
}

# --- preparation ----------------------------------------------------------------------------------

# release PACKAGE PROGRAM: builds the program, unless it is there, and prints where it is. One at a time:
# built together, the features of one would get into the other.
release() {
    ensure_cargo >&2
    say "builds $2" >&2
    (cd "$root" && cargo build --release --locked --quiet --package "$1" --bin "$2") ||
        die "$2 does not build" "see the lines above"
    printf '%s' "${CARGO_TARGET_DIR:-$root/target}/release/$2"
}

# require_disk MEBIBYTES HINT
require_disk() {
    local free
    free=$(docker run --rm "$tests_image" df --output=avail --block-size=1M "$work" | tail -n 1)
    ((free > $1)) || die "$1 MiB of disk are needed, $free are free" "$2"
}

# --- the container --------------------------------------------------------------------------------

remove_container() {
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true
}

trap remove_container EXIT

# inside SCRIPT DOCKER_ARGUMENT…: runs the other half, tests/SCRIPT. What it prints on standard output is
# what came out; on standard error it says what it does.
inside() {
    local script=$1 name
    name=$(basename "$1" .sh)
    shift
    docker run --name "$container" --init --network none --shm-size 1g --user "$postgres_uid" \
        --volume "$work" --workdir "$work" --volume "$root/tests/$script:/usr/local/bin/$name:ro" \
        --volume "$root/tests/bench/inside.sh:/usr/local/bin/inside.sh:ro" "$@" "$tests_image" bash "/usr/local/bin/$name"
}
