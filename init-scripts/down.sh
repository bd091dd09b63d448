#!/usr/bin/env bash
# Removes what init-scripts/up.sh made. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/down.sh [--all]

Removes the containers, the network, the volumes (databases and backups!), the secrets and the
certificates of the demonstration stack. The images stay, so that the next init-scripts/up.sh is quick;
Docker stays too.

  --all   the images too, but not debian:trixie-slim
TEXT
}

# remove KIND COMMAND NAME…: names what it removes; nothing where there is none.
remove() {
    local kind=$1 command=$2
    shift 2
    [[ $# -gt 0 ]] || return 0
    # shellcheck disable=SC2086  # two words: "container rm --force"
    docker $command "$@" >/dev/null
    say "removed $kind: $*"
}

containers() {
    docker ps --all --filter label=pgmesh.stack=up --format '{{.Names}}'
}

volumes() {
    docker volume ls --filter name=^pgmesh- --format '{{.Name}}'
}

networks() {
    docker network ls --filter label=pgmesh.stack=up --format '{{.Name}}'
}

images() {
    docker image ls --filter "label=$inputs_label" --format '{{.Repository}}' | sort -u
}

main() {
    local all=no names=()
    case ${1:-} in
    '') ;;
    --all) all=yes ;;
    -h | --help) usage && return 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
    exec 9>"$cache/up.lock"
    flock --nonblock 9 || die "init-scripts/up.sh or another down.sh runs" "wait until it has ended"
    docker_answers || die "no Docker engine answers, so nothing of the stack runs" "to remove its data too, start Docker and run this again"

    mapfile -t names < <(containers)
    remove containers "rm --force --volumes" "${names[@]}"
    mapfile -t names < <(volumes)
    remove volumes "volume rm --force" "${names[@]}"
    mapfile -t names < <(networks)
    remove networks "network rm" "${names[@]}"
    if [[ $all == yes ]]; then
        mapfile -t names < <(images)
        remove images "image rm --force" "${names[@]}"
    fi
    rm -rf "$cache/up"
    say "the demonstration stack is gone"
}

main "$@"
