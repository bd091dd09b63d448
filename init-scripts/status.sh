#!/usr/bin/env bash
# Says what of the stack runs, and why something does not. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/status.sh [SERVICE…]

Each service of the stack with the tasks that run and that are wanted. Of those that do not run as wanted, or
those that are named: what Swarm says of its last tasks, what its health check says, and the last lines of its log. Then what
the health monitor finds.

Exit: 0 everything runs and is well, 1 something does not, 2 wrong use.
TEXT
}

readonly lines=15

# What Swarm cuts short, in full; the newest tasks first.
show_tasks() {
    docker service ps --no-trunc --format '    {{.Name}} on {{.Node}}: wanted {{.DesiredState}}, is {{.CurrentState}} {{.Error}}' \
        "${STACK}_$1" 2>&1 | head -n 5
}

show_health() {
    local container
    container=$(docker ps --all --quiet --filter "label=com.docker.swarm.service.name=${STACK}_$1" | head -n 1)
    [[ -n $container ]] || return 0
    docker inspect --format '{{if .State.Health}}    health check: {{.State.Health.Status}}{{range .State.Health.Log}}{{if .ExitCode}}
      {{.End}} exit {{.ExitCode}} {{.Output}}{{end}}{{end}}{{end}}{{if .State.OOMKilled}}
    killed: out of the memory of its limit{{end}}' "$container" | sed '/^ *$/d' | tail -n 4
}

show_update() {
    docker service inspect --format '{{if .UpdateStatus}}    update: {{.UpdateStatus.State}}, {{.UpdateStatus.Message}}{{end}}' "${STACK}_$1" | sed '/^ *$/d'
}

show_log() {
    echo "    its log:"
    timeout 10 docker service logs --raw --tail "$lines" "${STACK}_$1" 2>&1 | tail -n "$lines" | sed 's/^/      /'
}

explain() {
    printf '%s%s%s\n' "${bold:-}" "$1" "${plain:-}"
    show_tasks "$1"
    show_update "$1"
    show_health "$1"
    show_log "$1"
}

main() {
    local service failed=0 verdict=0 container machine missing=()
    case ${1:-} in
    -h | --help) usage && return 0 ;;
    -*) usage >&2 && exit 2 ;;
    esac
    docker_answers || die "no Docker engine answers" "start it: systemctl start docker"
    [[ $(docker info --format '{{.Swarm.ControlAvailable}}') == true ]] ||
        die "this machine is no manager of a Swarm" "run this on a manager; init-scripts/up.sh makes one of a single machine"
    [[ -n $(services) ]] || die "the stack $STACK is not deployed" "init-scripts/up.sh"
    services | awk '{ printf "  %-20s %s\n", $1, $2 }'
    mapfile -t missing < <(missing_services)
    [[ ${#missing[@]} -eq 0 ]] || failed=1
    if [[ $# -gt 0 ]]; then missing=("$@"); fi
    for service in "${missing[@]}"; do explain "$service"; done
    container=$(container_of health-monitor) machine=$(machine_of health-monitor)
    health || verdict=$?
    if [[ -n $machine && -z $container && $verdict == 0 ]]; then
        echo "the health monitor, on $machine, finds everything well"
    elif [[ -z $container && $verdict == 3 ]]; then
        echo "no health monitor answers${machine:+ on $machine}: nobody can say whether everything is well"
    fi
    ((verdict == 0)) || failed=1
    return "$failed"
}

main "$@"
