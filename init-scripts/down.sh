#!/usr/bin/env bash
# Removes what init-scripts/up.sh made. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/down.sh [--keep-data] [--all] [--yes]

Removes the stack: services, containers, networks, volumes (databases, and backups of the S3 server for tests!),
secrets, configs, and what .cache/up has (certificates, passwords). It asks before it begins. The keys of the backups
stay where the repository is not in the stack itself: without them nobody can read it. The Swarm is left if up.sh
made it and nothing else runs in it. The images stay, so that the next init-scripts/up.sh is quick; Docker stays too.
On a Swarm of several machines volumes are removed on this one only: run it on each.

  --keep-data   volumes, secrets and .cache/up stay: the next up.sh goes on with them
  --all         the images too, but not debian:trixie-slim
  --yes         does not ask; needed where there is no terminal

A stack of another name (PGMESH_STACK) has .cache/up-NAME, and is not touched without that name.
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

stack_containers() {
    docker ps --all --quiet --filter "label=com.docker.stack.namespace=$STACK"
}

# Earlier versions started a demonstration without Swarm, and gave everything of it this label.
readonly earlier="$stack_label=up"

own_containers() {
    docker ps --all --filter "label=$stack_label=$STACK" --format '{{.Names}}'
    docker ps --all --filter "label=$earlier" --format '{{.Names}}'
}

volumes() {
    docker volume ls --filter "label=com.docker.stack.namespace=$STACK" --format '{{.Name}}'
    docker volume ls --filter "label=$stack_label=$STACK" --format '{{.Name}}'
    docker volume ls --filter "label=$earlier" --format '{{.Name}}'
}

networks() {
    docker network ls --filter "label=com.docker.stack.namespace=$STACK" --format '{{.Name}}'
    docker network ls --filter "label=$earlier" --format '{{.Name}}'
}

secrets_of_swarm() {
    docker secret ls --filter "label=$stack_label=$STACK" --format '{{.Name}}'
}

configs_of_swarm() {
    docker config ls --filter "label=com.docker.stack.namespace=$STACK" --format '{{.Name}}'
}

images() {
    docker image ls --filter "label=$inputs_label" --format '{{.Repository}}:{{.Tag}}' | grep -v '<none>' | sort -u
}

# Services stop within their stop_grace_period; only then volumes and networks are free.
remove_stack() {
    [[ $(docker info --format '{{.Swarm.ControlAvailable}}') == true ]] || return 0
    [[ -z $(services) ]] || say "stops $(services | wc -l) services"
    docker stack rm "$STACK" >"$cache/log/down.log" 2>&1 || die "docker stack rm failed" "see $cache/log/down.log"
    wait_hint="docker ps --filter label=com.docker.stack.namespace=$STACK" wait_for 180 "the containers have not stopped" no_containers
    wait_hint="docker network ls" wait_for 60 "the networks are not gone" no_networks_of_stack
}

no_containers() { [[ -z $(stack_containers) ]]; }
no_networks_of_stack() { [[ -z $(docker network ls --quiet --filter "label=com.docker.stack.namespace=$STACK") ]]; }

# On a machine that is no manager, or left the Swarm, something may be left.
remove_rest() {
    local names=()
    mapfile -t names < <(stack_containers)
    remove containers "container rm --force --volumes" "${names[@]}"
}

leave_swarm() {
    [[ -e $cache/swarm-is-ours && $(docker info --format '{{.Swarm.LocalNodeState}}') == active ]] || return 0
    [[ -z $(docker service ls --quiet) && $(docker node ls --quiet | wc -l) -eq 1 ]] || return 0
    docker swarm leave --force >/dev/null
    docker network rm docker_gwbridge >/dev/null 2>&1 || true
    rm -f "$cache/swarm-is-ours"
    say "left the Swarm"
}

# Whether the repository of the backups goes with the stack.
repository_is_inside() {
    grep -qx 'S3_FOR_TESTS=yes' "$up/values" && grep -qx 'S3_ENDPOINT=http://s3-for-tests:9000' "$up/values"
} 2>/dev/null

# What the next stack takes up again, if it is not moved away: it lies where up.sh looks for it.
remove_files() {
    local keys
    [[ -e $up ]] || return 0
    mapfile -t keys < <(backup_keys)
    if repository_is_inside || [[ ${#keys[@]} -eq 0 ]]; then
        rm -rf "$up"
        return 0
    fi
    find "$up" -mindepth 1 -maxdepth 1 ! -path "$secrets" -exec rm -rf {} +
    find "$secrets" -mindepth 1 ! -name 'pgmesh_backup_key*' -delete
    say "kept the keys of the backups, which the repository needs to be read: $(for key in "${keys[@]}"; do echo "$secrets/$(backup_key_name "$key")"; done | xargs)"
}

main() {
    local all=no keep=no sure=no names=()
    while [[ $# -gt 0 ]]; do
        case $1 in
        --all) all=yes ;;
        --keep-data) keep=yes ;;
        --yes) sure=yes ;;
        -h | --help) usage && return 0 ;;
        *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    lock_stack
    docker_answers || die "no Docker engine answers, so nothing of the stack runs" "to remove its data too, start Docker and run this again"
    [[ $sure == yes || -t 0 ]] || die "this removes the stack $STACK, and nobody is there to be asked" "start again on a terminal, or with --yes"
    ask "The stack $STACK ends now$([[ $keep == yes ]] || echo ", and its databases are deleted$(! repository_is_inside || echo ", and their backups")")."

    mapfile -t names < <(own_containers)
    remove containers "container rm --force --volumes" "${names[@]}"
    remove_stack
    remove_rest
    mapfile -t names < <(networks)
    remove networks "network rm" "${names[@]}"
    if [[ $keep == no ]]; then
        mapfile -t names < <(volumes)
        remove volumes "volume rm --force" "${names[@]}"
    fi
    if [[ $(docker info --format '{{.Swarm.ControlAvailable}}') == true ]]; then
        mapfile -t names < <(configs_of_swarm)
        remove configs "config rm" "${names[@]}"
        if [[ $keep == no ]]; then
            mapfile -t names < <(secrets_of_swarm)
            remove secrets "secret rm" "${names[@]}"
            leave_swarm
        fi
    fi
    if [[ $all == yes ]]; then
        mapfile -t names < <(images)
        remove images "image rm --force" "${names[@]}"
    fi
    [[ $keep == yes ]] || remove_files
    say "the stack is gone"
}

main "$@"
