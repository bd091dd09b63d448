#!/usr/bin/env bash
# Kills what stores WAL at random moments, and restores each time. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../init-scripts/lib.sh"

readonly container="pgmesh-soak-wal-$$"
# The volume of the image, which belongs to the user postgres: on a real disk, and not on overlayfs.
readonly work=/var/lib/postgresql/17
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

wrong_use() {
    printf '%s: %s (see --help)\n' "${0##*/}" "$1" >&2
    exit 2
}

parse_options() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --rounds | --seed | --writers)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || wrong_use "$1 needs a number above 0"
            printf -v "${1#--}" '%s' "$2"
            ;;
        --agent)
            [[ -x ${2:-} ]] || wrong_use "--agent needs a program"
            agent=$(realpath "$2")
            ;;
        --s3-server)
            [[ -x ${2:-} ]] || wrong_use "--s3-server needs a program"
            s3_server=$(realpath "$2")
            ;;
        *) wrong_use "unknown option $1" ;;
        esac
        shift 2
    done
}

# build PACKAGE PROGRAM: prints where the program is.
build() {
    say "builds $2" >&2
    (cd "$root" && cargo build --release --locked --quiet --package "$1" --bin "$2") ||
        die "$2 does not build" "see the lines above"
    printf '%s' "${CARGO_TARGET_DIR:-$root/target}/release/$2"
}

# The two are built one after the other: together, the S3 server's features would get into the agent.
ensure_programs() {
    [[ -n $agent && -n $s3_server ]] || ensure_cargo
    [[ -n $agent ]] || agent=$(build backup-agent backup-agent)
    [[ -n $s3_server ]] || s3_server=$(build cluster-tests s3-server)
}

ensure_images() {
    ensure_docker
    ensure_base_image
    ensure_postgres_image
    ensure_tests_image
}

remove_container() {
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true
}

main() {
    parse_options "$@"
    ensure_programs
    ensure_images
    mkdir -p "${results%/*}"
    trap remove_container EXIT
    docker run --name "$container" --init --network none --shm-size 1g --user "$postgres_uid" \
        --volume "$work" --workdir "$work" \
        --volume "$agent:/usr/local/bin/backup-agent:ro" \
        --volume "$s3_server:/usr/local/bin/s3-server:ro" \
        --volume "$root/tests/soak/wal-inside.sh:/usr/local/bin/soak-wal:ro" \
        --env ROUNDS="$rounds" --env SEED="$seed" --env WRITERS="$writers" \
        "$tests_image" bash /usr/local/bin/soak-wal | tee "$results"
}

main "$@"
