#!/usr/bin/env bash
# Makes the stack's certificate authority, and a certificate for each service. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=init-scripts/stack.sh
source "$(dirname "${BASH_SOURCE[0]}")/stack.sh"

readonly days=365
readonly renew_days=30

usage() {
    cat <<'TEXT'
Usage: init-scripts/certificates.sh [PROFILE]

Makes what is missing of it in .cache/up: an authority of this stack (ca.crt, ca.key; ten years), and for each
member of etcd, database server, PgBouncer and agent a key and a certificate of 365 days, as
secrets/tls_NAME_key and tls_NAME_certificate. One that ends within 30 days, or whose names are not those of
the profile any more, is made anew; init-scripts/up.sh, which runs this first, then brings it into the stack. It
does so once they have ended, too; nobody is served then until it has.

ca.crt is what clients trust. ca.key is needed to make certificates only: it may be kept elsewhere meanwhile.
TEXT
}

new_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out "$1" 2>>"$cache/log/certificates.log"
}

ensure_authority() {
    if [[ -e $up/ca.crt ]]; then
        openssl x509 -in "$up/ca.crt" -noout -checkend $((renew_days * 86400)) >/dev/null ||
            die "the authority $up/ca.crt ends within $renew_days days" \
                "init-scripts/down.sh --keep-data, move ca.crt and ca.key away, init-scripts/up.sh, and give clients the new ca.crt"
        return 0
    fi
    say "makes the certificate authority of the stack"
    (umask 077 && new_key "$up/ca.key.new")
    openssl req -x509 -new -key "$up/ca.key.new" -days 3650 -subj "/CN=$STACK authority" \
        -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' -addext 'keyUsage=critical,keyCertSign,cRLSign' \
        -out "$up/ca.crt.new" 2>>"$cache/log/certificates.log" || die "openssl could not make the authority" "see $cache/log/certificates.log"
    mv "$up/ca.key.new" "$up/ca.key"
    mv "$up/ca.crt.new" "$up/ca.crt"
    chmod 0644 "$up/ca.crt"
}

# names_of SERVICE: under which it is reached. Clients reach a coordinator through HAProxy too.
names_of() {
    local names=("$1" localhost)
    case $1 in
    coordinator-*) mapfile -t -O "${#names[@]}" names < <(echo haproxy && haproxies && public_names) ;;
    pgbouncer-*) mapfile -t -O "${#names[@]}" names < <(echo pgbouncer && public_names) ;;
    esac
    printf '%s\n' "${names[@]}"
}

public_names() {
    local name
    for name in ${PUBLIC_NAMES//,/ }; do echo "$name"; done
}

check_public_names() {
    local name
    while IFS= read -r name; do
        [[ -z $name || $name =~ ^(\*\.)?[A-Za-z0-9][A-Za-z0-9._-]*$ || $name =~ ^[0-9A-Fa-f:.]+$ ]] ||
            die "PUBLIC_NAMES has $name, which is neither a name nor an address" "mend it in the profile or the environment, start again"
    done < <(public_names)
}

# extensions_of SERVICE: the certificate's. etcd and the servers are clients of each other as well; the
# agents are nothing else, and PgBouncer is none of etcd.
extensions_of() {
    local name alternatives=IP:127.0.0.1 usage
    case $1 in
    etcd-* | coordinator-* | worker-*) usage=serverAuth,clientAuth ;;
    pgbouncer-*) usage=serverAuth ;;
    *) usage=clientAuth ;;
    esac
    while IFS= read -r name; do
        if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then alternatives+=",IP:$name"; else alternatives+=",DNS:$name"; fi
    done < <(names_of "$1")
    printf '%s\n' "subjectAltName=$alternatives" "extendedKeyUsage=$usage" \
        'basicConstraints=critical,CA:FALSE' 'keyUsage=critical,digitalSignature'
}

# is_good SERVICE: its certificate is of this authority and of its key, has the names of the profile, and does not end soon.
is_good() {
    local certificate="$secrets/tls_$1_certificate"
    [[ -e $certificate && -e $secrets/tls_$1_key && -e $up/certificates/$1 ]] &&
        cmp --silent "$up/certificates/$1" <(extensions_of "$1") &&
        openssl verify -CAfile "$up/ca.crt" "$certificate" >/dev/null 2>&1 &&
        [[ $(openssl x509 -in "$certificate" -noout -pubkey) == "$(openssl pkey -in "$secrets/tls_$1_key" -pubout)" ]] &&
        openssl x509 -in "$certificate" -noout -checkend $((renew_days * 86400)) >/dev/null
}

ensure_certificate() {
    local file="$secrets/tls_$1" request
    ! is_good "$1" || return 0
    [[ -e $up/ca.key ]] || die "a new certificate is needed for $1, and $up/ca.key is not there" "bring it back, then start again"
    # In one chain: within what stands before || a failure does not end the shell.
    (
        umask 077 && new_key "${file}_key.new" &&
            request=$(openssl req -new -key "${file}_key.new" -subj "/CN=$1") &&
            openssl x509 -req -in <(printf '%s\n' "$request") -CA "$up/ca.crt" -CAkey "$up/ca.key" -days "$days" \
                -set_serial "0x$(random_hex 16)" -extfile <(extensions_of "$1") -out "${file}_certificate.new" &&
            mv -f "${file}_key.new" "${file}_key" && mv -f "${file}_certificate.new" "${file}_certificate" &&
            extensions_of "$1" >"$up/certificates/$1"
    ) >>"$cache/log/certificates.log" 2>&1 || {
        rm -f "${file}_key.new" "${file}_certificate.new"
        die "openssl could not make the certificate of $1 for $(names_of "$1" | xargs)" "see $cache/log/certificates.log; the names are in PUBLIC_NAMES"
    }
    made+=("$1")
}

main() {
    local service made=()
    case ${1:-} in -h | --help) usage && return 0 ;; esac
    ensure_program openssl openssl
    if [[ $# -gt 0 ]]; then load_profile "$1"; else load_remembered_profile; fi
    lock_stack
    mkdir -p "$secrets" "$up/certificates"
    chmod 0700 "$up"
    : >"$cache/log/certificates.log"
    check_public_names
    ensure_authority
    for service in $(certified); do ensure_certificate "$service"; done
    [[ ${#made[@]} -eq 0 ]] || say "  new certificates: ${made[*]}"
}

main "$@"
