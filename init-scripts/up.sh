#!/usr/bin/env bash
# Brings up the stack on Docker Swarm and proves a backup by restoring it. See --help.
# shellcheck disable=SC2153  # variables of the profile
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

readonly scripts="$root/init-scripts"
readonly config=/etc/pgmesh/backup-agent.toml
readonly database_data=/var/lib/postgresql/17
readonly demo_scale=10
readonly start_limit_s=600
readonly copy=pgmesh-restored
readonly load=pgmesh-load

usage() {
    cat <<'TEXT'
Usage: init-scripts/up.sh [OPTION…] [PROFILE]

On a fresh Debian 12 with cargo, one command: installs and starts Docker if it is missing, builds the agents and
the images, makes certificates and secrets (.cache/up), makes a Swarm of this machine, deploys stack.yml with the
profile, waits until the health monitor finds everything well, takes a backup of each group, and proves that of
the coordinators: it restores it to a moment T, while a load writes on, into a container of its own, and compares
the copy with what the source was at T.

PROFILE is small (one machine, 2 cores and 8 GiB; the default), production, or a file like configs/small.env.
What the environment has already is not changed by the profile: DATABASE=shop init-scripts/up.sh

  --no-build   takes the programs that lie in .cache/image instead of building them
  --no-proof   ends when everything is well
  -h, --help   this text

Running it again brings in what has changed, one server after the other, and repeats the proof; it may be
stopped and started again at any point. init-scripts/status.sh says what does not start, and why;
init-scripts/down.sh removes everything. Images of your own: POSTGRES_IMAGE, ETCD_IMAGE, HAPROXY_IMAGE,
PGBOUNCER_IMAGE, REDIS_IMAGE, PROMETHEUS_IMAGE, ALERTMANAGER_IMAGE, GRAFANA_IMAGE, …_AGENT_IMAGE;
POSTGRES_BASE_IMAGE is what the database image is made from (one with Citus, for instance).

Exit: 0 all is well and the copy equals the source at T, 1 something failed, 2 wrong use.
TEXT
}

# --- programs and images --------------------------------------------------------------------------

# They are built one after the other: together, the features of one would get into the others.
build_programs() {
    local quiet=() agent
    [[ -t 2 ]] || quiet=(--quiet)
    say "builds the agents and the S3 server (the first time about ten minutes)"
    cd "$root"
    for agent in "${agents[@]}"; do build_program "$agent" "$agent"; done
    build_program cluster-tests s3-server
}

# build_program PACKAGE NAME
build_program() {
    cargo build --release --locked "${quiet[@]}" --package "$1" --bin "$2" ||
        die "$2 does not build" "see the lines above"
    stage "$2"
}

# Puts a program where the images take it from, and only if it changed: the image follows from it.
stage() {
    local built="${CARGO_TARGET_DIR:-$root/target}/release/$1" staged="$cache/image/$1"
    mkdir -p "$cache/image"
    cmp --silent "$built" "$staged" || install -m 0755 "$built" "$staged"
}

check_programs() {
    local name
    for name in "${agents[@]}" s3-server; do
        [[ -x $cache/image/$name ]] || die "$cache/image/$name is not there" "leave --no-build away"
    done
}

# The images wait for the network and the disk while cargo keeps the cores busy.
build() {
    local images
    [[ $build == no ]] || ensure_cargo
    ensure_docker
    if [[ $build == yes ]]; then
        (ensure_base_image && ensure_stack_images) &
        images=$!
        build_programs
        wait "$images" || die "an image is not there" "see the message above"
    fi
    check_programs
    ensure_base_image
    ensure_stack_images
    ensure_agent_images
    detect_citus
}

# --- the Swarm ------------------------------------------------------------------------------------

ensure_swarm() {
    local state manager address
    state=$(docker info --format '{{.Swarm.LocalNodeState}}')
    manager=$(docker info --format '{{.Swarm.ControlAvailable}}')
    [[ $state != active || $manager != true ]] || return 0
    [[ $state == inactive ]] || die "this machine is in a Swarm ($state), and is no manager of it" \
        "run this on a manager, or: docker swarm leave"
    # One machine alone needs no address that others reach, and none that may change.
    address=${ADVERTISE_ADDRESS:-127.0.0.1}
    [[ $PLACES == 1 || -n ${ADVERTISE_ADDRESS:-} ]] ||
        die "the profile wants $PLACES machines, and this one is in no Swarm" \
            "docker swarm init --advertise-addr ADDRESS here, docker swarm join on the others, then start again"
    say "makes a Swarm of this machine"
    docker swarm init --advertise-addr "$address" --listen-addr "$address:2377" >"$cache/log/swarm.log" 2>&1 ||
        die "docker swarm init failed: $(tail -n 1 "$cache/log/swarm.log")" "see $cache/log/swarm.log"
    : >"$cache/swarm-is-ours"
}

# Each place needs one machine; on a small one this machine is the only place.
ensure_places() {
    local place
    for ((place = 1; place <= PLACES; place++)); do
        [[ -z $(docker node ls --quiet --filter "node.label=pgmesh.place=$place") ]] || continue
        [[ $PLACES == 1 ]] || die "no machine of the Swarm has the label pgmesh.place=$place" \
            "docker node update --label-add pgmesh.place=$place MACHINE (docker node ls shows them)"
        docker node update --label-add pgmesh.place=1 "$(docker info --format '{{.Swarm.NodeID}}')" >/dev/null
    done
}

# Whether this kernel can do what Docker's encrypted networks do: ESP with AES-GCM.
kernel_encrypts() {
    local state=(src 127.0.0.1 dst 127.0.0.2 proto esp spi 0x70676d)
    have ip || ensure_packages iproute2
    as_root modprobe --quiet esp4 2>/dev/null || true
    as_root ip xfrm state add "${state[@]}" mode transport \
        aead 'rfc4106(gcm(aes))' 0x0102030405060708090a0b0c0d0e0f1011121314 128 2>/dev/null || return 1
    as_root ip xfrm state delete "${state[@]}"
}

choose_encryption() {
    NETWORK_OPTIONS='{}'
    case $NETWORK_ENCRYPTION in
    no) ;;
    yes | auto)
        if kernel_encrypts; then
            NETWORK_OPTIONS='{encrypted: "true"}'
        elif [[ $NETWORK_ENCRYPTION == yes ]]; then
            die "this kernel cannot encrypt overlay networks (ESP with AES-GCM)" \
                "take one with CONFIG_INET_ESP, or set NETWORK_ENCRYPTION=no: TLS is there in any case"
        else
            say "  overlay networks without encryption: this kernel has no ESP. One machine alone needs none"
        fi
        ;;
    *) die "NETWORK_ENCRYPTION=$NETWORK_ENCRYPTION" "yes, no or auto" ;;
    esac
    # Docker does not change a network that is there.
    local there
    there=$(docker network inspect --format '{{if index .Options "encrypted"}}yes{{else}}no{{end}}' "${STACK}_data" 2>/dev/null) || return 0
    [[ $there == yes && $NETWORK_OPTIONS != '{}' || $there == no && $NETWORK_OPTIONS == '{}' ]] ||
        die "the networks of the running stack are encrypted: $there, and that cannot be changed while it runs" \
            "init-scripts/down.sh --keep-data, then start again; or set NETWORK_ENCRYPTION as it was"
}

# Before the first deployment only: later they are ours.
check_ports() {
    local port
    [[ -z $(services) ]] || return 0
    for port in 5432 5433 6432 8404 9090 9631; do
        ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null ||
            die "something listens on port $port of this machine already" "stop it (ss -ltnp shows it), then start again"
    done
}

# --- deploying ------------------------------------------------------------------------------------

# deploy FILE…: those of $RENDERED.
deploy() {
    local file files=()
    for file in "$@"; do files+=(--compose-file "$RENDERED/$file.yml"); done
    docker stack deploy --with-registry-auth --resolve-image never "${files[@]}" "$STACK" >"$cache/log/deploy.log" 2>&1 ||
        die "docker stack deploy failed: $(tail -n 1 "$cache/log/deploy.log")" "see $cache/log/deploy.log and $RENDERED"
}

spec_of_service() {
    docker service inspect --format '{{index .Spec.Labels "pgmesh.spec"}}' "${STACK}_$1" 2>/dev/null || true
}

spec_of_file() {
    sed -n 's/.*pgmesh\.spec: "\([0-9a-f]*\)".*/\1/p' "$RENDERED/$1.yml"
}

# One member after the other, and a primary only once another one leads.
update_member() {
    local member=$1 group deployed_at
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    if [[ $member == coordinator-* || $member == worker-* ]]; then
        group=$(group_of "$member")
        if [[ $(leader_of "$group") == "$member" && $(members_of "$group" | wc -l) -gt 1 ]]; then
            say "  $member hands over its group"
            patronictl "$member" switchover --leader "$member" --force >"$cache/log/switchover.log" 2>&1 ||
                die "the switchover away from $member failed" "see $cache/log/switchover.log; init-scripts/status.sh"
        fi
    fi
    say "  updates $member"
    # What stack.yml has, the agents above all, comes last: it may need what the servers have then.
    deploy networks "$member"
    wait_hint="init-scripts/status.sh" wait_for 300 "$member is updated" update_is_over "$member"
    ! ended_badly "$member" || {
        "$scripts/status.sh" "$member" >&2 || true
        die "the update of $member did not start, and was rolled back" "see the lines above, mend it, start again"
    }
    wait_hint="init-scripts/status.sh" wait_for 600 "$member serves" serves "$member"
}

update_is_over() {
    case $(docker service inspect --format '{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}' "${STACK}_$1") in
    updating | rollback_started) return 1 ;;
    esac
}

# serves MEMBER: it is back in its role. Of one on another machine Swarm's word is taken.
serves() {
    local container
    [[ $(services | awk -v name="$1" '$1 == name { split($2, n, "/"); print n[1] }') -ge 1 ]] || return 1
    container=$(container_of "$1")
    [[ -n $container ]] || return 0
    [[ $(docker inspect --format '{{.State.Health.Status}}' "$container") == healthy ]] || return 1
    case $1 in
    coordinator-* | worker-*)
        [[ $(docker exec "$container" psql --no-psqlrc --quiet --no-align --tuples-only --dbname postgres --command \
            "SELECT NOT pg_is_in_recovery() OR EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')" 2>/dev/null) == t ]]
        ;;
    esac
}

deploy_all() {
    local member names changed=() missing
    # Those that a run before this one began, if it was stopped.
    while updating; do sleep 1; done
    mapfile -t names < <(members)
    mapfile -t missing < <(missing_services)
    # What does not run is made anew (its volumes stay): otherwise a mended service that takes its time would be
    # rolled back to what did not run.
    for member in "${missing[@]}"; do docker service rm "${STACK}_$member" >/dev/null; done
    if [[ -n $(services) ]]; then
        for member in "${names[@]}"; do
            [[ -z $(spec_of_service "$member") || $(spec_of_service "$member") == $(spec_of_file "$member") ]] || changed+=("$member")
        done
        [[ ${#changed[@]} -eq 0 ]] || say "updates what has changed: ${changed[*]}"
        for member in "${changed[@]}"; do update_member "$member"; done
    fi
    note_failed_tasks
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    say "deploys the stack: $(services | wc -l) services are there, $((${#names[@]} + $(grep -c '^    image:' "$RENDERED/stack.yml"))) are to be"
    deploy stack "${names[@]}"
}

# failed_tasks SERVICE: the ids of its tasks that failed, as far back as Swarm knows.
failed_tasks() {
    docker service ps --no-trunc --filter desired-state=shutdown --format '{{.ID}} {{.CurrentState}}' "${STACK}_$1" 2>/dev/null |
        awk '$2 == "Failed" || $2 == "Rejected" { print $1 }' | sort
}

# What failed before this deployment says nothing about it.
declare -A failed_before
note_failed_tasks() {
    local service
    for service in $(missing_services); do failed_before[$service]=$(failed_tasks "$service"); done
}

failures_since() {
    comm -13 <(printf '%s\n' "${failed_before[$1]:-}") <(failed_tasks "$1") | wc -l
}

# ended_badly SERVICE: its update since the deployment, if Swarm gave it up.
ended_badly() {
    docker service inspect --format '{{if .UpdateStatus}}{{.UpdateStatus.State}} {{.UpdateStatus.StartedAt.Format "2006-01-02T15:04:05"}}{{end}}' \
        "${STACK}_$1" 2>/dev/null | awk -v since="$deployed_at" '$1 ~ /^(paused|rollback)/ && $2 >= since { found = 1 } END { exit !found }'
}

updating() {
    docker service ls --quiet --filter "label=com.docker.stack.namespace=$STACK" |
        xargs -r docker service inspect --format '{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}' | grep -q '^updating'
}

# An update that does not start is rolled back by Swarm: the stack runs on, and is not what was asked for.
check_updates() {
    local service
    while updating; do sleep 1; done
    for service in $(services | cut -d ' ' -f 1); do
        ! ended_badly "$service" || {
            "$scripts/status.sh" "$service" >&2 || true
            die "the update of $service did not start, and was rolled back" "see the lines above, mend it, start again"
        }
    done
}

# Until all tasks run. One that failed three times is looked at before the time is up.
wait_until_running() {
    local missing last='' began=$SECONDS service
    while missing=$(missing_services) && [[ -n $missing || -z $(services) ]]; do
        [[ $missing == "$last" ]] || say "  waits for ${missing//$'\n'/, }"
        last=$missing
        for service in $missing; do
            (($(failures_since "$service") < 3)) || {
                "$scripts/status.sh" "$service" >&2 || true
                die "$service does not start" "see the lines above, mend it, start again"
            }
        done
        ((SECONDS - began < start_limit_s)) || {
            "$scripts/status.sh" >&2 || true
            die "not everything runs within $start_limit_s s: ${missing//$'\n'/, }" "see the lines above, mend it, start again"
        }
        sleep 2
    done
}

patronictl() {
    local container
    container=$(container_of "$1")
    shift
    docker exec "$container" patronictl "$@"
}

# What bootstrap.dcs of patroni.yml says holds for new clusters only; so it is brought into those that run.
bring_in_dynamic_settings() {
    local group member options=()
    for group in $(groups); do
        member=$(leader_of "$group")
        [[ -n $member ]] || continue
        [[ $CITUS != yes ]] || options=(--group "$group")
        docker exec "$(container_of "$member")" bash -euo pipefail -c '
            python3 -c "import json, yaml; print(json.dumps(yaml.safe_load(open(\"/etc/pgmesh/patroni.yml\"))[\"bootstrap\"][\"dcs\"]))" |
                patronictl edit-config --apply - --force "$@"' patronictl "${options[@]}" >"$cache/log/edit-config-$group.log" 2>&1 ||
            die "patronictl edit-config failed in group $group" "see $cache/log/edit-config-$group.log"
        restart_where_pending "$group" "$member"
    done
}

# restart_where_pending GROUP PRIMARY: some settings hold after a restart only; the primary is last.
restart_where_pending() {
    local member pending
    # Patroni's next turn notices what has changed.
    sleep 5
    pending=$(docker exec "$(container_of "$2")" bash -c '
        patronictl list --format json "$1" |
            python3 -c "import json, sys; print(*[it[\"Member\"] for it in json.load(sys.stdin) if it.get(\"Pending restart\")])"' \
        list "$(patroni_scope "$1")")
    for member in $(members_of "$1" | grep -vx "$2") "$2"; do
        [[ " $pending " == *" $member "* ]] || continue
        say "  restarts PostgreSQL of $member, for settings that need it"
        patronictl "$2" restart --force --pending "$(patroni_scope "$1")" "$member" >"$cache/log/restart-$member.log" 2>&1 ||
            die "$member did not restart" "see $cache/log/restart-$member.log"
        wait_hint="init-scripts/status.sh" wait_for 120 "$member serves" serves "$member"
    done
}

# Secrets and configs that nobody uses any more: what was rotated, renewed, edited.
prune() {
    local name
    for name in $(docker secret ls --filter "label=$stack_label=$STACK" --format '{{.Name}}'); do
        grep -qF "\"$name\"" "$RENDERED"/*.yml || docker secret rm "$name" >/dev/null 2>&1 || true
    done
    for name in $(docker config ls --filter "label=com.docker.stack.namespace=$STACK" --format '{{.Name}}'); do
        grep -qF "\"$name\"" "$RENDERED"/*.yml || docker config rm "$name" >/dev/null 2>&1 || true
    done
}

# --- the verdict ----------------------------------------------------------------------------------

health() {
    local container
    container=$(container_of health-monitor)
    if [[ -n $container ]]; then docker exec "$container" health-monitor check; else health_elsewhere; fi
}

# health_elsewhere: the verdict of a health monitor on another machine, by its page, as `check` would print it.
health_elsewhere() {
    local machine body found
    machine=$(docker service ps --filter desired-state=running --format '{{.Node}}' "${STACK}_health-monitor" | head -n 1)
    [[ -n $machine ]] || return 3
    machine=$(docker node inspect --format '{{.Status.Addr}}' "$machine")
    body=$(exec 3<>"/dev/tcp/$machine/9631" && printf 'GET /status HTTP/1.0\r\n\r\n' >&3 && timeout 5 cat <&3) || return 3
    [[ $body == *'"verdict":'* ]] || return 3
    found=$(grep -oE '"component":\{[^}]*\},"verdict":\{"next":"([^"\\]|\\.)*","reason":"([^"\\]|\\.)*","since":[^,]*,"status":"(warning|unknown|critical)"' <<<"$body" |
        sed -E 's/.*"kind":"([a-z]*)","name":"([^"]*)".*"reason":"(.*)","since":.*"status":"([a-z]*)"$/\U\4\E  \1 \2  \3/' || true)
    [[ -n $found ]] || return 0
    printf 'STATUS\n%s\n\n' "$found"
    return 1
}

# findings [PATTERN]: what is not ok, but for lines that match; fails where there is something.
findings() {
    health >"$cache/log/health.log" 2>&1 && return 0
    sed -n '/^STATUS/,/^$/p' "$cache/log/health.log" | sed '1d;/^$/d' | grep -vE "${1:-^$}" && return 1
    # Without a table it could not say what is wrong.
    grep -q '^STATUS' "$cache/log/health.log"
}

# wait_until_well SECONDS [PATTERN]: the health monitor's verdict is ok, but for what matches.
wait_until_well() {
    local began=$SECONDS said='' found
    until found=$(findings "${2:-}"); do
        found=$(tr -s ' ' <<<"${found%%$'\n'*}")
        [[ -z $found || ${found%%[0-9]*} == "$said" ]] || say "  not yet: $found"
        said=${found%%[0-9]*}
        ((SECONDS - began < $1)) || {
            cat "$cache/log/health.log" >&2
            "$scripts/status.sh" >&2 || true
            die "the health monitor does not find everything well within $1 s" "see what it says above, mend it, start again"
        }
        sleep 2
    done
}

# --- the proof ------------------------------------------------------------------------------------

# Progress bars where this script writes to a terminal.
terminal=()
[[ ! -t 1 ]] || terminal=(--tty)

agent() {
    docker exec "${terminal[@]}" "$(container_of backup-agent)" backup-agent --config "$config" --log-format text "$@"
}

# sql CONTAINER DATABASE QUERY: as the superuser, inside the container.
sql() {
    docker exec "$1" psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 --dbname "$2" --command "$3"
}

sql_is() {
    [[ $(sql "$1" postgres "$2") == "$3" ]]
}

# A pgbench database, with some data that does not compress and a large object besides. The table
# "filled" comes last and says that all of it is there.
ensure_data() {
    [[ $(sql "$primary" demo "SELECT to_regclass('filled') IS NOT NULL" 2>/dev/null) != t ]] || return 0
    say "fills the database demo (pgbench scale $demo_scale)"
    docker exec --interactive "$primary" psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname postgres <<SQL
SET client_min_messages = 'warning';
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET pgaudit.log = 'none';
SET pg_stat_statements.track_utility = off;
DROP DATABASE IF EXISTS demo WITH (FORCE);
DROP ROLE IF EXISTS demo;
CREATE ROLE demo LOGIN PASSWORD '$(<"$up/demo_password")';
CREATE DATABASE demo OWNER demo;
SQL
    docker exec "$primary" pgbench --quiet --initialize --scale="$demo_scale" demo >"$cache/log/pgbench-init.log" 2>&1 ||
        die "pgbench could not fill the database" "see $cache/log/pgbench-init.log"
    docker exec --interactive "$primary" psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 demo >/dev/null <<'SQL'
CREATE TABLE attachments AS
SELECT n AS id, (SELECT string_agg(sha512(convert_to(n || '.' || i || random(), 'UTF8')), '')
                 FROM generate_series(1, 128) AS i) AS content
FROM generate_series(1, 2000) AS n;
SELECT lo_from_bytea(0, (SELECT content FROM attachments WHERE id = 1));
GRANT ALL ON ALL TABLES IN SCHEMA public TO demo;
CREATE TABLE filled ();
SQL
}

# As an application would: through HAProxy, by TLS, whose certificate it checks.
start_load() {
    stop_load
    docker run --detach --init --name "$load" --label "$stack_label=$STACK" --network "${STACK}_application" \
        --stop-timeout 5 --stop-signal SIGTERM --no-healthcheck --entrypoint bash \
        --volume "$up/ca.crt:/etc/pgmesh/ca.crt:ro" --volume "$up/demo_password:/demo_password:ro" --user 0 \
        "$POSTGRES_IMAGE" -c '
            export PGPASSWORD=$(</demo_password)
            exec pgbench --no-vacuum --client=2 --rate=100 --time=3600 --max-tries=1000 \
                "host=haproxy user=demo dbname=demo sslmode=verify-full sslrootcert=/etc/pgmesh/ca.crt"' >/dev/null
    wait_hint="docker logs $load" wait_for 30 "the load writes" \
        sql_is "$primary" "SELECT count(*) >= 1 FROM pg_stat_activity WHERE usename = 'demo'" t
}

# Until its last transaction is over.
stop_load() {
    docker rm --force --volumes "$load" >/dev/null 2>&1 || true
    wait_hint="look at pg_stat_activity" wait_for 30 "the load has left" \
        sql_is "$primary" "SELECT count(*) FROM pg_stat_activity WHERE usename = 'demo'" 0
}

# The repository holds what the backup agent confirms.
archive_all() {
    local lsn
    lsn=$(sql "$primary" postgres 'SELECT pg_current_wal_flush_lsn()')
    wait_hint="docker service logs ${STACK}_backup-agent" wait_for 120 "the repository has the WAL up to $lsn" sql_is "$primary" \
        "SELECT coalesce(max(flush_lsn) >= '$lsn', false) FROM pg_stat_replication WHERE application_name = 'pgmesh_backup'" t
}

# state_of CONTAINER: everything a client can see of a server, as one checksum. The restrict key is random
# unless given; rows come in the order of the heap, which is the same in a copy of the files.
state_of() {
    docker exec "$1" bash -o pipefail -c 'pg_dumpall --restrict-key=pgmesh | sha256sum | cut -d " " -f 1'
}

# rows_of CONTAINER: the tables with their counts, for people.
rows_of() {
    sql "$1" demo "SELECT string_agg(format('%s %s', relname, n), ', ' ORDER BY relname) FROM (
        SELECT relname, (xpath('/row/n/text()', query_to_xml(format('SELECT count(*) AS n FROM %I', relname), false, true, '')))[1] AS n
        FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace) AS tables"
}

# Nobody writes while the state is taken, so that the moment and the state belong together; then the
# load goes on, so that the restore has to stop in the middle of the WAL.
note_moment() {
    stop_load
    moment_state=$(state_of "$primary")
    moment_rows=$(rows_of "$primary")
    moment=$(sql "$primary" postgres "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')")
    start_load
    say "  T = $moment; the load writes on"
    wait_for 30 "the load has changed the database" load_wrote
    archive_all
}

load_wrote() {
    [[ $(rows_of "$primary") != "$moment_rows" ]]
}

# What the copy needs, in a volume that only its user can read: files of this machine belong to others.
# copy_options: the options of its container.
prepare_copy() {
    docker rm --force --volumes "$copy" >/dev/null 2>&1 || true
    docker volume rm --force "$copy" "$copy-secrets" >/dev/null
    docker volume create --label "$stack_label=$STACK" "$copy" >/dev/null
    docker volume create --label "$stack_label=$STACK" "$copy-secrets" >/dev/null
    (umask 077 && tar -C "$secrets" -c pgmesh_backup_password pgmesh_backup_key s3_access_key_id s3_secret_access_key \
        tls_backup-agent_certificate tls_backup-agent_key) |
        docker run --rm --interactive --user 0 --entrypoint bash --volume "$copy-secrets:/secrets" "$POSTGRES_IMAGE" -c '
            cd /secrets && tar -x && mv tls_backup-agent_certificate tls_certificate && mv tls_backup-agent_key tls_key &&
                chown -R 999:999 . && chmod 0400 * && chmod 0700 .'
    copy_options=(
        --network "${STACK}_data" --label "$stack_label=$STACK" --shm-size 256m
        --volume "$copy:$database_data" --volume "$copy-secrets:/run/secrets:ro"
        --volume "$RENDERED/backup-agent.toml:$config:ro" --volume "$up/ca.crt:/etc/pgmesh/ca.crt:ro"
        --volume "$root/configs/postgres/restored.conf:/etc/pgmesh/postgresql.conf:ro"
    )
}

# Into a new volume, by the agent's own command; then PostgreSQL replays the WAL up to T and opens the
# copy for writing. The copy never archives: it must not write into the repository of its source.
restore_copy() {
    prepare_copy
    docker run --rm --init "${terminal[@]}" "${copy_options[@]}" --entrypoint backup-agent "$BACKUP_AGENT_IMAGE" \
        --config "$config" --log-format text restore --group 0 --to "$database_data/main" --target-time "$moment" \
        --target-action promote --archive-mode off ||
        die "the restore failed" "see the message above"
    docker run --detach --init --name "$copy" "${copy_options[@]}" --no-healthcheck --entrypoint postgres-entrypoint \
        --stop-signal SIGINT "$BACKUP_AGENT_IMAGE" >/dev/null
    wait_hint="docker logs $copy" wait_for 300 "the copy has replayed to T" copy_settled
    copy_is_open || {
        docker logs --tail 5 "$copy" >&2
        die "PostgreSQL ended before it reached T" "docker logs $copy"
    }
}

copy_is_open() {
    sql_is "$copy" 'SELECT pg_is_in_recovery()' f
}

# Open, or ended: then there is nothing to wait for.
copy_settled() {
    copy_is_open || [[ $(docker inspect --format '{{.State.Running}}' "$copy") == false ]]
}

compare() {
    local state
    state=$(state_of "$copy")
    printf '          at T  %s\n          copy  %s\n' "$moment_rows" "$(rows_of "$copy")"
    printf '          at T  pg_dumpall sha256 %s\n          copy  pg_dumpall sha256 %s\n' "$moment_state" "$state"
    [[ $state == "$moment_state" ]] ||
        die "the copy differs from the source at $moment" "docker exec $copy pg_dumpall, and compare"
    docker exec "$copy" pg_amcheck --all --install-missing >"$cache/log/amcheck.log" 2>&1 ||
        die "pg_amcheck finds damage in the copy" "see $cache/log/amcheck.log"
}

# The copy has shown what it was for.
remove_copy() {
    stop_load
    docker rm --force --volumes "$copy" >/dev/null 2>&1 || true
    docker volume rm --force "$copy" "$copy-secrets" >/dev/null
}

back_up() {
    [[ $proof == yes ]] || ! findings >/dev/null || return 0
    [[ -n $(container_of backup-agent) ]] || {
        say "  the backup agent is on $(docker service ps --filter desired-state=running --format '{{.Node}}' "${STACK}_backup-agent"): take the first backup there," \
            "docker exec \$(docker ps -qf name=${STACK}_backup-agent) backup-agent backup"
        return 0
    }
    say "tries the chain of the backups"
    agent check || die "the check of the backup agent failed" "see the lines above"
    say "takes a backup of each group"
    agent backup || die "a backup failed" "docker service logs ${STACK}_backup-agent"
}

prove() {
    local leader primary copy_options
    leader=$(leader_of 0)
    [[ -n $leader ]] || {
        say "the coordinators' primary is on another machine: run init-scripts/up.sh there to prove the backup"
        return 0
    }
    primary=$(container_of "$leader")
    [[ -e $up/demo_password ]] || (umask 077 && random_hex 24 >"$up/demo_password")
    ensure_data
    start_load
    say "notes the state at a moment T"
    note_moment
    say "restores to T"
    restore_copy
    say "compares"
    compare
    remove_copy
    say "the copy equals the source at T, and pg_amcheck finds nothing"
}

print_where() {
    cat <<TEXT

Where to look
  health      http://127.0.0.1:9631        docker exec \$(docker ps -qf name=${STACK}_health-monitor) health-monitor check
  psql        host=localhost port=6432 (PgBouncer), 5432 (HAProxy, writes) or 5433 (reads) user=pgmesh_app dbname=$DATABASE
              sslmode=verify-full sslrootcert=$up/ca.crt, password in $secrets/pgmesh_app_password
  superuser   docker exec -it \$(docker ps -qf name=${STACK}_$(leader_of 0)) psql $DATABASE
  Patroni     docker exec \$(docker ps -qf name=${STACK}_coordinator-1) patronictl list
  backups     docker exec \$(docker ps -qf name=${STACK}_backup-agent) backup-agent list
  lag         docker exec \$(docker ps -qf name=${STACK}_lag-exporter) lag-exporter show
  shards      docker exec \$(docker ps -qf name=${STACK}_rebalance-agent) rebalance-agent status
  HAProxy     http://127.0.0.1:8404/stats  user pgmesh, password in $secrets/haproxy_password
  Prometheus  http://127.0.0.1:9090
  what fails  init-scripts/status.sh
  remove      init-scripts/down.sh
TEXT
}

bring_up() {
    ensure_swarm
    ensure_places
    choose_encryption
    check_ports
    say "makes certificates and secrets"
    SECONDS=$SECONDS "$scripts/certificates.sh" "$profile"
    SECONDS=$SECONDS "$scripts/secrets.sh" "$profile"
    remember_profile
    render_all
    deploy_all
    wait_until_running
    check_updates
    prune
    say "everything runs; waits until it is well"
    [[ $CITUS == yes ]] || say "  no Citus in the database image: worker groups are plain PostgreSQL, and the rebalance agent idles"
    # A new stack has no backup yet.
    wait_until_well 300 '^[A-Z]+ +repository '
    bring_in_dynamic_settings
    back_up
    if [[ -n $(container_of backup-agent) ]]; then wait_until_well 300; fi
}

main() {
    local build=yes proof=yes profile_name=''
    while [[ $# -gt 0 ]]; do
        case $1 in
        --no-build) build=no ;;
        --no-proof) proof=no ;;
        -h | --help) usage && return 0 ;;
        -*) usage >&2 && exit 2 ;;
        *) [[ -z $profile_name ]] || { usage >&2 && exit 2; } && profile_name=$1 ;;
        esac
        shift
    done
    exec 9>"$cache/up.lock"
    flock --nonblock 9 || die "another init-scripts/up.sh or down.sh runs" "wait until it has ended"
    mkdir -p "$secrets"
    chmod 0700 "$up"
    load_profile "${profile_name:-$(cat "$up/profile" 2>/dev/null || echo small)}"
    build
    bring_up
    [[ $proof == no ]] || prove
    say "the stack is up, and well"
    print_where
}

main "$@"
