#!/usr/bin/env bash
# Takes a worker group out of the running stack. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

readonly least=2

usage() {
    cat <<'TEXT'
Usage: init-scripts/remove-worker.sh GROUP [--remove-volumes]

Takes a worker group away: with Citus it takes no new shards any more, and the rebalance agent moves those that it
has; then a backup of it is taken, its services end, and Patroni, Citus, the health monitor and Prometheus forget
it. Its backups stay in the repository. So do its volumes, unless --remove-volumes is given: on this machine; on
others they are removed by hand.

Refused: below two worker groups; while the cluster is not well; while the rebalance agent cannot empty it (it
must move shards: REBALANCE_MODE=apply in the profile); and without Citus while tables stand there, which nobody else can move.

If it was stopped, run it again. Run again with --remove-volumes, it removes the volumes that were kept.

Exit: 0 the group is gone, 1 refused or failed, 2 wrong use.
TEXT
}

volumes_of_group() {
    docker volume ls --format '{{.Name}}' | grep -E "^${STACK}_worker-$group-[0-9]+(_[0-9]+)?\$" || true
}

remove_volumes() {
    local names
    mapfile -t names < <(volumes_of_group)
    if [[ ${#names[@]} -eq 0 ]]; then
        say "no volume of worker group $group is on this machine"
    elif [[ $volumes == yes ]]; then
        docker volume rm "${names[@]}" >/dev/null
        say "removed volumes: ${names[*]}"
    else
        say "its volumes stay: ${names[*]} (init-scripts/remove-worker.sh $group --remove-volumes removes them)"
    fi
}

# Whether it may go at all.
check_group() {
    local found other stay=0
    for other in $(worker_groups); do
        [[ $other == "$group" || -n $(state_of_group "$other") ]] || stay=$((stay + 1))
    done
    ((stay >= least)) ||
        die "worker group $group is one of the last $least, and there are never fewer (one that joins or leaves does not count)" "init-scripts/add-worker.sh first"
    [[ $(state_of_group "$group") != joining ]] || die "worker group $group is only half there" "init-scripts/add-worker.sh first: it goes on"
    found=$(findings) || die "the cluster is not well: $(head -n 1 <<<"$found" | tr -s ' ')" "init-scripts/status.sh; mend it, start again"
}

superuser() {
    local container
    container=$(primary_here "$1")
    [[ -n $container ]] || die "the primary of group $1 is not on this machine" "init-scripts/switchover.sh $1 --to a server of this machine"
    sql "$container" "$DATABASE" "$2"
}

drain() {
    if [[ $CITUS == yes ]]; then
        say "worker group $group takes no new shards; the rebalance agent moves those that it has"
        superuser 0 "SELECT citus_set_node_property(nodename, nodeport, 'shouldhaveshards', false)
            FROM pg_dist_node WHERE groupid = $group AND noderole = 'primary'" >/dev/null
        run_agent rebalance-agent drain "$group" --wait ||
            die "worker group $group is not empty" "see the line above; on $(machine_of rebalance-agent): docker exec \$(docker ps -qf name=${STACK}_rebalance-agent) rebalance-agent status"
    else
        refuse_tables
    fi
}

# catalogue DATABASE SQL: of the group's primary; on another machine over the network, as a role that reads names.
# shellcheck disable=SC2016  # the inner shell expands what is its own
catalogue() {
    local container
    container=$(container_of "$leader")
    if [[ -n $container ]]; then
        sql "$container" "$1" "$2"
    else
        docker exec "$(container_of "$(any_database)")" bash -c '
            export PGPASSWORD=$(</run/secrets/pgmesh_health_password) PGDATABASE=$2 PGCONNECT_TIMEOUT=5
            exec psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 --command "$3" \
                "host=$1 user=pgmesh_health sslmode=verify-full sslrootcert=/etc/pgmesh/ca.crt"' client "$leader" "$1" "$2"
    fi
}

# Tables in any database, but for what init-scripts/ made there.
refuse_tables() {
    local leader database names found
    leader=$(leader_of "$group")
    [[ -n $leader ]] || die "worker group $group has no primary now" "init-scripts/status.sh; mend it, start again"
    names=$(catalogue postgres 'SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate') ||
        die "the primary of worker group $group does not say which databases it has" "see the message above, start again"
    while IFS= read -r database; do
        found=$(catalogue "$database" "SELECT string_agg(oid::regclass::text, ', ') FROM (
            SELECT oid FROM pg_class WHERE relkind IN ('r', 'p', 'm') AND relpersistence <> 't'
                AND relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema', 'pgmesh') LIMIT 5) AS tables" </dev/null) ||
            die "database $database of worker group $group does not say which tables it has" "see the message above; the superuser of $(machine_of "$leader") may look there"
        [[ -z $found ]] || die "worker group $group has tables of its own in database $database: $found" \
            "without Citus nobody moves them: copy them elsewhere (pg_dump) and drop them there, then start again"
    done <<<"$names"
}

no_containers() {
    local name
    [[ -z $(ending) ]] || return 1
    for name in "${members[@]}"; do [[ -z $(container_of "$name") ]] || return 1; done
}

# What Patroni keeps of it in etcd; it asks for each word of this.
forget_in_patroni() {
    local options leader=''
    mapfile -t options < <(group_options "$group")
    leader=$(patroni_members "$group" | awk '$2 == "Leader" { print $1 }' || true)
    printf '%s\n' "${options[0]}" 'Yes I am aware' ${leader:+"$leader"} |
        docker exec --interactive "$(container_of "$(any_database)")" patronictl remove "${options[@]}" >"$cache/log/patroni-remove.log" 2>&1 ||
        die "patronictl could not remove group $group" "see $cache/log/patroni-remove.log"
}

# As its primary ended, the coordinators' Patroni began a transaction that renames it, and waits there for the next one,
# with a lock on pg_dist_node. Citus removes a node that does not answer only once it is disabled.
forget_in_citus() {
    superuser 0 "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE application_name = 'Patroni citus' AND state = 'idle in transaction' AND query LIKE '%citus_update_node%'" >/dev/null
    superuser 0 "SELECT citus_disable_node(nodename, nodeport, true) FROM pg_dist_node WHERE groupid = $group AND noderole = 'primary' AND isactive" >/dev/null
    superuser 0 "SELECT citus_remove_node(nodename, nodeport) FROM pg_dist_node WHERE groupid = $group ORDER BY noderole DESC" >/dev/null
}

forget() {
    local name
    forget_in_patroni
    if [[ $CITUS == yes ]]; then
        forget_in_citus
        run_agent rebalance-agent undrain "$group" >/dev/null
    fi
    for name in "${members[@]}"; do
        run_agent health-monitor forget --group "$group" "$name" >"$cache/log/forget.log" 2>&1 ||
            die "the health monitor does not forget $name" "see $cache/log/forget.log, start again"
        rm -f "$secrets/tls_${name}_certificate" "$secrets/tls_${name}_key" "$up/certificates/$name"
    done
}

main() {
    local group='' volumes=no members name services_there=()
    while [[ $# -gt 0 ]]; do
        case $1 in
        --remove-volumes) volumes=yes ;;
        -h | --help) usage && return 0 ;;
        *) [[ $1 =~ ^[1-9][0-9]*$ && -z $group ]] || { usage >&2 && exit 2; } && group=$1 ;;
        esac
        shift
    done
    [[ -n $group ]] || { usage >&2 && exit 2; }
    open_stack
    refuse_in_rotation
    if [[ $(state_of_group "$group") == removed ]]; then
        say "worker group $group is removed already"
        remove_volumes
        return 0
    fi
    # Patroni is asked in one, before and after the group's own are gone.
    any_database >/dev/null
    worker_groups | has_line "$group" || die "there is no worker group $group" "one of: $(worker_groups | xargs)"
    mapfile -t members < <(members_of "$group")
    for name in "${members[@]}"; do
        [[ -z $(spec_of_service "$name") ]] || services_there+=("${STACK}_$name")
    done
    if [[ ${#services_there[@]} -gt 0 ]]; then
        check_group
        drain
        say "takes the last backup of worker group $group"
        agent backup --group "$group" || die "the backup failed: nothing was removed" "docker service logs ${STACK}_backup-agent; then start again"
        note_group "$group" leaving
        say "ends ${services_there[*]}"
        docker service rm "${services_there[@]}" >/dev/null
    fi
    wait_hint=$ending_hint wait_for 180 "the containers of worker group $group end" no_containers
    forget
    note_group "$group" removed
    render_all
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    deploy stack
    check_updates
    wait_until_running
    prune
    wait_until_well 300
    say "worker group $group is gone, and all is well; its backups stay (backup-agent list --group $group)"
    remove_volumes
}

main "$@"
