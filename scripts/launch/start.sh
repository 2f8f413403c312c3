#!/bin/sh
# Start COMMAND so that it outlives this shell: its output goes to FOLDER/train.log, its process id to FOLDER/pid.
#
#   sh start.sh FOLDER COMMAND...
set -eu
folder=$1
shift
mkdir -p "$folder"
if [ -e "$folder/pid" ] && kill -0 "$(cat "$folder/pid")" 2>/dev/null; then
    echo "start.sh: runs already, as process $(cat "$folder/pid")" >&2
    exit 1
fi
nohup "$@" >>"$folder/train.log" 2>&1 </dev/null &
echo $! >"$folder/pid"
