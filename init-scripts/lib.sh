# shellcheck shell=bash
# shellcheck disable=SC2034  # constants for the scripts that source this file
# Functions shared by tests/run.sh and the scripts of init-scripts/: messages, packages, the Docker engine,
# the base image and our own images. Sourced, never run.
#
# Each "ensure_…" does nothing when its result is there already, so that a second run is quick.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache="$root/.cache"
readonly root cache
readonly base_image=debian:trixie-slim
readonly postgres_image=pgmesh-postgres
readonly tests_image=pgmesh-tests
readonly inputs_label=pgmesh.inputs
# The user "postgres" in our images.
readonly postgres_uid=999
mkdir -p "$cache/log"

# --- messages -------------------------------------------------------------------------------------

# say TEXT: one line of progress, with the seconds since the start.
say() {
    printf '%s[%4ds]%s %s\n' "${bold:-}" "$SECONDS" "${plain:-}" "$*"
}

# die WHAT [NEXT STEP]: ends the script.
die() {
    printf '\n%s: %s\n' "${0##*/}" "$1" >&2
    [[ $# -lt 2 ]] || printf '  next step: %s\n' "$2" >&2
    exit 1
}

use_colours() {
    bold='' plain=''
    [[ -t 1 && -z ${NO_COLOR:-} ]] || return 0
    bold=$'\e[1m' plain=$'\e[0m'
}
use_colours

have() {
    command -v "$1" >/dev/null 2>&1
}

# logged NAME COMMAND…: runs a long command with its output in .cache/log/NAME.log; shows the end of
# the log when it fails.
logged() {
    local name=$1 log="$cache/log/$1.log" began=$SECONDS
    shift
    if "$@" >"$log" 2>&1 </dev/null; then
        say "  $name: done in $((SECONDS - began)) s"
        return 0
    fi
    printf '\n--- end of %s\n' "$log" >&2
    tail -n 40 "$log" >&2
    return 1
}

# --- programs of the host -------------------------------------------------------------------------

# as_root COMMAND…: as root, by sudo where we are not root.
as_root() {
    if [[ $(id -u) -eq 0 ]]; then
        "$@"
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        die "this needs root: $*" "run it as root (or make sudo work without a password), then start again"
    fi
}

# ensure_packages PACKAGE…: Debian packages of the host.
ensure_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    have apt-get || die "missing: ${missing[*]}" "install them with the package manager of this system"
    say "installs ${missing[*]}"
    as_root true
    logged apt-update as_root apt-get update ||
        say "  apt-get update reported problems; goes on with what it got"
    logged apt-install as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" ||
        die "apt-get could not install ${missing[*]}" "see the lines above; once it works, start again"
}

# ensure_program PROGRAM PACKAGE: the program, from that package where it is missing.
ensure_program() {
    have "$1" || ensure_packages "$2"
}

ensure_cargo() {
    have cargo || die "cargo is missing: the agents are built on this machine" \
        "install Rust $(sed -n 's/^channel = "\(.*\)"/\1/p' "$root/rust-toolchain.toml") (rustup), open a new shell, start again"
    (cd "$root" && cargo --version >/dev/null) ||
        die "cargo does not run in $root" "see the message above; rust-toolchain.toml names the version it wants"
    have cc || ensure_packages gcc libc6-dev
    # The etcd client's code is generated, at build time, from the definition of its protocol.
    if ! have protoc || [[ ! -e /usr/include/google/protobuf/descriptor.proto ]]; then
        ensure_packages protobuf-compiler libprotobuf-dev
    fi
}

# free_port: prints a free port of the loopback interface.
free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# random_hex BYTES
random_hex() {
    od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'
}

# wait_for SECONDS WHAT COMMAND…: until the command succeeds; dies, naming WHAT, when it does not.
wait_for() {
    local limit=$1 what=$2 began=$SECONDS
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS - began < limit)) || die "$what: not within $limit s" "${wait_hint:-look at the logs in $cache/log}"
        sleep 0.5
    done
}

# has_line LINE: whether what is read has it. It reads all, so that nobody writes to a pipe that is closed.
has_line() {
    grep -xF -- "$1" >/dev/null
}

# read_lines ARRAY COMMAND…: the lines that it prints. Fails where the command does, as "mapfile < <(…)" would not.
read_lines() {
    local -n read_lines_into=$1
    local read_lines_text
    read_lines_text=$("${@:2}") || return
    read_lines_into=()
    [[ -z $read_lines_text ]] || mapfile -t read_lines_into <<<"$read_lines_text"
}

# longest_gap FILE: the longest time between two of the times in it, in seconds.
longest_gap() {
    awk 'NR > 1 && $1 - last > gap { gap = $1 - last } { last = $1 } END { printf "%.1f", gap }' "$1"
}

# --- the Docker engine ----------------------------------------------------------------------------

docker_answers() {
    docker info >/dev/null 2>&1
}

# Without systemd nobody starts dockerd for us. It outlives this script on purpose: the next run, and
# the containers of up.sh, need it.
start_dockerd() {
    local log="$cache/log/dockerd.log"
    if [[ -d /run/systemd/system ]]; then
        as_root systemctl start docker
    else
        say "starts dockerd (log: $log)"
        as_root setsid dockerd >"$log" 2>&1 </dev/null 9>&- &
    fi
    wait_hint="see $log" wait_for 60 "dockerd does not answer" docker_answers
}

ensure_docker() {
    ! docker_answers || return 0
    if have docker && docker info 2>&1 | grep -qi 'permission denied'; then
        die "a Docker engine runs, but $(id -un) may not use it" "add the user to the group docker, or run as root"
    fi
    if [[ ${DOCKER_HOST:-} ]]; then
        die "no Docker engine answers at DOCKER_HOST=$DOCKER_HOST" "start it, or unset DOCKER_HOST"
    fi
    if ! have dockerd || ! have docker; then ensure_packages docker.io iptables; fi
    start_dockerd
}

# --- the base image -------------------------------------------------------------------------------

# host_mirror LABEL: the address this host's apt takes Debian (or Debian-Security) from; nothing where
# the host is not Debian.
host_mirror() {
    # shellcheck disable=SC2016  # apt's variables, not ours
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk -v label="$1" '$1 == label { print $2; exit }'
}

# What the published debian:trixie-slim has too: no manuals, and no fsync for each unpacked file.
slim_down() {
    local tree=$1
    rm -rf "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/* \
        "$tree"/usr/share/{doc,info,locale,man}/* "$tree"/var/log/{bootstrap,dpkg}.log
    printf 'path-exclude=/usr/share/%s/*\n' doc info locale man >"$tree/etc/dpkg/dpkg.cfg.d/slim"
    echo force-unsafe-io >>"$tree/etc/dpkg/dpkg.cfg.d/slim"
    printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"
    chmod 0755 "$tree/usr/sbin/policy-rc.d"
}

# Runs as root; see make_base_image.
bootstrap_tree() {
    local tree=$1 mirror=$2 security=$3
    debootstrap --variant=minbase trixie "$tree" ${mirror:+"$mirror"}
    [[ -z $mirror ]] || echo "deb $mirror trixie-updates main" >>"$tree/etc/apt/sources.list"
    [[ -z $security ]] || echo "deb $security trixie-security main" >>"$tree/etc/apt/sources.list"
    slim_down "$tree"
}

make_base_image() {
    local work
    ensure_program debootstrap debootstrap
    work=$(as_root mktemp -d "${TMPDIR:-/var/tmp}/pgmesh-base.XXXXXX")
    # The functions travel by their text: sudo starts a new shell.
    logged base-image as_root bash -euo pipefail -c "$(declare -f slim_down bootstrap_tree); bootstrap_tree \"\$@\"" \
        bootstrap "$work/root" "$(host_mirror Debian)" "$(host_mirror Debian-Security)" || {
        as_root rm -rf "$work"
        die "debootstrap could not make a Debian 13 tree" "see the lines above; a Debian mirror must be reachable"
    }
    as_root tar -C "$work/root" -c . | docker import --change 'CMD ["bash"]' - "$base_image" >/dev/null
    as_root rm -rf "$work"
}

ensure_base_image() {
    ! docker image inspect "$base_image" >/dev/null 2>&1 || return 0
    say "gets the base image $base_image"
    if timeout 120 docker pull --quiet "$base_image" >"$cache/log/pull.log" 2>&1; then return 0; fi
    say "  no image registry answers: makes $base_image with debootstrap (about a minute)"
    make_base_image
}

# --- our images -----------------------------------------------------------------------------------

# inputs_hash DOCKERFILE BASE FILE… -- ARGUMENT…: changes when anything the image is made of changes.
inputs_hash() {
    local dockerfile=$1 base=$2
    shift 2
    {
        docker image inspect --format '{{.Id}}' "$base"
        while [[ $# -gt 0 && $1 != -- ]]; do
            sha256sum <"$root/$1"
            shift
        done
        sha256sum <"$root/$dockerfile"
        printf '%s\n' "$@"
    } | sha256sum | cut -d ' ' -f 1
}

# ensure_image NAME DOCKERFILE BASE FILE… -- BUILD_ARGUMENT…: builds an image unless it was built from
# the same files, base and arguments. FILEs are those that the Dockerfile copies.
ensure_image() {
    local name=$1 dockerfile=$2 base=$3 hash argument arguments=() files=()
    shift 3
    while [[ $# -gt 0 && $1 != -- ]]; do
        files+=("$1")
        shift
    done
    hash=$(inputs_hash "$dockerfile" "$base" "${files[@]}" "$@")
    [[ $(image_label "$name" "$inputs_label") != "$hash" ]] || return 0
    shift
    for argument in "BASE_IMAGE=$base" "$@"; do arguments+=(--build-arg "$argument"); done
    say "builds the image $name"
    logged "image-$name" docker build --force-rm --label "$inputs_label=$hash" --tag "$name" \
        --file "$root/$dockerfile" "${arguments[@]}" "$root" ||
        die "the image $name could not be built from $dockerfile" "see the lines above, mend it, start again"
}

image_label() {
    docker image inspect --format "{{index .Config.Labels \"$2\"}}" "$1" 2>/dev/null || true
}

# The files that the database image is made of.
readonly postgres_files=(configs/postgres/entrypoint.sh configs/postgres/initialise.sh configs/postgres/patroni-healthcheck.sh configs/postgres/patroni.py)

ensure_postgres_image() {
    ensure_image "$postgres_image" configs/postgres/Dockerfile "$base_image" "${postgres_files[@]}" --
}

# With the engine and the images below it.
ensure_tests_image() {
    ensure_docker
    ensure_base_image
    ensure_postgres_image
    ensure_image "$tests_image" tests/Dockerfile "$postgres_image" tests/load-regression.sh --
}
