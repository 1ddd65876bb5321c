#!/usr/bin/env bash
# Plays one run in N processes on this machine:
#
#     launch/local.sh [--dry-run] N --config FILE [--section.key value ...]
#
# It runs `python -m sppo_jax.main ARGS` N times, with a coordinator on a free port. The same command again resumes.
# COMMAND=evaluate runs sppo_jax.evaluate instead.
#
#     DEVICES=4 launch/local.sh 2 --config configs/quickstart.yaml    # on the CPU, 4 devices a process
#     launch/local.sh 8 --config configs/mistral_7b.yaml              # on 8 GPUs, one a process
#
# DEVICES   that many CPU devices in each process; not set: process P takes GPU P
# COMMAND   main (if not set) or evaluate
# PYTHON    the interpreter; not set: the one of .venv beside launch/, or else python3
#
# Each process writes OUT.logs/process-P.log, to which a later start appends; process 0 writes to the terminal as well.
# Where OUT is a URL, the folder of the logs lies in the working directory. Ctrl-C, SIGTERM and SIGHUP (as SIGTERM) reach
# every process.
#
# The exit code is the worst of theirs: 2 (bad input: do not start again), 1 (a fault), any other, 144 (a process was
# lost), 130 or 143 (stopped by a signal), 0. After 130, 143 and 144 the same command resumes.

set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1

# shellcheck source=launch/common.sh
. "$here/launch/common.sh"

first_word "$@"
[ -z "$dry" ] || shift
count=${1:-}
whole "$count" || refuse "the first argument is the number of processes, from 1 to 9999, found '$count'"
shift
COMMAND=${COMMAND:-main}
case $COMMAND in main | evaluate) ;; *) refuse "COMMAND=$COMMAND must be main or evaluate" ;; esac
[ -z "${DEVICES:-}" ] || whole "$DEVICES" || refuse "DEVICES=$DEVICES must be a whole number from 1 to 9999"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$here/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
for word in "$@"; do
    case $word in --help | -h | --version) exec "$PYTHON" -m "sppo_jax.$COMMAND" "$word" ;; esac
done

# Reads the command line as the command does, so that one process instead of N refuses a bad one.
prepare='
import socket
from sppo_jax import main
from sppo_jax.command import call
from sppo_jax.evaluation import flags
def out_of(command, *given):
    if command == "evaluate":
        return flags.read(given).out
    return main.read(given)[0].out
def prepare(given):
    out = out_of(*given)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        print(free.getsockname()[1], out)
call(prepare)
'
prepared=$("$PYTHON" -c "$prepare" "$COMMAND" "$@") || exit
port=${prepared%% *}
out=${prepared#* }
while [ "$out" != / ] && [ "$out" != "${out%/}" ]; do out=${out%/}; done
case $out in *://*) out=${out##*/} ;; esac
logs=$out.logs

start() { # process $1: this shell becomes it
    if [ -n "${DEVICES:-}" ]; then
        export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
    else
        export JAX_LOCAL_DEVICE_IDS=$1
    fi
    export PYTHONUNBUFFERED=1
    set -- "$PYTHON" -m "sppo_jax.$COMMAND" "${@:2}" --distributed.coordinator "127.0.0.1:$port" \
        --distributed.process_id "$1" --distributed.num_processes "$count"
    if [ -z "$dry" ]; then exec "$@" </dev/null; fi
    if [ -n "${DEVICES:-}" ]; then
        printf 'JAX_PLATFORMS=cpu XLA_FLAGS=%q' "$XLA_FLAGS"
    else
        printf 'JAX_LOCAL_DEVICE_IDS=%s' "$JAX_LOCAL_DEVICE_IDS"
    fi
    printf ' %q' "$@"
    printf ' # log: %q\n' "$logs/process-${*: -3:1}.log"
}

if [ -n "$dry" ]; then
    for ((p = 0; p < count; p++)); do (start "$p" "$@"); done
    exit
fi

mkdir -p "$logs" || exit 2
pipes=$(mktemp -d "${TMPDIR:-/tmp}/sppo-local.XXXXXX") && mkfifo "$pipes/0" || exit 2
trap 'rm -rf "$pipes"' EXIT
pids=
asked= # the last signal that has arrived, and how many have
signals=0
pass_on() {
    asked=$1
    signals=$((signals + 1))
    # shellcheck disable=SC2086 # a list of numbers
    [ -z "$pids" ] || kill -s "$1" $pids 2>/dev/null
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

# Not a pipeline: the shell would wait for the copy, and have its exit code. Signals are for process 0 alone.
(trap '' INT TERM HUP PIPE && exec tee -a "$logs/process-0.log") <"$pipes/0" &
copy=$!
exec 3>"$pipes/0"

# With job control each process is a group of its own: Ctrl-C comes to it from here alone, and is not ignored, as it is in
# a script's background processes.
set -m
for ((p = 0; p < count; p++)); do
    [ -z "$asked" ] || break
    if [ "$p" = 0 ]; then
        start "$p" "$@" >&3 2>&3 3>&- &
    else
        start "$p" "$@" >>"$logs/process-$p.log" 2>&1 3>&- &
    fi
    pids="$pids $!"
    # A signal between the last two lines has missed the process.
    [ -z "$asked" ] || pass_on "$asked"
done
set +m
exec 3>&-

rank() { # of exit code $1: the higher, the worse
    case $1 in 0) echo 0 ;; 130 | 143) echo 1 ;; 144) echo 2 ;; 2) echo 5 ;; 1) echo 4 ;; *) echo 3 ;; esac
}

worst=0
for pid in $pids; do
    while true; do
        before=$signals
        wait "$pid"
        code=$?
        [ "$before" != "$signals" ] || break # a signal ends `wait` before the process has ended
    done
    if [ "$(rank "$code")" -gt "$(rank "$worst")" ]; then worst=$code; fi
done

# The copy ends with process 0, unless a process that it has left behind holds its output open.
for ((i = 0; i < 50; i++)); do
    kill -0 "$copy" 2>/dev/null || break
    sleep 0.1
done
exit "$worst"
