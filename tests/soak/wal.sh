#!/usr/bin/env bash
# Kills what stores WAL at random moments, and restores each time. See --help.
set -euo pipefail

# shellcheck source=tests/bench/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../bench/lib.sh"

readonly results="$cache/soak/wal.txt"

rounds=100
seed=$(od -An -N 2 -tu2 /dev/urandom | tr -d ' ')
writers=3
agent=''
s3_server=''

usage() {
    cat <<'TEXT'
Usage: tests/soak/wal.sh [OPTIONS]

Proves that nothing is lost while a backup-agent receives WAL into an S3 server. In one container, which is
removed at the end: a PostgreSQL 17 primary and a standby, the S3 server, the agent, and writers, which note
each commit that was acknowledged, and when, outside the database.

In each round, at a random moment under load, one of these is killed with SIGKILL:

  agent     the backup-agent
  host      the backup-agent, and everything that it has on disk is deleted (its configuration is kept apart)
  primary   every process of the primary

In a third of the rounds the S3 server hangs (SIGSTOP) for one to three seconds before that.

Then the repository is restored to its end into a fresh directory, and every row is compared:

  - what was acknowledged longer ago than ship_interval (1 s) and 2 s must be there, unless the store hung;
  - what the primary was told is stored must be there;
  - in every second round commits wait for the repository (synchronous_standby_names = 'ANY 1
    (pgmesh_backup)'), and everything that was acknowledged must be there;
  - nothing else may be there.

  --rounds N        how often something is killed [100]; a round takes 10 to 15 seconds
  --seed N          for the random moments and victims [another each time; the first line says which]
  --writers N       how many write at once [3]
  --agent FILE      a backup-agent to test [target/release/backup-agent, built first]
  --s3-server FILE  the S3 server [target/release/s3-server, built first]
  -h, --help        this text

The last lines are the number of rounds, of commits tried and of commits lost, and the longest delay: how
long ago the oldest commit was acknowledged that was not in the repository when something was killed (of the
rounds in which the S3 server did not hang).
All lines are left in .cache/soak/wal.txt too.

Exit: 0 nothing was lost; 1 a commit was lost, or something failed; 2 wrong use.
TEXT
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --rounds) rounds=$(positive "$@") ;;
        --seed) seed=$(positive "$@") ;;
        --writers) writers=$(positive "$@") ;;
        --agent) agent=$(program "$@") ;;
        --s3-server) s3_server=$(program "$@") ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

main() {
    parse_options "$@"
    agent=${agent:-$(release backup-agent backup-agent)}
    s3_server=${s3_server:-$(release cluster-tests s3-server)}
    ensure_tests_image
    mkdir -p "${results%/*}"
    inside soak/wal-inside.sh --volume "$agent:/usr/local/bin/backup-agent:ro" \
        --volume "$s3_server:/usr/local/bin/s3-server:ro" \
        --env ROUNDS="$rounds" --env SEED="$seed" --env WRITERS="$writers" | tee "$results"
}

main "$@"
