#!/usr/bin/env bash
# Tries the profile production on a Swarm of three machines that it makes here. See --help.
# shellcheck disable=SC2016  # the shells of the containers expand what is theirs
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../init-scripts/lib.sh"
# shellcheck source=tests/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TEXT'
Usage: tests/machines.sh [--keep] [--only STEP] [--no-build]

Makes three machines (containers, each with a Docker engine of its own) and a Swarm of them, brings up the profile
production on it with little memory, and tries what one machine cannot show: that no group and no pair has all its
members on one machine, that a client writes through HAProxy on two of them, that a machine that is cut off with
the coordinators' primary takes no writes any more while the others go on without a lost commit, that all is well
once it is back, and that init-scripts/up.sh brings in what has changed wherever the primaries are. Then it removes
all that. It takes about 20 minutes on two cores, 6 GiB of memory and 10 GiB of disk.

  --keep        leaves the machines and the stack; the next run goes on with them
  --only STEP   one of placement clients cut change down
  --no-build    takes the programs that lie in .cache/image instead of building them. Images that are named by
                POSTGRES_IMAGE and so on (init-scripts/up.sh --help) are not built at all

The machines need the capabilities SYS_ADMIN, NET_ADMIN and SYS_PTRACE, and no seccomp, but are not privileged.

The last line is "N passed, N failed, N skipped". Exit: 0 all passed, 1 otherwise, 2 wrong use.
TEXT
}

readonly machines=(machine-1 machine-2 machine-3)
readonly prefix=test
readonly network=test-machines
readonly client=$prefix-client
# The one that is cut off; scripts are run on the first.
readonly lost=machine-2
readonly lost_primary=coordinator-2
readonly repository=/pgmesh
readonly profile=$cache/machines.env
# So long that Swarm gives up the machine, and starts elsewhere what may run there.
readonly cut_s=90

# --- machines -------------------------------------------------------------------------------------

# on MACHINE COMMAND…
on() {
    docker exec "$prefix-$1" "${@:2}"
}

# in_stack SHELL: with the functions of init-scripts/stack.sh, on the first machine.
in_stack() {
    on machine-1 bash -euo pipefail -c '
        cd "$1"
        source init-scripts/lib.sh
        source init-scripts/stack.sh
        load_remembered_profile
        CITUS=$(if grep -q PATRONI_CITUS_GROUP "$RENDERED/coordinator-1.yml"; then echo yes; else echo no; fi)
        eval "$2"' in-stack "$repository" "$1"
}

script() {
    on machine-1 "$repository/init-scripts/$1" "${@:2}"
}

# Its data has a volume of its own: overlay upon overlay does not work.
ensure_machine() {
    local name="$prefix-$1"
    [[ $(docker inspect --format '{{.State.Running}}' "$name" 2>/dev/null) != true ]] || return 0
    docker volume create "$name" >/dev/null
    docker run --detach --init --name "$name" --hostname "$1" --network "$network" --network-alias "$1" \
        --cgroupns private --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE \
        --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined \
        --volume "$name:/var/lib/docker" pgmesh-machine >/dev/null
    wait_hint="docker logs $name" wait_for 60 "the Docker engine of $1 does not answer" on "$1" docker info
}

# Three managers: the Swarm goes on without any one of them.
ensure_swarm() {
    local address token number=0 name
    address=$(on machine-1 hostname --ip-address)
    [[ $(on machine-1 docker info --format '{{.Swarm.LocalNodeState}}') == active ]] ||
        on machine-1 docker swarm init --advertise-addr "$address" >/dev/null
    token=$(on machine-1 docker swarm join-token --quiet manager)
    for name in "${machines[@]}"; do
        number=$((number + 1))
        [[ $(on "$name" docker info --format '{{.Swarm.LocalNodeState}}') == active ]] ||
            on "$name" docker swarm join --token "$token" "$address:2377" >/dev/null
        on machine-1 docker node update --label-add "pgmesh.place=$number" "$name" >/dev/null
    done
}

make_machines() {
    local name
    ensure_docker
    ensure_base_image
    ensure_image pgmesh-machine tests/machines.Dockerfile "$base_image" --
    say "makes ${machines[*]}, and a Swarm of them"
    docker network inspect "$network" >/dev/null 2>&1 || docker network create "$network" >/dev/null
    for name in "${machines[@]}"; do ensure_machine "$name"; done
    ensure_swarm
}

remove_machines() {
    local name
    for name in "$client" "${machines[@]/#/$prefix-}"; do docker rm --force --volumes "$name" >/dev/null 2>&1 || true; done
    for name in "${machines[@]/#/$prefix-}"; do docker volume rm --force "$name" >/dev/null; done
    ! docker network inspect "$network" >/dev/null 2>&1 || docker network rm "$network" >/dev/null
    rm -f "$profile"
}

# --- the stack ------------------------------------------------------------------------------------

# What comes first holds.
make_profile() {
    cat >"$profile" <<'ENV'
NETWORK_ENCRYPTION=auto
PUBLIC_NAMES=machine-1,machine-2
S3_FOR_TESTS=yes
S3_ENDPOINT=http://s3-for-tests:9000
S3_REGION=us-east-1
S3_PATH_STYLE=true
COORDINATOR_MAX_CONNECTIONS=60
COORDINATOR_SHARED_BUFFERS=64MB
COORDINATOR_EFFECTIVE_CACHE_SIZE=192MB
COORDINATOR_WORK_MEM=4MB
COORDINATOR_MAINTENANCE_WORK_MEM=32MB
COORDINATOR_MEMORY=512M
COORDINATOR_CPUS=2.0
WORKER_MAX_CONNECTIONS=40
WORKER_SHARED_BUFFERS=32MB
WORKER_EFFECTIVE_CACHE_SIZE=96MB
WORKER_WORK_MEM=4MB
WORKER_MAINTENANCE_WORK_MEM=32MB
WORKER_MEMORY=384M
MAX_WAL_SIZE=256MB
MAX_SLOT_WAL_KEEP_SIZE=2GB
PGBOUNCER_MAX_CLIENTS=200
PGBOUNCER_POOL_SIZE=10
PGBOUNCER_MAX_DB_CONNECTIONS=20
PGBOUNCER_MEMORY=128M
HAPROXY_MAX_CONNECTIONS=1000
HAPROXY_MEMORY=256M
REDIS_MAXMEMORY=32mb
REDIS_MEMORY=64M
ETCD_MEMORY=256M
PROMETHEUS_MEMORY=512M
AGENT_MEMORY=128M
BACKUP_AGENT_MEMORY=384M
ENV
    cat "$root/configs/production.env" >>"$profile"
    "$root/init-scripts/up.sh" --images "${build[@]}" "$profile" | tee "$cache/log/machines-images.log"
    grep '^[A-Z0-9_]*_IMAGE=' "$cache/log/machines-images.log" >>"$profile"
}

images() {
    sed -n 's/^[A-Z0-9_]*_IMAGE=//p' "$profile" | sort -u
}

# What stands for the registry.
load_images() {
    local name image missing
    for name in "${machines[@]}"; do
        missing=()
        for image in $(images); do on "$name" docker image inspect "$image" >/dev/null 2>&1 || missing+=("$image"); done
        [[ ${#missing[@]} -gt 0 ]] || continue
        say "  $name: loads ${#missing[@]} images"
        docker save "${missing[@]}" | docker exec --interactive "$prefix-$name" docker load --quiet >/dev/null
    done
}

# The first machine has what an operator has: the scripts and the files they read, and no compiler.
copy_repository() {
    local name
    for name in "${machines[@]}"; do
        tar -C "$root" -c init-scripts configs stack.yml | docker exec --interactive "$prefix-$name" bash -c \
            'mkdir -p "$1" && tar -C "$1" --no-same-owner -x' copy "$repository"
    done
}

# copy_profile: its lines that the first machine is to have.
copy_profile() {
    docker exec --interactive "$prefix-machine-1" bash -c 'cat >"$1/machines.env"' copy "$repository"
}

bring_up() {
    make_profile
    load_images
    copy_repository
    copy_profile <"$profile"
    say "init-scripts/up.sh on machine-1, which has neither cargo nor the base image"
    script up.sh "$repository/machines.env" || die "up.sh failed" "see the lines above; --keep leaves the machines to look at"
    passed=$((passed + 1))
    try "each group has a backup" agent list
    try "the verdict is healthy" becomes_well 180
}

# agent COMMAND…: of the backup agent, on whatever machine that is.
agent() {
    in_stack "agent $*"
}

# becomes_well SECONDS
becomes_well() {
    in_stack "wait_until_well $1"
}

# --- placement ------------------------------------------------------------------------------------

# tasks: "SERVICE MACHINE" of each that runs, as the machines' own engines say.
tasks() {
    local name
    for name in "${machines[@]}"; do
        on "$name" docker ps --filter label=com.docker.stack.namespace=pgmesh --format '{{.Label "com.docker.swarm.service.name"}}' |
            sed "s/^pgmesh_//; s/\$/ $name/"
    done | sort
}

try_placement() {
    local there name
    there=$(tasks)
    for name in "${machines[@]}"; do say "        $name: $(awk -v name="$name" '$2 == name { print $1 }' <<<"$there" | xargs)"; done
    try "each service is on the machine with its place" placed_by_label
    for name in etcd coordinator; do try "$name-… has one member on each machine" equals 3 machines_with "$name-[1-3]"; done
    for name in worker-1 worker-2 haproxy pgbouncer; do try "$name-… is on two machines" equals 2 machines_with "$name-[12]"; done
    try "health-monitor is on all machines" equals 3 machines_with health-monitor
    try "rebalance-agent is on two machines" equals 2 machines_with rebalance-agent
    try "all wanted tasks run" equals '' in_stack missing_services
    try "the page of a health monitor says that all is well" wait_for 180 "the page says that all is well" in_stack health_elsewhere
    try_encryption
}

# placed_by_label: all those that name a place, against what it is rendered from.
placed_by_label() {
    local service place count=0
    while read -r service place; do
        count=$((count + 1))
        grep -qxF "$service machine-$place" <<<"$there" || { echo "$service is not on machine-$place" && return 1; }
    done < <(on machine-1 docker service ls --format '{{.Name}}' | xargs docker exec "$prefix-machine-1" docker service inspect --format \
        '{{.Spec.Name}} {{range .Spec.TaskTemplate.Placement.Constraints}}{{.}}{{end}} {{.Spec.Mode.Replicated.Replicas}}' |
        sed -nE 's/^pgmesh_([^ ]+) node\.labels\.pgmesh\.place == ([0-9]) [1-9]$/\1 \2/p')
    ((count >= 16)) || { echo "only $count services name a place" && return 1; }
}

# machines_with PATTERN: on how many a task of those services runs.
machines_with() {
    grep -E "^($1) " <<<"$there" | cut -d ' ' -f 2 | sort -u | wc -l
}

try_encryption() {
    local encrypted
    encrypted=$(on machine-1 docker network inspect --format '{{if index .Options "encrypted"}}yes{{else}}no{{end}}' pgmesh_data)
    if [[ $encrypted == yes ]]; then
        try "what goes between machines is encrypted" on machine-1 bash -c 'ip -s xfrm state | grep -A 20 "proto esp" | grep -qE "[1-9][0-9]*\(bytes\)"'
    else
        try "networks are not encrypted because this kernel cannot" refused . on machine-1 ip xfrm state add src 127.0.0.1 dst 127.0.0.2 \
            proto esp spi 0x70676d mode transport aead 'rfc4106(gcm(aes))' 0x0102030405060708090a0b0c0d0e0f1011121314 128
        skip "encrypted overlay networks" "this kernel has no ESP with AES-GCM"
    fi
}

# --- clients --------------------------------------------------------------------------------------

# An application's machine: it reaches the three as any host of their network does, and knows the authority and a password.
start_client() {
    docker rm --force --volumes "$client" >/dev/null 2>&1 || true
    docker run --detach --init --name "$client" --network "$network" --user 0 --no-healthcheck --entrypoint sleep \
        "$(sed -n 's/^POSTGRES_IMAGE=//p' "$profile")" infinity >/dev/null
    on machine-1 tar -C "$repository/.cache/up" -c ca.crt secrets/pgmesh_app_password secrets/pgmesh_admin_password |
        docker exec --interactive "$client" tar -C / -x
}

# client ROLE HOSTS PORT SQL: hosts are tried in their order.
client() {
    docker exec "$client" bash -c '
        export PGPASSWORD=$(<"/secrets/$1_password")
        exec psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 --dbname \
            "host=$2 port=$3 user=$1 dbname=app connect_timeout=5 sslmode=verify-full sslrootcert=/ca.crt" --command "$4"' client "$@"
}

# Three clients write, each until it is told to end: one that connects anew for each row through HAProxy of the
# first machine, one that tries the second machine first, and one that stays connected to PgBouncer of the first.
# Of each: the time of each confirmed commit with its number, and the time of each error.
start_writers() {
    client pgmesh_admin machine-1 5432 "SET ROLE pgmesh_owner; DROP TABLE IF EXISTS confirmed;
        CREATE TABLE confirmed (n text PRIMARY KEY); GRANT ALL ON confirmed TO pgmesh_app" >/dev/null 2>&1
    docker exec "$client" bash -c 'rm -rf /tmp/writers && mkdir /tmp/writers && cd /tmp/writers && touch {first,either,kept}.{confirmed,errors}'
    docker exec --detach "$client" bash -c '
        cd /tmp/writers
        export PGPASSWORD=$(</secrets/pgmesh_app_password) PGCONNECT_TIMEOUT=2
        options="user=pgmesh_app dbname=app sslmode=verify-full sslrootcert=/ca.crt"
        anew() {
            until [[ -e stop ]]; do
                n=$1-$EPOCHREALTIME
                if timeout 5 psql --no-psqlrc --quiet "host=$2 port=5432 $options" --command "INSERT INTO confirmed VALUES (\$\$$n\$\$)" 2>"$1.error"; then
                    echo "$EPOCHREALTIME $n" >>"$1.confirmed"
                else
                    echo "$EPOCHREALTIME $(tr "\n" " " <"$1.error")" >>"$1.errors"
                fi
                sleep 0.1
            done
        }
        anew first machine-1 &
        anew either machine-2,machine-1 &
        until [[ -e stop ]]; do
            until [[ -e stop ]]; do echo "INSERT INTO confirmed VALUES (\$\$kept-$EPOCHREALTIME\$\$) RETURNING n;" && sleep 0.1; done |
                psql --no-psqlrc --quiet --no-align --tuples-only "host=machine-1 port=6432 $options" 2>&1 |
                while read -r line; do
                    if [[ $line == kept-* ]]; then echo "$EPOCHREALTIME $line" >>kept.confirmed; else echo "$EPOCHREALTIME $line" >>kept.errors; fi
                done
            sleep 0.1
        done'
    wait_hint="docker exec $client head /tmp/writers/first.errors" wait_for 30 "the clients write" all_write
}

all_write() {
    docker exec "$client" bash -c 'cd /tmp/writers && test -s first.confirmed -a -s either.confirmed -a -s kept.confirmed'
}

stop_writers() {
    docker exec "$client" touch /tmp/writers/stop
    sleep 6
}

# gap WRITER: its longest time without a confirmed write.
gap() {
    docker exec "$client" cat "/tmp/writers/$1.confirmed" | longest_gap /dev/stdin
}

lines_of() {
    docker exec "$client" bash -c 'wc -l <"/tmp/writers/$1"' lines "$1"
}

# print_writers [AFTER]: what they saw.
print_writers() {
    local writer
    for writer in first either kept; do
        say "        $(case $writer in
        first) echo "a client that connects anew through HAProxy of machine-1" ;;
        either) echo "one that tries machine-2 before machine-1" ;;
        kept) echo "one that stays connected through PgBouncer of machine-1" ;;
        esac): $(lines_of "$writer.confirmed") commits, longest gap $(gap "$writer") s, $(lines_of "$writer.errors") errors"
    done
}

# below SECONDS WRITER
below() {
    local found
    found=$(gap "$2")
    echo "$found s"
    awk -v gap="$found" -v limit="$1" 'BEGIN { exit !(gap > 0 && gap < limit) }'
}

# confirmed: what the clients were told is stored.
confirmed() {
    docker exec "$client" bash -c 'cat /tmp/writers/*.confirmed | cut -d " " -f 2' | sort
}

all_confirmed_are_there() {
    local lost_rows
    lost_rows=$(comm -23 <(confirmed) <(client pgmesh_app machine-1 5432 'SELECT n FROM confirmed' | sort))
    [[ -z $lost_rows && $(confirmed | wc -l) -gt 0 ]] || { echo "lost: $lost_rows" && return 1; }
}

try_clients() {
    local name
    for name in machine-1 machine-2; do
        try "a client writes through HAProxy of $name" equals f client pgmesh_app "$name" 5432 'SELECT pg_is_in_recovery()'
        try "it reads from a standby there" equals t client pgmesh_app "$name" 5433 'SELECT pg_is_in_recovery()'
        try "it writes through PgBouncer of $name" equals f client pgmesh_app "$name" 6432 'SELECT pg_is_in_recovery()'
    done
}

# --- one machine is cut off -----------------------------------------------------------------------

now() { date +%s.%N; }

# since TIME: in seconds.
since() { awk -v from="$1" -v to="${2:-$(now)}" 'BEGIN { printf "%.1f", to - from }'; }

leader() { in_stack 'leader_of 0'; }

# isolate -I|-D: nothing goes to other machines and nothing comes from them, or everything again. Nobody is told.
isolate() {
    on "$lost" bash -euc 'for it in "INPUT -i" "OUTPUT -o" "FORWARD -i" "FORWARD -o"; do iptables "$1" $it eth0 -j DROP; done' isolate "$1"
}

# The superuser of that machine writes to its server, whoever leads: time, whether the server recovers, what became of it.
write_there() {
    docker exec --detach "$prefix-$lost" bash -c 'docker exec "$1" bash -c "$2" >/tmp/there 2>&1' there "$old" '
        rm -f /tmp/stop
        for ((n = 0; n < 600; n++)); do
            [[ ! -e /tmp/stop ]] || exit 0
            recovers=$(timeout 2 psql --no-psqlrc --quiet --no-align --tuples-only --command "SELECT pg_is_in_recovery()" postgres 2>/dev/null) || recovers=none
            if said=$(timeout 2 psql --no-psqlrc --quiet --command "INSERT INTO confirmed VALUES (\$\$there-$EPOCHREALTIME\$\$)" app 2>&1); then said=confirmed; fi
            echo "$EPOCHREALTIME $recovers $(tr "\n" " " <<<"$said")"
            sleep 0.3
        done'
}

# confirmed_there AFTER: the writes that it confirmed later than that.
confirmed_there() {
    awk -v after="$1" '$1 > after && $3 == "confirmed"' <<<"$there"
}

another_leads() { [[ $(leader) =~ ^coordinator-[13]$ ]]; }

# writes_on: each client has a confirmed write of the last 5 s.
writes_on() {
    docker exec "$client" bash -c 'for file in /tmp/writers/*.confirmed; do
        awk -v now="$EPOCHREALTIME" "{ last = \$1 } END { print FILENAME, now - last; exit !(now - last < 5) }" "$file" || exit 1; done'
}

# names_the_lost health|health_elsewhere: of the servers whose machine is lost, all.
names_the_lost() {
    local said name
    said=$(in_stack "$1 2>&1" || true)
    while read -r name; do
        grep -q "$name" <<<"$said" || { echo "$name is not in what the health monitor says:" && echo "$said" && return 1; }
    done < <(awk -v lost="$lost" '$2 == lost && /^(coordinator|worker)-/ { print $1 }' <<<"$tasks_before")
}

follows() { in_stack 'patroni_members 0' | grep -E "^$lost_primary [A-Za-z]+ streaming " >/dev/null; }

all_run() { [[ -z $(in_stack missing_services) ]]; }

# rows_there: as the server that was cut off has them.
rows_there() {
    on "$lost" docker exec "$(on "$lost" docker ps --quiet --filter "label=com.docker.swarm.service.name=pgmesh_$lost_primary")" \
        psql --no-psqlrc --quiet --no-align --tuples-only --command 'SELECT n FROM confirmed' app | sort
}

same_rows() {
    [[ $(rows_there | sha256sum) == "$(client pgmesh_app machine-1 5432 'SELECT n FROM confirmed' | sort | sha256sum)" ]]
}

try_cut() {
    local old tasks_before there='' cut_at back_at
    [[ $(leader) == "$lost_primary" ]] ||
        try "switchover.sh hands the coordinators over to a server of another machine" script switchover.sh 0 --to "$lost_primary"
    try "$lost_primary leads" equals "$lost_primary" leader
    tasks_before=$(tasks)
    old=$(on "$lost" docker ps --quiet --filter "label=com.docker.swarm.service.name=pgmesh_$lost_primary")
    start_writers
    write_there
    sleep 5
    cut_at=$(now)
    isolate -I
    say "        $lost is cut off: $(awk -v name="$lost" '$2 == name { print $1 }' <<<"$tasks_before" | xargs)"
    try "another coordinator leads" wait_for 120 "another leads" another_leads
    say "        $(leader), seen $(since "$cut_at") s after"
    sleep "$(awk -v gone="$(since "$cut_at")" -v all="$cut_s" 'BEGIN { print (all > gone) ? all - gone : 0 }')"
    try "all three clients write on" writes_on
    try "the health monitor names the lost servers" names_the_lost health
    try "and by the page of one on whatever machine" names_the_lost health_elsewhere
    try "status.sh says what does not run" refused "$lost_primary" script status.sh
    try "Swarm knows that $lost is gone" equals down on machine-1 docker node inspect --format '{{.Status.State}}' "$lost"
    there=$(on "$lost" cat /tmp/there)
    say "        on $lost: the last write it confirmed was $(since "$cut_at" "$(awk '$3 == "confirmed" { last = $1 } END { print last }' <<<"$there")") s after it was cut off;" \
        "its server was a primary for $(since "$cut_at" "$(awk '$2 == "f" { last = $1 } END { print last }' <<<"$there")") s"
    try "the old primary confirmed nothing once it was alone" equals '' confirmed_there "$(awk -v at="$cut_at" 'BEGIN { printf "%.3f", at + 0.5 }')"
    try "it takes no writes" refused 'read-only|recovery|starting up|shutting down|No such file' on "$lost" docker exec "$old" \
        timeout 5 psql --no-psqlrc --quiet --command "INSERT INTO confirmed VALUES ('late')" app
    on "$lost" docker exec "$old" touch /tmp/stop || true
    isolate -D
    back_at=$(now)
    say "        $lost is back, after $(since "$cut_at") s"
    try "$lost_primary follows" wait_for 180 "$lost_primary follows" follows
    say "        after $(since "$back_at") s"
    try "all wanted tasks run" wait_for 180 "all wanted tasks run" all_run
    try "the verdict is healthy again" becomes_well 300
    say "        after $(since "$back_at") s"
    stop_writers
    print_writers
    for name in first either kept; do try "nobody waited for 60 s ($name)" below 60 "$name"; done
    try "no confirmed write is lost" all_confirmed_are_there
    try "the server that came back has the same rows" wait_for 30 "the same rows" same_rows
    try "the backup agent has WAL without a gap" agent list --wal
    try "its whole chain works" agent check
    try "a backup of each group is taken" agent backup
}

# --- what has changed is brought in ---------------------------------------------------------------

# timeline: of the coordinators.
timeline() {
    in_stack 'docker exec "$(container_of "$(any_database)")" patronictl list --format json $(group_options 0)' |
        grep -o '"TL": [0-9]*' | cut -d ' ' -f 2 | sort -n | tail -n 1
}

containers() {
    local name
    for name in "${machines[@]}"; do on "$name" docker ps --quiet --filter label=com.docker.stack.namespace=pgmesh; done | sort
}

try_change() {
    local before name
    before=$(containers)
    try "up.sh again" script up.sh --no-proof "$repository/machines.env"
    try "changes nothing" equals "$before" containers
    [[ $(leader) == "$lost_primary" ]] || try "switchover.sh hands over again" script switchover.sh 0 --to "$lost_primary"
    start_writers
    before=$(timeline)
    sed 's/^COORDINATOR_MAX_CONNECTIONS=60$/COORDINATOR_MAX_CONNECTIONS=61/' "$profile" | copy_profile
    try "up.sh brings in a setting of the coordinators, whose primary is on another machine" script up.sh --no-proof "$repository/machines.env"
    stop_writers
    print_writers
    try "the servers have it" equals 61 client pgmesh_app machine-1 5432 'SHOW max_connections'
    try "and the standbys" equals 61 client pgmesh_app machine-1 5433 'SHOW max_connections'
    try "there was one switchover" equals "$((before + 1))" timeline
    for name in first either kept; do try "nobody waited for 30 s ($name)" below 30 "$name"; done
    try "no confirmed write is lost" all_confirmed_are_there
    copy_profile <"$profile"
}

# --- nothing is left ------------------------------------------------------------------------------

left() {
    local name
    for name in "${machines[@]}"; do
        on "$name" docker ps --all --quiet
        on "$name" docker volume ls --quiet
        on "$name" docker network ls --format '{{.Name}}' | grep ^pgmesh || true
    done
    on machine-1 docker secret ls --quiet
    on machine-1 docker config ls --quiet
}

try_down() {
    local name
    for name in "${machines[@]}"; do try "down.sh on $name" on "$name" "$repository/init-scripts/down.sh" --yes; done
    try "nothing is left" equals '' left
}

main() {
    local keep=no only='' step steps=(placement clients cut change down) build=()
    while [[ $# -gt 0 ]]; do
        case $1 in
        --keep) keep=yes ;;
        --no-build) build=(--no-build) ;;
        --only) [[ " ${steps[*]} " == *" ${2:-} "* ]] || { usage >&2 && exit 2; } && only=$2 && shift ;;
        -h | --help) usage && return 0 ;;
        *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    : >"$tests_log"
    [[ $keep == yes ]] || trap remove_machines EXIT
    make_machines
    if [[ -z $only || -z $(on machine-1 docker service ls --quiet) ]]; then bring_up; fi
    start_client
    [[ -z $only ]] || steps=("$only")
    for step in "${steps[@]}"; do
        [[ $step != down || $keep == no || $only == down ]] || continue
        "try_$step"
    done
    summary
}

main "$@"
