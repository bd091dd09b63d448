#!/usr/bin/env bash
# Makes the stack's passwords and keys, and gives them to Swarm. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

usage() {
    cat <<'TEXT'
Usage: init-scripts/secrets.sh [--files-only] [PROFILE]

Makes what is missing in .cache/up/secrets: a random password for each role, Redis, HAProxy's statistics and
Grafana, the key of the backups, and the keys of the S3 server for tests. A file that is there stays as it is: put
your own there before the first run, a password as letters, digits and ._~+/=- without an end of line. Then each file becomes a Swarm secret, with a hash in its name; with
--files-only none does.

.cache/up/secrets/pgmesh_backup_key is what backups can be read with, and nothing else: keep a copy elsewhere.
init-scripts/rotate-secret.sh replaces what is there.
TEXT
}

# make_secret NAME COMMAND…: the command's output, unless the file is there.
make_secret() {
    local file="$secrets/$1"
    shift
    [[ ! -e $file ]] || return 0
    (umask 077 && "$@" >"$file.new" && mv "$file.new" "$file")
}

make_all() {
    local name
    mkdir -p "$secrets"
    chmod 0700 "$up"
    [[ -e $up/salt ]] || (umask 077 && random_hex 32 >"$up/salt.new" && mv "$up/salt.new" "$up/salt")
    for name in "${database_passwords[@]}" haproxy redis grafana; do make_secret "${name}_password" random_hex 24; done
    [[ -n $(backup_keys) ]] || make_secret pgmesh_backup_key openssl rand -base64 32
    if [[ $S3_FOR_TESTS == yes ]]; then
        make_secret s3_access_key_id random_hex 10
        make_secret s3_secret_access_key random_hex 24
    fi
    for name in s3_access_key_id s3_secret_access_key; do
        [[ -s $secrets/$name ]] || die "$secrets/$name is missing: the profile says that S3 is at $S3_ENDPOINT" \
            "put the key of that S3 into this file, then start again"
    done
}

# A line end would be part of the password for some who read it, and not for others. Agents, who read the rest, drop it.
check_files() {
    local name
    for name in "${database_passwords[@]/%/_password}" haproxy_password redis_password s3_access_key_id s3_secret_access_key; do
        is_plain "$name" "$(<"$secrets/$name")" ||
            die "$secrets/$name is empty, or has characters that it may not have (secrets.sh --help)" "put another value there, start again; of a stack that runs: init-scripts/rotate-secret.sh"
        [[ $name == s3_* || $(wc -l <"$secrets/$name") == 0 ]] ||
            die "$secrets/$name ends with an end of line" "truncate --size=-1 $secrets/$name, start again"
    done
    for name in $(backup_keys); do
        name=$(backup_key_name "$name")
        is_key "$(<"$secrets/$name")" || die "$secrets/$name is not 32 bytes in base64 or hexadecimal" "bring back the one that the backups were made with; for a new stack openssl rand -base64 32 makes one"
    done
}

# Swarm's secrets never change; what has changed is another one, and those that no service uses any more go
# when the stack is deployed.
give_to_swarm() {
    local file name there count=0
    there=$(docker secret ls --format '{{.Name}}')
    for file in "$secrets"/*; do
        [[ $file != *.new ]] || continue
        name="${STACK}_${file##*/}_$(secret_hash "$file")"
        if ! grep -qxF "$name" <<<"$there"; then
            docker secret create --label "$stack_label=$STACK" "$name" "$file" >/dev/null || die "Swarm does not take the secret $name" "see the message above, start again"
            count=$((count + 1))
        fi
    done
    ((count == 0)) || say "  $count new secrets in Swarm"
}

main() {
    local files_only=no
    case ${1:-} in
    -h | --help) usage && return 0 ;;
    --files-only) files_only=yes && shift ;;
    esac
    ensure_program openssl openssl
    if [[ $# -gt 0 ]]; then load_profile "$1"; else load_remembered_profile; fi
    lock_stack
    make_all
    check_files
    [[ $files_only == yes ]] || give_to_swarm
}

main "$@"
