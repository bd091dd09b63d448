#!/usr/bin/env bash
# Has another server of a group become its primary. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/switchover.sh [GROUP] [--to MEMBER]

Hands the primary's role of a group (0, the coordinators, unless said otherwise) to a standby, by Patroni: the
primary ends in order, so nothing is lost. Waits until the new primary takes writes and the old one follows it,
and prints for how long a client could not write: one that writes a record each tenth of a second, through
HAProxy in group 0, and with target_session_attrs=read-write in the others.

  --to MEMBER  this one; otherwise the standby that is least behind

Refused where no standby is fit, with the reason. With --to a server that is the primary already, nothing is done.

Exit: 0 another one leads, 1 refused or failed, 2 wrong use.
TEXT
}

# choose: the primary and who is to be it: $from and $to.
choose() {
    local members
    members=$(patroni_members "$group") || die "Patroni does not say who is in group $group" "init-scripts/status.sh"
    from=$(awk '$2 == "Leader" { print $1 }' <<<"$members")
    [[ -n $from ]] || die "group $group has no primary now" "Patroni finds one by itself if it can; init-scripts/status.sh says what is in the way"
    [[ $wanted != "$from" ]] || return 0
    [[ -z $wanted ]] || grep -q "^$wanted " <<<"$members" ||
        die "$wanted is not in group $group" "one of: $(awk -v from="$from" '$1 != from { print $1 }' <<<"$members" | xargs)"
    to=$(fit_standby "$group" "$from" "$wanted") || die "no standby of group $group is fit to take over$to" "init-scripts/status.sh; once one streams, start again"
}

# Writes again and again as a client, and prints the time of each commit that was confirmed. A message in the WAL
# is a commit as any other, and leaves nothing behind.
write_on() {
    local host
    host=$(if [[ $group == 0 ]]; then haproxies; else members_of "$group"; fi | paste -sd ,)
    docker exec --interactive "$(container_of "$(any_database)")" bash -c '
        export PGPASSWORD=$(</run/secrets/pgmesh_app_password) PGCONNECT_TIMEOUT=2
        for ((n = 0; n < 1800; n++)); do
            # Ends with who started it.
            read -r -t 0.1 || (($? > 128)) || exit 0
            timeout 5 psql --no-psqlrc --quiet --tuples-only --dbname \
                "host=$1 user=pgmesh_app dbname=$2 sslmode=verify-full sslrootcert=/etc/pgmesh/ca.crt target_session_attrs=read-write" \
                --command "SELECT pg_logical_emit_message(true, \$\$pgmesh\$\$, \$\$switchover\$\$)" </dev/null >/dev/null 2>&1 && echo "$EPOCHREALTIME"
        done' writer "$host" "$DATABASE"
}

writes() {
    (($(wc -l <"$times") > ${1:-2}))
}

follows() {
    [[ $(patroni_members "$group" | awk -v name="$from" '$1 == name { print $3 }') == streaming ]]
}

main() {
    local group=0 wanted='' from='' to='' written
    while [[ $# -gt 0 ]]; do
        case $1 in
        --to) [[ $# -gt 1 ]] || { usage >&2 && exit 2; } && wanted=$2 && shift ;;
        -h | --help) usage && return 0 ;;
        *) [[ $1 =~ ^[0-9]+$ ]] || { usage >&2 && exit 2; } && group=$1 ;;
        esac
        shift
    done
    open_stack
    groups | has_line "$group" || die "there is no group $group" "one of: $(groups | xargs)"
    choose
    [[ $wanted != "$from" ]] || { say "$from is the primary of group $group already" && return 0; }
    times=$(mktemp "$cache/switchover.XXXXXX")
    exec 8> >(write_on >"$times" 2>/dev/null 9>&-)
    trap 'exec 8>&-; rm -f "$times"' EXIT
    wait_hint="init-scripts/status.sh" wait_for 30 "a client of group $group cannot write even now" writes
    say "$from hands over group $group to $to"
    hand_over "$group" "$from" "$to"
    written=$(wc -l <"$times")
    wait_hint="init-scripts/status.sh" wait_for 60 "$to takes writes" writes "$((written + 1))"
    say "$to is the primary of group $group; the longest time without a confirmed write: $(longest_gap "$times") s"
    wait_hint="init-scripts/status.sh $from" wait_for 120 "$from follows $to" follows
    say "$from follows it"
}

main "$@"
