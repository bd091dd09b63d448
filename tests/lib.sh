# shellcheck shell=bash
# shellcheck disable=SC2154  # those of init-scripts/lib.sh
# What tests/stack.sh and tests/machines.sh try things with. Sourced after init-scripts/lib.sh, never run.

passed=0 failed=0 skipped=0

# try WHAT COMMAND…: what the command prints is in the log.
tests_log="$cache/log/tests-$(basename "$0" .sh).log"
readonly tests_log
try() {
    local what=$1 output result=0
    shift
    output=$("$@" 2>&1) || result=$?
    printf '\n--- %s: exit %s\n%s\n' "$what" "$result" "$output" >>"$tests_log"
    if [[ $result == 0 ]]; then
        passed=$((passed + 1))
        say "ok      $what"
    else
        failed=$((failed + 1))
        say "FAILED  $what"
        tail -n 15 <<<"$output" | sed 's/^/            /'
    fi
}

skip() {
    skipped=$((skipped + 1))
    say "skipped $1: $2"
}

# refused PATTERN COMMAND…: it fails, and says so.
refused() {
    local pattern=$1 output
    shift
    if output=$("$@" 2>&1); then
        echo "not refused: $output"
        return 1
    fi
    grep -qE "$pattern" <<<"$output" || {
        echo "refused otherwise: $output"
        return 1
    }
}

# equals EXPECTED COMMAND…
equals() {
    local expected=$1 output
    shift
    output=$("$@")
    [[ $output == "$expected" ]] || {
        echo "expected $expected, got $output"
        return 1
    }
}

# summary: the last line; fails where something failed.
summary() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [[ $failed -eq 0 ]]
}
