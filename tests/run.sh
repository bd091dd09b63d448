#!/usr/bin/env bash
# Runs every test of the workspace against real servers. See --help.
set -euo pipefail

# shellcheck source=init-scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../init-scripts/lib.sh"

readonly nextest_version=0.9.143
readonly moto_version=5.2.5
readonly garage_version=2.5.0
readonly typos_version=1.52.0
readonly deny_version=0.20.2
readonly tools="$cache/tools"
readonly state="$cache/tests"
readonly container="pgmesh-tests-$$"
readonly bucket=pgmesh-tests
export PATH="$tools/bin:$PATH"

usage() {
    cat <<'TEXT'
Usage: tests/run.sh [--all | --lint | --setup] [NEXTEST ARGUMENT…]

Runs every test of the workspace, with PostgreSQL 17 in a container made from this repository's own
Dockerfiles, and with moto and Garage as further S3 servers. On a fresh Debian 12 with cargo it first
installs what is missing: the Docker engine, the base image, the images, cargo-nextest, moto, Garage
(about 15 minutes on two cores, once; everything but Debian packages and images goes to .cache/).

  --all        first everything that --lint does, then the tests (this is what CI runs)
  --lint       format, spelling, clippy, documentation and its examples, licences, shell scripts
  --setup      only installs what the tests need
  -h, --help   this text

Anything else goes to cargo-nextest, for instance a part of a test's name:
  tests/run.sh damage
  tests/run.sh -E 'test(wal_push)' --no-capture

Citus is in no Debian package. With PGMESH_TEST_CITUS_IMAGE=IMAGE in the environment, a pgmesh-tests image that
has Citus installed, the tests run in that one and those against a real Citus are not skipped.

The last line is "N passed, N failed, N skipped"; before it, each skipped test with its reason.
Exit: 0 all passed, 1 otherwise, 2 wrong use.

With PostgreSQL 17 installed on this machine, `cargo nextest run` works as well; the tests against moto
and Garage are then skipped.
TEXT
}

# --- tools ----------------------------------------------------------------------------------------

# cargo_tool NAME VERSION PACKAGE ARGUMENT…: a program from crates.io, in .cache/tools. The version is
# part of a marker's name, so that a new version here is installed. With --debug, because optimising
# takes longer than a test run could ever win back.
cargo_tool() {
    local name=$1 version=$2 package=$3 marker="$tools/.$3-$2"
    shift 3
    [[ ! -e $marker ]] || return 0
    say "builds $package $version (once)"
    # From the workspace's directory, so that rust-toolchain.toml names the compiler.
    logged "$name" env -C "$root" CARGO_TARGET_DIR="$cache/build/$name" \
        cargo install --locked --force --root "$tools" --version "$version" "$package" "$@" ||
        die "cargo could not install $package $version" "see the lines above; crates.io must be reachable"
    rm -rf "$cache/build/$name"
    touch "$marker"
}

ensure_nextest() {
    ! cargo nextest --version 2>/dev/null | grep -q "cargo-nextest $nextest_version" || return 0
    cargo_tool nextest "$nextest_version" cargo-nextest --debug \
        --no-default-features --features default-no-update
}

ensure_garage() {
    cargo_tool garage "$garage_version" garage --debug --no-default-features --features bundled-libs,sqlite
}

# python_tool PACKAGE VERSION: a package from PyPI, in the environment .cache/tools/python.
python_tool() {
    local package=$1 version=$2 marker="$tools/.$1-$2"
    [[ ! -e $marker ]] || return 0
    say "installs $package $version (once)"
    [[ -x $tools/python/bin/pip ]] || logged python-venv python3 -m venv "$tools/python" ||
        die "python3 cannot make an environment" "apt-get install python3-venv, then start again"
    logged "$package" "$tools/python/bin/pip" install --quiet "$package==$version" ||
        die "pip could not install $package $version" "see the lines above; PyPI must be reachable"
    touch "$marker"
}

ensure_build_programs() {
    ensure_cargo
    if ! have python3 || ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        ensure_packages python3 python3-venv
    fi
}

# All of them before the images are made in the background: only one apt-get runs at a time.
ensure_host_packages() {
    ensure_build_programs
    ensure_program curl curl
    if ! docker_answers && ! have dockerd; then ensure_packages docker.io iptables; fi
    docker image inspect "$base_image" >/dev/null 2>&1 || ensure_program debootstrap debootstrap
}

# The images wait for the network and the disk while cargo keeps the cores busy.
setup() {
    local images
    mkdir -p "$tools" "$state"
    exec 9>"$cache/setup.lock"
    flock 9
    ensure_host_packages
    (ensure_tests_image) &
    images=$!
    python_tool 'moto[server]' "$moto_version"
    ensure_nextest
    ensure_garage
    wait "$images" || die "the images are not there" "see the message above"
    exec 9>&-
}

# --- lint -----------------------------------------------------------------------------------------

lint_step() {
    local name=$1
    shift
    logged "$name" "$@" || die "$name failed" "see the lines above (all of it: .cache/log/$name.log)"
}

lint_scripts() {
    # .ci/run and every *.sh that git knows, or would.
    git -C "$root" ls-files -z --cached --others --exclude-standard -- '*.sh' .ci/run |
        (cd "$root" && xargs -0 shellcheck -x)
}

lint() {
    say "checks format, spelling, lints, documentation, licences and shell scripts"
    mkdir -p "$tools"
    ensure_build_programs
    ensure_program shellcheck shellcheck
    python_tool typos "$typos_version"
    cargo_tool deny "$deny_version" cargo-deny --debug
    cd "$root"
    lint_step fmt cargo fmt --all --check
    lint_step shellcheck lint_scripts
    lint_step typos "$tools/python/bin/typos" --config .typos.toml .
    lint_step clippy cargo clippy --workspace --all-targets --locked -- -D warnings
    lint_step doc env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked
    lint_step doc-tests cargo test --workspace --doc --locked
    # Without the advisories: their database is not a package registry, and may not be reachable.
    lint_step deny cargo deny --offline check bans licenses sources
}

# --- build ----------------------------------------------------------------------------------------

# One build for tests and programs: asked for separately, cargo would build many dependencies twice.
build() {
    local quiet=()
    [[ -t 2 ]] || quiet=(--quiet)
    say "builds the workspace and its tests"
    cd "$root"
    cargo build --workspace --bins --tests --locked "${quiet[@]}" ||
        die "the workspace does not build" "see the lines above"
    cargo metadata --format-version 1 --locked >"$state/cargo.json"
    cargo nextest list --workspace --locked --list-type binaries-only --message-format json --cargo-quiet >"$state/binaries.json"
}

target_directory() {
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["target_directory"])' "$state/cargo.json"
}

# --- S3 servers -----------------------------------------------------------------------------------

servers=()

start_moto() {
    local port
    port=$(free_port)
    "$tools/python/bin/moto_server" --host 127.0.0.1 --port "$port" >"$cache/log/moto-server.log" 2>&1 </dev/null &
    servers+=("$!")
    wait_hint="see $cache/log/moto-server.log" wait_for 60 "moto does not answer" \
        curl --silent --fail --output /dev/null "http://127.0.0.1:$port/moto-api/data.json"
    curl --silent --fail --request PUT "http://127.0.0.1:$port/$bucket" --output /dev/null
    moto_url="http://moto:$(random_hex 16)@127.0.0.1:$port/$bucket"
}

start_garage() {
    local api rpc key secret
    api=$(free_port) rpc=$(free_port) key="GK$(random_hex 12)" secret=$(random_hex 32)
    garage_data=$(mktemp -d "$state/garage.XXXXXX")
    cat >"$garage_data/garage.toml" <<TOML
metadata_dir = "$garage_data/meta"
data_dir = "$garage_data/data"
db_engine = "sqlite"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$rpc"
rpc_public_addr = "127.0.0.1:$rpc"
rpc_secret = "$(random_hex 32)"

[s3_api]
s3_region = "us-east-1"
api_bind_addr = "127.0.0.1:$api"
TOML
    chmod 0600 "$garage_data/garage.toml"
    GARAGE_DEFAULT_ACCESS_KEY=$key GARAGE_DEFAULT_SECRET_KEY=$secret GARAGE_DEFAULT_BUCKET=$bucket \
        "$tools/bin/garage" --config "$garage_data/garage.toml" server --single-node --default-bucket \
        >"$cache/log/garage-server.log" 2>&1 </dev/null &
    servers+=("$!")
    # An unsigned request is refused, which is an answer.
    wait_hint="see $cache/log/garage-server.log" wait_for 60 "Garage does not answer" \
        curl --silent --output /dev/null "http://127.0.0.1:$api/$bucket"
    garage_url="http://$key:$secret@127.0.0.1:$api/$bucket"
}

stop_all() {
    local pid
    docker rm --force --volumes "$container" >/dev/null 2>&1 || true
    for pid in "${servers[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    [[ -z ${garage_data:-} ]] || rm -rf "$garage_data"
}

# --- the tests ------------------------------------------------------------------------------------

# The container's user must be able to read what it runs. A checkout made by mktemp is closed to others.
check_readable() {
    local path
    while IFS= read -r path; do
        say "opens $path for reading: the tests run as another user (PostgreSQL refuses root)"
        chmod o+rx "$path" || die "$path is closed to other users" "chmod o+rx $path"
    done < <(find "$root" "$target" -maxdepth 0 ! -perm -o=rx)
}

# Where the container's user may write: nextest keeps its report there, the tests note what they skip.
prepare_results() {
    results="$state/results"
    mkdir -p "$results" "$root/target/nextest"
    docker run --rm --user 0 --volume "$results:/results" "$tests_image" \
        bash -c 'rm -rf /results/* && chmod 1777 /results'
}

# The repository stands at its own path, because paths of the build are compiled into the tests.
# --network host: moto and Garage listen on this machine's loopback. --init: a test that kills a server
# leaves children behind that somebody must wait for. /small-disk is there to become full.
run_tests() {
    local terminal=()
    [[ ! -t 1 ]] || terminal=(--tty)
    docker run --name "$container" --init --network host --shm-size 1g --user "$postgres_uid" \
        "${terminal[@]}" \
        --volume "$root:$root:ro" --volume "$target:$target:ro" --volume "$results:$root/target/nextest" \
        --volume "$(command -v cargo-nextest):/usr/local/bin/cargo-nextest:ro" \
        --volume /tmp --tmpfs /small-disk:size=48m,mode=1777 --workdir "$root" \
        --env PGMESH_TEST_MOTO="$moto_url" --env PGMESH_TEST_GARAGE="$garage_url" \
        --env PGMESH_TEST_SMALL_DISK=/small-disk \
        --env PGMESH_TESTS_SKIP_FILE="$root/target/nextest/skipped" \
        --env CARGO_TERM_COLOR="$([[ -t 1 ]] && echo always || echo never)" \
        "${PGMESH_TEST_CITUS_IMAGE:-$tests_image}" cargo-nextest nextest run --profile ci \
        --cargo-metadata "$state/cargo.json" --binaries-metadata "$state/binaries.json" "$@"
}

# A test that skips itself passes as far as nextest knows; it stands in the file of the skipped too.
# The one closing line, and before it the names.
print_result() {
    local status=$1 report="$results/ci/junit.xml" skips="$results/skipped"
    [[ -s $report ]] || die "the tests did not run (cargo-nextest ended with $status)" "see the lines above"
    [[ -e $skips ]] || skips=/dev/null
    python3 - "$report" "$skips" "$status" <<'PYTHON'
import re, sys, xml.etree.ElementTree as xml

report, skips, status = sys.argv[1], sys.argv[2], int(sys.argv[3])
top = xml.parse(report).getroot()
total = int(top.get("tests"))
failed = int(top.get("failures")) + int(top.get("errors"))
# A line is "SKIPPED test: reason"; a test counts once, whatever it skips.
skipped = dict(re.findall(r"^SKIPPED (\S+): (.*)$", open(skips).read(), re.MULTILINE))
for test, reason in sorted(skipped.items()):
    print(f"skipped: {test}: {reason}")
print(f"{total - failed - len(skipped)} passed, {failed} failed, {len(skipped)} skipped")
sys.exit(1 if failed or status else 0)
PYTHON
}

run() {
    local status=0 began
    setup
    build
    target=$(target_directory)
    check_readable
    prepare_results
    trap stop_all EXIT
    start_moto
    start_garage
    say "runs the tests"
    began=$SECONDS
    run_tests "$@" || status=$?
    say "the tests took $((SECONDS - began)) s"
    print_result "$status"
}

main() {
    case ${1:-} in
    -h | --help) usage ;;
    --lint) shift && lint ;;
    --setup) shift && setup && say "everything that the tests need is there" ;;
    --all) shift && lint && run "$@" ;;
    *) run "$@" ;;
    esac
}

main "$@"
