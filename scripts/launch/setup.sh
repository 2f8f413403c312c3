#!/bin/sh
# Make .venv here with llmjax and one of its extras, and mount a file system on /shared where one is named.
#
#   sh setup.sh EXTRA [SERVER:/EXPORT]
set -eu
extra=$1
share=${2:-}

if [ -n "$share" ] && ! mountpoint -q /shared; then
    command -v mount.nfs >/dev/null || { sudo apt-get -q update && sudo apt-get -qy install nfs-common; }
    sudo mkdir -p /shared
    sudo mount -t nfs "$share" /shared
    [ -w /shared ] || sudo chmod a+rwx /shared
fi

# The machine's own Python where it is new enough and can make environments, else one that uv brings.
for python in python3.13 python3.12 python3.11 python3; do
    [ ! -x .venv/bin/pip ] || break
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && "$python" -m venv --clear .venv || :
done
if [ ! -x .venv/bin/pip ]; then
    python3 -m pip install --user uv
    rm -rf .venv
    python3 -m uv venv --seed --python 3.12 .venv
fi
.venv/bin/pip install ".[$extra]"
