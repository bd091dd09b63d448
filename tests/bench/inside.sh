# shellcheck shell=bash
# What the halves that run inside the container share. Sourced, never run.

readonly work=$PWD
readonly log="$work/log"
export PGHOST="$work" PGUSER=postgres PGDATABASE=postgres

logs=("$log") # what is shown of, if something fails

say() {
    printf '[%4ds] %s\n' "$SECONDS" "$*" >&2
}

die() {
    printf '\n%s: %s; the end of what was logged:\n' "${0##*/}" "$1" >&2
    tail -n 20 "${logs[@]}" >&2
    exit 1
}

# wait_for WHAT COMMAND…: until the command succeeds, or die.
wait_for() {
    local i what=$1
    shift
    for ((i = 0; i < 300; i++)); do
        ! "$@" || return 0
        sleep 0.2
    done
    die "$what"
}

# sql STATEMENT: on the server at PGPORT, or the only one.
sql() {
    psql --quiet --no-align --tuples-only --no-psqlrc --set ON_ERROR_STOP=1 --command "$1"
}
