#!/usr/bin/env bash
# Tries the stack as it runs on this machine's Swarm. See --help.
# shellcheck disable=SC2016  # the shells of the containers expand what is theirs
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../init-scripts/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/../init-scripts/stack.sh"
# shellcheck source=tests/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
Usage: tests/stack.sh [--secrets NAMES] [--only STEP | --full [UP OPTION…]]

Tries the stack that init-scripts/up.sh brought up on this machine: clients by TLS and SCRAM through HAProxy and
PgBouncer, who is refused, what each role may, that every configuration is taken by its program, that no secret
is to be read, that a coordinator primary whose container is killed is replaced without a lost commit, that each other
part may be killed and a restore reaches the last commit then, and what operators do: switchover, rolling update,
worker groups, rotation, the same with the scripts killed in the middle, restore; with the errors counted that clients see.

  --only STEP     one of clients roles configurations proof failover losses switchover rolling_update workers citus rotation
                  interruptions restore secrets
  --secrets NAMES what the step rotation replaces: "all", or names between blanks; otherwise one of each kind. Each takes
                  one to three minutes
  --full          from init-scripts/up.sh with these options to init-scripts/down.sh, and that nothing is left then

What each command printed is in .cache/log/tests-stack.log. The last line is "N passed, N failed, N skipped". Exit: 0 all passed, 1 otherwise, 2 wrong use.
TEXT
}

in_service() {
    local container
    container=$(container_of "$1")
    shift
    docker exec "$container" "$@"
}

# --- clients --------------------------------------------------------------------------------------

# A client of this machine, without anything of the stack but the authority and a password.
start_client() {
    docker rm --force --volumes pgmesh-test-client >/dev/null 2>&1 || true
    docker run --detach --init --name pgmesh-test-client --label "$stack_label=$STACK" --network host --user 0 \
        --entrypoint sleep --no-healthcheck --volume "$up/ca.crt:/ca.crt:ro" --volume "$secrets:/passwords:ro" \
        "$(docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "${STACK}_coordinator-1")" infinity >/dev/null
}

# client ROLE PORT CONNINFO SQL
client() {
    docker exec pgmesh-test-client bash -c '
        export PGPASSWORD=${PASSWORD:-$(<"/passwords/$1_password")}
        exec psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 \
            --dbname "host=localhost user=$1 port=$2 dbname='"$DATABASE"' connect_timeout=10 $3" --command "$4"' client "$@"
}

readonly strict='sslmode=verify-full sslrootcert=/ca.crt require_auth=scram-sha-256'

try_clients() {
    local port role
    for port in 5432 6432; do
        try "a client by TLS and SCRAM writes through $port" \
            equals f client pgmesh_app "$port" "$strict" 'SELECT pg_is_in_recovery()'
    done
    try "through 5433 it reads from a standby" equals t client pgmesh_app 5433 "$strict" 'SELECT pg_is_in_recovery()'
    try "PostgreSQL speaks TLS 1.3" equals TLSv1.3 client pgmesh_app 5432 "$strict" \
        'SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()'
    try "PgBouncer speaks TLS 1.3 with PostgreSQL" equals TLSv1.3 client pgmesh_app 6432 "$strict" \
        'SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()'
    for port in 5432 5433 6432; do
        try "without TLS $port refuses" refused 'no encryption|SSL required|pg_hba.conf rejects' \
            client pgmesh_app "$port" sslmode=disable 'SELECT 1'
        try "with TLS 1.1 $port refuses" refused 'protocol|alert|version|no protocols' \
            client pgmesh_app "$port" 'sslmode=require ssl_min_protocol_version=TLSv1 ssl_max_protocol_version=TLSv1.1' 'SELECT 1'
        try "the superuser is refused through $port" refused 'rejects|authentication failed|no such user|valid client certificate' \
            client postgres "$port" sslmode=require 'SELECT 1'
    done
    try "a wrong password is refused" refused 'password authentication failed' wrong_password 5432
    try "a wrong password is refused by PgBouncer" refused 'authentication failed' wrong_password 6432
    for role in pgmesh_backup pgmesh_replication pgmesh_rewind; do
        try "$role may not use the database of the applications" refused 'rejects' client "$role" 5432 sslmode=require 'SELECT 1'
    done
}

wrong_password() {
    docker exec pgmesh-test-client env PGPASSWORD=wrong psql --no-psqlrc \
        "host=localhost user=pgmesh_app port=$1 dbname=$DATABASE sslmode=require" --command 'SELECT 1'
}

try_roles() {
    local role insert="INSERT INTO memory_entries (namespace, key, value, embedding) VALUES ('test', gen_random_uuid()::text, '{}', array_fill(0.1, ARRAY[384])::vector)"
    try "applications write" client pgmesh_app 6432 "$strict" "$insert"
    try "AI agents add" client pgmesh_mcp 6432 "$strict" "$insert"
    try "AI agents change nothing" refused 'permission denied' client pgmesh_mcp 6432 "$strict" "UPDATE memory_entries SET value = '1'"
    try "AI agents delete nothing" refused 'permission denied' client pgmesh_mcp 6432 "$strict" "DELETE FROM memory_entries"
    try "readers read" client pgmesh_readonly 6432 "$strict" "SELECT count(*) FROM memory_entries"
    try "readers write nothing" refused 'permission denied|read-only' client pgmesh_readonly 6432 "$strict" "$insert"
    try "nobody but the owner makes tables" refused 'permission denied' client pgmesh_app 6432 "$strict" 'CREATE TABLE mine ()'
    try "administrators do" client pgmesh_admin 5432 "$strict" 'SET ROLE pgmesh_owner; CREATE TABLE mine (); DROP TABLE mine'
    try "administrators are no superusers" refused 'permission denied|must be superuser' client pgmesh_admin 5432 "$strict" 'SELECT * FROM pg_authid'
    try "nobody but PgBouncer looks up passwords" refused 'permission denied' client pgmesh_app 5432 "$strict" \
        "SELECT * FROM pgmesh.pgbouncer_lookup('pgmesh_app')"
    for role in pgmesh_app pgmesh_readonly pgmesh_mcp; do
        try "$role may not use the database postgres" refused 'permission denied for database' other_database "$role" 5432 postgres
        try "$role may not use template1" refused 'permission denied for database' other_database "$role" 5432 template1
        try "PgBouncer has no other database for $role" refused 'no such database|authentication failed' other_database "$role" 6432 postgres
    done
    for role in pgmesh_admin pgmesh_lag pgmesh_rebalance; do
        try "PgBouncer does not know $role" refused 'authentication failed|no such user' client "$role" 6432 "$strict" 'SELECT 1'
    done
    try "an HNSW index is used" client_plan
    try "the scripts may run twice" initialise_again
    try "what up.sh asks is whether they have run" in_service "$(leader_of 0)" pgmesh-initialise check
}

# other_database ROLE PORT DATABASE
other_database() {
    docker exec pgmesh-test-client bash -c 'export PGPASSWORD=$(<"/passwords/$1_password")
        exec psql --no-psqlrc "host=localhost user=$1 port=$2 dbname=$3 sslmode=require connect_timeout=10" --command "SELECT 1"' client "$@"
}

client_plan() {
    client pgmesh_app 5432 "$strict" "SET enable_seqscan = off; SET enable_sort = off; EXPLAIN SELECT key FROM memory_entries
        ORDER BY embedding <=> array_fill(0.2, ARRAY[384])::vector LIMIT 5" | grep -q memory_entries_embedding
}

initialise_again() {
    local leader container
    leader=$(leader_of 0) container=$(container_of "$leader")
    docker exec "$container" psql --quiet --dbname "$DATABASE" --command 'DELETE FROM pgmesh.initialised' &&
        docker exec "$container" pgmesh-initialise on_start primary 0 | grep -q 'has its roles and tables'
}

# --- configurations -------------------------------------------------------------------------------

try_configurations() {
    local name
    for name in $(databases); do
        try "patroni takes its configuration ($name)" patroni_takes "$name"
    done
    for name in $(haproxies); do
        try "haproxy takes its configuration ($name)" in_service "$name" haproxy -c -f /etc/pgmesh/haproxy.cfg
    done
    try "promtool takes prometheus.yml" in_service prometheus promtool check config /etc/pgmesh/prometheus.yml
    try "Prometheus has each figure that an alert asks for" alerts_have_figures
    try "amtool takes alertmanager.yml" in_service alertmanager amtool check-config /etc/pgmesh/alertmanager.yml
    for name in "${agents[@]}"; do
        try "$name takes its configuration" in_service "$name" "$name" --config "/etc/pgmesh/$name.toml" check-config
    done
    try "Redis took its configuration, password and all" redis_is_set
    try "PgBouncer took its configuration" equals transaction pgbouncer_setting pool_mode
    try "etcd refuses who has no certificate" refused 'certificate|bad certificate|handshake|deadline' \
        in_service etcd-1 etcdctl --endpoints https://localhost:2379 --cacert /etc/pgmesh/ca.crt --command-timeout 3s endpoint health
    try "Patroni changes nothing for who has no certificate" equals 403 patroni_status DELETE /restart
    try "Prometheus knows how full the disk is" disk_is_known
    try "Prometheus reaches all that it asks" targets_are_up
    try_stack_files "the running profile" "$RENDERED"
    if make_production; then
        try_stack_files "the profile production" "$production/stack"
        try "haproxy takes the configuration of production" production_haproxy
        try "promtool takes prometheus.yml of production" production_promtool
        for name in "${agents[@]}"; do try "$name takes its configuration of production" production_agent "$name"; done
    fi
    try "a value that cannot be right is refused" refused 'allowed is a number from 1' \
        env COORDINATORS='2  # two are enough' PGMESH_UP="$production" "$root/init-scripts/secrets.sh" --files-only production
    try "up.sh refuses to go on without the files of the stack" refused 'is there already, and .*/values is not' \
        env PGMESH_UP="$production" "$root/init-scripts/up.sh" --no-build --no-proof
    try "up.sh refuses another number of members of etcd" refused 'ETCD_MEMBERS=.* cannot be changed' \
        env ETCD_MEMBERS=$((ETCD_MEMBERS + 2)) "$root/init-scripts/up.sh" --no-build --no-proof
    try "up.sh refuses fewer coordinators" refused 'can be more and not less' \
        env COORDINATORS=$((COORDINATORS - 1)) "$root/init-scripts/up.sh" --no-build --no-proof
    [[ $CITUS == yes ]] || try "up.sh refuses a database image with Citus on a stack without it" \
        refused 'is without Citus, and the image pgmesh-test-citus has it' up_with_citus
}

# As far as up.sh can see before it starts anything.
up_with_citus() {
    docker rm --force pgmesh-test-citus >/dev/null 2>&1 || true
    docker run --name pgmesh-test-citus --user 0 --entrypoint bash \
        "$(docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "${STACK}_coordinator-1")" \
        -c 'touch "$(pg_config --pkglibdir 2>/dev/null || echo /usr/lib/postgresql/17/lib)/citus.so"' || return
    docker commit pgmesh-test-citus pgmesh-test-citus >/dev/null
    docker rm pgmesh-test-citus >/dev/null
    local status=0
    POSTGRES_IMAGE=pgmesh-test-citus BACKUP_AGENT_IMAGE=$(docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "${STACK}_backup-agent") \
        "$root/init-scripts/up.sh" --no-build --no-proof || status=$?
    docker rmi pgmesh-test-citus >/dev/null
    return $status
}

# Patroni 4.0 takes "quorum", and its validator does not know it.
patroni_takes() {
    local found
    found=$(in_service "$1" patroni --validate-config --ignore-listen-port /etc/pgmesh/patroni.yml 2>&1 |
        grep -v 'synchronous_mode quorum is not a boolean' || true)
    [[ -z $found ]] || { echo "$found" && return 1; }
}

redis_is_set() {
    in_service redis bash -c '
        [[ $(redis-cli PING) == NOAUTH* ]] && export REDISCLI_AUTH=$(</run/secrets/redis_password) &&
            redis-cli CONFIG GET maxmemory-policy | grep -q allkeys-lru'
}

pgbouncer_setting() {
    docker exec pgmesh-test-client bash -c 'export PGPASSWORD=$(</passwords/pgmesh_health_password)
        psql --no-psqlrc --no-align --tuples-only "host=localhost port=6432 user=pgmesh_health dbname=pgbouncer sslmode=verify-full sslrootcert=/ca.crt" --command "SHOW CONFIG"' |
        awk -F '|' -v key="$1" '$1 == key { print $2 }'
}

patroni_status() {
    in_service coordinator-1 bash -c 'printf "$1 $2 HTTP/1.0\r\n\r\n" | timeout 5 openssl s_client -quiet -connect 127.0.0.1:8008 2>/dev/null | head -n 1 | cut -d " " -f 2' status "$1" "$2"
}

# prometheus_says PATH: of its interface.
prometheus_says() {
    docker exec pgmesh-test-client bash -c 'exec 3<>/dev/tcp/127.0.0.1/9090 &&
        printf "GET /api/v1/%s HTTP/1.0\r\n\r\n" "$1" >&3 && cat <&3' ask "$1"
}

disk_is_known() {
    prometheus_says 'query?query=pgmesh_health_check_status' | grep '"component":"disk"' >/dev/null
}

targets_are_up() {
    local body
    body=$(prometheus_says 'targets?state=active')
    [[ $(grep -o '"health":"[a-z]*"' <<<"$body" | sort | uniq -c | tr -s ' ') == ' '*'"health":"up"' ]] || {
        grep -o '"lastError":"[^"]*"' <<<"$body" | sort -u
        return 1
    }
}

# But for one that is there with Citus only.
alerts_have_figures() {
    local figures name missing=()
    figures=$(prometheus_says 'label/__name__/values')
    grep -q PATRONI_CITUS_GROUP "$RENDERED/coordinator-1.yml" || figures+='"pgmesh_rebalance_refusals"'
    while read -r name; do
        [[ $figures == *"\"$name\""* ]] || missing+=("$name")
    done < <(grep -vE '^#|description:' "$root/configs/prometheus/alerts.yml" | grep -oE '\b(pgmesh|patroni|etcd|haproxy)_[a-z_]+' | sort -u)
    [[ ${#missing[@]} == 0 ]] || { echo "not there: ${missing[*]}" && return 1; }
}

# try_stack_files WHAT DIRECTORY
try_stack_files() {
    if docker stack config --help 2>/dev/null | grep -q -- --compose-file; then
        try "docker stack config takes the files of $1" stack_config "$2"
    else
        skip "docker stack config of $1" "this docker client has no such command"
    fi
}

stack_config() {
    local file files=() output
    for file in "$1"/*.yml; do
        ! grep -q '^version:' "$file" || files+=(--compose-file "$file")
    done
    output=$(docker stack config "${files[@]}" 2>&1 >/dev/null) || { echo "$output" && return 1; }
    [[ -z $output ]] || { echo "$output" && return 1; }
}

# What up.sh would make of the profile production, beside what runs.
readonly production="$cache/test-production"
make_production() {
    rm -rf "$production"
    mkdir -p "$production/secrets"
    echo test >"$production/secrets/s3_access_key_id"
    echo test >"$production/secrets/s3_secret_access_key"
    try "certificates of the profile production are made" env PGMESH_UP="$production" "$root/init-scripts/certificates.sh" production
    try "a name that no certificate can have is refused" refused 'could not make the certificate of coordinator-1' \
        env PGMESH_UP="$production" PUBLIC_NAMES=10.0.0.300 "$root/init-scripts/certificates.sh" production
    try "secrets of the profile production are made" env PGMESH_UP="$production" "$root/init-scripts/secrets.sh" --files-only production
    try "the files of the profile production are made" env PGMESH_UP="$production" bash -euo pipefail -c '
        source init-scripts/lib.sh
        source init-scripts/stack.sh
        load_profile production
        CITUS=no NETWORK_OPTIONS="{encrypted: \"true\"}"
        for name in POSTGRES ETCD HAPROXY PGBOUNCER REDIS PROMETHEUS ALERTMANAGER BACKUP_AGENT LAG_EXPORTER HEALTH_MONITOR REBALANCE_AGENT; do
            printf -v "${name}_IMAGE" "%s" "registry.example/$name"
        done
        render_all'
}

production_run() {
    local service=$1 entrypoint=$2 mounts=()
    shift 2
    for file in "$production"/secrets/*; do mounts+=(--volume "$file:/run/secrets/${file##*/}:ro"); done
    docker run --rm --user 0 --network none --entrypoint "$entrypoint" --volume "$production/stack:/etc/pgmesh:ro" "${mounts[@]}" \
        --volume "$production/secrets/tls_backup-agent_certificate:/run/secrets/tls_certificate:ro" \
        --volume "$production/secrets/tls_backup-agent_key:/run/secrets/tls_key:ro" \
        "$(docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "${STACK}_$service")" "$@"
}

production_haproxy() {
    production_run haproxy-1 bash -c 'sed "s/{{.*}}/x/" /etc/pgmesh/haproxy.cfg >/tmp/haproxy.cfg && haproxy -c -f /tmp/haproxy.cfg'
}

production_promtool() {
    production_run prometheus promtool check config /etc/pgmesh/prometheus.yml
}

production_agent() {
    production_run "$1" "$1" --config "/etc/pgmesh/$1.toml" check-config
}

# --- the proof ------------------------------------------------------------------------------------

# superuser SQL: on the coordinators' primary.
superuser() {
    sql "$(primary_here 0)" postgres "$1"
}

proof_left() {
    superuser "SELECT datname FROM pg_database WHERE datname = 'pgmesh_proof' UNION ALL SELECT rolname FROM pg_roles WHERE rolname = 'pgmesh_proof'"
    docker ps --all --format '{{.Names}}' | grep -xE "$load|$copy" || true
    docker volume ls --format '{{.Name}}' | grep "^$copy" || true
}

try_proof() {
    local load="$STACK-load"
    try "of the proof of the first run nothing is left" equals '' proof_left
    superuser 'CREATE DATABASE pgmesh_proof' >/dev/null
    try "up.sh refuses a database of that name that it did not make" refused 'a database pgmesh_proof that up.sh did not make' \
        "$root/init-scripts/up.sh" --no-build --proof
    try "and it is there still" equals pgmesh_proof superuser "SELECT datname FROM pg_database WHERE datname = 'pgmesh_proof'"
    superuser 'DROP DATABASE pgmesh_proof' >/dev/null
    superuser 'CREATE DATABASE demo' >/dev/null
    start_writer
    try "a run without an option makes the proof that has not ended, while applications write" "$root/init-scripts/up.sh" --no-build
    try_load "proof" "" .kept
    try "of it nothing is left" equals '' proof_left
    try "another database is as it was" equals demo superuser "SELECT datname FROM pg_database WHERE datname = 'demo'"
    superuser 'DROP DATABASE demo' >/dev/null
}

# --- secrets --------------------------------------------------------------------------------------

try_secrets() {
    local everything
    everything=$(mktemp "$cache/everything.XXXXXX")
    {
        docker ps --all --quiet | xargs -r docker inspect
        docker service ls --quiet | xargs -r docker service inspect
        docker config ls --quiet | while read -r id; do docker config inspect --format '{{printf "%s" .Spec.Data}}' "$id"; done
        docker secret ls --quiet | xargs -r docker secret inspect
        docker image ls --quiet --filter "label=$inputs_label" | sort -u | xargs -r docker image inspect
        docker image ls --quiet --filter "label=$inputs_label" | sort -u | while read -r id; do docker history --no-trunc "$id"; done
    } >"$everything" 2>&1
    try "no secret in what docker inspect shows" has_no_secret "$everything"
    services | while read -r name _; do timeout 30 docker service logs --raw "${STACK}_$name" 2>&1 || true; done >"$everything"
    try "no secret in the logs ($(wc -l <"$everything") lines)" has_no_secret "$everything"
    docker ps --quiet --filter "label=com.docker.stack.namespace=$STACK" | while read -r id; do
        docker exec "$id" bash -c 'cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline' 2>/dev/null | tr '\0' '\n' || true
    done >"$everything"
    try "no secret in the environment or the command line of a process" has_no_secret "$everything"
    try "PostgreSQL kept no password as a statement" no_password_in_statements
    rm -f "$everything"
}

has_no_secret() {
    local file found=0
    [[ -s $1 ]] || { echo "nothing was looked at" && return 1; }
    for file in "$secrets"/*; do
        [[ $file != *_certificate ]] || continue
        ! grep -qF -- "$(sed -n '2p;q' "$file" | grep . || head -n 1 "$file")" "$1" || { echo "${file##*/} is there" && found=1; }
    done
    return "$found"
}

no_password_in_statements() {
    equals 0 in_service "$(leader_of 0)" psql --no-psqlrc --quiet --no-align --tuples-only --dbname "$DATABASE" --command \
        "SELECT count(*) FROM pg_stat_statements WHERE query ~* 'password +''[0-9a-f]{20}'"
}

# --- a lost primary -------------------------------------------------------------------------------

# Two clients write. One connects anew for each row, through HAProxy, with the password that is in the file then (and
# reads it once more where that is refused, as it may be replaced in that moment); the other stays connected, through
# PgBouncer, as long as it can, and reads the password when it has to connect again. Of each: the time of each confirmed
# commit with its number, and the time of each error.
start_writer() {
    client pgmesh_admin 5432 "$strict" "SET ROLE pgmesh_owner; DROP TABLE IF EXISTS confirmed;
        CREATE TABLE confirmed (n bigint PRIMARY KEY); GRANT ALL ON confirmed TO pgmesh_app" >/dev/null 2>&1
    docker exec pgmesh-test-client bash -c 'rm -f /tmp/stop /tmp/ended* && : >/tmp/confirmed && : >/tmp/errors && : >/tmp/confirmed.kept && : >/tmp/errors.kept'
    docker exec --detach pgmesh-test-client bash -c '
        export PGCONNECT_TIMEOUT=2
        insert() {
            PGPASSWORD=$(</passwords/pgmesh_app_password) timeout 5 psql --no-psqlrc --quiet "host=localhost port=5432 user=pgmesh_app dbname='"$DATABASE $strict"'" \
                --command "INSERT INTO confirmed VALUES ($n)" 2>/tmp/error
        }
        until [[ -e /tmp/stop ]]; do
            n=${EPOCHREALTIME/./}
            if insert || { grep -q "password authentication failed" /tmp/error && sleep 0.5 && insert; }; then
                echo "$EPOCHREALTIME $n" >>/tmp/confirmed
            else
                echo "$EPOCHREALTIME $(tr "\n" " " </tmp/error)" >>/tmp/errors
            fi
        done
        : >/tmp/ended'
    docker exec --detach pgmesh-test-client bash -c '
        export PGCONNECT_TIMEOUT=2
        until [[ -e /tmp/stop ]]; do
            export PGPASSWORD=$(</passwords/pgmesh_app_password)
            until [[ -e /tmp/stop ]]; do echo "INSERT INTO confirmed VALUES (-${EPOCHREALTIME/./}) RETURNING n;" && sleep 0.05; done |
                psql --no-psqlrc --quiet --no-align --tuples-only "host=localhost port=6432 user=pgmesh_app dbname='"$DATABASE $strict"'" 2>&1 |
                while read -r line; do
                    if [[ $line =~ ^-[0-9]+$ ]]; then echo "$EPOCHREALTIME $line" >>/tmp/confirmed.kept; else echo "$EPOCHREALTIME $line" >>/tmp/errors.kept; fi
                done
            sleep 0.1
        done
        : >/tmp/ended.kept'
    wait_hint="docker exec pgmesh-test-client cat /tmp/errors /tmp/errors.kept" wait_for 30 "the clients write" both_write
}

both_write() {
    docker exec pgmesh-test-client test -s /tmp/confirmed -a -s /tmp/confirmed.kept
}

stop_writer() {
    sleep 2
    docker exec pgmesh-test-client bash -c 'echo "$EPOCHREALTIME" >/tmp/stop'
    wait_hint="docker top pgmesh-test-client" wait_for 30 "the clients end" docker exec pgmesh-test-client test -e /tmp/ended -a -e /tmp/ended.kept
}

# switchovers: when the coordinators had another primary, in seconds since 1970.
switchovers() {
    in_service coordinator-1 bash -c 'patronictl history --format json | python3 -c "
import datetime, json, sys
for it in json.load(sys.stdin):
    if it.get(\"Timestamp\"): print(datetime.datetime.fromisoformat(it[\"Timestamp\"]).timestamp())"'
}

# errors_otherwise [WRITER]: those that are not within 15 s of a promotion: on a busy machine the old primary takes
# its time to end.
errors_otherwise() {
    docker exec pgmesh-test-client cat "/tmp/errors${1:-}" |
        awk 'NR == FNR { at[NR] = $1; next } { for (i in at) if ($1 > at[i] - 15 && $1 < at[i] + 15) next; print }' <(echo 0; switchovers) -
}

no_errors_otherwise() {
    local found
    found=$(errors_otherwise "${1:-}")
    [[ -z $found ]] || { echo "$found" && return 1; }
}

# try_load WHAT [WRITER…]: ends the writers, and says what they saw. Those that are named must have seen no error but in switchovers.
try_load() {
    local what=$1 writer
    shift
    stop_writer
    for writer in "" .kept; do
        say "        $what: a client $(if [[ -z $writer ]]; then echo "that connects anew through HAProxy"; else echo "that stays connected through PgBouncer"; fi):" \
            "$(lines_of "confirmed$writer") commits, longest gap $(longest_gap_of "$writer") s, $(lines_of "errors$writer") errors," \
            "$(errors_otherwise "$writer" | wc -l) of them beyond switchovers"
    done
    for writer in "$@"; do
        try "$what: no error beyond the switchovers${writer:+, connected through PgBouncer}" no_errors_otherwise "$writer"
    done
    try "$what: no confirmed write is lost" all_confirmed_are_there
}

lines_of() {
    docker exec pgmesh-test-client bash -c 'wc -l <"/tmp/$1"' lines "$1"
}

# The last one is that until the end, if the writer wrote no more.
longest_gap_of() {
    docker exec pgmesh-test-client cat "/tmp/confirmed$1" /tmp/stop | sort -n | longest_gap /dev/stdin
}

all_confirmed_are_there() {
    local there
    there=$(client pgmesh_app 5432 "$strict" 'SELECT n FROM confirmed')
    [[ -n $(confirmed_writes) && -z $(comm -23 <(confirmed_writes) <(sort <<<"$there")) ]]
}

confirmed_writes() {
    docker exec pgmesh-test-client bash -c 'cut -d " " -f 2 /tmp/confirmed /tmp/confirmed.kept' | sort
}

is_well() {
    in_service health-monitor health-monitor check
}

try_failover() {
    local leader gap began
    leader=$(leader_of 0)
    start_writer
    sleep 5
    say "        kills the container of $leader"
    began=$SECONDS
    docker kill "$(container_of "$leader")" >/dev/null
    sleep 5
    try "after the primary was killed the verdict is healthy again" wait_for 240 "healthy again" is_well
    say "        after $((SECONDS - began)) s; $(leader_of 0) leads"
    stop_writer
    gap=$(longest_gap_of '')
    say "        the longest time without a confirmed write: $gap s"
    try "no confirmed write is lost" all_confirmed_are_there
    try "the gap is below 30 s" awk -v gap="$gap" 'BEGIN { exit !(gap > 0 && gap < 30) }'
}

# --- everything else that may be lost -------------------------------------------------------------

# One after the other, under the writer: none of these stops it for long. After each a restore reaches the last commit.
try_losses() {
    local service leader group before
    leader=$(leader_of 0)
    for service in etcd-1 worker-1-1 "$(coordinators | grep -vx "$leader" | head -n 1)" haproxy-1 pgbouncer-1 redis s3-for-tests \
        prometheus alertmanager "${agents[@]}"; do
        [[ -n $(container_of "$service") ]] || continue
        start_writer
        before=$(container_of "$service")
        docker kill "$before" >/dev/null
        try "$service is back after it was killed" wait_for 60 "another container" is_another "$service" "$before"
        try "the verdict is healthy again" wait_for 180 "healthy again" is_well
        stop_writer
        try "nobody lost a write for it, nor waited for 10 s (longest: $(longest_gap_of '') s, through PgBouncer $(longest_gap_of .kept) s)" uninterrupted
        group=0
        [[ $service != worker-* ]] || group=$(group_of "$service")
        try "a restore of group $group reaches the last commit" reaches_last_commit "$group"
    done
    try "the coordinators' primary is the one before" equals "$leader" leader_of 0
    # It asked its standby for the last time when etcd was lost, and that has another address since.
    try "it can hand over" "$root/init-scripts/switchover.sh"
}

# is_another SERVICE CONTAINER: it has one, that is not this, and is healthy.
is_another() {
    local container
    container=$(container_of "$1")
    [[ -n $container && $container != "$2" && $(docker inspect --format '{{.State.Health.Status}}' "$container") == healthy ]]
}

# reaches_last_commit GROUP: what was written there last is in a copy that is restored without a target.
reaches_last_commit() {
    local last=$EPOCHREALTIME primary result=0
    primary=$(container_of "$(leader_of "$1")")
    sql "$primary" "$DATABASE" "CREATE TABLE IF NOT EXISTS last_commit (at text); INSERT INTO last_commit VALUES ('$last')" &&
        archive_all "$1" && (restore_copy "$1") && equals "$last" sql "$copy" "$DATABASE" 'SELECT max(at) FROM last_commit' || result=1
    [[ $result != 0 || $1 != 0 ]] || is_in_copy || result=1
    sql "$primary" "$DATABASE" 'DROP TABLE last_commit'
    [[ $result != 0 ]] || remove_copy
    return "$result"
}

# All that was confirmed to the writers is in the copy.
is_in_copy() {
    local lost
    lost=$(comm -23 <(confirmed_writes) <(sql "$copy" "$DATABASE" 'SELECT n FROM confirmed' | sort))
    [[ -z $lost ]] || { echo "confirmed, and not in the copy: $lost" && return 1; }
}

uninterrupted() {
    local writer
    for writer in '' .kept; do awk -v gap="$(longest_gap_of "$writer")" 'BEGIN { exit !(gap > 0 && gap < 10) }' || return 1; done
    all_confirmed_are_there
}

# --- what operators do ----------------------------------------------------------------------------

try_switchover() {
    local leader
    leader=$(leader_of 0)
    start_writer
    try "switchover.sh hands the coordinators over" "$root/init-scripts/switchover.sh"
    try_load "switchover" "" .kept
    try "another one leads" refused "expected $leader" equals "$leader" leader_of 0
    try "switchover.sh to the primary does nothing" "$root/init-scripts/switchover.sh" 0 --to "$(leader_of 0)"
    try "switchover.sh refuses a group without a standby" refused 'no standby of group 1 is fit to take over: it has none' "$root/init-scripts/switchover.sh" 1
    try "switchover.sh refuses who is not there" refused 'is not in group 0' "$root/init-scripts/switchover.sh" --to nobody
    try "switchover.sh refuses a standby that does not stream" refuses_unfit
}

# Its WAL receiver is kept from the primary as long as its PostgreSQL is stopped.
refuses_unfit() {
    local standby result=0
    standby=$(coordinators | grep -vx "$(leader_of 0)" | head -n 1)
    in_service "$standby" patronictl pause --wait >/dev/null
    in_service "$standby" pg_ctl --pgdata=/var/lib/postgresql/17/main --mode=fast --silent stop
    sleep 5
    refused "no standby of group 0 is fit to take over; $standby: it is" "$root/init-scripts/switchover.sh" || result=1
    in_service "$standby" patronictl resume --wait >/dev/null
    wait_for 120 "healthy again" is_well
    return "$result"
}

try_rolling_update() {
    local image new name
    image=$(image_of coordinator-1)
    new=${image%:*}:test
    printf 'FROM %s\nLABEL pgmesh.test=update\n' "$image" | docker build --quiet --tag "$new" - >/dev/null
    start_writer
    try "up.sh rolls a new database image out" env POSTGRES_IMAGE="$new" "$root/init-scripts/up.sh" --no-build --no-proof
    try_load "rolling update of the database image" "" .kept
    for name in $(databases); do try "$name has the new image" equals "$new" image_of "$name"; done
    try "up.sh remembers what its environment had" "$root/init-scripts/up.sh" --no-build --no-proof
    try "and keeps the new image" equals "$new" image_of coordinator-1
    try "up.sh rolls it back" env POSTGRES_IMAGE= "$root/init-scripts/up.sh" --no-build --no-proof
    try "coordinator-1 has the old image" equals "$image" image_of coordinator-1
    try "the verdict is healthy" is_well
    docker image rm --force "$new" >/dev/null
}

image_of() {
    docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "${STACK}_$1"
}

try_workers() {
    local group container
    try "remove-worker.sh refuses to go below two groups" refused 'one of the last 2' "$root/init-scripts/remove-worker.sh" 1
    try "add-worker.sh adds a group" "$root/init-scripts/add-worker.sh"
    group=$(worker_groups | tail -n 1)
    try "it serves" equals "worker-$group-1" leader_of "$group"
    try "it has its roles" equals 1 in_service "worker-$group-1" psql --no-psqlrc --quiet --no-align --tuples-only "$DATABASE" \
        --command "SELECT count(*) FROM pg_roles WHERE rolname = 'pgmesh_app'"
    try "the lag exporter sees it" sees "worker-$group-1" lag-exporter lag-exporter show
    try "the backup agent has its backup" sees "$group" backup-agent backup-agent list --group "$group"
    try "status.sh shows it, and that all is well" "$root/init-scripts/status.sh"
    if [[ $CITUS == no ]]; then
        in_service "worker-$group-1" psql --quiet "$DATABASE" --command 'CREATE TABLE mine (id int)'
        try "remove-worker.sh refuses a group with tables that nobody moves" refused 'tables of its own in database app: mine' "$root/init-scripts/remove-worker.sh" "$group"
        in_service "worker-$group-1" psql --quiet "$DATABASE" --command 'DROP TABLE mine'
    fi
    start_writer
    try "remove-worker.sh removes it" "$root/init-scripts/remove-worker.sh" "$group"
    try_load "remove-worker" "" .kept
    try "its volume stays" docker volume inspect "${STACK}_worker-$group-1$(generation)"
    try "remove-worker.sh removes the volume later" "$root/init-scripts/remove-worker.sh" "$group" --remove-volumes
    try "then it is gone" refused 'no such volume' docker volume inspect "${STACK}_worker-$group-1$(generation)"
    try "its backup stays" sees "$group" backup-agent backup-agent list --group "$group"
    try "the verdict is healthy" is_well
    try "remove-worker.sh refuses a group that is not there" refused 'there is no worker group 99' "$root/init-scripts/remove-worker.sh" 99
}

# Only with an image that has Citus, and what moves only with REBALANCE_MODE=apply.
try_citus() {
    local group before
    [[ $CITUS == yes ]] || { skip "Citus" "the database image has none" && return 0; }
    try "all groups are registered" equals "$(groups | xargs)" on_coordinator \
        "SELECT string_agg(groupid::text, ' ' ORDER BY groupid) FROM pg_dist_node WHERE noderole = 'primary' AND isactive"
    try "the tables are distributed" equals 'embedding_models reference, graph_nodes distributed, memory_entries distributed, namespaces reference, patterns distributed, trajectories distributed' \
        on_coordinator "SELECT string_agg(table_name || ' ' || citus_table_type, ', ' ORDER BY table_name::text) FROM citus_tables"
    try "applications write to all shards" client pgmesh_app 6432 "$strict" "INSERT INTO memory_entries (namespace, key, value, embedding)
        SELECT 'citus ' || n, n::text, '{}', array_fill(n, ARRAY[384])::vector FROM generate_series(1, 2000) AS n ON CONFLICT DO NOTHING"
    try "readers read from all shards" equals 2000 client pgmesh_readonly 5433 "$strict" "SELECT count(*) FROM memory_entries WHERE namespace LIKE 'citus %'"
    try "the rebalance agent plans" in_service rebalance-agent rebalance-agent plan
    if [[ ${REBALANCE_MODE:-} != apply ]]; then
        skip "moving shards" "REBALANCE_MODE is not apply"
        return 0
    fi
    start_writer
    try "add-worker.sh adds a group" "$root/init-scripts/add-worker.sh"
    group=$(worker_groups | tail -n 1)
    try "the rebalance agent moves shards to it" wait_for 300 "shards in group $group" has_shards "$group"
    before=$(on_coordinator 'SELECT count(*) FROM memory_entries')
    try "remove-worker.sh empties it, and removes it" "$root/init-scripts/remove-worker.sh" "$group" --remove-volumes
    try_load "shards that move" "" .kept
    try "no row is lost" equals "$before" on_coordinator 'SELECT count(*) FROM memory_entries'
    try "Citus has forgotten it" equals 0 on_coordinator "SELECT count(*) FROM pg_dist_node WHERE groupid = $group"
    try "the verdict is healthy" is_well
}

on_coordinator() {
    sql "$(primary_here 0)" "$DATABASE" "$1"
}

has_shards() {
    [[ $(on_coordinator "SELECT count(*) > 0 FROM pg_dist_placement JOIN pg_dist_shard USING (shardid) JOIN pg_dist_partition USING (logicalrelid)
        WHERE partmethod = 'h' AND groupid = $1") == t ]]
}

# sees WHAT SERVICE COMMAND…
sees() {
    local what=$1
    shift
    in_service "$@" | grep -- "$what" >/dev/null
}

# Of applications, of agents, of Patroni, of what is no database, the key of the backups, and the repository's own.
try_rotation() {
    local name old
    for name in "${rotated[@]}"; do
        old=$(cat "$secrets/$name" 2>/dev/null || awk 1 "$secrets/s3_access_key_id" "$secrets/s3_secret_access_key")
        start_writer
        try "rotate-secret.sh $name" "$root/init-scripts/rotate-secret.sh" "$name"
        # The others would only say that they must wait for it.
        [[ ! -e $rotation ]] || return 0
        case $name in
        # What clients connect to is restarted.
        haproxy_password) try_load "rotation of $name" ;;
        pgmesh_health_password | pgmesh_pgbouncer_password) try_load "rotation of $name" "" ;;
        *) try_load "rotation of $name" "" .kept ;;
        esac
        try "the verdict is healthy" is_well
        case $name in
        pgmesh_backup_key) ;;
        s3) try "the old pair is refused" refused 'NotSignedUp|InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied' repository_by "$old" ;;
        *)
            try "the new password is taken" login "$name" "$(<"$secrets/$name")"
            try "the old password is refused" refused 'password authentication failed|WRONGPASS|401 Unauthorized|is another' login "$name" "$old"
            ;;
        esac
    done
    try "backups under the older key can be read" in_service backup-agent backup-agent verify --group 0
    try "a backup under the new key is taken" in_service backup-agent backup-agent backup --group 0
    printf "it's\n" >"$cache/test-secret"
    try "rotate-secret.sh refuses a value that does not stand everywhere as it is" refused 'characters that it may not have' \
        "$root/init-scripts/rotate-secret.sh" pgmesh_app_password --from "$cache/test-secret"
    rm -f "$cache/test-secret"
    try "rotate-secret.sh abandons nothing where nothing was begun" refused 'no rotation of pgmesh_app_password' \
        "$root/init-scripts/rotate-secret.sh" pgmesh_app_password --abandon
    try "rotate-secret.sh refuses what is no secret" refused 'no secret that can be rotated' "$root/init-scripts/rotate-secret.sh" nothing
}

# login NAME PASSWORD: by the secret's user, where it is asked for.
login() {
    case $1 in
    redis_password) redis_login "$2" ;;
    haproxy_password) haproxy_statistics "$2" ;;
    postgres_password) superuser_password_is "$2" ;;
    pgmesh_replication_password) role_login pgmesh_replication 'replication=true' IDENTIFY_SYSTEM "$2" ;;
    *) role_login "${1%_password}" '' 'SELECT 1' "$2" ;;
    esac
}

# role_login ROLE CONNINFO COMMAND PASSWORD
role_login() {
    local database=$DATABASE
    case $1 in pgmesh_backup | pgmesh_lag | pgmesh_rewind) database=postgres ;; esac
    docker exec --interactive pgmesh-test-client bash -c 'read -r PGPASSWORD && export PGPASSWORD && exec psql --no-psqlrc \
        "host=localhost user=$1 port=5432 dbname=$4 sslmode=require $2" --command "$3"' login "${@:1:3}" "$database" <<<"$4"
}

redis_login() {
    docker exec --interactive "$(container_of redis)" bash -c 'read -r REDISCLI_AUTH && export REDISCLI_AUTH && redis-cli PING 2>&1 |
        tee /dev/stderr | grep -x PONG' <<<"$1"
}

haproxy_statistics() {
    local answer
    answer=$(docker exec --interactive pgmesh-test-client bash -c 'read -r password && exec 3<>/dev/tcp/127.0.0.1/8404 &&
        printf "GET /stats HTTP/1.0\r\nAuthorization: Basic %s\r\n\r\n" "$(printf "pgmesh:%s" "$password" | base64 --wrap=0)" >&3 && head -n 1 <&3' <<<"$1")
    echo "$answer"
    [[ $answer == *' 200 '* ]]
}

# The superuser cannot log in over the network: what PostgreSQL has of the password is compared.
superuser_password_is() {
    docker exec --interactive "$(container_of "$(leader_of 0)")" python3 -c '
import base64, hashlib, hmac, subprocess, sys
verifier = subprocess.check_output(["psql", "-XAtc", "SELECT rolpassword FROM pg_authid WHERE rolname = current_user", "postgres"], text=True).split("$")
iterations, salt = verifier[1].split(":")
salted = hashlib.pbkdf2_hmac("sha256", sys.stdin.read().strip().encode(), base64.b64decode(salt), int(iterations))
stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
if verifier[2].split(":")[0] != base64.b64encode(stored).decode():
    sys.exit("it is another")' <<<"$1"
}

# repository_by PAIR: a list of the backups by that pair of S3, in two lines.
repository_by() {
    docker exec --interactive "$(container_of backup-agent)" bash -c '
        umask 077 && cd /tmp && mkdir -p pair && read -r id && read -r key && printf %s "$id" >pair/s3_access_key_id && printf %s "$key" >pair/s3_secret_access_key &&
            sed "s#/run/secrets/s3_#/tmp/pair/s3_#" /etc/pgmesh/backup-agent.toml >pair/config && timeout 60 backup-agent --config /tmp/pair/config list
        result=$?
        rm -rf pair
        exit "$result"' <<<"$1"
}

# killed_again_and_again COMMAND…: killed with all its children after 2 s, and begun again, then after 4 s, and so on,
# until it ends by itself.
killed_again_and_again() {
    local after=2 result=137
    while [[ $result == 137 ]]; do
        result=0
        timeout --signal=KILL "$after" "$@" || result=$?
        [[ $result != 137 ]] || echo "--- killed after $after s"
        after=$((after * 2))
    done
    return "$result"
}

try_interruptions() {
    local before group old
    before=$(worker_groups)
    start_writer
    try "add-worker.sh goes on where it was killed" killed_again_and_again "$root/init-scripts/add-worker.sh"
    group=$(comm -13 <(sort <<<"$before") <(worker_groups | sort))
    try "there is one group more, and it serves" equals "worker-$group-1" leader_of "$group"
    try "the verdict is healthy" is_well
    try "remove-worker.sh goes on where it was killed" killed_again_and_again "$root/init-scripts/remove-worker.sh" "$group" --remove-volumes
    try "the group is gone" equals "$before" worker_groups
    try "so are its volumes" refused 'no such volume' docker volume inspect "${STACK}_worker-$group-1$(generation)"
    try "the verdict is healthy" is_well
    old=$(<"$secrets/pgmesh_app_password")
    try "rotate-secret.sh goes on where it was killed" killed_again_and_again "$root/init-scripts/rotate-secret.sh" pgmesh_app_password
    try_load "scripts that were killed" "" .kept
    try "the new password is taken" login pgmesh_app_password "$(<"$secrets/pgmesh_app_password")"
    try "the old password is refused" refused 'password authentication failed' login pgmesh_app_password "$old"
    try "the verdict is healthy" is_well
    try "up.sh finds nothing to do" "$root/init-scripts/up.sh" --no-build --no-proof
}

try_restore() {
    local moment
    client pgmesh_admin 5432 "$strict" "SET ROLE pgmesh_owner; DROP TABLE IF EXISTS restored; CREATE TABLE restored (what text); GRANT ALL ON restored TO pgmesh_app" >/dev/null 2>&1
    client pgmesh_app 5432 "$strict" "INSERT INTO restored VALUES ('before')"
    moment=$(client pgmesh_app 5432 "$strict" "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')")
    sleep 1
    client pgmesh_app 5432 "$strict" "INSERT INTO restored VALUES ('after')"
    try "restore-cluster.sh asks" refused 'not confirmed' "$root/init-scripts/restore-cluster.sh" --latest </dev/null
    try "restore-cluster.sh refuses a moment that cannot be reached, and the databases run as before" \
        refused 'the databases run as before' "$root/init-scripts/restore-cluster.sh" --target-time '2020-01-01 00:00:00+00' --yes
    try "what was there is there" equals $'before\nafter' client pgmesh_app 5432 "$strict" 'SELECT * FROM restored'
    try "restore-cluster.sh refuses while the repository lacks what is committed" refuses_without_agent
    try "restore-cluster.sh --latest" "$root/init-scripts/restore-cluster.sh" --latest --yes
    try "it reaches the last commit" equals $'before\nafter' client pgmesh_app 5432 "$strict" 'SELECT * FROM restored'
    try "restore-cluster.sh --target-time" "$root/init-scripts/restore-cluster.sh" --target-time "$moment" --yes
    try "it reaches the moment, and no more" equals before client pgmesh_app 5432 "$strict" 'SELECT * FROM restored'
    try "restore-cluster.sh --remove-old-volumes" "$root/init-scripts/restore-cluster.sh" --remove-old-volumes --yes
    try "the verdict is healthy" is_well
}

refuses_without_agent() {
    local result=0
    docker service scale "${STACK}_backup-agent=0" >/dev/null
    ARCHIVE_LIMIT_S=5 refused 'no backup agent receives its WAL' "$root/init-scripts/restore-cluster.sh" --latest --yes || result=1
    docker service scale "${STACK}_backup-agent=1" >/dev/null
    wait_for 180 "healthy again" is_well
    return "$result"
}

# --- nothing is left ------------------------------------------------------------------------------

# What versions before the stack left behind.
make_earlier() {
    docker network create --label "$stack_label=up" pgmesh-earlier >/dev/null
    docker run --detach --name pgmesh-earlier --label "$stack_label=up" --network pgmesh-earlier "$base_image" sleep 60 >/dev/null
    docker volume create --label "$stack_label=up" pgmesh-earlier >/dev/null
}

nothing_left() {
    local left
    left=$({
        docker ps --all --format 'container {{.Names}}' --filter "label=com.docker.stack.namespace=$STACK"
        docker ps --all --format 'container {{.Names}}' --filter "label=$stack_label=$STACK"
        docker ps --all --format 'container {{.Names}}' --filter "label=$stack_label=up"
        docker volume ls --format 'volume {{.Name}}' | grep -E "^volume (${STACK}[_-]|pgmesh)" || true
        docker network ls --format 'network {{.Name}}' | grep -E "^network (${STACK}_|pgmesh-earlier)" || true
        [[ $(docker info --format '{{.Swarm.ControlAvailable}}') != true ]] || {
            docker secret ls --format 'secret {{.Name}}' | grep "^secret ${STACK}_" || true
            docker config ls --format 'config {{.Name}}' | grep "^config ${STACK}_" || true
            docker service ls --format 'service {{.Name}}' | grep "^service ${STACK}_" || true
        }
        [[ ! -e $up ]] || echo "directory $up"
    })
    [[ -z $left ]] || { echo "$left" && return 1; }
}

main() {
    local full=no step steps=(clients roles configurations proof failover losses switchover rolling_update workers citus rotation interruptions restore secrets)
    rotated=(pgmesh_app_password pgmesh_backup_password pgmesh_replication_password haproxy_password pgmesh_backup_key s3)
    while [[ $# -gt 0 ]]; do
        case $1 in
        --secrets)
            read -r -a rotated <<<"${2:-}"
            [[ ${rotated[*]} != all ]] || rotated=("${database_passwords[@]/%/_password}" redis_password haproxy_password pgmesh_backup_key s3)
            shift
            ;;
        --only)
            [[ " ${steps[*]} " == *" ${2:-} "* ]] || { usage >&2 && exit 2; }
            steps=("$2") && shift
            ;;
        --full) full=yes && shift && break ;;
        -h | --help) usage && return 0 ;;
        *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    if [[ $full == yes ]]; then
        "$root/init-scripts/up.sh" "$@"
        passed=$((passed + 1))
    fi
    : >"$tests_log"
    load_remembered_profile
    take_running
    start_client
    try "status.sh says that all is well" "$root/init-scripts/status.sh"
    for step in "${steps[@]}"; do "try_$step"; done
    docker rm --force --volumes pgmesh-test-client >/dev/null
    rm -rf "$production"
    if [[ $full == yes ]]; then
        make_earlier
        try "down.sh asks" refused 'nobody is there to be asked' "$root/init-scripts/down.sh" </dev/null
        try "down.sh removes the stack" "$root/init-scripts/down.sh" --yes
        try "nothing is left" nothing_left
    fi
    summary
}

main "$@"
