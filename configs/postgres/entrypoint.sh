#!/usr/bin/env bash
# Starts PostgreSQL in a container; makes the data directory first if there is none.
#
#   PGDATA                  data directory; a directory below a volume
#   PGMESH_PRIMARY          host name of the primary: this server is made as its standby and follows it
#   PGMESH_SLOT             physical replication slot of this standby on the primary
#   PGMESH_INIT_SCRIPTS     directory of NN-purpose.sql, run in order on a new primary
#   PGMESH_REPLICATION_PASSWORD_FILE, PGMESH_SUPERUSER_PASSWORD_FILE   secrets
#
# A new data directory is made beside its final name and moved there when it is whole, so that a
# container killed in between starts over instead of running on half a database.
set -euo pipefail

readonly config_file=/etc/pgmesh/postgresql.conf
readonly replication_user=pgmesh_replication
readonly new_data="$PGDATA.new"

say() {
    printf 'entrypoint: %s\n' "$*"
}

die() {
    printf 'entrypoint: %s\n' "$*" >&2
    exit 1
}

run_init_scripts() {
    local directory=${PGMESH_INIT_SCRIPTS:-} script
    [[ -n $directory ]] || return 0
    for script in "$directory"/[0-9][0-9]-*.sql; do
        [[ -e $script ]] || continue
        say "runs ${script##*/}"
        psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname postgres --file "$script"
    done
}

# Only a socket and no archiving: nobody may see or copy a server that is not finished.
make_primary() {
    local pwfile=${PGMESH_SUPERUSER_PASSWORD_FILE:-}
    say "makes a new database in $PGDATA"
    initdb --pgdata="$new_data" --data-checksums --encoding=UTF8 --locale=C.UTF-8 \
        --auth-local=peer --auth-host=scram-sha-256 ${pwfile:+--pwfile="$pwfile"} >/dev/null
    pg_ctl --pgdata="$new_data" --wait --silent --log="$new_data/init.log" \
        --options="-c listen_addresses='' -c archive_mode=off" start ||
        die "the new database did not start: $(tail -n 5 "$new_data/init.log")"
    run_init_scripts
    pg_ctl --pgdata="$new_data" --wait --silent --mode=fast stop
    rm -f "$new_data/init.log"
}

primary_conninfo() {
    printf 'host=%s port=5432 user=%s dbname=postgres application_name=%s sslmode=%s sslrootcert=%s passfile=%s connect_timeout=5' \
        "$PGMESH_PRIMARY" "$replication_user" "${PGMESH_SLOT:-walreceiver}" \
        "${PGMESH_SSLMODE:-verify-full}" "${PGMESH_CA_FILE:-/etc/pgmesh/ca.crt}" "$HOME/.pgpass"
}

write_passfile() {
    local password
    password=$(<"${PGMESH_REPLICATION_PASSWORD_FILE:?names the file with the password of $replication_user}")
    (umask 077 && printf '*:*:*:%s:%s\n' "$replication_user" "$password" >"$HOME/.pgpass")
}

wait_for_primary() {
    local tries=0
    until psql --no-psqlrc --quiet --tuples-only --dbname "$(primary_conninfo)" --command 'SELECT 1' >/dev/null 2>&1; do
        tries=$((tries + 1))
        ((tries < 120)) || die "no answer from the primary $PGMESH_PRIMARY as $replication_user within 120 s: $(
            psql --no-psqlrc --dbname "$(primary_conninfo)" --command 'SELECT 1' 2>&1 | head -n 1
        )"
        sleep 1
    done
}

ensure_slot() {
    [[ -n ${PGMESH_SLOT:-} ]] || return 0
    psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set slot="$PGMESH_SLOT" --dbname "$(primary_conninfo)" >/dev/null <<'SQL'
SELECT pg_create_physical_replication_slot(:'slot', true)
WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = :'slot');
SQL
}

make_standby() {
    say "copies the primary $PGMESH_PRIMARY"
    wait_for_primary
    ensure_slot
    pg_basebackup --dbname="$(primary_conninfo)" --pgdata="$new_data" --checkpoint=fast \
        --wal-method=stream ${PGMESH_SLOT:+--slot="$PGMESH_SLOT"}
    touch "$new_data/standby.signal"
}

ensure_data_directory() {
    [[ ! -s $PGDATA/PG_VERSION ]] || return 0
    [[ -z $(ls -A "$PGDATA" 2>/dev/null) ]] ||
        die "$PGDATA is neither empty nor a PostgreSQL data directory: empty it, or set PGDATA"
    rm -rf "$new_data"
    if [[ -n ${PGMESH_PRIMARY:-} ]]; then make_standby; else make_primary; fi
    rm -rf "$PGDATA"
    mv "$new_data" "$PGDATA"
    sync
}

start_postgres() {
    local settings=(-D "$PGDATA")
    [[ ! -e $config_file ]] || settings+=(-c "config_file=$config_file")
    if [[ -n ${PGMESH_PRIMARY:-} ]]; then
        settings+=(-c "primary_conninfo=$(primary_conninfo)" -c "primary_slot_name=${PGMESH_SLOT:-}")
    fi
    exec postgres "${settings[@]}" "$@"
}

# Another command than "postgres" (a shell, psql) runs as it is.
if [[ ${1:-postgres} != postgres ]]; then exec "$@"; fi
[[ $# -eq 0 ]] || shift
[[ $(id -u) -ne 0 ]] || die "PostgreSQL does not run as root: start the container as the user postgres"
[[ -z ${PGMESH_PRIMARY:-} ]] || write_passfile
ensure_data_directory
start_postgres "$@"
