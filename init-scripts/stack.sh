# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154  # variables that the files of the stack name; those of lib.sh and of the profile
# Functions of the stack, shared by up.sh, down.sh, status.sh, certificates.sh and secrets.sh: the profile,
# what there is of each kind, images, and the files that are made from stack.yml and configs/. Sourced after
# lib.sh, never run.

readonly STACK=${PGMESH_STACK:-pgmesh}
readonly ROOT=$root
readonly up="${PGMESH_UP:-$cache/up}"
readonly secrets="$up/secrets"
readonly RENDERED="$up/stack"
readonly stack_label=pgmesh.stack

# --- the profile ----------------------------------------------------------------------------------

# load_profile NAME|FILE: its variables, but for those that the environment has. The profile that was
# taken is remembered, for the other scripts.
load_profile() {
    local file=$1 line name
    [[ -e $file ]] || file="$root/configs/$1.env"
    [[ -r $file ]] || die "there is no profile $1" "one of: small, production, or a file like configs/small.env"
    profile=$file
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^([A-Z][A-Z0-9_]*)=(.*)$ ]] || continue
        name=${BASH_REMATCH[1]}
        [[ -v $name ]] || printf -v "$name" '%s' "${BASH_REMATCH[2]}"
    done <"$file"
}

load_remembered_profile() {
    load_profile "$(cat "$up/profile" 2>/dev/null || echo small)"
}

remember_profile() {
    printf '%s\n' "$profile" >"$up/profile"
}

# --- what there is --------------------------------------------------------------------------------

readonly agents=(backup-agent lag-exporter health-monitor rebalance-agent)

# numbered NAME COUNT: NAME-1 NAME-2 …
numbered() {
    local number
    for ((number = 1; number <= $2; number++)); do printf '%s\n' "$1-$number"; done
}

etcd_members() { numbered etcd "$ETCD_MEMBERS"; }
haproxies() { numbered haproxy "$HAPROXIES"; }
pgbouncers() { numbered pgbouncer "$PGBOUNCERS"; }
coordinators() { numbered coordinator "$COORDINATORS"; }

# members_of GROUP: its database servers.
members_of() {
    if (($1 == 0)); then coordinators; else numbered "worker-$1" "$WORKER_MEMBERS"; fi
}

groups() {
    seq 0 "$WORKER_GROUPS"
}

databases() {
    local group
    for group in $(groups); do members_of "$group"; done
}

# group_of DATABASE: coordinator-2 is of group 0, worker-3-1 of group 3.
group_of() {
    case $1 in
    coordinator-*) echo 0 ;;
    *) local rest=${1#worker-} && echo "${rest%-*}" ;;
    esac
}

# place_of MEMBER: the label pgmesh.place of its machine.
place_of() {
    local number=${1##*-} shift=0
    [[ $1 != worker-* ]] || shift=$(group_of "$1")
    echo $(((number - 1 + shift) % PLACES + 1))
}

patroni_scope() {
    if [[ $CITUS == yes ]]; then echo "$STACK"; else echo "$1"; fi
}

# What needs a certificate of its own.
certified() {
    etcd_members
    databases
    pgbouncers
    printf '%s\n' "${agents[@]}"
}

readonly database_passwords=(postgres pgmesh_replication pgmesh_rewind pgmesh_backup pgmesh_lag pgmesh_health
    pgmesh_rebalance pgmesh_admin pgmesh_app pgmesh_readonly pgmesh_mcp pgmesh_pgbouncer)

# --- hashes and names -----------------------------------------------------------------------------

# upper NAME: as part of the name of a variable.
upper() {
    local name=${1^^}
    printf '%s' "${name//[^A-Z0-9]/_}"
}

# secret_hash FILE: of its content and of something random that nobody else has, so that the name of a
# secret tells nothing about what it is.
secret_hash() {
    cat "$up/salt" "$1" | sha256sum | cut -c 1-12
}

content_hash() {
    sha256sum <"$1" | cut -c 1-12
}

# --- rendering ------------------------------------------------------------------------------------

# render FILE: its text with the value of each variable in place of ${NAME}.
render() {
    local rest made='' name
    rest=$(<"$1")
    while [[ $rest =~ \$\{([A-Z][A-Z0-9_]*)\} ]]; do
        name=${BASH_REMATCH[1]}
        [[ -v $name ]] || die "$1 names \${$name}, which has no value" "set it in the profile $profile"
        made+=${rest%%"\${$name}"*}${!name}
        rest=${rest#*"\${$name}"}
    done
    printf '%s\n' "$made$rest"
}

# joined SEPARATOR WORD…
joined() {
    local separator=$1 text=''
    shift
    (($# == 0)) || text=$(printf "%s$separator" "$@")
    printf '%s' "${text%"$separator"}"
}

# each FORMAT NAME…: FORMAT with %s for each name, one after the other.
each() {
    local format=$1 name
    shift
    for name in "$@"; do printf '%s' "${format//%s/$name}"; done
}

# The variables that follow from the profile. Names of members have no blanks.
# shellcheck disable=SC2046
derive() {
    local etcd coordinator pgbouncer haproxy group
    mapfile -t etcd < <(etcd_members)
    mapfile -t coordinator < <(coordinators)
    mapfile -t pgbouncer < <(pgbouncers)
    mapfile -t haproxy < <(haproxies)
    ETCD_INITIAL_CLUSTER=$(joined , $(for name in "${etcd[@]}"; do echo "$name=https://$name:2380"; done))
    ETCD_HOSTS=$(joined , "${etcd[@]/%/:2379}")
    ETCD_ENDPOINTS=$(joined ', ' $(for name in "${etcd[@]}"; do echo "\"https://$name:2379\""; done))
    ETCD_METRICS_TARGETS=$(joined ', ' $(for name in "${etcd[@]}"; do echo "\"$name:2381\""; done))
    HAPROXY_METRICS_TARGETS=$(joined ', ' $(for name in "${haproxy[@]}"; do echo "\"$name:8404\""; done))
    HAPROXY_SERVERS=$(each $'    server %s %s:5432 check port 8008 verifyhost %s\n' "${coordinator[@]}")
    PATRONI_METRICS_TARGETS=$(for group in $(groups); do
        printf '      - {targets: [%s], labels: {group: "%s"}}\n' "$(joined ', ' $(members_of "$group" | sed 's/.*/"&:8008"/'))" "$group"
    done)
    PGBOUNCER_TABLES=$(each $'[[pgbouncer]]\nname = "%s"\nhost = "%s"\nport = 6432\nuser = "pgmesh_health"\npassword_file = "/run/secrets/pgmesh_health_password"\ndatabase = "'"$DATABASE"$'"\ngroup = 0\ntls = "verify-full"\nca_file = "/etc/pgmesh/ca.crt"\n\n' "${pgbouncer[@]}")
    HAPROXY_TABLES=$(each $'[[haproxy]]\nname = "%s"\nurl = "http://%s:8404/stats"\nuser = "pgmesh"\npassword_file = "/run/secrets/haproxy_password"\nwrite_backend = "postgres_write"\nread_backend = "postgres_read"\ngroup = 0\n\n' "${haproxy[@]}")
    GRAFANA_IMAGE=${GRAFANA_IMAGE:-grafana/grafana:11.6.0}
}

# Hashes of what the files of the stack name: secrets, and configs that are made already.
hash_all() {
    local file name
    for file in "$secrets"/*; do
        printf -v "HASH_$(upper "${file##*/}")" '%s' "$(secret_hash "$file")"
    done
    for file in "$RENDERED"/* "$root"/init-scripts/[0-9][0-9]-*.sql; do
        name=${file##*/}
        [[ $name == *.yml && $name != prometheus.yml && $name != alertmanager.yml && $name != *-prometheus.yml && $name != patroni-*.yml ]] ||
            printf -v "HASH_$(upper "$name")" '%s' "$(content_hash "$file")"
    done
}

# patroni_config KIND GROUP_VARIABLES: patroni-coordinator.yml or patroni-worker.yml.
render_patroni() {
    local kind=$1 prefix=${1^^} name value
    for name in MAX_CONNECTIONS SHARED_BUFFERS EFFECTIVE_CACHE_SIZE WORK_MEM MAINTENANCE_WORK_MEM; do
        value="${prefix}_$name"
        printf -v "$name" '%s' "${!value}"
    done
    SYNCHRONOUS_MODE=false
    [[ $kind != coordinator ]] || SYNCHRONOUS_MODE=quorum
    SUPERUSER_METHOD=reject
    [[ $CITUS != yes ]] || SUPERUSER_METHOD=scram-sha-256
    render "$root/configs/postgres/patroni.yml" >"$RENDERED/patroni-$kind.yml"
}

render_configs() {
    local agent
    render_patroni coordinator
    render_patroni worker
    render "$root/configs/haproxy/haproxy.cfg" >"$RENDERED/haproxy.cfg"
    render "$root/configs/pgbouncer/pgbouncer.ini" >"$RENDERED/pgbouncer.ini"
    render "$root/configs/pgbouncer/userlist.txt" >"$RENDERED/userlist.txt"
    render "$root/configs/redis/redis.conf" >"$RENDERED/redis.conf"
    render "$root/configs/prometheus/prometheus.yml" >"$RENDERED/prometheus.yml"
    render "$root/configs/prometheus/grafana-prometheus.yml" >"$RENDERED/grafana-prometheus.yml"
    render "$root/configs/alertmanager/alertmanager.yml" >"$RENDERED/alertmanager.yml"
    for agent in "${agents[@]}"; do
        render "$root/configs/stack/$agent.toml" >"$RENDERED/$agent.toml"
    done
    cp "$up/ca.crt" "$RENDERED/ca.crt"
}

# render_service TEMPLATE NAME: $RENDERED/NAME.yml. Its label pgmesh.spec changes with everything in it.
render_service() {
    local text
    SPEC='' text=$(render "$1")
    SPEC=$(sha256sum <<<"$text" | cut -c 1-12)
    render "$1" >"$RENDERED/$2.yml"
}

# of_certificate NAME: for the template of a service that has its own.
of_certificate() {
    TLS_CERTIFICATE_HASH=$(secret_hash "$secrets/tls_$1_certificate")
    TLS_KEY_HASH=$(secret_hash "$secrets/tls_$1_key")
}

render_database() {
    local kind=${1%%-*} memory cpus
    MEMBER=$1 GROUP=$(group_of "$1") PLACE=$(place_of "$1")
    # With Citus Patroni puts the group below the scope by itself.
    PATRONI_NAMESPACE="/service/$STACK/" PATRONI_SCOPE=$(patroni_scope "$GROUP") CITUS_ENVIRONMENT=''
    if [[ $CITUS == yes ]]; then
        PATRONI_NAMESPACE=/service/
        CITUS_ENVIRONMENT=$(printf 'PATRONI_CITUS_DATABASE: %s\n      PATRONI_CITUS_GROUP: "%s"' "$DATABASE" "$GROUP")
    fi
    memory=${kind^^}_MEMORY cpus=${kind^^}_CPUS
    MEMORY=${!memory} CPUS=${!cpus}
    PATRONI_CONFIG=patroni-$kind.yml
    PATRONI_CONFIG_HASH=$(content_hash "$RENDERED/$PATRONI_CONFIG")
    of_certificate "$1"
    render_service "$root/configs/stack/database.yml" "$1"
}

# render_numbered TEMPLATE NAME: for etcd-1, haproxy-1 …
render_numbered() {
    NUMBER=${2##*-} PLACE=$(place_of "$2")
    render_service "$root/configs/stack/$1.yml" "$2"
}

# render_all: everything into $RENDERED. Secrets, certificates and the names of images must be there.
render_all() {
    local name
    rm -rf "$RENDERED"
    mkdir -p "$RENDERED"
    derive
    render_configs
    hash_all
    for name in $(etcd_members); do of_certificate "$name" && render_numbered etcd "$name"; done
    for name in $(databases); do render_database "$name"; done
    for name in $(haproxies); do render_numbered haproxy "$name"; done
    for name in $(pgbouncers); do of_certificate "$name" && render_numbered pgbouncer "$name"; done
    [[ $S3_FOR_TESTS != yes ]] || render_service "$root/configs/stack/s3-for-tests.yml" s3-for-tests
    render "$root/stack.yml" >"$RENDERED/stack.yml"
    # For deploying a member alone.
    sed -n '/^version:/p; /^networks:/,/^$/p' "$RENDERED/stack.yml" >"$RENDERED/networks.yml"
}

# members: the services with a file of their own, in the order in which they are updated.
members() {
    etcd_members
    [[ $S3_FOR_TESTS != yes ]] || echo s3-for-tests
    databases
    haproxies
    pgbouncers
}

# --- images ---------------------------------------------------------------------------------------

# ensure_tagged VARIABLE NAME DOCKERFILE BASE FILE… -- BUILD_ARGUMENT…: the image NAME, with what it is made of
# as its tag, so that Swarm sees when it is another; its full name goes into VARIABLE. Nothing where the
# environment names an image by that variable: that one is taken.
ensure_tagged() {
    local variable=$1 name=$2 hash
    shift 2
    [[ -z ${!variable:-} ]] || return 0
    hash=$(inputs_hash "$@")
    name="$name:${hash:0:12}"
    ensure_image "$name" "$@"
    printf -v "$variable" '%s' "$name"
}

ensure_stack_images() {
    local health=agents/healthcheck.sh postgres_base=${POSTGRES_BASE_IMAGE:-$base_image}
    ensure_tagged POSTGRES_IMAGE pgmesh-postgres configs/postgres/Dockerfile "$postgres_base" "${postgres_files[@]}" --
    ensure_tagged ETCD_IMAGE pgmesh-etcd configs/etcd/Dockerfile "$base_image" "$health" --
    ensure_tagged HAPROXY_IMAGE pgmesh-haproxy configs/haproxy/Dockerfile "$base_image" "$health" --
    ensure_tagged PGBOUNCER_IMAGE pgmesh-pgbouncer configs/pgbouncer/Dockerfile "$base_image" --
    ensure_tagged REDIS_IMAGE pgmesh-redis configs/redis/Dockerfile "$base_image" --
    ensure_tagged PROMETHEUS_IMAGE pgmesh-prometheus configs/prometheus/Dockerfile "$base_image" --
    ensure_tagged ALERTMANAGER_IMAGE pgmesh-alertmanager configs/alertmanager/Dockerfile "$base_image" --
}

# From the programs in .cache/image. The backup agent stands on the database image: it runs PostgreSQL's programs.
ensure_agent_images() {
    local health=agents/healthcheck.sh
    ensure_tagged BACKUP_AGENT_IMAGE pgmesh-backup-agent agents/Dockerfile "$POSTGRES_IMAGE" "$health" .cache/image/backup-agent -- AGENT=backup-agent ADMIN_PORT=9632
    ensure_tagged LAG_EXPORTER_IMAGE pgmesh-lag-exporter agents/Dockerfile "$base_image" "$health" .cache/image/lag-exporter -- AGENT=lag-exporter ADMIN_PORT=9633
    ensure_tagged HEALTH_MONITOR_IMAGE pgmesh-health-monitor agents/Dockerfile "$base_image" "$health" .cache/image/health-monitor -- AGENT=health-monitor ADMIN_PORT=9631
    ensure_tagged REBALANCE_AGENT_IMAGE pgmesh-rebalance-agent agents/Dockerfile "$base_image" "$health" .cache/image/rebalance-agent -- AGENT=rebalance-agent ADMIN_PORT=9634
    [[ $S3_FOR_TESTS != yes ]] ||
        ensure_tagged S3_FOR_TESTS_IMAGE pgmesh-s3-for-tests configs/s3-for-tests/Dockerfile "$base_image" .cache/image/s3-server --
}

# Whether the database image has Citus.
detect_citus() {
    CITUS=no
    ! docker run --rm --entrypoint bash "$POSTGRES_IMAGE" -c 'test -e "$(pg_config --pkglibdir 2>/dev/null || echo /usr/lib/postgresql/17/lib)/citus.so"' || CITUS=yes
}

# --- services and their containers ----------------------------------------------------------------

# container_of SERVICE: the id of its container on this machine; nothing where there is none.
container_of() {
    docker ps --quiet --filter "label=com.docker.swarm.service.name=${STACK}_$1" | head -n 1
}

# services: name, "running/wanted" of each service of the stack.
services() {
    docker stack services --format '{{.Name}} {{.Replicas}}' "$STACK" 2>/dev/null | sed "s/^${STACK}_//" | sort
}

# missing_services: those of which fewer tasks run than are wanted.
missing_services() {
    services | awk '{ split($2, n, "/"); if (n[1] + 0 < n[2] + 0) print $1 }'
}

# leader_of GROUP: its primary, by the key in etcd; nothing while there is none, or no member is on this machine.
leader_of() {
    local member container
    for member in $(members_of "$1"); do
        container=$(container_of "$member")
        [[ -z $container ]] || [[ $(docker exec "$container" psql --no-psqlrc --quiet --no-align --tuples-only \
            --command 'SELECT pg_is_in_recovery()' postgres 2>/dev/null) != f ]] || {
            echo "$member"
            return 0
        }
    done
}
