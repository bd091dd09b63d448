#!/usr/bin/env bash
# Brings up the stack on Docker Swarm and proves a backup by restoring it. See --help.
# shellcheck disable=SC2153  # variables of the profile
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

readonly initialise_limit_s=900
readonly proof_scale=10
readonly load=$STACK-load
# The database of the proof, and the role that writes to it. What has this comment was made here, and may be dropped.
readonly proof_database=pgmesh_proof
readonly proof_mark='init-scripts/up.sh made it to prove a backup, and removes it'
# There from when a proof is wanted until it has ended: one that was stopped is made by the next run.
readonly unproved="$up/unproved"

usage() {
    cat <<'TEXT'
Usage: init-scripts/up.sh [OPTION…] [PROFILE]

On a fresh Debian 12 with cargo, one command: installs and starts Docker if it is missing, builds the agents and
the images, makes certificates and secrets (.cache/up), makes a Swarm of this machine, deploys stack.yml with the
profile, and waits until the health monitor finds everything well. The first run, and each with --proof, then takes a
backup of each group, and proves that of the coordinators: in a database of its own, pgmesh_proof, it notes what there
is at a moment T, restores all of their databases to T into a container of its own, while a load writes on, and
compares that database in the copy with what it was. Database, load, copy and its volumes are gone afterwards. Of
other databases nothing is compared, so applications may write meanwhile.

PROFILE is small (one machine, 2 cores and 8 GiB; the default), production, or a file like configs/small.env.
What the environment has is not changed by the profile, and remembered for later runs, which say so:
DATABASE=shop init-scripts/up.sh. An empty one, REBALANCE_MODE= for instance, ends that: the profile's holds again.

  --no-build   takes the programs that lie in .cache/image instead of building them
  --images     only makes the images, and prints a line NAME_IMAGE=… of each: for a registry that several machines use
  --proof      proves a backup also if this is not the first run; on a machine with room for the coordinators' data
  --no-proof   never does
  -h, --help   this text

Running it again brings in what has changed, one server after the other; it may be stopped and started again at any
point: a proof that has not ended is made by the next run. init-scripts/status.sh says what does not start, and why;
init-scripts/down.sh removes everything. Images of your own: POSTGRES_IMAGE, ETCD_IMAGE, HAPROXY_IMAGE,
PGBOUNCER_IMAGE, REDIS_IMAGE, PROMETHEUS_IMAGE, ALERTMANAGER_IMAGE, GRAFANA_IMAGE, BACKUP_AGENT_IMAGE,
LAG_EXPORTER_IMAGE, HEALTH_MONITOR_IMAGE, REBALANCE_AGENT_IMAGE, in the environment or the profile: what is named is
not built. POSTGRES_BASE_IMAGE is what the database image is made from (one with Citus, for instance).

Exit: 0 all is well, and what was proved holds; 1 something failed, 2 wrong use.
TEXT
}

# --- programs and images --------------------------------------------------------------------------

# programs: those that images are made of; none of an image that is named.
programs() {
    local name variable
    for name in "${agents[@]}"; do
        variable=$(upper "$name")_IMAGE
        [[ -n ${!variable:-} ]] || echo "$name"
    done
    [[ $S3_FOR_TESTS != yes || -n ${S3_FOR_TESTS_IMAGE:-} ]] || echo s3-server
}

# build_programs NAME…: one after the other: together, the features of one would get into the others.
build_programs() {
    local quiet=() name package
    [[ -t 2 ]] || quiet=(--quiet)
    say "builds $(joined ', ' "$@") (the first time about ten minutes)"
    cd "$root"
    for name in "$@"; do
        package=$name
        [[ $name != s3-server ]] || package=cluster-tests
        cargo build --release --locked "${quiet[@]}" --package "$package" --bin "$name" ||
            die "$name does not build" "see the lines above"
        stage "$name"
    done
}

# Puts a program where the images take it from, and only if it changed: the image follows from it.
stage() {
    local built="${CARGO_TARGET_DIR:-$root/target}/release/$1" staged="$cache/image/$1"
    mkdir -p "$cache/image"
    cmp --silent "$built" "$staged" || install -m 0755 "$built" "$staged"
}

# check_programs NAME…
check_programs() {
    local name
    for name in "$@"; do
        [[ -x $cache/image/$name ]] || die "$cache/image/$name is not there" "leave --no-build away"
    done
}

# The images wait for the network and the disk while cargo keeps the cores busy.
build() {
    local images programs
    read_lines programs programs
    [[ $build == no || ${#programs[@]} -eq 0 ]] || ensure_cargo
    ensure_docker
    if [[ $build == yes && ${#programs[@]} -gt 0 ]]; then
        (ensure_stack_images) &
        images=$!
        build_programs "${programs[@]}"
        wait "$images" || die "an image is not there" "see the message above"
    fi
    check_programs "${programs[@]}"
    ensure_stack_images
    ensure_agent_images
}

print_images() {
    local name
    for name in POSTGRES ETCD HAPROXY PGBOUNCER REDIS PROMETHEUS ALERTMANAGER "${agents[@]}" S3_FOR_TESTS; do
        name=$(upper "$name")_IMAGE
        [[ -z ${!name:-} ]] || printf '%s=%s\n' "$name" "${!name}"
    done
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
    local place machines
    for ((place = 1; place <= PLACES; place++)); do
        machines=$(docker node ls --filter "node.label=pgmesh.place=$place" --format '{{.Hostname}}')
        [[ $machines != *$'\n'* ]] || die "several machines have the label pgmesh.place=$place: ${machines//$'\n'/, }" \
            "the data of a place are on one of them: docker node update --label-rm pgmesh.place the others"
        [[ -z $machines ]] || continue
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
    # One that was killed in between left it.
    as_root ip xfrm state delete "${state[@]}" 2>/dev/null || true
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
            say "  overlay networks without encryption: this kernel has no ESP$( ((PLACES > 1)) || echo ". One machine alone needs none")"
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

deploy_all() {
    local member names missing under_way etcd=()
    # Those that a run before this one began, if it was stopped. What is deployed now may be what mends them.
    await_updates || say "  the update of $under_way has not ended within $start_limit_s s: goes on"
    read_lines names members
    read_lines missing missing_services || die "Swarm does not say what runs" "docker stack services $STACK; then start again"
    # What does not run is made anew (its volumes stay): otherwise a mended service that takes its time would be
    # rolled back to what did not run. etcd first: without it Patroni does not say who leads.
    for member in "${missing[@]}"; do
        docker service rm "${STACK}_$member" >/dev/null
        [[ $member != etcd-* ]] || etcd+=("$member")
    done
    [[ ${#etcd[@]} -eq 0 ]] || deploy networks "${etcd[@]}"
    update_changed "${names[@]}"
    note_failed_tasks
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    say "deploys the stack: $(services | wc -l) services are there, $((${#names[@]} + $(grep -c '^    image:' "$RENDERED/stack.yml"))) are to be"
    deploy stack "${names[@]}"
}

# --- the proof ------------------------------------------------------------------------------------

# In no log, and not as a statement that is kept.
quiet_sql() {
    {
        printf 'SET %s;\n' "client_min_messages = 'warning'" "log_statement = 'none'" 'log_min_duration_statement = -1' \
            "log_min_error_statement = 'panic'" "pgaudit.log = 'none'" 'pg_stat_statements.track_utility = off'
        cat
    } | docker exec --interactive "$primary" psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname postgres
}

# foreign: what has the names of the proof, and not its mark.
foreign() {
    sql "$primary" postgres "SELECT string_agg(what, ' and ') FROM (
        SELECT 'a database $proof_database' AS what FROM pg_database
        WHERE datname = '$proof_database' AND shobj_description(oid, 'pg_database') IS DISTINCT FROM '$proof_mark'
        UNION ALL SELECT 'a role $proof_database' FROM pg_authid
        WHERE rolname = '$proof_database' AND shobj_description(oid, 'pg_authid') IS DISTINCT FROM '$proof_mark') AS it"
}

# Where it has the mark.
drop_data() {
    quiet_sql <<SQL
SELECT format('DROP DATABASE %I WITH (FORCE)', datname) FROM pg_database
WHERE datname = '$proof_database' AND shobj_description(oid, 'pg_database') = '$proof_mark' \gexec
SELECT format('DROP ROLE %I', rolname) FROM pg_authid
WHERE rolname = '$proof_database' AND shobj_description(oid, 'pg_authid') = '$proof_mark' \gexec
SQL
}

# A pgbench database, with some data that does not compress and a large object besides.
make_data() {
    local there
    there=$(foreign)
    [[ -z $there ]] || die "the coordinators have $there that up.sh did not make" \
        "rename it, or drop it if nobody needs it; or do without the proof: --no-proof"
    drop_data
    say "fills the database $proof_database (pgbench scale $proof_scale)"
    quiet_sql <<SQL
BEGIN;
CREATE ROLE $proof_database LOGIN PASSWORD '$(<"$up/proof_password")';
COMMENT ON ROLE $proof_database IS '$proof_mark';
COMMIT;
CREATE DATABASE $proof_database OWNER $proof_database;
COMMENT ON DATABASE $proof_database IS '$proof_mark';
REVOKE CONNECT ON DATABASE $proof_database FROM PUBLIC;
SQL
    docker exec "$primary" pgbench --quiet --initialize --scale="$proof_scale" "$proof_database" >"$cache/log/pgbench-init.log" 2>&1 ||
        die "pgbench could not fill the database" "see $cache/log/pgbench-init.log"
    docker exec --interactive "$primary" psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 "$proof_database" >/dev/null <<SQL
CREATE TABLE attachments AS
SELECT n AS id, (SELECT string_agg(sha512(convert_to(n || '.' || i || random(), 'UTF8')), '')
                 FROM generate_series(1, 128) AS i) AS content
FROM generate_series(1, 2000) AS n;
SELECT lo_from_bytea(0, (SELECT content FROM attachments WHERE id = 1));
GRANT ALL ON ALL TABLES IN SCHEMA public TO $proof_database;
SQL
}

# As an application would: through HAProxy, by TLS, whose certificate it checks.
start_load() {
    stop_load
    docker run --detach --init --name "$load" --label "$stack_label=$STACK" --network "${STACK}_application" \
        --stop-timeout 5 --stop-signal SIGTERM --no-healthcheck --entrypoint bash \
        --volume "$up/ca.crt:/etc/pgmesh/ca.crt:ro" --volume "$up/proof_password:/proof_password:ro" --user 0 \
        "$POSTGRES_IMAGE" -c '
            export PGPASSWORD=$(</proof_password)
            exec pgbench --no-vacuum --client=2 --rate=100 --time=3600 --max-tries=1000 \
                "host=haproxy user=$1 dbname=$1 sslmode=verify-full sslrootcert=/etc/pgmesh/ca.crt"' load "$proof_database" >/dev/null
    wait_hint="docker logs $load" wait_for 30 "the load writes" \
        sql_is "$primary" "SELECT count(*) >= 1 FROM pg_stat_activity WHERE usename = '$proof_database'" t
}

# Until its last transaction is over.
stop_load() {
    docker rm --force --volumes "$load" >/dev/null 2>&1 || true
    wait_hint="look at pg_stat_activity" wait_for 30 "the load has left" \
        sql_is "$primary" "SELECT count(*) FROM pg_stat_activity WHERE usename = '$proof_database'" 0
}

# state_of CONTAINER: everything a client can see of the database, as one checksum. Nobody else writes to it; to others,
# applications do. The restrict key is random unless given; rows come in the order of the heap, which is the same in a
# copy of the files.
state_of() {
    docker exec "$1" bash -o pipefail -c 'pg_dump --create --restrict-key=pgmesh "$1" | sha256sum | cut -d " " -f 1' dump "$proof_database"
}

# rows_of CONTAINER: the tables with their counts, for people.
rows_of() {
    sql "$1" "$proof_database" "SELECT string_agg(format('%s %s', relname, n), ', ' ORDER BY relname) FROM (
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
    archive_all 0 || die "the coordinators' primary does not say what it has written" "init-scripts/status.sh; start again"
}

load_wrote() {
    [[ $(rows_of "$primary") != "$moment_rows" ]]
}

compare() {
    local state
    state=$(state_of "$copy")
    printf '          at T  %s\n          copy  %s\n' "$moment_rows" "$(rows_of "$copy")"
    printf '          at T  pg_dump sha256 %s\n          copy  pg_dump sha256 %s\n' "$moment_state" "$state"
    [[ $state == "$moment_state" ]] ||
        die "the copy differs from the source at $moment" "init-scripts/up.sh --proof tries it once more; backup-agent verify reads the backups back"
    docker exec "$copy" pg_amcheck --all --install-missing >"$cache/log/amcheck.log" 2>&1 ||
        die "pg_amcheck finds damage in the copy" "see $cache/log/amcheck.log"
}

# What the proof made, however it ended. What one that was killed left behind goes as the next run begins.
remove_proof() {
    docker rm --force --volumes "$load" >/dev/null 2>&1 || true
    remove_copy || true
    rm -f "$up/$copy.toml" "$up/proof_password"
}

# Runs as the script ends, when the variables of main may be gone.
end_proof() {
    trap - EXIT
    remove_proof
    primary=$(primary_here 0) || primary=''
    [[ -n $primary ]] || { say "the database $proof_database stays until the next proof: the coordinators' primary is not here" && return 0; }
    drop_data 2>"$cache/log/proof.log" ||
        say "the database $proof_database stays until the next proof: $(head -n 1 "$cache/log/proof.log")"
}

# With the proof; and where one is missing, or another fault of theirs is seen.
back_up() {
    [[ $proof == yes ]] || ! findings >/dev/null || return 0
    say "tries the chain of the backups"
    agent check || die "the check of the backup agent failed" "see the lines above"
    say "takes a backup of each group"
    agent backup || die "a backup failed" "docker service logs ${STACK}_backup-agent"
}

prove() {
    local leader primary moment moment_state moment_rows
    leader=$(leader_of 0)
    primary=$(container_of "$leader")
    [[ -n $primary ]] || {
        rm -f "$unproved"
        say "no proof of the backup: it needs the coordinators' primary on this machine, and $leader is on $(machine_of "$leader");" \
            "init-scripts/switchover.sh 0 --to a server of this one, then start again with --proof"
        return 0
    }
    (umask 077 && random_hex 24 >"$up/proof_password")
    trap end_proof EXIT
    make_data
    start_load
    say "notes the state at a moment T"
    note_moment
    say "restores to T"
    restore_copy 0 --target-time "$moment"
    say "compares"
    compare
    end_proof
    rm -f "$unproved"
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

# is_there: what was deployed runs, or its data is on this machine.
is_there() {
    [[ -n $(services) || -n $(docker volume ls --quiet --filter "label=com.docker.stack.namespace=$STACK") ]]
}

# New passwords and a new authority would take over what runs, and nobody could read its backups.
refuse_without_files() {
    local name
    is_there || return 0
    for name in ca.crt salt values; do
        [[ -e $up/$name ]] ||
            die "the stack $STACK is there already, and $up/$name is not: without it this would make other passwords and keys" \
                "copy ${up#"$root/"} here from where the stack was brought up; if it is lost, init-scripts/down.sh removes the stack with its data"
    done
}

# was NAME: as it was deployed.
was() { sed -n "/^$1=/{s/^[^=]*=//p;q}" "$up/values"; }

# Members of etcd are there from its first start on, a volume stays where it is, and so does a database. What is taken
# away would stay, and be missed.
refuse_other_numbers() {
    local name
    is_there || return 0
    for name in ETCD_MEMBERS PLACES DATABASE; do
        [[ $(was "$name") == "${!name}" ]] ||
            die "the stack $STACK has $name=$(was "$name"), which cannot be changed, and $name=${!name} is asked for" \
                "say $name=$(was "$name") as before, in the profile or the environment; a stack that is otherwise is another one: init-scripts/down.sh removes this one"
    done
    for name in COORDINATORS WORKER_MEMBERS; do
        ((${!name} >= $(was "$name"))) ||
            die "the stack $STACK has $name=$(was "$name"), which can be more and not less, and $name=${!name} is asked for" \
                "say $name=$(was "$name") as before, or more"
    done
    [[ -e $group_file ]] || ((WORKER_GROUPS >= $(was WORKER_GROUPS))) ||
        die "the stack $STACK has WORKER_GROUPS=$(was WORKER_GROUPS), and WORKER_GROUPS=$WORKER_GROUPS is asked for" \
            "say WORKER_GROUPS=$(was WORKER_GROUPS) as before; init-scripts/remove-worker.sh takes a group away"
}

# Neither can what Citus has distributed be read without it, nor does what was made without become its own.
refuse_other_base() {
    local had=no remedy="init-scripts/down.sh removes the stack with its data and backups"
    [[ -e $RENDERED/coordinator-1.yml ]] || return 0
    ! grep -q PATRONI_CITUS_GROUP "$RENDERED/coordinator-1.yml" || had=yes
    case $had-$CITUS in
    yes-no) die "the stack $STACK is with Citus, and the image $POSTGRES_IMAGE has none" "name one that has it: POSTGRES_BASE_IMAGE or POSTGRES_IMAGE in the profile. $remedy" ;;
    no-yes) die "the stack $STACK is without Citus, and the image $POSTGRES_IMAGE has it" "name one without, or restore the data into a stack of another name (PGMESH_STACK) on another machine. $remedy" ;;
    esac
}

# Images that are made for others are not those that an earlier run was told to take.
choose_profile() {
    local name from=$remembered
    [[ $images_only == no ]] || from=/dev/null
    load_profile "${profile_name:-$(cat "$up/profile" 2>/dev/null || echo small)}" "$from"
    [[ $profile != "$(realpath "$up")/values"* ]] ||
        die "$profile is what this script writes itself" "name the profile that it is made from: small, production, or a file of your own"
    [[ ${#recalled[@]} -eq 0 ]] || say "takes what the environment of an earlier run gave (NAME= in the environment ends that):"
    for name in "${recalled[@]}"; do say "  $name"; done
}

# What makes roles and tables gives up after a while, and says so in the log of its container only.
check_initialised() {
    local group all_groups container result log began
    read_lines all_groups groups
    for group in "${all_groups[@]}"; do
        log="$cache/log/initialise-$group.log" began=$SECONDS result=75
        container=$(primary_here "$group")
        [[ -n $container ]] || {
            say "  group $group: its primary is on another machine, so whether it has its roles and tables was not looked at"
            continue
        }
        until ((result != 75 || SECONDS - began >= initialise_limit_s)); do
            result=0
            docker exec "$container" pgmesh-initialise check >"$log" 2>&1 || result=$?
            ((result != 75)) || sleep 2
        done
        ((result != 75)) || die "group $group has not got its roles and tables within $initialise_limit_s s" "docker logs $container says why; mend it, start again"
        ((result == 0)) || die "roles and tables of group $group are not as init-scripts/ has them: $(grep -m 1 ERROR "$log" || tail -n 1 "$log")" "see $log; mend it, start again"
    done
}

# Once, unless told otherwise: it takes a backup of each group, and restores the coordinators on this machine.
choose_proof() {
    [[ -n $proof || -e $up/values && ! -e $unproved ]] || proof=yes
    if [[ $proof == yes ]]; then
        : >"$unproved"
    else
        proof=no
        rm -f "$unproved"
    fi
}

bring_up() {
    refuse_without_files
    refuse_other_numbers
    detect_citus
    refuse_other_base
    choose_proof
    ensure_swarm
    ensure_places
    choose_encryption
    check_ports
    say "makes certificates and secrets"
    note_profile
    remove_proof
    SECONDS=$SECONDS "$scripts/certificates.sh" "$up/values.new"
    SECONDS=$SECONDS "$scripts/secrets.sh" "$up/values.new"
    remember_profile
    [[ ! -e $group_file || $(worker_groups | wc -l) == "$WORKER_GROUPS" ]] ||
        say "  worker groups are $(worker_groups | xargs), as add-worker.sh and remove-worker.sh left them, whatever WORKER_GROUPS=$WORKER_GROUPS says"
    render_all
    deploy_all
    wait_until_running
    check_updates
    prune
    say "everything runs; waits until it is well"
    [[ $CITUS == yes ]] || say "  no Citus in the database image: worker groups are plain PostgreSQL, and the rebalance agent idles"
    # A new stack has no backup yet.
    wait_until_well 300 '^[A-Z]+ +repository '
    check_initialised
    bring_in_dynamic_settings
    back_up
    wait_until_well 300
}

main() {
    local build=yes proof='' images_only=no profile_name=''
    while [[ $# -gt 0 ]]; do
        case $1 in
        --no-build) build=no ;;
        --proof) proof=yes ;;
        --no-proof) proof=no ;;
        --images) images_only=yes ;;
        -h | --help) usage && return 0 ;;
        -*) usage >&2 && exit 2 ;;
        *) [[ -z $profile_name ]] || { usage >&2 && exit 2; } && profile_name=$1 ;;
        esac
        shift
    done
    lock_stack
    refuse_in_rotation
    choose_profile
    build
    [[ $images_only == no ]] || { print_images && return 0; }
    mkdir -p "$secrets"
    chmod 0700 "$up"
    bring_up
    [[ $proof == no ]] || prove
    say "the stack is up, and well"
    print_where
}

main "$@"
