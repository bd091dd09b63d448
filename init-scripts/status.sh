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
a script is changing now, or has begun and not ended, and what the health monitor finds.

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

# Of its newest task that wrote something: Swarm gives the lines of all tasks in no order, and one that did not start has none.
show_log() {
    local task lines_of_task
    while read -r task; do
        lines_of_task=$(timeout 10 docker service logs --raw --tail "$lines" "$task" 2>&1 | tail -n "$lines" | sed 's/^/      /')
        [[ -n $lines_of_task ]] || continue
        printf '    the log of its task %s:\n%s\n' \
            "$(docker inspect --format "(wanted {{.DesiredState}}, is {{.Status.State}} since {{.Status.Timestamp.Format \"15:04:05\"}} UTC)" "$task")" "$lines_of_task"
        return 0
    done < <(docker service ps --quiet --no-trunc "${STACK}_$1" 2>/dev/null | head -n 3)
    echo "    it has no log"
}

explain() {
    printf '%s%s%s\n' "${bold:-}" "$1" "${plain:-}"
    show_tasks "$1"
    show_update "$1"
    show_health "$1"
    show_log "$1"
}

# What a script is doing now; otherwise what one has begun and not ended. Fails where there is such a thing.
show_unfinished() {
    local group state result=0
    if ! flock --nonblock "$cache/up.lock" true; then
        echo "being changed now by $(<"$cache/up.lock")"
        return 0
    fi
    if [[ -e $rotation ]]; then
        echo "unfinished: the rotation of $(<"$rotation"). Next: init-scripts/rotate-secret.sh $(<"$rotation")"
        result=1
    fi
    while read -r group state; do
        case $state in
        joining) echo "unfinished: worker group $group is only half there. Next: init-scripts/add-worker.sh" ;;
        leaving) echo "unfinished: worker group $group is to go. Next: init-scripts/remove-worker.sh $group" ;;
        *) continue ;;
        esac
        result=1
    done < <(cat "$group_file" 2>/dev/null || true)
    return "$result"
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
    for service in "$@"; do
        services | cut -d ' ' -f 1 | has_line "$service" || die "there is no service $service" "one of those above"
    done
    if [[ $# -gt 0 ]]; then missing=("$@"); fi
    for service in "${missing[@]}"; do explain "$service"; done
    show_unfinished || failed=1
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
