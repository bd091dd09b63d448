#!/usr/bin/env bash
# The half of monitor.sh that runs inside the container; not to be started by hand.
# Settings come from the environment: MINUTES, EVERY (seconds).
set -euo pipefail

readonly work=$PWD
readonly log="$work/log"
readonly monitor_log="$work/monitor.log"
readonly told="$work/told" # what the webhook was sent, a line a notice
readonly config="$work/health-monitor.toml"
readonly status=http://127.0.0.1:9631/status
# The groups of the members 1 to 5, which listen on 5431 + n, their Patroni on 8000 + n.
readonly groups=(- 0 0 0 1 1)
# An outage that lasts longer may be told: notify.after, in seconds.
readonly after=10
# How long a member is away when it is updated.
readonly away=15
# What was over must stay over until this has passed: three readings, and the two seconds that a webhook gathers.
readonly echo_of=8
export PGUSER=postgres PGDATABASE=postgres PGHOST=127.0.0.1

declare -A pids=() # of the daemons, by name
seen=0             # so many lines of $told were judged
restarts=0
updated=0
false_alerts=0
true_alerts=0

say() {
    printf '[%4ds] %s\n' "$SECONDS" "$*"
}

die() {
    printf '\nsoak: %s; the ends of the logs:\n' "$1" >&2
    tail -n 15 "$log" "$work"/*.log >&2
    exit 1
}

# wait_for SECONDS WHAT COMMAND…
wait_for() {
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >>"$log" 2>&1; do
        ((SECONDS < until)) || die "not in time: $what"
        sleep 0.2
    done
}

# --- daemons --------------------------------------------------------------------------------------

# daemon NAME COMMAND…
daemon() {
    local name=$1
    shift
    "$@" >>"$work/$name.log" 2>&1 &
    pids[$name]=$!
}

# stop NAME [SIGNAL]
stop() {
    kill "-${2:-TERM}" "${pids[$1]}"
    wait "${pids[$1]}" 2>/dev/null || true
}

start_etcd() {
    local n=$1 client="http://127.0.0.1:$((2369 + 10 * $1))" peer="http://127.0.0.1:$((2370 + 10 * $1))"
    daemon "etcd-$n" etcd --name "etcd-$n" --data-dir "$work/etcd-$n" --log-level warn --unsafe-no-fsync \
        --initial-cluster etcd-1=http://127.0.0.1:2380,etcd-2=http://127.0.0.1:2390,etcd-3=http://127.0.0.1:2400 \
        --listen-client-urls "$client" --advertise-client-urls "$client" \
        --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer"
}

etcd_serves() {
    etcdctl --endpoints http://127.0.0.1:2379,http://127.0.0.1:2389,http://127.0.0.1:2399 endpoint health
}

write_patroni() {
    local n=$1
    cat >"$work/patroni-$n.yml" <<YAML
namespace: /service/soak/
scope: "${groups[n]}"
name: patroni-$n
restapi: {listen: "127.0.0.1:$((8000 + n))", connect_address: "127.0.0.1:$((8000 + n))"}
etcd3: {hosts: ["127.0.0.1:2379", "127.0.0.1:2389", "127.0.0.1:2399"]}
bootstrap:
  dcs: {postgresql: {use_pg_rewind: true, parameters: {shared_buffers: 128MB}}}
  initdb: [{encoding: UTF8}, {auth: trust}, data-checksums]
postgresql:
  listen: 127.0.0.1:$((5431 + n))
  connect_address: 127.0.0.1:$((5431 + n))
  data_dir: $work/data-$n
  bin_dir: /usr/lib/postgresql/17/bin
  pgpass: $work/pgpass-$n
  basebackup: [{checkpoint: fast}]
  parameters: {unix_socket_directories: $work}
  pg_hba: [local all all trust, host all all all trust, host replication all all trust]
  authentication: {superuser: {username: postgres}, replication: {username: postgres}, rewind: {username: postgres}}
YAML
}

start_patroni() {
    daemon "patroni-$1" patroni "$work/patroni-$1.yml"
}

# is N ROLE: primary, replica.
is() {
    curl --silent --fail --output /dev/null "http://127.0.0.1:$((8000 + $1))/$2"
}

streams() {
    is "$1" replica && [[ $(psql -At -p $((5431 + $1)) -c 'SELECT status FROM pg_stat_wal_receiver') == streaming ]]
}

# members GROUP ROLE
members() {
    local n
    for n in 1 2 3 4 5; do
        if [[ ${groups[n]} == "$1" ]] && is "$n" "$2"; then echo "$n"; fi
    done
}

# HAProxy finds the primaries, as the template of Patroni's documentation does.
write_ways_in() {
    local n
    {
        echo 'defaults
  mode tcp
  timeout connect 2s
  timeout client 1h
  timeout server 1h
  timeout check 2s
  default-server inter 1s fall 2 rise 2 on-marked-down shutdown-sessions
  option httpchk
  http-check expect status 200
listen stats
  mode http
  bind 127.0.0.1:8404
  stats enable
  stats uri /stats'
        # NAME PORT GROUP ROLE
        while read -r name port group role; do
            printf 'listen %s\n  bind 127.0.0.1:%d\n  option httpchk GET /%s\n' "$name" "$port" "$role"
            for n in 1 2 3 4 5; do
                [[ ${groups[n]} != "$group" ]] ||
                    echo "  server patroni-$n 127.0.0.1:$((5431 + n)) check port $((8000 + n))"
            done
        done <<<$'write_0 5000 0 primary\nread_0 5001 0 replica\nwrite_1 5010 1 primary\nread_1 5011 1 replica'
    } >"$work/haproxy.cfg"
    printf '"postgres" ""\n"pgmesh_health" ""\n' >"$work/users.txt"
    cat >"$work/pgbouncer.ini" <<INI
[databases]
bench = host=127.0.0.1 port=5000 dbname=bench
[pgbouncer]
listen_addr = 127.0.0.1
unix_socket_dir =
auth_type = trust
auth_file = $work/users.txt
stats_users = pgmesh_health
pool_mode = transaction
INI
}

start_haproxy() {
    daemon haproxy haproxy -db -f "$work/haproxy.cfg"
}

start_pgbouncer() {
    daemon pgbouncer pgbouncer "$work/pgbouncer.ini"
}

start_cluster() {
    local n
    for n in 1 2 3; do start_etcd "$n"; done
    wait_for 60 "etcd serves" etcd_serves
    for n in 1 2 3 4 5; do write_patroni "$n"; done
    start_patroni 1
    start_patroni 4
    wait_for 120 "group 0 has a primary" is 1 primary
    wait_for 120 "group 1 has a primary" is 4 primary
    for n in 2 3 5; do start_patroni "$n"; done
    for n in 2 3 5; do wait_for 120 "the standbys stream" streams "$n"; done
    write_ways_in
    start_haproxy
    start_pgbouncer
}

# bench PORT: a client that comes again when its connections were cut, as applications do.
bench() {
    while sleep 1; do pgbench --port="$1" --no-vacuum --client=4 --rate=50 --time=36000 bench || true; done
}

start_load() {
    local port
    for port in 5000 5010; do
        wait_for 60 "HAProxy has found the primary" psql -p "$port" -c 'CREATE DATABASE bench'
        psql -q -p "$port" -c 'CREATE ROLE pgmesh_health LOGIN IN ROLE pg_monitor'
        pgbench --port="$port" --initialize --quiet --scale=2 bench >>"$log" 2>&1
    done
    daemon bench-0 bench 6432
    daemon bench-1 bench 5010
}

# --- the monitor, and whom it tells ---------------------------------------------------------------

start_monitor() {
    cat >"$work/webhook.py" <<'PYTHON'
import http.server, sys

class Webhook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        notice = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with open(sys.argv[1], "a") as told:
            told.write(notice + "\n")
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", 9000), Webhook).serve_forever()
PYTHON
    touch "$told"
    daemon webhook python3 "$work/webhook.py" "$told"
    cat >"$config" <<'TOML'
cluster = "soak"
admin_address = "127.0.0.1:9631"
[postgres]
user = "pgmesh_health"
database = "bench"
tls = "disable"
[etcd]
endpoints = ["http://127.0.0.1:2379", "http://127.0.0.1:2389", "http://127.0.0.1:2399"]
[patroni]
scope = "soak"
[[pgbouncer]]
name = "pgbouncer"
host = "127.0.0.1"
user = "pgmesh_health"
database = "bench"
tls = "disable"
[[haproxy]]
name = "haproxy"
url = "http://127.0.0.1:8404/stats"
write_backend = "write_0"
read_backend = "read_0"
[[webhook]]
name = "soak"
url = "http://127.0.0.1:9000/"
body = '["{event}", "{status}", "{component}", "{check}", "{reason}", "{since}"]'
TOML
    daemon monitor health-monitor --config "$config" --log-format json run
    wait_for 60 "the monitor is ready" curl --silent --fail http://127.0.0.1:9631/readyz
}

well() {
    curl --silent --fail "$status" | jq --exit-status '.verdict.status == "ok"'
}

# judge PATTERN: what was told since the last time is true where it is of a component that matches, false otherwise.
judge() {
    local notice component
    sleep "$echo_of"
    while IFS= read -r notice; do
        seen=$((seen + 1))
        component=$(jq --raw-output '.[2]' <<<"$notice")
        if [[ $component =~ $1 ]]; then
            true_alerts=$((true_alerts + 1))
            say "  told, and true: $notice"
        else
            false_alerts=$((false_alerts + 1))
            say "  FALSE ALERT: $notice"
        fi
    done < <(tail -n "+$((seen + 1))" "$told")
}

# --- what is done ---------------------------------------------------------------------------------

# restart N HOW: a standby, by Patroni or with it.
restart() {
    local n=$1 how=$2 began=$EPOCHREALTIME lasted matching='^$'
    if [[ $how == "by Patroni" ]]; then
        curl --silent --fail --request POST --data '{}' "http://127.0.0.1:$((8000 + n))/restart" >>"$log"
    else
        stop "patroni-$n"
        start_patroni "$n"
    fi
    wait_for 180 "patroni-$n streams again" streams "$n"
    wait_for 180 "all is well after the restart of patroni-$n" well
    lasted=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $began }")
    restarts=$((restarts + 1))
    say "restart $restarts: patroni-$n of group ${groups[n]} $how, all is well after $lasted s"
    awk "BEGIN { exit !($lasted <= $after) }" || matching="patroni-$n( |$)|^group ${groups[n]}$|^haproxy"
    judge "$matching"
}

# One standby after the other, until so many seconds have passed since the start.
restart_standbys() {
    local until=$1 group n standbys how=("by Patroni" "with its Patroni")
    while ((SECONDS + EVERY < until)); do
        sleep "$EVERY"
        group=$((restarts / 2 % 2))
        mapfile -t standbys < <(members "$group" replica)
        n=${standbys[restarts / 4 % ${#standbys[@]}]}
        restart "$n" "${how[restarts % 2]}"
    done
    ((until <= SECONDS)) || sleep $((until - SECONDS))
    judge '^$'
}

update() {
    stop "patroni-$1"
    sleep "$away"
    start_patroni "$1"
    wait_for 180 "patroni-$1 streams again" streams "$1"
    updated=$((updated + 1))
}

rolling_update() {
    local silence n group primary standbys began=$SECONDS
    say "maintenance: everything is updated"
    silence=$(health-monitor --config "$config" silence --for 1h --comment "rolling update" | awk 'END { print $NF }')
    for n in 1 2 3; do
        stop "etcd-$n"
        sleep 2
        start_etcd "$n"
        wait_for 60 "etcd serves" etcd_serves
    done
    stop haproxy
    start_haproxy
    stop pgbouncer INT # TERM would wait until all clients have gone
    start_pgbouncer
    for group in 0 1; do
        primary=$(members "$group" primary)
        mapfile -t standbys < <(members "$group" replica)
        for n in "${standbys[@]}"; do update "$n"; done
        patronictl -c "$work/patroni-$primary.yml" switchover --force --leader "patroni-$primary" \
            --candidate "patroni-${standbys[0]}" >>"$log" 2>&1 || die "no switchover"
        wait_for 60 "group $group has another primary" is "${standbys[0]}" primary
        update "$primary"
    done
    wait_for 180 "all is well after the maintenance" well
    health-monitor --config "$config" unsilence "$silence" >>"$log"
    say "maintenance: $updated members, etcd, HAProxy and PgBouncer were updated in $((SECONDS - began)) s"
    judge '^$'
}

# What must be told. Otherwise a webhook that is never reached would look as good.
lose_standby() {
    local n before=$true_alerts
    n=$(members 1 replica)
    say "patroni-$n is lost"
    kill -KILL "${pids[patroni-$n]}" "$(head -n 1 "$work/data-$n/postmaster.pid")"
    wait "${pids[patroni-$n]}" 2>/dev/null || true
    sleep 30
    start_patroni "$n"
    wait_for 180 "all is well after the loss of patroni-$n" well
    judge "patroni-$n( |$)|^group 1$"
    ((before + 2 <= true_alerts)) || die "the loss of a standby was not told, or not that it was over"
}

# The CPU time of the monitor, in ticks of 10 ms.
cpu() {
    awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/${pids[monitor]}/stat"
}

cost() {
    awk -v before="$1" -v now="$(cpu)" -v seconds="$2" '
        /VmHWM/ { printf "%.1f MiB at most, %.2f %% of a core", $2 / 1024, (now - before) / seconds }' \
        "/proc/${pids[monitor]}/status"
}

main() {
    local began end before components checks changes
    start_cluster
    start_load
    start_monitor
    wait_for 180 "all is well" well
    say "watched: 5 members of Patroni in two groups, etcd, PgBouncer, HAProxy"
    began=$SECONDS end=$((SECONDS + MINUTES * 60)) before=$(cpu)
    restart_standbys $((began + MINUTES * 30))
    rolling_update
    restart_standbys "$end"
    components=$(curl --silent --fail "$status" | jq '.components | length')
    checks=$(curl --silent --fail "$status" | jq '[.components[].checks[]] | length')
    changes=$(grep --count '"check changed"' "$monitor_log" || true)
    say "$((SECONDS - began)) s, $restarts restarts of standbys, $updated in maintenance"
    say "$checks checks of $components components were judged, $changes changes noticed, $false_alerts false alerts"
    say "the monitor: $(cost "$before" $((SECONDS - began)))"
    lose_standby
    say "told: $true_alerts true, $false_alerts false"
    ((false_alerts == 0))
}

main
