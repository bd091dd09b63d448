#!/usr/bin/env bash
# Fills the database "regression" of a running server with the tables of PostgreSQL's regression suite.
#
#   load-regression HOST PORT [TEST...]      HOST: a host name or the directory of a Unix socket
#
# Without TEST the whole suite runs (a minute or two). Whether its results equal the expected files is
# not asked: locale and settings of the server differ from those the suite assumes. What matters is
# what it leaves behind. Exit 0 when the database is there and has tables.
set -euo pipefail

readonly suite=/usr/share/pgmesh-tests/regress
readonly pg_regress=/usr/lib/postgresql/17/lib/pgxs/src/test/regress/pg_regress

[[ $# -ge 2 ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
readonly host=$1 port=$2
shift 2

output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT

arguments=(
    --host="$host" --port="$port" --user="${PGUSER:-postgres}"
    --inputdir="$suite" --expecteddir="$suite" --outputdir="$output"
    --dlpath="$suite/lib" --bindir=/usr/lib/postgresql/17/bin
    --max-concurrent-tests=20 --no-locale
)
if [[ $# -gt 0 ]]; then
    arguments+=(test_setup "$@")
else
    arguments+=(--schedule="$suite/parallel_schedule")
fi
"$pg_regress" "${arguments[@]}" >"$output/log" 2>&1 || true

sql() {
    psql --no-psqlrc --host="$host" --port="$port" --username="${PGUSER:-postgres}" --dbname=regression \
        --quiet --tuples-only --no-align --command "$1"
}

tables=$(sql "SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'p')") || {
    tail -n 20 "$output/log" >&2
    exit 1
}
# The suite's own test of tablespaces ends with this; a part of the suite leaves it behind. A tablespace
# inside the data directory is a developer's option, and no server recovers with one unless told so.
PGOPTIONS='-c client_min_messages=error' sql 'DROP TABLESPACE IF EXISTS regress_tblspace'

grep -E '^(not ok|# [0-9]+ of|# All)' "$output/log" || true
printf 'regression: %s tables\n' "$tables"
[[ $tables -gt 100 || $# -gt 0 ]]
