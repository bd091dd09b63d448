#!/usr/bin/env bash
# Restores all databases of the stack from the repository. See --help.
# shellcheck disable=SC2016  # the shells of the containers expand what is theirs
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

readonly restore_limit_s=${RESTORE_LIMIT_S:-86400}
# The backup agent stores WAL within a second or so of its commit.
readonly archive_limit_s=${ARCHIVE_LIMIT_S:-60}

usage() {
    cat <<'TEXT'
Usage: init-scripts/restore-cluster.sh TARGET [--system-identifier GROUP=N…] [--force] [--yes]
       init-scripts/restore-cluster.sh --remove-old-volumes [--yes]

Ends all database servers, restores each group from the repository into new volumes, up to the target, and starts
the stack with them: Patroni begins anew, standbys are copied from their primaries. Whoever writes has to wait.
It asks before it begins, and refuses unless the repository has all that is committed in each group, as the primary
and the backup agent confirm. If a group cannot be restored to the target, all is put back as it was.

TARGET, the same for all groups:
  --latest               the end of the WAL of each group
  --target-time TIME     the last commit at or before '2026-03-01 14:30:00+00' (a zone is required)
  --target-name NAME     a restore point that was made in each group (pg_create_restore_point); with Citus
                         citus_create_restore_point makes one that is consistent over all of them

A time is one by each primary's own clock: with Citus a transaction over several groups that committed at that very
moment may be there in some and not in others until Citus recovers it (within a minute); a named point has none.

  --system-identifier    the database cluster, where the repository has several of a group
  --force                after a disaster, where a primary or the backup agent does not come back: restores what the
                         repository has, whatever else was committed. That is in the old volumes only, if anywhere
  --yes                  does not ask
  --remove-old-volumes   removes the volumes that the databases had before (on this machine). Until then they stay, to
                         look into. It asks, and leaves those of removed worker groups: they are remove-worker.sh's

Exit: 0 done, 1 refused or failed, 2 wrong use.
TEXT
}

job() { printf '%s_restore-%s' "$STACK" "$1"; }

# With their containers, which have the volumes in use.
remove_jobs() {
    local group
    for group in $(groups); do
        docker service rm "$(job "$group")" >/dev/null 2>&1 || true
        docker ps --all --quiet --filter "label=com.docker.swarm.service.name=$(job "$group")" | xargs -r docker rm --force >/dev/null 2>&1 || true
    done
}

# start_job GROUP VOLUMES ARGUMENT…: on the machine of the group's first server, with its volume. Not as a job of
# Swarm's: with several managers that may run more than once, at the same time (moby/moby#53632).
start_job() {
    local group=$1 volumes=$2 member options
    shift 2
    member=$(members_of "$group" | head -n 1)
    mapfile -t options < <(options_of_agent backup-agent | tr ' ' '\n')
    docker service create --detach --quiet --restart-condition none --name "$(job "$group")" \
        --label "com.docker.stack.namespace=$STACK" --container-label "com.docker.stack.namespace=$STACK" \
        --init --no-healthcheck --endpoint-mode dnsrr --network "${STACK}_data" --constraint "node.labels.pgmesh.place == $(place_of "$member")" \
        --mount "type=volume,source=${STACK}_$member$volumes,target=/var/lib/postgresql/17,volume-label=com.docker.stack.namespace=$STACK" \
        --config "source=$restored_conf,target=/etc/pgmesh/postgresql.conf" "${options[@]}" --no-resolve-image \
        --entrypoint bash "$BACKUP_AGENT_IMAGE" -euo pipefail -c "$restore_script" restore "$group" "$@" >/dev/null
}

# The recovery ends here, and not under Patroni, which would have it follow somebody. It prints the identifier.
readonly restore_script='
    group=$1 && shift
    rm -rf "$PGDATA"
    { cat /etc/pgmesh/backup-agent.toml && printf "\n[wal]\ngroup = %s\n" "$group"; } >/tmp/backup-agent.toml
    backup-agent --config /tmp/backup-agent.toml --log-format text restore --group "$group" --to "$PGDATA" --archive-mode preserve --target-action promote "$@"
    # As large as they were: Patroni starts a server with no less than it had last, and would want a restart.
    sizes=$(pg_controldata --pgdata="$PGDATA" | sed -nE "
        s/^(max_connections|max_worker_processes|max_wal_senders) setting: +([0-9]+)/-c \1=\2/p
        s/^max_prepared_xacts setting: +([0-9]+)/-c max_prepared_transactions=\1/p
        s/^max_locks_per_xact setting: +([0-9]+)/-c max_locks_per_transaction=\1/p" | xargs)
    pg_ctl --pgdata="$PGDATA" --wait --timeout=86400 --options="-c config_file=/etc/pgmesh/postgresql.conf -c hot_standby=off $sizes" start
    until [[ $(psql --no-psqlrc --no-align --tuples-only postgres --command "SELECT pg_is_in_recovery()" || true) == f ]]; do
        pg_ctl --pgdata="$PGDATA" status >/dev/null || { echo "PostgreSQL ended before it reached the target"; exit 1; }
        sleep 1
    done
    pg_ctl --pgdata="$PGDATA" --wait --timeout=600 --mode=fast stop
    pg_controldata --pgdata="$PGDATA" | sed -n "s/^Database system identifier: */identifier=/p"'

state_of_job() {
    docker service ps --format '{{.CurrentState}}' "$(job "$1")" | head -n 1
}

log_of_job() {
    timeout 30 docker service logs --raw "$(job "$1")" 2>&1
}

# wait_for_jobs: until each has ended; fails if one failed.
wait_for_jobs() {
    local group began=$SECONDS failed=0
    for group in $(groups); do
        until [[ $(state_of_job "$group") =~ ^(Complete|Failed|Rejected|Shutdown) ]]; do
            ((SECONDS - began < restore_limit_s)) || break
            sleep 1
        done
        if [[ $(state_of_job "$group") == Complete* ]]; then
            say "  group $group is ready"
        else
            failed=1
            say "  group $group FAILED: $(state_of_job "$group"), $(docker service ps --no-trunc --format '{{.Error}}' "$(job "$group")" | head -n 1)"
            log_of_job "$group" | tail -n 8 | sed 's/^/          /'
        fi
    done
    return "$failed"
}

# A recovery finds a time only by a commit after it, and a group that nobody writes to has none.
commit_once() {
    local group
    for group in $(groups); do
        on_primary "$group" "SELECT pg_logical_emit_message(true, 'pgmesh', 'restore')" >/dev/null ||
            say "  the primary of group $group takes no writes: its last commit must be after the target"
    done
}

# What is committed and not in the repository would be in the old volumes only. A group without servers was ended by a
# run before this one, which looked.
check_repository() {
    local group lsn stored began
    for group in $(groups); do
        [[ -n $(for name in $(members_of "$group"); do spec_of_service "$name"; done) ]] || continue
        lsn=$(on_primary "$group" 'SELECT pg_current_wal_flush_lsn()') || lsn=''
        [[ -n $lsn ]] ||
            die "group $group has no primary that answers: nobody can say whether the repository has all that was committed there" \
                "bring it back (init-scripts/status.sh); if it is lost: --force restores what the repository has"
        began=$SECONDS
        until stored=$(on_primary "$group" "SELECT max(flush_lsn), max(flush_lsn) >= '$lsn' FROM pg_stat_replication WHERE application_name = 'pgmesh_backup'") &&
            [[ $stored == *'|t' ]]; do
            ((SECONDS - began < archive_limit_s)) ||
                die "group $group has committed up to $lsn, and the repository has $(if [[ $stored == [0-9A-F]* ]]; then echo "it up to ${stored%|*}"; else echo "less: no backup agent receives its WAL"; fi)" \
                    "docker service logs ${STACK}_backup-agent; mend it, start again. --force would lose what is missing"
            sleep 1
        done
    done
}

# Coordinators first: nobody begins anything new on the workers then.
end_databases() {
    local name there=()
    for name in $(databases); do
        [[ -z $(spec_of_service "$name") ]] || there+=("${STACK}_$name")
    done
    say "ends the database servers"
    for name in "${there[@]}"; do docker service rm "$name" >/dev/null; done
    wait_hint=$ending_hint wait_for 180 "the database servers end" no_databases
}

no_databases() {
    local name
    [[ -z $(ending) ]] || return 1
    for name in $(databases); do [[ -z $(container_of "$name") ]] || return 1; done
}

# Patroni's keys go, but for its settings and the identifier: with that a server whose volume is empty waits to be
# copied, and makes no new database.
begin_anew_in_etcd() {
    local group identifiers=() container
    for group in $(groups); do
        identifiers+=("$group=$(log_of_job "$group" | sed -n 's/^identifier=\([0-9]*\).*/\1/p')")
        [[ ${identifiers[-1]} =~ =[0-9]+$ ]] || die "group $group does not say which database it is" "docker service logs $(job "$group")"
    done
    container=$(for name in $(etcd_members); do container_of "$name"; done | head -n 1)
    [[ -n $container ]] || die "no etcd runs on this machine" "run this where one does"
    docker exec "$container" bash -euo pipefail -c '
        export ETCDCTL_CACERT=/etc/pgmesh/ca.crt ETCDCTL_CERT=/run/secrets/tls_certificate ETCDCTL_KEY=/run/secrets/tls_key ETCDCTL_ENDPOINTS=https://localhost:2379
        prefix=$1 && shift
        for it in "$@"; do
            for key in members/ leader status sync history failover failsafe; do etcdctl del --prefix "$prefix/${it%%=*}/$key" >/dev/null; done
            etcdctl put "$prefix/${it%%=*}/initialize" "${it#*=}" >/dev/null
        done' begin "/service/$STACK" "${identifiers[@]}"
}

has_leader() {
    patroni_members "$1" | grep ' Leader running ' >/dev/null
}

start_databases() {
    local name names group
    render_all
    mapfile -t names < <(databases)
    note_failed_tasks
    deploy networks "${names[@]}"
    wait_until_running
    for group in $(groups); do wait_hint="init-scripts/status.sh $(members_of "$group" | head -n 1)" wait_for 300 "group $group has a primary" has_leader "$group"; done
    for name in "${names[@]}"; do wait_hint="init-scripts/status.sh $name" wait_for 600 "$name serves" serves "$name"; done
}

# put_back NEXT: what fails before the new volumes are whole leaves everything as it was. Runs as the script ends,
# when the variables of main may be gone.
put_back() {
    trap - EXIT
    say "starts the databases as they were"
    remove_jobs
    start_databases
    say "the databases run as before: nothing was replaced"
    remove_generation "$1" || say "  what was restored stays in volumes that end with $1; the next restore removes them"
}

# remove_generation N: volumes that a restore made and did not end.
remove_generation() {
    docker volume ls --format '{{.Name}}' | { grep -E "^${STACK}_(coordinator|worker)-.*$1\$" || true; } | xargs -r docker volume rm >/dev/null
}

remove_volumes() {
    local name there names=()
    there=$(docker volume ls --format '{{.Name}}')
    for name in $(databases); do
        mapfile -t -O "${#names[@]}" names < <(grep -E "^${STACK}_$name(_[0-9]+)?\$" <<<"$there" | grep -vxF "${STACK}_$name$(generation)")
    done
    [[ ${#names[@]} -gt 0 ]] || { say "no old volume of a database is here" && return 0; }
    ask "These volumes, and what is in them and not in the repository, are lost for good: ${names[*]}"
    docker volume rm "${names[@]}" >/dev/null
    say "removed volumes: ${names[*]}"
}

# The next generation's volumes are new.
restore() {
    local group argument identifier
    remove_generation "$next"
    say "restores the groups $(groups | xargs)"
    for group in $(groups); do
        argument=()
        for identifier in "${identifiers[@]}"; do
            [[ ${identifier%%=*} != "$group" ]] || argument=(--system-identifier "${identifier#*=}")
        done
        start_job "$group" "$next" "${target[@]}" "${argument[@]}"
    done
    wait_for_jobs || die "a group could not be restored" "see the lines above"
    begin_anew_in_etcd
    trap - EXIT
    echo "$next" >"$up/generation"
}

main() {
    local action='' sure=no forced=no target=() identifiers=() restored_conf next
    while [[ $# -gt 0 ]]; do
        case $1 in
        --latest) action+=restore ;;
        --target-time | --target-name) [[ $# -gt 1 ]] || { usage >&2 && exit 2; } && action+=restore && target=("$1" "$2") && shift ;;
        --system-identifier) [[ ${2:-} =~ ^[0-9]+=[0-9]+$ ]] || { usage >&2 && exit 2; } && identifiers+=("$2") && shift ;;
        --remove-old-volumes) action+=remove_volumes ;;
        --force) forced=yes ;;
        --yes) sure=yes ;;
        -h | --help) usage && return 0 ;;
        *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    case $action in restore | remove_volumes) ;; *) usage >&2 && exit 2 ;; esac
    open_stack
    [[ $action != remove_volumes ]] || { remove_volumes && return 0; }
    agent list || true
    ask "All databases of the stack $STACK end now, and what runs is replaced (${target[*]:-the end of the WAL}); its volumes are kept.$([[ $forced == no ]] || echo " Whether the repository has all that was committed is not looked at.")"
    restored_conf=${STACK}_restored.conf_$(content_hash "$root/configs/postgres/restored.conf")
    docker config inspect "$restored_conf" >/dev/null 2>&1 ||
        docker config create --label "com.docker.stack.namespace=$STACK" "$restored_conf" "$root/configs/postgres/restored.conf" >/dev/null
    next=_$(($(generation | tr -d _) + 1))
    remove_jobs
    commit_once
    [[ $forced == yes ]] || check_repository
    # shellcheck disable=SC2064  # as it is now
    trap "put_back $next" EXIT
    end_databases
    restore
    remove_jobs
    say "starts the databases"
    start_databases
    bring_in_dynamic_settings
    say "everything runs; waits until it is well, and has a backup that leads here"
    wait_until_well 900
    prune
    say "all is well. The volumes from before are kept until: init-scripts/restore-cluster.sh --remove-old-volumes"
}

main "$@"
