#!/usr/bin/env bash
# Replaces a password or a key of the running stack. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/rotate-secret.sh NAME [--from FILE | --abandon]

Gives a secret a new value, random or that of FILE, and brings it to all who use it, one after the other. The new
value is in .cache/up/secrets. If it was stopped, run it again: it goes on with the same value.

  --from FILE  a line of letters, digits and ._~+/=-; for s3 two of any characters without blanks
  --abandon    goes back to the old value, where a rotation was stopped and the new one turns out to be wrong. Refused
               once the old one may have ended somewhere: as soon as PostgreSQL is given the new password of a role,
               or the backup agent the new key. Then only the new value leads on

NAME is one of:

  pgmesh_app_password, pgmesh_readonly_password, pgmesh_mcp_password, pgmesh_admin_password
      PostgreSQL knows one password of a role: from one moment on a new connection needs the new one, which is in
      the file right before; whoever is connected stays so. PgBouncer is made to learn it at once, so that those
      connected there get new connections to the servers too; it does not know pgmesh_admin.
  pgmesh_backup_password, pgmesh_lag_password, pgmesh_rebalance_password
      The role's password, then the agent, which keeps its connections until it is restarted.
  pgmesh_health_password, pgmesh_pgbouncer_password
      The same; PgBouncer has them as well, and is restarted: its clients are disconnected between two
      transactions and connect anew, after some seconds where it is the only one.
  pgmesh_replication_password, pgmesh_rewind_password, postgres_password
      The role's password, then the servers. Standbys that stream stay connected; in a failover meanwhile those
      that are not restarted yet follow a new primary only then. Not postgres_password with Citus, whose servers
      know it by pg_dist_authinfo.
  pgmesh_backup_key
      A key with a new number, which writes from now on; the older ones stay, to read. Keep a copy of it elsewhere.
      To retire an older one: README.md.
  s3
      The pair s3_access_key_id and s3_secret_access_key: --from names a file with the two in two lines, made where
      the S3 is. Both must be valid until this has ended. For the S3 server for tests it makes a pair by itself.
  redis_password, haproxy_password
      They know one password: the service is restarted, and its clients connect anew.

The servers have all passwords of roles, so each is restarted for one, a primary only after it handed over: a short
pause for writers, and an outage in a group that has one server.

Exit: 0 the new value holds everywhere and all is well, 1 refused or failed, 2 wrong use.
TEXT
}

# The old values, as long as they may be gone back to.
readonly before="$rotation.before"
readonly abandoned="$rotation.abandoned"

# names: the files of the secret.
names() {
    case $name in
    s3) printf 's3_%s\n' access_key_id secret_access_key ;;
    pgmesh_backup_key) backup_key_name "$(($(backup_keys | tail -n 1) + 1))" ;;
    *) echo "$name" ;;
    esac
}

check_name() {
    local role
    [[ -n $name ]] || { usage >&2 && exit 2; }
    for role in "${database_passwords[@]}"; do [[ $name != "${role}_password" ]] || return 0; done
    case $name in
    s3)
        [[ $S3_FOR_TESTS == yes || -n $from || -e $rotation ]] ||
            die "the new pair is made where the S3 is: $S3_ENDPOINT" "put its id and its secret in two lines of a file, and name that by --from"
        ;;
    pgmesh_backup_key | redis_password | haproxy_password) ;;
    grafana_password) die "Grafana keeps its password itself" "change it there (user admin), or: grafana cli admin reset-admin-password" ;;
    *) die "$name is no secret that can be rotated" "init-scripts/rotate-secret.sh --help names them" ;;
    esac
}

# users: the services with a file of their own that have the secret, in the order in which they get it. What
# stands in stack.yml, the agents above all, gets it before them.
users() {
    case $name in
    redis_password | s3 | pgmesh_backup_key) ;;
    haproxy_password) haproxies ;;
    pgmesh_health_password | pgmesh_pgbouncer_password) pgbouncers && databases ;;
    *) databases ;;
    esac
}

check_stack() {
    local found group
    # One that was stopped goes on: what it left half done may be what is not well.
    [[ -e $rotation ]] || found=$(findings) || die "the cluster is not well: $(head -n 1 <<<"$found" | tr -s ' ')" "init-scripts/status.sh; mend it, start again"
    [[ $name != postgres_password || $CITUS == no ]] || die "Citus' servers know the superuser's password by pg_dist_authinfo" \
        "change it there by hand, in one go with ALTER ROLE on each primary, and put it in $secrets/$name"
    # These are nobody's password in PostgreSQL.
    case $name in redis_password | haproxy_password | s3 | pgmesh_backup_key) return 0 ;; esac
    for group in $(groups); do
        wait_hint="run this where all primaries are (init-scripts/switchover.sh)" wait_for 60 "the primary of group $group is not on this machine" leader_is_here "$group"
    done
}

leader_is_here() {
    [[ -n $(primary_here "$1") ]]
}

# new_value LINE: for one of the files.
new_value() {
    if [[ -n $from ]]; then
        sed -n "$1p" "$from" | tr -d '\n'
    elif [[ $name == pgmesh_backup_key ]]; then
        openssl rand -base64 32
    else
        random_hex 24
    fi
}

# Before anything is changed.
check_from() {
    local line wanted
    wanted=$(names | wc -l)
    [[ $(grep -c '' "$from") == "$wanted" ]] || die "$from has $(grep -c '' "$from") lines, and $name needs $wanted" "mend it, start again"
    for ((line = 1; line <= wanted; line++)); do
        if [[ $name == pgmesh_backup_key ]]; then
            is_key "$(new_value "$line")" || die "$from is not 32 bytes in base64 or hexadecimal" "openssl rand -base64 32 makes a key"
        else
            is_plain "$name" "$(new_value "$line")" || die "line $line of $from is empty, or has characters that it may not have" "rotate-secret.sh --help names them; mend it, start again"
        fi
    done
}

# current_names: the files that have the new value, or are to have it.
current_names() {
    if [[ $name == pgmesh_backup_key && ! -e $secrets/$(names).new ]]; then backup_key_name "$(backup_keys | tail -n 1)"; else names; fi
}

# All values are there before the first of them is in place.
make_values() {
    local file line=0
    [[ -z $from ]] || check_from
    if [[ -e $rotation ]]; then
        for file in $(current_names); do
            line=$((line + 1))
            [[ -z $from || $(cat "$secrets/$file.new" 2>/dev/null || cat "$secrets/$file") == "$(new_value "$line")" ]] ||
                die "the rotation of $name has begun with another value than that of $from" \
                    "leave --from away to go on with it, or go back first: init-scripts/rotate-secret.sh $name --abandon"
        done
        say "goes on with the rotation of $name"
        return 0
    fi
    for file in "$secrets"/*.new; do rm -f "$file"; done
    rm -rf "$before"
    for file in $(names); do
        line=$((line + 1))
        (
            umask 077
            new_value "$line" >"$secrets/$file.new"
            [[ $name == pgmesh_backup_key ]] || { mkdir -p "$before" && cp -p "$secrets/$file" "$before"; }
        )
    done
    printf '%s\n' "$name" >"$rotation"
}

# go_back: the old values into their files again. Nobody was given a new key of the backups that is not in place yet.
go_back() {
    local file
    if [[ $name != pgmesh_backup_key ]]; then
        [[ -d $before ]] || die "the old value of $name may be refused already: it cannot be gone back to" "init-scripts/rotate-secret.sh $name goes on with the new one"
        for file in "$before"/*; do (umask 077 && cp -p "$file" "$secrets/${file##*/}"); done
    elif [[ ! -e $secrets/$(names).new ]]; then
        die "backups may be under the new key already: it has to stay" "init-scripts/rotate-secret.sh $name goes on with it"
    fi
    for file in "$secrets"/*.new; do rm -f "$file"; done
    : >"$abandoned"
    say "goes back to the old value of $name"
}

place_values() {
    local file
    for file in "$secrets"/*.new; do [[ ! -e $file ]] || mv "$file" "${file%.new}"; done
}

# In no log, and not as a statement that is kept. The file changes with the role, once psql waits for it.
alteration() {
    local password
    cat <<'SQL'
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET pgaudit.log = 'none';
SET pg_stat_statements.track_utility = off;
SQL
    sleep 1
    place_values
    password=$(<"$secrets/$name")
    printf "BEGIN;\nALTER ROLE %s PASSWORD '%s';\n" "${name%_password}" "${password//\'/\'\'}"
    [[ $CITUS == no ]] || citus_login "$password"
    echo 'COMMIT;'
}

# What Citus' nodes log in with to each other changes with the role, as init-scripts/25-citus-logins.sql wrote it.
citus_login() {
    local info=${1//\\/\\\\}
    info="password='${info//\'/\\\'}'"
    printf "UPDATE pg_catalog.pg_dist_authinfo SET authinfo = '%s' WHERE rolename = '%s';\n" "${info//\'/\'\'}" "${name%_password}"
}

alter_role() {
    local group
    rm -rf "$before"
    for group in $(groups); do
        alteration | docker exec --interactive "$(primary_here "$group")" psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 "$DATABASE" ||
            die "the password of ${name%_password} could not be changed in group $group" "see the message above, start again"
    done
    say "  ${name%_password} has its new password in the groups $(groups | xargs)"
}

# A login by SCRAM is how PgBouncer gets what it logs in to the servers with: one by the new password, as
# soon as that holds, and those who are connected notice nothing. Tries until it is told to end, and for ten minutes.
teach_pgbouncer() {
    docker run --rm --interactive --network "${STACK}_application" --label "$stack_label=$STACK" --no-healthcheck --user 0 --entrypoint bash \
        --volume "$up/ca.crt:/ca.crt:ro" --volume "$secrets/$name.new:/password:ro" "$POSTGRES_IMAGE" -c '
            export PGPASSWORD=$(</password) PGCONNECT_TIMEOUT=5
            echo ready
            for host in $3; do
                until psql --no-psqlrc --quiet --dbname "host=$host port=6432 user=$1 dbname=$2 sslmode=verify-full sslrootcert=/ca.crt" \
                    --command "SELECT" </dev/null >/dev/null 2>&1; do
                    read -r -t 0.05 || (($? > 128 && SECONDS < 600)) || exit 1
                done
            done' teacher "${name%_password}" "$DATABASE" "$(pgbouncers | xargs)"
}

# Clients read the file to log in as the role.
change_role_of_clients() {
    local teacher ready
    [[ -e $secrets/$name.new ]] || cp -p "$secrets/$name" "$secrets/$name.new"
    coproc teach_pgbouncer 9>&-
    teacher=$COPROC_PID
    read -r -t 60 ready <&"${COPROC[0]}" || die "no client could be started that logs in to PgBouncer (${ready:-no answer})" "docker ps; start again"
    alter_role
    wait "$teacher" || die "PgBouncer does not take the new password within ten minutes" "init-scripts/status.sh pgbouncer-1; start again"
}

bring_to_swarm() {
    SECONDS=$SECONDS "$scripts/secrets.sh" "$up/values"
    render_all
}

main() {
    local name='' from='' abandon=no used users
    while [[ $# -gt 0 ]]; do
        case $1 in
        --from) [[ $# -gt 1 ]] || { usage >&2 && exit 2; } && from=$2 && shift ;;
        --abandon) abandon=yes ;;
        -h | --help) usage && return 0 ;;
        -*) usage >&2 && exit 2 ;;
        *) [[ -z $name ]] || { usage >&2 && exit 2; } && name=$1 ;;
        esac
        shift
    done
    [[ -z $from || -r $from ]] || die "$from cannot be read" "name the file with the new value"
    [[ -z $from || $abandon == no ]] || { usage >&2 && exit 2; }
    open_stack
    [[ ! -e $rotation || $(<"$rotation") == "$name" ]] || die "the rotation of $(<"$rotation") was interrupted" "init-scripts/rotate-secret.sh $(<"$rotation")"
    [[ -e $rotation || $abandon == no ]] || die "no rotation of $name was interrupted" "nothing is to be done"
    # It was stopped on its way back.
    [[ ! -e $rotation || ! -e $abandoned ]] || abandon=yes
    check_name
    if [[ $abandon == yes ]]; then
        [[ -e $abandoned && $name == pgmesh_backup_key ]] || go_back
    else
        rm -f "$abandoned"
        check_stack
        make_values
    fi
    case $abandon-$name in
    yes-*) bring_to_swarm ;;
    no-pgmesh_app_password | no-pgmesh_readonly_password | no-pgmesh_mcp_password)
        change_role_of_clients
        bring_to_swarm
        ;;
    no-pgmesh_admin_password)
        alter_role
        bring_to_swarm
        ;;
    no-redis_password | no-haproxy_password | no-s3 | no-pgmesh_backup_key)
        place_values
        bring_to_swarm
        ;;
    *)
        # The agent follows at once.
        place_values
        bring_to_swarm
        alter_role
        ;;
    esac
    deployed_at=$(date --utc +%Y-%m-%dT%H:%M:%S)
    if [[ $name == s3 && $S3_FOR_TESTS == yes ]]; then update_changed s3-for-tests; fi
    deploy stack
    check_updates
    mapfile -t users < <(users)
    update_changed "${users[@]}"
    wait_until_running
    prune
    case $name in s3 | pgmesh_backup_key) agent check || die "the backup agent cannot work with it" "see the lines above; if the new value is wrong: init-scripts/rotate-secret.sh $name --abandon" ;; esac
    wait_until_well 300
    rm -rf "$rotation" "$before" "$abandoned"
    if [[ $abandon == yes ]]; then
        say "the old value of $name holds, and all is well"
    else
        used=$(for file in $(current_names); do echo "$secrets/$file"; done | xargs)
        say "$name is replaced, and all is well: $used"
    fi
}

main "$@"
