# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154  # variables that the files of the stack name; those of lib.sh and of the profile
# Functions of the stack, shared by the scripts of init-scripts/ and tests/stack.sh: the profile, what there is
# of each kind, images, the files that are made from stack.yml and configs/, deploying them, and what the
# running stack says. Sourced after lib.sh, never run.

readonly STACK=${PGMESH_STACK:-pgmesh}
# "up" is the label of what versions before the stack made, which down.sh removes.
[[ $STACK =~ ^[a-z][a-z0-9-]*$ && $STACK != up ]] || die "PGMESH_STACK=$STACK" "a name of small letters, digits and hyphens, and not \"up\""
readonly ROOT=$root
# What a stack is made with is its own.
up=$cache/up
[[ $STACK == pgmesh ]] || up+=-$STACK
up=${PGMESH_UP:-$up}
readonly up
readonly secrets="$up/secrets"
readonly RENDERED="$up/stack"
readonly rendering="$up/stack.new"
readonly scripts="$root/init-scripts"
readonly stack_label=pgmesh.stack
readonly start_limit_s=600
readonly job_limit_s=86400
readonly job_start_limit_s=300
# The name of the secret that rotate-secret.sh is replacing; until it has ended.
readonly rotation="$up/rotating"
# Progress bars where the script writes to a terminal.
terminal=()
[[ ! -t 1 ]] || terminal=(--tty)

# lock_stack: one script at a time changes the stack. Those that it runs need no lock of their own.
lock_stack() {
    [[ -z ${PGMESH_LOCKED:-} ]] || return 0
    exec 9>>"$cache/up.lock"
    flock --nonblock 9 || die "the stack is being changed by $(<"$cache/up.lock")" \
        "wait until that has ended; if it was killed, until what it had begun has"
    printf '%s (process %s, since %s)\n' "${0##*/}" "$$" "$(date '+%Y-%m-%d %H:%M:%S')" >"$cache/up.lock"
    export PGMESH_LOCKED=yes
}

# refuse_in_rotation: for scripts that bring secrets to services.
refuse_in_rotation() {
    [[ ! -e $rotation ]] || die "the rotation of $(<"$rotation") was interrupted" "init-scripts/rotate-secret.sh $(<"$rotation")"
}

# ask WHAT: goes on only where the stack's name is typed, or --yes was given.
ask() {
    local answer
    [[ $sure == no ]] || return 0
    printf '%s\nType %s to go on: ' "$1" "$STACK"
    read -r answer || true
    [[ $answer == "$STACK" ]] || die "not confirmed: nothing was done" "start again, or with --yes"
}

# --- the profile ----------------------------------------------------------------------------------

# Images of one's own may stand in a profile or in the environment; none has to.
readonly image_variables=({POSTGRES_BASE,POSTGRES,ETCD,HAPROXY,PGBOUNCER,REDIS,PROMETHEUS,ALERTMANAGER,GRAFANA,BACKUP_AGENT,LAG_EXPORTER,HEALTH_MONITOR,REBALANCE_AGENT,S3_FOR_TESTS}_IMAGE)

# What the environment of up.sh gave holds for later runs too.
readonly remembered="$up/environment"

# load_profile NAME|FILE [REMEMBERED]: each variable as the environment has it; or else as that of an earlier up.sh had
# it; or else as the profile says. An empty one in the environment stands for the profile's. What is not from the
# profile is in $given, what is from an earlier run in $recalled.
load_profile() {
    local file=$1 name
    declare -gA given=()
    recalled=()
    [[ -f $file ]] || file="$root/configs/$1.env"
    [[ -f $file && -r $file ]] || die "there is no profile $1" "one of: small, production, or a file like configs/small.env"
    profile=$(realpath "$file")
    note_environment
    take_remembered "${2:-$remembered}"
    take_profile
    for name in $(variables_in "$root/configs/small.env"); do
        [[ -v $name ]] || die "the profile $profile does not say $name" "as configs/small.env does; in a profile that up.sh has deployed, run up.sh again"
    done
}

# variables_in FILE: their names.
variables_in() {
    sed -nE 's/^([A-Z][A-Z0-9_]*)=.*/\1/p' "$1"
}

note_environment() {
    local name
    for name in $(variables_in "$profile") "${image_variables[@]}"; do
        [[ -n ${!name:-} ]] || continue
        check_value "the environment" "$name" "${!name}"
        given[$name]=${!name}
    done
}

# take_remembered FILE
take_remembered() {
    local line kept=() name value
    [[ ! -e $1 ]] || mapfile -t kept <"$1"
    for line in "${kept[@]}"; do
        name=${line%%=*} value=${line#*=}
        [[ ! -v $name ]] || continue
        check_value "$1" "$name" "$value"
        printf -v "$name" '%s' "$value"
        given[$name]=$value recalled+=("$line")
    done
}

take_profile() {
    local line name value
    local -A taken=()
    while IFS= read -r line || [[ -n $line ]]; do
        [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
        [[ $line =~ ^([A-Z][A-Z0-9_]*)=(.*)$ ]] || die "the profile $profile has the line: $line" "each is NAME=value, or begins with #"
        name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        check_value "the profile $profile" "$name" "$value"
        # Of a variable that is there twice the first holds.
        [[ -n ${!name:-} || -v taken[$name] ]] || printf -v "$name" '%s' "$value"
        taken[$name]=
    done <"$profile"
}

# check_value WHERE NAME VALUE: values get into files of many kinds, where one that is wrong may be taken for another.
check_value() {
    local pattern words
    case $2 in
    PLACES | COORDINATORS | WORKER_MEMBERS | HAPROXIES | HEALTH_MONITORS | *_MAX_CONNECTIONS | *_MAX_CLIENTS | *_POOL_SIZE | *_MAX_DB_CONNECTIONS)
        pattern='[1-9][0-9]*' words='a number from 1' ;;
    WORKER_GROUPS | PGBOUNCERS | REBALANCE_AGENTS | GRAFANAS) pattern='0|[1-9][0-9]*' words='a number' ;;
    ETCD_MEMBERS) pattern='[1357]' words='1, 3, 5 or 7' ;;
    *_SHARED_BUFFERS | *_EFFECTIVE_CACHE_SIZE | *_WORK_MEM | MAX_WAL_SIZE)
        pattern='[1-9][0-9]*(kB|MB|GB|TB)' words='a size as PostgreSQL writes it: 192MB, 4GB' ;;
    MAX_SLOT_WAL_KEEP_SIZE) pattern='-1|[1-9][0-9]*(kB|MB|GB|TB)' words='a size as PostgreSQL writes it: 192MB, 4GB; or -1' ;;
    *_MEMORY) pattern='[1-9][0-9]*[kKmMgG][bB]?' words='a size as Docker writes it: 512M, 1G' ;;
    *_CPUS) pattern='[0-9]+(\.[0-9]+)?' words='a number like 2 or 0.5' ;;
    REDIS_MAXMEMORY) pattern='[1-9][0-9]*([kKmMgG][bB])?' words='a size as Redis writes it: 64mb, 2gb' ;;
    PROMETHEUS_RETENTION) pattern='[1-9][0-9]*[smhdwy]' words='a time as Prometheus writes it: 12h, 15d' ;;
    NETWORK_ENCRYPTION) pattern='yes|no|auto' words='yes, no or auto' ;;
    REBALANCE_MODE) pattern='dry_run|apply' words='dry_run or apply' ;;
    S3_FOR_TESTS) pattern='yes|no' words='yes or no' ;;
    S3_PATH_STYLE) pattern='true|false' words='true or false' ;;
    S3_ENDPOINT) pattern='https?://[][A-Za-z0-9._:/-]+' words='an address that begins with http:// or https://' ;;
    S3_BUCKET | S3_REGION) pattern='[A-Za-z0-9._-]+' words='letters, digits, dots, _ and -' ;;
    DATABASE) pattern='[A-Za-z_][A-Za-z0-9_-]{0,62}' words='a name of letters, digits, _ and -' ;;
    PUBLIC_NAMES) pattern='([A-Za-z0-9*._:-]+(,[A-Za-z0-9*._:-]+)*)?' words='names or addresses with commas between them, without blanks' ;;
    *_IMAGE) pattern='([A-Za-z0-9][A-Za-z0-9._/:@-]*)?' words='the name of an image' ;;
    # One of its own, which a file in configs/ names.
    *) pattern="[^\"'#]*" words='anything without quotes and #' ;;
    esac
    [[ $3 =~ ^($pattern)$ ]] || die "$1 has $2=$3" "allowed is $words; nothing may follow the value in its line"
}

# As up.sh deployed it, with what its environment had: that of another script changes nothing.
load_remembered_profile() {
    if [[ -e $up/values ]]; then
        # shellcheck disable=SC2046  # one word for each
        unset $(variables_in "$up/values")
        load_profile "$up/values"
    else
        load_profile "$(cat "$up/profile" 2>/dev/null || echo small)"
    fi
}

# note_profile: into files that remember_profile puts in place. The profiles that come with the scripts are remembered
# by their names, so that .cache/up may be copied to another checkout.
note_profile() {
    local name
    name=$profile
    [[ ${name%/*} != "$(realpath "$root")/configs" ]] || name=$(basename "$profile" .env)
    printf '%s\n' "$name" >"$up/profile.new"
    for name in "${!given[@]}"; do printf '%s=%s\n' "$name" "${given[$name]}"; done | sort >"$remembered.new"
    { variables_in "$profile" && printf '%s\n' "${!given[@]}"; } | sort -u | sed '/^$/d' |
        while read -r name; do printf '%s=%s\n' "$name" "${!name}"; done >"$up/values.new"
}

remember_profile() {
    mv "$remembered.new" "$remembered"
    mv "$up/profile.new" "$up/profile"
    mv "$up/values.new" "$up/values"
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

# worker_groups: as many as the profile says, until add-worker.sh or remove-worker.sh has changed it: then
# this file has each group there ever was, with "joining", "leaving" or "removed" where that holds.
readonly group_file="$up/worker-groups"
worker_groups() {
    if [[ -e $group_file ]]; then awk '$2 != "removed" { print $1 }' "$group_file"; else seq 1 "$WORKER_GROUPS"; fi
}

groups() {
    echo 0
    worker_groups
}

# note_group GROUP STATE: in that file.
note_group() {
    local others
    others=$(cat "$group_file" 2>/dev/null || worker_groups)
    { awk -v group="$1" '$1 != group' <<<"$others" && echo "$1 $2"; } | sort -n >"$group_file.new"
    mv "$group_file.new" "$group_file"
}

# state_of_group GROUP: "joining", "leaving", "removed"; nothing of one that is simply there.
state_of_group() {
    [[ ! -e $group_file ]] || awk -v group="$1" '$1 == group { print $2 }' "$group_file"
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

# generation: what the names of the databases' volumes end with: nothing, until restore-cluster.sh made new ones.
generation() {
    cat "$up/generation" 2>/dev/null || true
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

# backup_keys: the numbers of the backup's keys, which are their ids. The highest writes; the others read.
backup_keys() {
    find "$secrets" -name 'pgmesh_backup_key*' ! -name '*.new' 2>/dev/null | sed -nE 's/.*_backup_key$/1/p; s/.*_backup_key_([0-9]+)$/\1/p' | sort -n
}

# backup_key_name NUMBER: of its secret.
backup_key_name() {
    if (($1 == 1)); then echo pgmesh_backup_key; else echo "pgmesh_backup_key_$1"; fi
}

# is_plain NAME VALUE: a password stands as it is in patroni.yml, haproxy.cfg, redis.conf and PgBouncer's userlist.txt.
# Keys of S3 stand nowhere, and are made elsewhere.
is_plain() {
    if [[ $1 == s3* ]]; then [[ $2 =~ ^[[:graph:]]+$ ]]; else [[ $2 =~ ^[A-Za-z0-9._~+/=-]+$ ]]; fi
}

# is_key VALUE: 32 bytes in base64 or hexadecimal, as the backup agent wants it.
is_key() {
    [[ $1 =~ ^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$ || $1 =~ ^[0-9A-Fa-f]{64}$ ]]
}

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
    local etcd coordinator pgbouncer haproxy group key name
    read_lines etcd etcd_members
    read_lines coordinator coordinators
    read_lines pgbouncer pgbouncers
    read_lines haproxy haproxies
    ETCD_INITIAL_CLUSTER=$(joined , $(for name in "${etcd[@]}"; do echo "$name=https://$name:2380"; done))
    ETCD_HOSTS=$(joined , "${etcd[@]/%/:2379}")
    ETCD_ENDPOINTS=$(joined ', ' $(for name in "${etcd[@]}"; do echo "\"https://$name:2379\""; done))
    ETCD_METRICS_TARGETS=$(joined ', ' $(for name in "${etcd[@]}"; do echo "\"$name:2381\""; done))
    HAPROXY_METRICS_TARGETS=$(joined ', ' $(for name in "${haproxy[@]}"; do echo "\"$name:8404\""; done))
    HAPROXY_SERVERS=$(each $'    server %s %s:5432 check port 8008 verifyhost %s\n' "${coordinator[@]}")
    HAPROXY_ALL_CONNECTIONS=$((HAPROXY_MAX_CONNECTIONS + 100))
    PATRONI_METRICS_TARGETS=$(for group in $(groups); do
        printf '      - {targets: [%s], labels: {group: "%s"}}\n' "$(joined ', ' $(members_of "$group" | sed 's/.*/"&:8008"/'))" "$group"
    done)
    PGBOUNCER_TABLES=$(each $'[[pgbouncer]]\nname = "%s"\nhost = "%s"\nport = 6432\nuser = "pgmesh_health"\npassword_file = "/run/secrets/pgmesh_health_password"\ndatabase = "'"$DATABASE"$'"\ngroup = 0\ntls = "verify-full"\nca_file = "/etc/pgmesh/ca.crt"\n\n' "${pgbouncer[@]}")
    HAPROXY_TABLES=$(each $'[[haproxy]]\nname = "%s"\nurl = "http://%s:8404/stats"\nuser = "pgmesh"\npassword_file = "/run/secrets/haproxy_password"\nwrite_backend = "postgres_write"\nread_backend = "postgres_read"\ngroup = 0\n\n' "${haproxy[@]}")
    BACKUP_KEY_TABLES='' BACKUP_KEY_SECRETS='' BACKUP_KEY_DEFINITIONS=''
    for key in $(backup_keys); do
        name=$(backup_key_name "$key") BACKUP_WRITE_KEY=$key
        BACKUP_KEY_TABLES+=$(printf '[[encryption.keys]]\nid = "%s"\nfile = "/run/secrets/%s"' "$key" "$name")$'\n'
        BACKUP_KEY_SECRETS+=$(printf '      - {source: %s, target: %s, uid: "999", gid: "999", mode: 0400}' "$name" "$name")$'\n'
        BACKUP_KEY_DEFINITIONS+=$(printf '  %s: {external: true, name: "%s_%s_%s"}' "$name" "$STACK" "$name" "$(secret_hash "$secrets/$name")")$'\n'
    done
    BACKUP_KEY_SECRETS=${BACKUP_KEY_SECRETS%$'\n'} BACKUP_KEY_DEFINITIONS=${BACKUP_KEY_DEFINITIONS%$'\n'}
    GRAFANA_IMAGE=${GRAFANA_IMAGE:-grafana/grafana:11.6.0}
}

# Hashes of what the files of the stack name: secrets, and configs that are made already.
hash_all() {
    local file name
    for file in "$secrets"/*; do
        printf -v "HASH_$(upper "${file##*/}")" '%s' "$(secret_hash "$file")"
    done
    for file in "$rendering"/* "$root"/init-scripts/[0-9][0-9]-*.sql; do
        name=${file##*/}
        [[ $name == *.yml && $name != prometheus.yml && $name != alerts.yml && $name != alertmanager.yml && $name != *-prometheus.yml && $name != patroni-*.yml ]] ||
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
    SUPERUSER_METHOD=reject LOOPBACK_METHOD=reject
    [[ $CITUS != yes ]] || SUPERUSER_METHOD='scram-sha-256 clientcert=verify-ca' LOOPBACK_METHOD=scram-sha-256
    render "$root/configs/postgres/patroni.yml" >"$rendering/patroni-$kind.yml"
}

render_configs() {
    local agent
    render_patroni coordinator
    render_patroni worker
    render "$root/configs/haproxy/haproxy.cfg" >"$rendering/haproxy.cfg"
    render "$root/configs/pgbouncer/pgbouncer.ini" >"$rendering/pgbouncer.ini"
    render "$root/configs/pgbouncer/userlist.txt" >"$rendering/userlist.txt"
    cp "$root/configs/pgbouncer/run.sh" "$rendering/pgbouncer.sh"
    render "$root/configs/redis/redis.conf" >"$rendering/redis.conf"
    render "$root/configs/prometheus/prometheus.yml" >"$rendering/prometheus.yml"
    cp "$root/configs/prometheus/alerts.yml" "$rendering/alerts.yml"
    render "$root/configs/prometheus/grafana-prometheus.yml" >"$rendering/grafana-prometheus.yml"
    render "$root/configs/alertmanager/alertmanager.yml" >"$rendering/alertmanager.yml"
    for agent in "${agents[@]}"; do
        render "$root/configs/stack/$agent.toml" >"$rendering/$agent.toml"
    done
    cp "$up/ca.crt" "$rendering/ca.crt"
}

# render_service TEMPLATE NAME: NAME.yml. Its label pgmesh.spec changes with everything in it.
render_service() {
    local text
    SPEC='' text=$(render "$1")
    SPEC=$(sha256sum <<<"$text" | cut -c 1-12)
    render "$1" >"$rendering/$2.yml"
}

# of_certificate NAME: for the template of a service that has its own.
of_certificate() {
    TLS_CERTIFICATE_HASH=$(secret_hash "$secrets/tls_$1_certificate")
    TLS_KEY_HASH=$(secret_hash "$secrets/tls_$1_key")
}

render_database() {
    local kind=${1%%-*} memory cpus
    GENERATION=$(generation)
    MEMBER=$1 GROUP=$(group_of "$1") PLACE=$(place_of "$1")
    # With Citus Patroni puts the group below the scope by itself.
    PATRONI_NAMESPACE="/service/$STACK/" PATRONI_SCOPE=$(patroni_scope "$GROUP") CITUS_ENVIRONMENT=''
    if [[ $CITUS == yes ]]; then
        PATRONI_NAMESPACE=/service/
        CITUS_ENVIRONMENT=$(printf 'PATRONI_CITUS_DATABASE: %s\n      PATRONI_CITUS_GROUP: "%s"\n      PGMESH_CITUS: "yes"' "$DATABASE" "$GROUP")
    fi
    memory=${kind^^}_MEMORY cpus=${kind^^}_CPUS
    MEMORY=${!memory} CPUS=${!cpus}
    PATRONI_CONFIG=patroni-$kind.yml
    PATRONI_CONFIG_HASH=$(content_hash "$rendering/$PATRONI_CONFIG")
    of_certificate "$1"
    render_service "$root/configs/stack/database.yml" "$1"
}

# render_numbered TEMPLATE NAME: for etcd-1, haproxy-1 …
render_numbered() {
    NUMBER=${2##*-} PLACE=$(place_of "$2")
    render_service "$root/configs/stack/$1.yml" "$2"
}

# render_all: everything into $RENDERED. Secrets, certificates and the names of images must be there. A script that is
# stopped leaves each file as it was or as it is to be: others read there what runs (take_running).
render_all() {
    local name names
    rm -rf "$rendering"
    mkdir -p "$rendering" "$RENDERED"
    derive
    render_configs
    hash_all
    read_lines names members
    for name in "${names[@]}"; do
        case $name in
        etcd-* | pgbouncer-*) of_certificate "$name" ;;
        esac
        case $name in
        s3-for-tests) render_service "$root/configs/stack/s3-for-tests.yml" "$name" ;;
        coordinator-* | worker-*) render_database "$name" ;;
        *) render_numbered "${name%-*}" "$name" ;;
        esac
    done
    render "$root/stack.yml" >"$rendering/stack.yml"
    # For deploying a member alone.
    sed -n '/^version:/p; /^networks:/,/^$/p' "$rendering/stack.yml" >"$rendering/networks.yml"
    for name in "$RENDERED"/*; do [[ -e $rendering/${name##*/} ]] || rm -f "$name"; done
    mv "$rendering"/* "$RENDERED"
    rmdir "$rendering"
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
    ensure_base_image
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
    CITUS=$(docker run --rm --entrypoint bash "$POSTGRES_IMAGE" -c \
        'if [[ -e $(pg_config --pkglibdir 2>/dev/null || echo /usr/lib/postgresql/17/lib)/citus.so ]]; then echo yes; else echo no; fi') ||
        die "the image $POSTGRES_IMAGE does not run" "see the message above; if it is in a registry, this machine must reach it (docker login, docker pull)"
}

# take_running: images, Citus and networks as they are deployed, for what changes one thing of a running stack.
take_running() {
    local service name
    for service in coordinator-1 etcd-1 haproxy-1 pgbouncer-1 redis prometheus alertmanager "${agents[@]}" s3-for-tests; do
        name=$(upper "${service%-1}")_IMAGE
        [[ $service != coordinator-1 ]] || name=POSTGRES_IMAGE
        printf -v "$name" '%s' "$(docker service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' "${STACK}_$service" 2>/dev/null)"
        # What a stopped restore-cluster.sh has ended is as it was deployed last.
        [[ -n ${!name} ]] || printf -v "$name" '%s' "$(sed -n 's/^    image: //p' "$RENDERED/$service.yml" 2>/dev/null)"
        [[ -n ${!name} || $service == s3-for-tests ]] ||
            die "the service $service is not deployed" "init-scripts/up.sh mends the stack; then start again"
    done
    [[ -e $RENDERED/coordinator-1.yml ]] || die "$RENDERED/coordinator-1.yml is not there" "copy ${up#"$root/"} here from where the stack was brought up"
    CITUS=no NETWORK_OPTIONS='{}'
    ! grep -q PATRONI_CITUS_GROUP "$RENDERED/coordinator-1.yml" || CITUS=yes
    [[ $(docker network inspect --format '{{index .Options "encrypted"}}' "${STACK}_data") != true ]] || NETWORK_OPTIONS='{encrypted: "true"}'
}

# open_stack: how each script begins that changes a running stack.
open_stack() {
    docker_answers || die "no Docker engine answers" "start it: systemctl start docker"
    [[ $(docker info --format '{{.Swarm.ControlAvailable}}') == true ]] ||
        die "this machine is no manager of a Swarm" "run this on a manager; init-scripts/up.sh makes one of a single machine"
    lock_stack
    load_remembered_profile
    [[ -n $(services) ]] || die "the stack $STACK is not deployed" "init-scripts/up.sh"
    take_running
    remove_left_jobs
}

# What ran once for a script that was killed: everybody else would wait for it to run.
remove_left_jobs() {
    docker service ls --filter "label=com.docker.stack.namespace=$STACK" --format '{{.Name}}' | { grep -E "^${STACK}_([a-z-]+-once|restore-[0-9]+)\$" || true; } |
        xargs -r docker service rm >/dev/null
}

# --- services and their containers ----------------------------------------------------------------

# container_of SERVICE: the id of its container on this machine; nothing where there is none.
container_of() {
    docker ps --quiet --filter "label=com.docker.swarm.service.name=${STACK}_$1" | head -n 1
}

# ending: the machines where containers of removed services still run. One that is lost says nothing of its own.
# shellcheck disable=SC2046  # one word for each
ending() {
    docker node ps --format '{{.DesiredState}} {{.Node}}' $(docker node ls --quiet) | awk '$1 == "Remove" { print $2 }' | sort -u
}
readonly ending_hint="docker ps on the machines that docker node ps shows with the wanted state Remove; a lost one: docker node demote, docker node rm --force"

# services: name, "running/wanted" of each service of the stack.
services() {
    docker stack services --format '{{.Name}} {{.Replicas}}' "$STACK" 2>/dev/null | sed "s/^${STACK}_//" | sort
}

# missing_services: those of which fewer tasks run than are wanted.
missing_services() {
    services | awk '{ split($2, n, "/"); if (n[1] + 0 < n[2] + 0) print $1 }'
}

# machine_of SERVICE: that it runs on.
machine_of() {
    docker service ps --filter desired-state=running --format '{{.Node}}' "${STACK}_$1" 2>/dev/null | head -n 1
}

# leader_of GROUP: its primary, on whatever machine, as Patroni has it in etcd; nothing while there is none, or no
# server of this machine can say.
leader_of() {
    (patroni_members "$1" 2>/dev/null || true) | awk '$2 == "Leader" { print $1 }'
}

# primary_here GROUP: the container of its primary; nothing where that is on another machine.
primary_here() {
    local leader
    leader=$(leader_of "$1")
    [[ -z $leader ]] || container_of "$leader"
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

# update_changed MEMBER…: those that are deployed otherwise than they are rendered. A group's primary comes
# after its standbys, so that a group has one switchover.
update_changed() {
    local member group leader changed=() primaries=() etcd_is_lost=no
    [[ -n $(services) ]] || return 0
    for member in "$@"; do
        [[ -n $(spec_of_service "$member") && $(spec_of_service "$member") != $(spec_of_file "$member") ]] || continue
        # A member of etcd that is out comes first: the others are its quorum.
        if [[ $member == etcd-* ]] && ! takes_part "$member"; then changed=("$member" "${changed[@]}"); else changed+=("$member"); fi
    done
    [[ ${#changed[@]} -gt 0 ]] || return 0
    say "updates what has changed: ${changed[*]}"
    [[ " ${changed[*]}" != *" etcd-"* ]] || ! no_etcd_takes_part || etcd_is_lost=yes
    [[ $etcd_is_lost == no ]] || say "  no member of etcd answers: each is updated without waiting for the others"
    # Of their servers Patroni must be able to say who leads.
    [[ " ${changed[*]}" != *" coordinator-"* && " ${changed[*]}" != *" worker-"* ]] || any_database >/dev/null
    for group in $(groups); do
        leader=$(leader_of "$group")
        primaries+=("${leader:-$(primary_by_sql "$group")}")
    done
    for member in "${changed[@]}"; do
        [[ " ${primaries[*]} " == *" $member "* ]] || update_member "$member"
    done
    for member in "${changed[@]}"; do
        [[ " ${primaries[*]} " != *" $member "* ]] || update_member "$member"
    done
}

# primary_by_sql GROUP: of its servers on this machine the one that is no standby, where Patroni cannot say it.
primary_by_sql() {
    local member container
    for member in $(members_of "$1"); do
        container=$(container_of "$member")
        [[ -z $container || $(sql "$container" postgres 'SELECT pg_is_in_recovery()' 2>/dev/null) != f ]] || echo "$member"
    done
}

# certificate_is_over MEMBER: of a database server: then its Patroni reaches no etcd, and no standby its primary.
certificate_is_over() {
    local container
    container=$(container_of "$1")
    if [[ -n $container ]]; then
        docker exec "$container" bash -c 'cd /run/secrets && openssl x509 -in tls_certificate -noout && ! openssl x509 -in tls_certificate -noout -checkend 0 >/dev/null'
    else
        docker exec "$(container_of "$(any_database)")" bash -c '
            certificate=$(timeout 5 openssl s_client -connect "$1:8008" </dev/null 2>/dev/null | openssl x509 2>/dev/null) &&
                ! openssl x509 -noout -checkend 0 <<<"$certificate" >/dev/null' is_over "$1"
    fi
}

# make_way SERVER: it is a primary no more, unless nobody else is there.
make_way() {
    local member=$1 group to
    group=$(group_of "$member")
    wait_hint="init-scripts/status.sh" wait_for 60 "Patroni does not say who is in group $group" patroni_members "$group"
    if [[ $(leader_of "$group") == "$member" && $(members_of "$group" | wc -l) -gt 1 ]]; then
        # One that has just come back is no synchronous standby yet.
        wait_hint="init-scripts/switchover.sh $group says what is in the way" \
            wait_for 120 "no standby of group $group is fit to take over from $member" fit_standby "$group" "$member"
        to=$(fit_standby "$group" "$member") || die "no standby of group $group is fit to take over$to" "init-scripts/status.sh; start again"
        say "  $member hands over group $group to $to"
        hand_over "$group" "$member" "$to"
    elif [[ $(members_of "$group" | wc -l) -eq 1 ]]; then
        say "  $member is the only server of group $group: nobody can use that group until it is back"
    fi
}

# One member after the other, and a primary only once another one leads.
update_member() {
    local member=$1 other deployed_at asked_at is_back=serves
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    if [[ $member == coordinator-* || $member == worker-* ]]; then
        if certificate_is_over "$member"; then
            say "  the certificate of $member is over, so its Patroni reaches no etcd: it is updated as it is"
            is_back=runs
        else
            make_way "$member"
        fi
    fi
    if [[ $member == etcd-* ]]; then
        for other in $(etcd_members | grep -vx "$member"); do
            wait_hint="init-scripts/status.sh $other" wait_for 60 "$other takes part in etcd, so that $member may be away" takes_part "$other"
        done
    fi
    say "  updates $member"
    # What stack.yml has, the agents above all, comes last: it may need what the servers have then.
    deploy networks "$member"
    asked_at=$SECONDS
    wait_hint="init-scripts/status.sh" wait_for 300 "$member is updated" update_is_over "$member"
    ! ended_badly "$member" || {
        "$scripts/status.sh" "$member" >&2 || true
        die "the update of $member did not start, and was rolled back" "see the lines above, mend it, start again"
    }
    wait_hint="init-scripts/status.sh" wait_for 600 "$member serves" "$is_back" "$member"
}

# Swarm begins an update a moment after it was asked for; what it says until then is of the one before. Where no
# task changes, only the update policy for instance, there is none.
update_is_over() {
    local state started
    read -r state started < <(docker service inspect --format \
        '{{if .UpdateStatus}}{{.UpdateStatus.State}} {{.UpdateStatus.StartedAt.Format "2006-01-02T15:04:05"}}{{end}}' "${STACK}_$1") || true
    [[ $state != updating && $state != rollback_started ]] || return 1
    [[ ! $started < $deployed_at ]] || ((SECONDS - asked_at >= 10))
}

# serves MEMBER: it is back in its role.
serves() {
    local container
    [[ $(services | awk -v name="$1" '$1 == name { split($2, n, "/"); print n[1] }') -ge 1 ]] || return 1
    container=$(container_of "$1")
    [[ -n $container ]] || { serves_elsewhere "$1" && return 0 || return 1; }
    runs "$1" || return 1
    case $1 in
    coordinator-* | worker-*)
        [[ $(docker exec "$container" psql --no-psqlrc --quiet --no-align --tuples-only --dbname postgres --command \
            "SELECT NOT pg_is_in_recovery() OR EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')" 2>/dev/null) == t ]]
        ;;
    etcd-*) takes_part "$1" ;;
    esac
}

# takes_part MEMBER: it answers what needs the quorum; its container is healthy without, too. Where no etcd is on this
# machine, Swarm's word is taken; and where no member took part before the update, the others must be updated first.
takes_part() {
    local container
    [[ ${etcd_is_lost:-no} == no ]] || return 0
    container=$(container_of "$1")
    [[ -n $container ]] || container=$(for name in $(etcd_members); do container_of "$name"; done | head -n 1)
    [[ -z $container ]] || docker exec "$container" etcdctl --endpoints "https://$1:2379" --cacert /etc/pgmesh/ca.crt \
        --cert /run/secrets/tls_certificate --key /run/secrets/tls_key --command-timeout 4s endpoint health >/dev/null 2>&1
}

no_etcd_takes_part() {
    local name
    for name in $(etcd_members); do ! takes_part "$name" || return 1; done
}

# runs MEMBER: whatever its role. One on another machine by Swarm's word.
runs() {
    local container
    [[ $(services | awk -v name="$1" '$1 == name { split($2, n, "/"); print n[1] }') -ge 1 ]] || return 1
    container=$(container_of "$1")
    [[ -z $container || $(docker inspect --format '{{.State.Health.Status}}' "$container") == healthy ]]
}

# serves_elsewhere MEMBER: of a server Patroni knows it; of the rest Swarm's word is taken.
serves_elsewhere() {
    case $1 in
    coordinator-* | worker-*) patroni_members "$(group_of "$1")" | grep -E "^$1 (Leader running|[A-Za-z]+ streaming) " >/dev/null ;;
    etcd-*) takes_part "$1" ;;
    esac
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

# updating: the services that Swarm updates; fails where it does not say.
updating() {
    local ids
    read_lines ids docker service ls --quiet --filter "label=com.docker.stack.namespace=$STACK" || return
    [[ ${#ids[@]} -eq 0 ]] || docker service inspect --format '{{.Spec.Name}} {{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}' "${ids[@]}" |
        awk -v stack="${STACK}_" '$2 == "updating" || $2 == "rollback_started" { print substr($1, length(stack) + 1) }'
}

# await_updates: until none is under way. Fails where one takes too long, as does that of a task which no machine can
# take; which they are is in $under_way.
await_updates() {
    local began=$SECONDS said=''
    until under_way=$(updating | xargs) && [[ -z $under_way ]]; do
        ((SECONDS - began < start_limit_s)) || return 1
        [[ $under_way == "$said" ]] || ((SECONDS - began < 5)) || { say "  waits for the update of $under_way" && said=$under_way; }
        sleep 1
    done
}

# An update that does not start is rolled back by Swarm: the stack runs on, and is not what was asked for.
check_updates() {
    local service there under_way
    await_updates || {
        # shellcheck disable=SC2086  # one word for each
        "$scripts/status.sh" $under_way >&2 || true
        die "the update of ${under_way:-the stack, of which Swarm says nothing,} has not ended within $start_limit_s s" "see the lines above, mend it, start again"
    }
    read_lines there services || die "Swarm does not say which services there are" "docker stack services $STACK; then start again"
    for service in "${there[@]%% *}"; do
        ! ended_badly "$service" || {
            "$scripts/status.sh" "$service" >&2 || true
            die "the update of $service did not start, and was rolled back" "see the lines above, mend it, start again"
        }
    done
}

# Until all tasks run. One that failed three times is looked at before the time is up.
wait_until_running() {
    local missing last='' began=$SECONDS service
    until missing=$(missing_services) && [[ -z $missing && -n $(services) ]]; do
        [[ -z $missing || $missing == "$last" ]] || say "  waits for ${missing//$'\n'/, }"
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

# patronictl MEMBER ARGUMENT…: in the container of that server.
patronictl() {
    local container
    container=$(container_of "$1")
    shift
    docker exec "$container" patronictl "$@"
}

# any_database: a server whose container is on this machine and runs.
any_database() {
    local member
    for member in $(databases); do
        [[ -z $(container_of "$member") ]] || { echo "$member" && return 0; }
    done
    die "no database server runs on this machine" "run this on a machine of one (docker stack ps $STACK), or: init-scripts/status.sh"
}

# group_options GROUP: how patronictl is told the group: its scope, or with Citus its number.
group_options() {
    if [[ $CITUS == yes ]]; then printf '%s\n' "$STACK" --group "$1"; else echo "$1"; fi
}

# patroni_members GROUP: "name role state lag" of each, as Patroni has it in etcd; the role without blanks.
patroni_members() {
    local options
    mapfile -t options < <(group_options "$1")
    docker exec "$(container_of "$(any_database)")" bash -o pipefail -c 'patronictl list --format json "$@" | python3 -c "
import json, sys
for it in json.load(sys.stdin):
    print(it[\"Member\"], it[\"Role\"].replace(\" \", \"\"), it[\"State\"].replace(\" \", \"-\"), it.get(\"Lag in MB\", 0))"' list "${options[@]}"
}

readonly lag_mb_max=16

# fit_standby GROUP PRIMARY [MEMBER]: the standby that is least behind, or that one, if it may take over. Otherwise it
# fails, and prints for each why not.
fit_standby() {
    local name role state lag reason reasons='' to='' least=''
    while read -r name role state lag; do
        [[ $name != "$2" && (-z ${3:-} || $name == "$3") ]] || continue
        reason=''
        if [[ $state != streaming ]]; then
            reason="it is ${state//-/ }, and does not stream"
        elif [[ $1 == 0 && $role == Replica ]]; then
            reason="it is no synchronous standby now: commits may be missing there"
        elif ! [[ $lag =~ ^[0-9]+$ ]] || ((lag > lag_mb_max)); then
            reason="it is $lag MB behind"
        elif [[ -z $to ]] || ((lag < least)); then
            to=$name least=$lag
        fi
        [[ -z $reason ]] || reasons+="; $name: $reason"
    done < <(patroni_members "$1")
    echo "${to:-${reasons:-: it has none}}"
    [[ -n $to ]]
}

leads() {
    patroni_members "$1" | grep "^$2 Leader running " >/dev/null
}

# hand_over GROUP FROM TO: Patroni's switchover, until the other one leads. patronictl ends well even where it was refused.
hand_over() {
    local options
    mapfile -t options < <(group_options "$1")
    {
        patronictl "$(any_database)" switchover "${options[@]}" --leader "$2" --candidate "$3" --force >"$cache/log/switchover.log" 2>&1 &&
            ! grep '^Switchover failed' "$cache/log/switchover.log" >/dev/null
    } || die "Patroni did not switch over: $(grep -v '^[+|]' "$cache/log/switchover.log" | tail -n 1)" "see $cache/log/switchover.log; init-scripts/status.sh"
    wait_hint="see $cache/log/switchover.log; init-scripts/status.sh" wait_for 60 "$3 leads" leads "$1" "$3"
}

# What bootstrap.dcs of patroni.yml says holds for new clusters only; so it is brought into those that run.
bring_in_dynamic_settings() {
    local group container options
    container=$(container_of "$(any_database)")
    for group in $(groups); do
        mapfile -t options < <(group_options "$group")
        docker exec --interactive "$container" bash -euo pipefail -c '
            python3 -c "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)[\"bootstrap\"][\"dcs\"]))" |
                patronictl edit-config "$@" --apply - --force' patronictl "${options[@]}" \
            <"$RENDERED/patroni-$(if ((group == 0)); then echo coordinator; else echo worker; fi).yml" >"$cache/log/edit-config-$group.log" 2>&1 ||
            die "patronictl edit-config failed in group $group" "see $cache/log/edit-config-$group.log"
        restart_where_pending "$group" "$container"
    done
}

# restart_where_pending GROUP CONTAINER: some settings hold after a restart only; the primary is last. The container
# is one to ask Patroni in.
restart_where_pending() {
    local member pending leader options
    # Patroni's next turn notices what has changed.
    sleep 5
    leader=$(leader_of "$1")
    mapfile -t options < <(group_options "$1")
    pending=$(docker exec "$2" bash -o pipefail -c '
        patronictl list --format json "$@" |
            python3 -c "import json, sys; print(*[it[\"Member\"] for it in json.load(sys.stdin) if it.get(\"Pending restart\")])"' \
        list "${options[@]}")
    for member in $(members_of "$1" | grep -vx "$leader") $leader; do
        [[ " $pending " == *" $member "* ]] || continue
        say "  restarts PostgreSQL of $member, for settings that need it"
        docker exec "$2" patronictl restart --force --pending "${options[@]}" "$member" >"$cache/log/restart-$member.log" 2>&1 ||
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

# --- a copy of a group, restored beside it -----------------------------------------------------------

readonly copy=$STACK-restored
readonly database_data=/var/lib/postgresql/17

# archive_all GROUP: until the repository holds all that is committed now, as the backup agent confirms to the primary.
# Fails where no primary can be asked.
archive_all() {
    local lsn
    lsn=$(on_primary "$1" 'SELECT pg_current_wal_flush_lsn()' 2>/dev/null) && [[ -n $lsn ]] || return 1
    wait_hint="docker service logs ${STACK}_backup-agent" wait_for 120 "the repository has the WAL of group $1 up to $lsn" has_wal "$1" "$lsn"
}

# has_wal GROUP LSN
has_wal() {
    [[ $(on_primary "$1" "SELECT max(flush_lsn) >= '$2' FROM pg_stat_replication WHERE application_name = 'pgmesh_backup'") == t ]]
}

# prepare_copy GROUP: what the copy needs, in a volume that only its user can read: files of this machine belong
# to others. The options of its container are $copy_options.
prepare_copy() {
    remove_copy
    docker volume create --label "$stack_label=$STACK" "$copy" >/dev/null
    docker volume create --label "$stack_label=$STACK" "$copy-secrets" >/dev/null
    { cat "$RENDERED/backup-agent.toml" && printf '\n[wal]\ngroup = %s\n' "$1"; } >"$up/$copy.toml"
    (umask 077 && cd "$secrets" && tar -c pgmesh_backup_password pgmesh_backup_key* s3_access_key_id s3_secret_access_key \
        tls_backup-agent_certificate tls_backup-agent_key) |
        docker run --rm --interactive --user 0 --entrypoint bash --volume "$copy-secrets:/secrets" "$POSTGRES_IMAGE" -c '
            cd /secrets && tar -x && mv tls_backup-agent_certificate tls_certificate && mv tls_backup-agent_key tls_key &&
                chown -R 999:999 . && chmod 0400 * && chmod 0700 .'
    copy_options=(
        --network "${STACK}_data" --label "$stack_label=$STACK" --shm-size 256m
        --volume "$copy:$database_data" --volume "$copy-secrets:/run/secrets:ro"
        --volume "$up/$copy.toml:/etc/pgmesh/backup-agent.toml:ro" --volume "$up/ca.crt:/etc/pgmesh/ca.crt:ro"
        --volume "$root/configs/postgres/restored.conf:/etc/pgmesh/postgresql.conf:ro"
    )
}

# restore_copy GROUP TARGET…: into a new volume, by the agent's own command; then PostgreSQL replays the WAL up to the
# target and opens the copy for writing. The copy never archives: it must not write into the repository of its source.
restore_copy() {
    local group=$1 copy_options
    shift
    prepare_copy "$group"
    logged restore docker run --rm --init "${copy_options[@]}" --entrypoint backup-agent "$BACKUP_AGENT_IMAGE" \
        --log-format text restore --group "$group" --to "$database_data/main" "$@" --target-action promote --archive-mode off ||
        die "the restore failed" "see the lines above"
    docker run --detach --init --name "$copy" "${copy_options[@]}" --no-healthcheck --entrypoint postgres-entrypoint \
        --stop-signal SIGINT "$BACKUP_AGENT_IMAGE" >/dev/null
    wait_hint="docker logs $copy" wait_for 300 "the copy has replayed the WAL" copy_settled
    copy_is_open || {
        docker logs --tail 5 "$copy" >&2
        die "PostgreSQL ended before it reached the target" "docker logs $copy"
    }
}

copy_is_open() {
    sql_is "$copy" 'SELECT pg_is_in_recovery()' f
}

# Open, or ended: then there is nothing to wait for.
copy_settled() {
    copy_is_open || [[ $(docker inspect --format '{{.State.Running}}' "$copy") == false ]]
}

remove_copy() {
    docker rm --force --volumes "$copy" >/dev/null 2>&1 || true
    docker volume rm --force "$copy" "$copy-secrets" >/dev/null
}

# --- the verdict ----------------------------------------------------------------------------------

health() {
    local container
    container=$(container_of health-monitor)
    if [[ -n $container ]]; then docker exec "$container" health-monitor check; else health_elsewhere; fi
}

# health_elsewhere: the verdict of a health monitor on another machine, by its page, as `check` would print it. A
# machine that is lost does not answer.
# shellcheck disable=SC2016  # the inner shell expands what is its own
health_elsewhere() {
    local machine body='' found
    for machine in $(docker service ps --filter desired-state=running --format '{{.Node}}' "${STACK}_health-monitor"); do
        machine=$(docker node inspect --format '{{.Status.Addr}}' "$machine")
        body=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/9631" && printf "GET /status HTTP/1.0\r\n\r\n" >&3 && cat <&3' ask "$machine" 2>/dev/null || true)
        [[ $body != *'"verdict":'* ]] || break
    done
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

# wait_until_well SECONDS [PATTERN]: the health monitor's verdict is ok, but for what matches. WAL that does not reach the
# repository is found by it after minutes only: what is committed now must be there.
wait_until_well() {
    local began=$SECONDS said='' found group
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
    for group in $(groups); do
        archive_all "$group" ||
            say "  group $group: no server of this machine reaches its primary, so whether the repository has all of its WAL was not looked at"
    done
}

# --- asking ---------------------------------------------------------------------------------------

# agent COMMAND…: of the backup agent.
agent() {
    run_agent backup-agent --log-format text "$@"
}

# run_agent NAME ARGUMENT…: in the agent's container, or where that is on another machine, in one that runs once.
run_agent() {
    local name=$1 container
    shift
    container=$(container_of "$name")
    if [[ -n $container ]]; then
        docker exec "${terminal[@]}" "$container" "$name" "$@"
    else
        agent_job "$name" "$@"
    fi
}

# agent_job NAME ARGUMENT…: Swarm runs it once, on any machine, with what the agent is given; then what it printed. Not as
# a job of Swarm's: those run once for each manager that ever led, at the same time and again (moby/moby#53632).
agent_job() {
    local name=$1 job="${STACK}_$1-once" image memory options state began=$SECONDS
    shift
    read -r image memory < <(docker service inspect --format \
        '{{.Spec.TaskTemplate.ContainerSpec.Image}} {{.Spec.TaskTemplate.Resources.Limits.MemoryBytes}}' "${STACK}_$name") || return 1
    mapfile -t options < <(options_of_agent "$name" | tr ' ' '\n')
    docker service rm "$job" >/dev/null 2>&1 || true
    docker service create --detach --quiet --restart-condition none --name "$job" \
        --label "com.docker.stack.namespace=$STACK" --container-label "com.docker.stack.namespace=$STACK" \
        --init --no-healthcheck --read-only --cap-drop ALL --mount type=tmpfs,target=/tmp --limit-memory "$memory" \
        --endpoint-mode dnsrr --network "${STACK}_coordination" --network "${STACK}_data" "${options[@]}" --no-resolve-image \
        --entrypoint "$name" "$image" "$@" >/dev/null || return 1
    until state=$(docker service ps --format '{{.CurrentState}}' "$job" | head -n 1) && [[ $state =~ ^(Complete|Failed|Rejected|Shutdown) ]]; do
        ((SECONDS - began < job_limit_s)) || break
        # No machine can take it.
        [[ $state == Running* ]] || ((SECONDS - began < job_start_limit_s)) || break
        sleep 1
    done
    timeout 30 docker service logs --raw "$job" 2>&1 || true
    [[ $state == Complete* ]] || docker service ps --no-trunc --format '{{.CurrentState}} {{.Error}}' "$job"
    docker service rm "$job" >/dev/null
    [[ $state == Complete* ]]
}

# options_of_agent NAME: what the agent is given, a job is given too.
options_of_agent() {
    docker service inspect --format '
        {{- range .Spec.TaskTemplate.ContainerSpec.Secrets}}--secret source={{.SecretName}},target={{.File.Name}},uid=999,gid=999,mode=0400{{"\n"}}{{end}}
        {{- range .Spec.TaskTemplate.ContainerSpec.Configs}}--config source={{.ConfigName}},target={{.File.Name}}{{"\n"}}{{end}}' "${STACK}_$1" | xargs -n 2
}

# on_primary GROUP SQL: in the database postgres; on another machine over the network, as the backup agent's role.
# shellcheck disable=SC2016  # the inner shell expands what is its own
on_primary() {
    local leader container options=(--no-psqlrc --quiet --no-align --tuples-only --command "$2")
    leader=$(leader_of "$1")
    [[ -n $leader ]] || return 1
    container=$(container_of "$leader")
    if [[ -n $container ]]; then
        timeout 10 docker exec "$container" psql "${options[@]}" postgres
    else
        timeout 10 docker exec "$(container_of "$(any_database)")" bash -c 'export PGPASSWORD=$(</run/secrets/pgmesh_backup_password) PGCONNECT_TIMEOUT=5
            host=$1 && shift
            exec psql "$@" "host=$host user=pgmesh_backup dbname=postgres sslmode=verify-full sslrootcert=/etc/pgmesh/ca.crt"' client "$leader" "${options[@]}"
    fi
}

# sql CONTAINER DATABASE QUERY: as the superuser, inside the container.
sql() {
    docker exec "$1" psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 --dbname "$2" --command "$3"
}

sql_is() {
    [[ $(sql "$1" postgres "$2") == "$3" ]]
}
