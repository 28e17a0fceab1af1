# shellcheck shell=bash disable=SC2034
# What script/bootstrap, script/test and script/demo share: how they speak, and where the environment is. Sourced, not run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export UV_PYTHON_DOWNLOADS=never # the Python is the machine's own
step_started=$SECONDS

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
else
    bold='' dim='' red='' green='' plain=''
fi

# step TEXT: begins a step; what follows it belongs to it.
step() {
    step_started=$SECONDS
    printf '%s==> %s%s\n' "$bold" "$*" "$plain"
}

# note TEXT: one line about the present step.
note() { printf '    %s\n' "$*"; }

# finished [TEXT]: ends a step.
finished() { printf '    %s%s%s %s(%d s)%s\n' "$green" "${*:-done}" "$plain" "$dim" $((SECONDS - step_started)) "$plain"; }

# fail WHAT REMEDY: says what is wrong and what to do, and ends the script.
fail() {
    printf '%serror:%s %s\n' "$red" "$plain" "$1" >&2
    [ -z "${2:-}" ] || printf '       %s\n' "$2" >&2
    exit 1
}

# find_root: sets `as_root` to what stands before a command that needs root ("" or sudo).
find_root() {
    as_root=()
    [ "$EUID" -eq 0 ] && return
    command -v sudo >/dev/null || fail "this needs root, and sudo is not installed" "run it as root, or install sudo"
    as_root=(sudo)
}

# run_logged LOG COMMAND...: runs it with its output in LOG, a dot every few seconds; on failure shows the end of LOG.
run_logged() {
    local log=$1 pid status=0 waited=0
    shift
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        waited=$((waited + 1))
        [ $((waited % 25)) -ne 0 ] || printf '%s.%s' "$dim" "$plain"
    done
    wait "$pid" || status=$?
    [ "$waited" -lt 25 ] || printf '\n'
    [ "$status" -eq 0 ] || { tail -n 25 "$log" | sed 's/^/    | /' >&2; }
    return "$status"
}
