#!/usr/bin/env bash
# What Patroni calls when a server starts and when its role changes: ACTION ROLE SCOPE. On a primary, and
# only if they or the passwords have changed since the last time, it runs the scripts of init-scripts/
# (NN-purpose.sql; each may run twice), so that a new cluster gets its roles and tables, and a new
# password holds, wherever in the Swarm the primary is.
#
# "check", for init-scripts/up.sh, does it too, but once: exit 0 done, 75 it is being done, 1 not, and why is printed.
set -euo pipefail

readonly scripts=/etc/pgmesh/init
readonly database=${PGMESH_DATABASE:?the database of the applications}
readonly group=${PGMESH_GROUP:?the number of this group}

say() {
    printf 'pgmesh-initialise: %s\n' "$*"
}

# Not by PATRONI_CITUS_GROUP: Patroni takes its variables out of the environment.
readonly citus=${PGMESH_CITUS:-no}

# Citus' workers, too, would bring what is run here to all nodes, or refuse it: each does it for itself.
options='-c client_min_messages=warning'
[[ $citus == no || $group == 0 ]] || options+=' -c citus.enable_ddl_propagation=off'
readonly options

query() {
    PGOPTIONS=$options psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 "$@"
}

inputs() {
    cat "$scripts"/[0-9][0-9]-*.sql /run/secrets/*_password | sha256sum | cut -d ' ' -f 1
}

is_done() {
    [[ $(query --dbname "$database" --command \
        "SELECT inputs FROM pgmesh.initialised ORDER BY at DESC LIMIT 1" 2>/dev/null) == "$1" ]]
}

# The shards go to the workers that are registered when tables are distributed: so once, before that, until
# their number has been the same for ten seconds.
workers_are_registered() {
    local before=0 now
    [[ $citus == yes && $group == 0 ]] || return 0
    while now=$(query --dbname "$database" --command \
        "SELECT CASE WHEN EXISTS (SELECT FROM pg_dist_partition) THEN -1 ELSE count(*) END FROM pg_dist_node WHERE groupid > 0"); do
        [[ $now != "$before" && $now != -1 ]] || break
        before=$now
        sleep 10
    done
    [[ $now && $now != 0 ]] || { say 'no worker is registered yet: tables are not distributed'; return 1; }
}

# The roles in the database "postgres" too: rights on functions hold in one database.
run_scripts() {
    local script
    # With Citus the database and the extension are Patroni's to make.
    if [[ $citus == yes ]]; then
        [[ $(query --dbname "$database" --command "SELECT count(*) FROM pg_extension WHERE extname = 'citus'" 2>/dev/null) == 1 ]] || return 1
    elif [[ $(query --dbname postgres --command "SELECT count(*) FROM pg_database WHERE datname = '$database'") == 0 ]]; then
        query --dbname postgres --command "CREATE DATABASE \"$database\"" || return 1
    fi
    query --dbname postgres --file "$scripts/10-roles.sql" >/dev/null || return 1
    for script in "$scripts"/[0-9][0-9]-*.sql; do
        [[ $script != *-tables.sql ]] || workers_are_registered || return 1
        say "runs ${script##*/} in $database"
        query --dbname "$database" --set "group=$group" --file "$script" >/dev/null || return 1
    done
    query --dbname "$database" --set "inputs=$1" >/dev/null <<'SQL'
CREATE SCHEMA IF NOT EXISTS pgmesh;
CREATE TABLE IF NOT EXISTS pgmesh.initialised (at timestamptz NOT NULL DEFAULT now(), inputs text NOT NULL);
INSERT INTO pgmesh.initialised (inputs) VALUES (:'inputs');
SQL
}

check() {
    local wanted
    exec 9>/run/postgresql/pgmesh-initialise.lock
    flock --nonblock 9 || exit 75
    wanted=$(inputs) || exit 1
    is_done "$wanted" || run_scripts "$wanted" || exit 1
}

main() {
    local wanted tries
    [[ ${1:-} != check ]] || { check && exit 0; }
    [[ ${2:-} == primary ]] || exit 0
    exec 9>/run/postgresql/pgmesh-initialise.lock
    flock 9
    wanted=$(inputs)
    for ((tries = 0; tries < 60; tries++)); do
        [[ $(query --dbname postgres --command 'SELECT pg_is_in_recovery()' 2>/dev/null) == t ]] && ((tries > 15)) && exit 0
        if is_done "$wanted"; then exit 0; fi
        if run_scripts "$wanted"; then
            say "$database of group $group has its roles and tables"
            exit 0
        fi
        # The workers, on machines of their own, may take minutes.
        sleep $((tries < 15 ? 2 : 15))
    done
    say "GAVE UP: roles and tables of $database are not as init-scripts/ wants them; the reasons stand above"
    exit 1
}

main "$@"
