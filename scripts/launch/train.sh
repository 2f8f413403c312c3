#!/bin/sh
# Run COMMAND, an `llmjax train ... --json`, again until the last line that it prints says that the run is done.
#
#   sh train.sh RUN_DIR COMMAND...
#
# A command that a signal stopped is run again; so is one that failed, whatever its exit code (of hosts that do not meet
# each has its own), up to three times without a new checkpoint. A TERM or INT to this script is passed on, and ends it
# when the step is saved. LAUNCH_PAUSE are seconds between two runs.
# Exit code: 0 done, 75 stopped by a signal to this script and not done, else that of the last failure.
set -u
tries=3
run_dir=$1
shift

folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/output" || exit 1

child=
stopped=
stop() {
    stopped=yes
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

newest() {
    ls "$run_dir/checkpoints" 2>/dev/null | grep -x '[0-9][0-9]*' | sort -n | tail -n 1
}

failures=0
while :; do
    before=$(newest)
    # What reaches a whole group of processes must not end the reader before the writer.
    (
        trap '' TERM INT
        exec tee "$folder/log"
    ) <"$folder/output" &
    reader=$!
    "$@" >"$folder/output" &
    child=$!
    [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null
    # A signal ends `wait`, not the command.
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    wait "$reader"

    why=none
    case $(tail -n 1 "$folder/log") in
        *'"stopped": "done"'* | *'"stopped": "early_stopping"'*) why=done ;;
        *'"stopped": "signal"'*) why=signal ;;
    esac
    [ "$why" != done ] || [ "$code" -ne 0 ] || exit 0
    [ -z "$stopped" ] || exit 75
    if [ "$code" -eq 0 ] && [ "$why" = signal ]; then
        failures=0
    elif [ "$code" -eq 0 ]; then
        echo "train.sh: the command ended without saying why it stopped" >&2
        exit 1
    else
        [ "$(newest)" = "$before" ] || failures=0
        failures=$((failures + 1))
        [ "$failures" -lt "$tries" ] || exit "$code"
    fi
    echo "train.sh: exit code $code, again in ${LAUNCH_PAUSE:-10} s" >&2
    sleep "${LAUNCH_PAUSE:-10}" &
    wait $!
    [ -z "$stopped" ] || exit 75
done
