#!/usr/bin/env bash
# Runs PgBouncer, and starts it anew when HAProxy is at none of the addresses any more that it had, or had none yet.
#
# Docker's DNS lets an address be kept for 600 s, and PgBouncer's resolver (c-ares) keeps it so long, whatever
# dns_max_ttl says: after HAProxy came back with another address nobody was served for minutes. That there is no
# such name it keeps as long as the name server behind Docker's says, up to an hour: where PgBouncer was there first,
# it never found HAProxy. Clients whose connections end here had lost those behind them.
set -euo pipefail

addresses() {
    getent ahostsv4 haproxy | awk '{ print $1 }' | sort -u
}

# moved KNOWN NOW: whether it is somewhere, and the two lists have no line in common.
moved() {
    [[ $2 ]] && ! grep --quiet --line-regexp --fixed-strings -f <(printf '%s' "$1") <<<"$2"
}

pgbouncer=''
trap 'kill -INT "$pgbouncer"; wait "$pgbouncer"; exit' INT TERM
while :; do
    known=$(addresses || true)
    pgbouncer "$@" &
    pgbouncer=$!
    while kill -0 "$pgbouncer" 2>/dev/null; do
        sleep 1 &
        wait $!
        now=$(addresses || true)
        if moved "$known" "$now"; then
            [[ $known ]] || known="no address"
            echo "HAProxy has moved from ${known//$'\n'/, } to ${now//$'\n'/, }: PgBouncer is started anew"
            kill -QUIT "$pgbouncer"
            wait "$pgbouncer" || true
            continue 2
        fi
    done
    wait "$pgbouncer"
    exit
done
