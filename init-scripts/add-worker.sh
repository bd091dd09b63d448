#!/usr/bin/env bash
# Adds a worker group to the running stack. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/add-worker.sh

Adds a worker group with WORKER_MEMBERS servers (of the profile) and the next number that no group ever had:
certificates, secrets, a service for each server; waits until it serves, takes its first backup, and shows what the
agents say of it. They find it in etcd by themselves, without a restart; Prometheus, which has a list, is restarted.
With Citus Patroni registers the group, and the rebalance agent plans for it; without Citus it is a PostgreSQL of
its own: there is nothing to distribute.

If it was stopped, run it again: it goes on with the same group. init-scripts/remove-worker.sh takes one away again.

Exit: 0 the group serves and is well, 1 something failed, 2 wrong use.
TEXT
}

# The group that an earlier run has begun, or the next.
choose_group() {
    group=$(awk '$2 == "joining" { print $1; exit }' "$group_file" 2>/dev/null || true)
    [[ -z $group ]] || { say "goes on with worker group $group" && return 0; }
    group=$(($( (cat "$group_file" 2>/dev/null || worker_groups) | awk 'END { print $1 + 0 }') + 1))
    note_group "$group" joining
    say "adds worker group $group: $(members_of "$group" | xargs)"
}

has_tables() {
    [[ $(sql "$(primary_here "$group")" "$DATABASE" "SELECT count(*) > 0 FROM pgmesh.initialised") == t ]]
}

is_registered() {
    sql_is_in_database "SELECT count(*) FROM pg_dist_node WHERE groupid = $group AND noderole = 'primary' AND isactive" 1
}

sql_is_in_database() {
    [[ $(sql "$(for name in $(coordinators); do container_of "$name"; done | head -n 1)" "$DATABASE" "$1") == "$2" ]]
}

# knows AGENT COMMAND…: what the agent says names each server of the group.
knows() {
    local container member said
    container=$(container_of "$1")
    [[ -n $container ]] || return 0
    said=$(docker exec "$container" "$@" 2>/dev/null || true)
    for member in $(members_of "$group"); do grep -q "$member" <<<"$said" || return 1; done
}

main() {
    local group name members container
    case ${1:-} in
    '') ;;
    -h | --help) usage && return 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
    open_stack
    refuse_in_rotation
    choose_group
    mapfile -t members < <(members_of "$group")
    SECONDS=$SECONDS "$scripts/certificates.sh" "$up/values"
    SECONDS=$SECONDS "$scripts/secrets.sh" "$up/values"
    render_all
    note_failed_tasks
    deploy networks "${members[@]}"
    wait_until_running
    for name in "${members[@]}"; do wait_hint="init-scripts/status.sh $name" wait_for 600 "$name serves" serves "$name"; done
    if [[ -n $(primary_here "$group") ]]; then
        wait_hint="docker service logs ${STACK}_${members[0]}" wait_for 180 "group $group has its roles" has_tables
    fi
    if [[ $CITUS == yes ]]; then
        wait_hint="init-scripts/status.sh" wait_for 120 "Patroni registers group $group in pg_dist_node" is_registered
        say "  Patroni has registered it: the rebalance agent plans for it"
    else
        say "  no Citus: the group is a PostgreSQL of its own, and there is nothing to distribute to it"
    fi
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    deploy stack
    check_updates
    wait_until_running
    prune
    for name in "lag-exporter show" "health-monitor check --format json"; do
        # shellcheck disable=SC2086  # words
        wait_hint="docker service logs ${STACK}_${name%% *}" wait_for 120 "${name%% *} sees group $group" knows $name
    done
    # It has no backup yet.
    wait_until_well 300 '^[A-Z]+ +repository '
    say "takes the first backup of group $group"
    agent backup --group "$group" || die "the backup failed" "docker service logs ${STACK}_backup-agent; then start again"
    wait_until_well 300
    note_group "$group" ''
    say "worker group $group serves, and all is well. What the agents say of it:"
    container=$(container_of lag-exporter)
    [[ -z $container ]] || docker exec "$container" lag-exporter show | sed -n "1p; /worker-$group-/p"
    agent list --group "$group"
}

main "$@"
