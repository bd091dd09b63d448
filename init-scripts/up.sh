#!/usr/bin/env bash
# Brings up the demonstration stack and proves a backup by restoring it. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly up="$cache/up"
readonly secrets="$up/secrets"
readonly network=pgmesh
readonly config=/etc/pgmesh/backup-agent.toml
readonly database_data=/var/lib/postgresql/17
readonly scale=20

usage() {
    cat <<'TEXT'
Usage: init-scripts/up.sh

On a fresh Debian 12 with cargo, one command: installs and starts Docker if it is missing, builds the
agents and the images, makes secrets and certificates (.cache/up), and starts in containers

  pgmesh-postgres-1     PostgreSQL 17, the primary; archives its WAL by "backup-agent wal-push"
  pgmesh-postgres-2     its streaming standby
  pgmesh-load           pgbench, writing all the time
  pgmesh-s3             an S3 server for tests (data in the volume pgmesh-s3)
  pgmesh-backup-agent   the backup agent
  pgmesh-lag-exporter   the lag exporter
  pgmesh-health-monitor the health monitor

Then it takes a backup, notes the state of the database at a moment T while nobody writes, lets the
load write on, restores to T in

  pgmesh-restored       a copy of its own, open for reading and writing

and compares the two. Running it again keeps what runs and repeats the proof.
init-scripts/down.sh removes everything.

Exit: 0 the copy equals the source at T, 1 something failed, 2 wrong use.
TEXT
}

# --- programs -------------------------------------------------------------------------------------

# They are built one after the other: together, the features of one would get into the others.
build_programs() {
    local quiet=()
    [[ -t 2 ]] || quiet=(--quiet)
    say "builds the agents and the S3 server (the first time about ten minutes)"
    cd "$root"
    build_program backup-agent backup-agent
    build_program lag-exporter lag-exporter
    build_program health-monitor health-monitor
    build_program cluster-tests s3-server
}

# build_program PACKAGE NAME
build_program() {
    cargo build --release --locked "${quiet[@]}" --package "$1" --bin "$2" ||
        die "$2 does not build" "see the lines above"
    stage "$2"
}

# Puts a program where the images take it from, and only if it changed: a running container has it open.
stage() {
    local built="${CARGO_TARGET_DIR:-$root/target}/release/$1" staged="$cache/image/$1"
    mkdir -p "$cache/image"
    cmp --silent "$built" "$staged" || install -m 0755 "$built" "$staged"
}

# The database image waits for the network and the disk while cargo keeps the cores busy.
build() {
    local image
    ensure_cargo
    ensure_docker
    (ensure_base_image && ensure_postgres_image) &
    image=$!
    build_programs
    wait "$image" || die "the database image is not there" "see the message above"
    ensure_agent_image backup-agent "$postgres_image" 9632
    ensure_agent_image lag-exporter "$base_image" 9633
    ensure_agent_image health-monitor "$base_image" 9631
}

# --- secrets and certificates ---------------------------------------------------------------------

# make_secret NAME COMMAND…: the command's output, once. The old value stays on a second run.
make_secret() {
    local file="$secrets/$1"
    shift
    [[ ! -e $file ]] || return 0
    (umask 077 && "$@" >"$file.new" && mv "$file.new" "$file")
}

# A certificate authority of this machine, and one certificate for all the database servers.
make_certificates() {
    local name names=()
    [[ ! -e $secrets/postgres_tls_certificate ]] || return 0
    for name in postgres-1 postgres-2 restored localhost; do names+=("DNS:$name"); done
    (
        umask 077
        cd "$up"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
            -subj "/CN=pgmesh demonstration CA" -keyout ca.key -out ca.crt
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
            -subj "/CN=postgres" -keyout server.key -out server.csr
        openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 \
            -extfile <(printf 'subjectAltName=%s\n' "$(IFS=,; echo "${names[*]}")") -out server.crt
        mv server.key "$secrets/postgres_tls_key"
        mv server.crt "$secrets/postgres_tls_certificate"
        chmod 0644 ca.crt
    ) >"$cache/log/certificates.log" 2>&1 ||
        die "openssl could not make the certificates" "see $cache/log/certificates.log"
}

# The files belong to the user of the containers and nobody else may read them; .cache/up itself is
# closed to other users of this machine.
ensure_secrets() {
    local name
    mkdir -p "$secrets"
    chmod 0700 "$up"
    ensure_program openssl openssl
    for name in pgmesh_replication_password pgmesh_backup_password pgmesh_lag_password pgmesh_health_password pgmesh_rebalance_password demo_password s3_secret_access_key; do
        make_secret "$name" random_hex 24
    done
    make_secret s3_access_key_id random_hex 10
    make_secret pgmesh_backup_key openssl rand -base64 32
    make_certificates
    docker run --rm --user 0 --entrypoint bash --volume "$secrets:/secrets" "$postgres_image" \
        -c "chown $postgres_uid:$postgres_uid /secrets/* && chmod 0600 /secrets/* && chmod 0711 /secrets"
}

# --- containers -----------------------------------------------------------------------------------

# The options of the container being described; see ensure_container.
options=()

secret() {
    local name
    for name in "$@"; do options+=(--volume "$secrets/$name:/run/secrets/$name:ro"); done
}

# config_file FILE [NAME]: a file of this repository below /etc/pgmesh.
config_file() {
    options+=(--volume "$1:/etc/pgmesh/${2:-${1##*/}}:ro")
}

# What "backup-agent" needs wherever it runs: in its own container and in those that archive.
agent_options() {
    config_file "$root/configs/backup-agent.toml"
    config_file "$up/ca.crt"
    secret pgmesh_backup_password pgmesh_backup_key s3_access_key_id s3_secret_access_key
}

# database_options NAME: a database server that has the agent's program for archiving and restoring.
database_options() {
    options=(
        --shm-size 256m --volume "pgmesh-$1:$database_data" --publish 127.0.0.1::5432
        --entrypoint postgres-entrypoint --stop-signal SIGINT
        --health-cmd 'pg_isready --quiet --host=/run/postgresql' --health-interval 5s
        --health-start-period 120s --expose 5432
    )
    agent_options
    config_file "$root/configs/postgresql.conf"
    config_file "$root/configs/pg_hba.conf"
    secret postgres_tls_key postgres_tls_certificate pgmesh_replication_password
}

# Everything that makes a container what it is: options, image, command, and the files it mounts.
container_spec() {
    {
        docker image inspect --format '{{.Id}}' "$1"
        printf '%s\n' "$@"
        cat "$root"/configs/*.* "$up/ca.crt"
    } | sha256sum | cut -d ' ' -f 1
}

# ensure_container NAME IMAGE COMMAND…: starts it with $options, unless it runs just like that.
ensure_container() {
    local name=$1 image=$2 spec
    shift 2
    spec=$(container_spec "$image" "${options[@]}" -- "$@")
    if [[ $(docker inspect --format "{{index .Config.Labels \"$spec_label\"}}" "pgmesh-$name" 2>/dev/null) == "$spec" ]]; then
        docker start "pgmesh-$name" >/dev/null
        say "  pgmesh-$name is there"
        return 0
    fi
    docker rm --force --volumes "pgmesh-$name" >/dev/null 2>&1 || true
    docker run --detach --init --name "pgmesh-$name" --hostname "$name" \
        --network "$network" --network-alias "$name" --restart unless-stopped \
        --label "pgmesh.stack=up" --label "$spec_label=$spec" "${options[@]}" "$image" "$@" >/dev/null ||
        die "the container pgmesh-$name did not start" "docker logs pgmesh-$name"
    say "  pgmesh-$name starts"
}

# sql NAME DATABASE QUERY: asks one server, as superuser, inside its container.
sql() {
    docker exec "pgmesh-$1" psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 \
        --dbname "$2" --command "$3"
}

# sql_is NAME QUERY ANSWER
sql_is() {
    [[ $(sql "$1" postgres "$2") == "$3" ]]
}

ensure_network() {
    docker network inspect "$network" >/dev/null 2>&1 ||
        docker network create --label pgmesh.stack=up "$network" >/dev/null
}

start_s3() {
    options=(
        --volume "$cache/image/s3-server:/usr/local/bin/s3-server:ro"
        --volume "pgmesh-s3:$database_data" --entrypoint s3-server --no-healthcheck --stop-signal SIGTERM
    )
    secret s3_access_key_id s3_secret_access_key
    ensure_container s3 "$postgres_image" --listen 0.0.0.0:9000 --directory "$database_data" --bucket pgmesh \
        --access-key-id-file /run/secrets/s3_access_key_id \
        --secret-access-key-file /run/secrets/s3_secret_access_key
}

start_primary() {
    database_options postgres-1
    options+=(--volume "$root/init-scripts:/etc/pgmesh/init:ro" --env PGMESH_INIT_SCRIPTS=/etc/pgmesh/init)
    secret demo_password pgmesh_lag_password pgmesh_health_password pgmesh_rebalance_password
    ensure_container postgres-1 "$backup_agent_image"
    wait_hint="docker logs pgmesh-postgres-1" wait_for 120 "the primary" \
        sql_is postgres-1 'SELECT pg_is_in_recovery()' f
}

start_standby() {
    database_options postgres-2
    options+=(
        --env PGMESH_PRIMARY=postgres-1 --env PGMESH_SLOT=postgres_2
        --env PGMESH_REPLICATION_PASSWORD_FILE=/run/secrets/pgmesh_replication_password
    )
    ensure_container postgres-2 "$backup_agent_image"
    wait_hint="docker logs pgmesh-postgres-2" wait_for 300 "the standby streams" sql_is postgres-1 \
        "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'postgres_2' AND state = 'streaming'" 1
}

start_agent() {
    options=(--publish 127.0.0.1::9632 --stop-timeout 30)
    agent_options
    ensure_container backup-agent "$backup_agent_image"
    wait_hint="docker logs pgmesh-backup-agent" wait_for 60 "the agent is healthy" \
        docker exec pgmesh-backup-agent agent-healthcheck
}

start_lag_exporter() {
    options=(--publish 127.0.0.1::9633 --volume pgmesh-lag-exporter:/var/lib/pgmesh/lag-exporter)
    config_file "$root/configs/lag-exporter.toml"
    config_file "$up/ca.crt"
    secret pgmesh_lag_password
    ensure_container lag-exporter "$lag_exporter_image"
    wait_hint="docker logs pgmesh-lag-exporter" wait_for 60 "the lag exporter knows every lag" \
        docker exec pgmesh-lag-exporter lag-exporter show
}

start_health_monitor() {
    options=(--publish 127.0.0.1::9631)
    config_file "$root/configs/health-monitor.toml"
    config_file "$up/ca.crt"
    secret pgmesh_health_password
    ensure_container health-monitor "$health_monitor_image"
    wait_hint="docker logs pgmesh-health-monitor" wait_for 60 "the health monitor has asked everything" \
        docker exec pgmesh-health-monitor agent-healthcheck
}

# --- data and load --------------------------------------------------------------------------------

data_is_there() {
    sql_is postgres-1 "SELECT count(*) FROM pg_database WHERE datname = 'demo'" 1 &&
        [[ $(sql postgres-1 demo "SELECT to_regclass('filled') IS NOT NULL") == t ]]
}

# A pgbench database, with some data that does not compress and a large object besides. The table
# "filled" comes last and says that all of it is there.
ensure_data() {
    ! data_is_there || return 0
    say "fills the database demo (pgbench scale $scale)"
    docker exec --interactive pgmesh-postgres-1 psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 <<'SQL'
SET client_min_messages = 'warning';
DROP DATABASE IF EXISTS demo WITH (FORCE);
DROP ROLE IF EXISTS demo;
SET log_min_error_statement = 'panic';
\set password `cat /run/secrets/demo_password`
CREATE ROLE demo LOGIN PASSWORD :'password';
CREATE DATABASE demo OWNER demo;
SQL
    docker exec pgmesh-postgres-1 pgbench --quiet --initialize --scale="$scale" demo >"$cache/log/pgbench-init.log" 2>&1 ||
        die "pgbench could not fill the database" "see $cache/log/pgbench-init.log"
    docker exec --interactive pgmesh-postgres-1 psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 demo >/dev/null <<'SQL'
CREATE TABLE attachments AS
SELECT n AS id, (SELECT string_agg(sha512(convert_to(n || '.' || i || random(), 'UTF8')), '')
                 FROM generate_series(1, 128) AS i) AS content
FROM generate_series(1, 4000) AS n;
SELECT lo_from_bytea(0, (SELECT content FROM attachments WHERE id = 1));
GRANT ALL ON ALL TABLES IN SCHEMA public TO demo;
CREATE TABLE filled ();
SQL
}

start_load() {
    options=(--entrypoint bash --no-healthcheck --stop-signal SIGTERM --stop-timeout 5)
    config_file "$up/ca.crt"
    secret demo_password
    # shellcheck disable=SC2016  # the container's shell reads the secret
    ensure_container load "$postgres_image" -c '
        export PGPASSWORD=$(</run/secrets/demo_password)
        exec pgbench --no-vacuum --client=4 --rate=100 --time=864000 --progress=60 \
            "host=postgres-1 user=demo dbname=demo sslmode=verify-full sslrootcert=/etc/pgmesh/ca.crt"'
    wait_hint="docker logs pgmesh-load" wait_for 30 "the load writes" load_connected
}

load_connected() {
    sql_is postgres-1 "SELECT count(*) >= 1 FROM pg_stat_activity WHERE usename = 'demo'" t
}

# Until the last transaction of the load is over.
stop_load() {
    docker stop pgmesh-load >/dev/null
    wait_hint="docker exec pgmesh-postgres-1 psql -c 'SELECT * FROM pg_stat_activity'" wait_for 30 \
        "the load has left" sql_is postgres-1 "SELECT count(*) FROM pg_stat_activity WHERE usename = 'demo'" 0
}

# --- the proof ------------------------------------------------------------------------------------

# Progress bars where this script writes to a terminal.
terminal=()
[[ ! -t 1 ]] || terminal=(--tty)

agent() {
    docker exec "${terminal[@]}" pgmesh-backup-agent backup-agent --config "$config" --log-format text "$@"
}

# Closes the current segment and waits until the archive has it: everything written before is safe.
archive_all() {
    local segment
    segment=$(sql postgres-1 postgres 'SELECT pg_walfile_name(pg_switch_wal())')
    wait_hint="docker logs pgmesh-postgres-1 (messages of archive_command)" wait_for 120 "the archive has $segment" \
        sql_is postgres-1 "SELECT last_archived_wal >= '$segment' FROM pg_stat_archiver" t
}

# state_of NAME: everything a client can see of a server, as one checksum. The restrict key is random
# unless given; rows come in the order of the heap, which is the same in a copy of the files.
state_of() {
    docker exec "pgmesh-$1" bash -o pipefail -c 'pg_dumpall --restrict-key=pgmesh | sha256sum | cut -d " " -f 1'
}

# rows_of NAME: the tables with their counts, for people.
rows_of() {
    sql "$1" demo "SELECT string_agg(format('%s %s', relname, n), ', ' ORDER BY relname) FROM (
        SELECT relname, (xpath('/row/n/text()', query_to_xml(format('SELECT count(*) AS n FROM %I', relname), false, true, '')))[1] AS n
        FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace) AS tables"
}

# Nobody writes while the state is taken, so that the moment and the state belong together; then the
# load goes on, so that the restore has to stop in the middle of the WAL.
note_moment() {
    stop_load
    moment_state=$(state_of postgres-1)
    moment_rows=$(rows_of postgres-1)
    moment=$(sql postgres-1 postgres \
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')")
    start_load
    say "  T = $moment; the load writes on"
    wait_for 30 "the load has changed the database" load_wrote
    archive_all
}

load_wrote() {
    [[ $(rows_of postgres-1) != "$moment_rows" ]]
}

# Into a new volume, by the agent's own command; then PostgreSQL replays the WAL up to T and opens the
# copy for writing. The copy never archives: it must not write into the repository of its source.
restore_copy() {
    docker rm --force --volumes pgmesh-restored >/dev/null 2>&1 || true
    docker volume rm --force pgmesh-restored >/dev/null
    docker volume create --label pgmesh.stack=up pgmesh-restored >/dev/null
    database_options restored
    docker run --rm --init --name pgmesh-restore --network "$network" --label pgmesh.stack=up \
        "${terminal[@]}" "${options[@]}" --entrypoint backup-agent "$backup_agent_image" \
        --config "$config" --log-format text restore --to "$database_data/main" --target-time "$moment" --target-action promote --archive-mode off ||
        die "the restore failed" "see the message above"
    options+=(--restart no)
    ensure_container restored "$backup_agent_image"
    wait_hint="docker logs pgmesh-restored" wait_for 300 "the copy has replayed to T" copy_settled
    copy_is_open || {
        docker logs --tail 5 pgmesh-restored >&2
        die "PostgreSQL ended before it reached T" "docker logs pgmesh-restored"
    }
}

copy_is_open() {
    sql_is restored 'SELECT pg_is_in_recovery()' f
}

# Open, or ended: then there is nothing to wait for.
copy_settled() {
    copy_is_open || [[ $(docker inspect --format '{{.State.Running}}' pgmesh-restored) == false ]]
}

compare() {
    local state
    state=$(state_of restored)
    printf '          at T  %s\n          copy  %s\n' "$moment_rows" "$(rows_of restored)"
    printf '          at T  pg_dumpall sha256 %s\n          copy  pg_dumpall sha256 %s\n' "$moment_state" "$state"
    [[ $state == "$moment_state" ]] ||
        die "the copy differs from the source at $moment" "docker exec pgmesh-restored pg_dumpall, and compare"
    docker exec pgmesh-restored pg_amcheck --all --install-missing >"$cache/log/amcheck.log" 2>&1 ||
        die "pg_amcheck finds damage in the copy" "see $cache/log/amcheck.log"
}

prove() {
    say "tries the chain"
    agent check || die "the check of the agent failed" "see the lines above"
    say "takes a backup"
    agent backup || die "the backup failed" "docker logs pgmesh-backup-agent"
    say "notes the state at a moment T"
    note_moment
    say "restores to T"
    restore_copy
    say "compares"
    compare
    say "the copy equals the source at T, and pg_amcheck finds nothing"
}

published() {
    docker port "pgmesh-$1" "$2" | head -n 1
}

print_where() {
    local backup health lag
    backup=$(published backup-agent 9632)
    health=$(published health-monitor 9631)
    lag=$(published lag-exporter 9633)
    cat <<TEXT

Where to look
  primary     docker exec -it pgmesh-postgres-1 psql demo     or $(published postgres-1 5432)
  standby     docker exec -it pgmesh-postgres-2 psql demo     or $(published postgres-2 5432)
  the copy    docker exec -it pgmesh-restored psql demo       or $(published restored 5432)
              from this machine: host=localhost user=demo dbname=demo sslmode=verify-full
              sslrootcert=$up/ca.crt, password in $secrets/demo_password
  backups     docker exec pgmesh-backup-agent backup-agent list
  lag         docker exec pgmesh-lag-exporter lag-exporter show
  health      docker exec pgmesh-health-monitor health-monitor check
  metrics     http://$backup/metrics    status http://$backup/status    (backup agent)
              http://$lag/metrics    status http://$lag/status    (lag exporter)
              http://$health/metrics    status http://$health/status    (health monitor)
  logs        docker logs --follow pgmesh-backup-agent, pgmesh-lag-exporter, pgmesh-health-monitor
  remove      init-scripts/down.sh
TEXT
}

bring_up() {
    say "starts the containers"
    ensure_network
    ensure_secrets
    start_s3
    start_primary
    start_standby
    start_agent
    start_lag_exporter
    start_health_monitor
    ensure_data
    start_load
    archive_all
}

main() {
    case ${1:-} in
    '') ;;
    -h | --help) usage && return 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
    exec 9>"$cache/up.lock"
    flock --nonblock 9 || die "another init-scripts/up.sh or down.sh runs" "wait until it has ended"
    build
    bring_up
    prove
    print_where
}

main "$@"
