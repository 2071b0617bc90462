#!/bin/sh
# Install a slim, CPU-only vLLM and this checkout's Block (as a plugin) into an environment of their own: about 2 GB, 2 minutes.
#   tools/vllm/install.sh [ENVIRONMENT]        default: .venv-vllm
# Does nothing when the environment is already complete.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
venv=${1:-$repo/.venv-vllm}
stamp=$venv/.installed-$(cat "$here/requirements.txt" "$here/name/pyproject.toml" | cksum | cut -d' ' -f1)

if [ ! -e "$stamp" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --no-deps -r "$here/requirements.txt"
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    cp "$here/name/pyproject.toml" "$build/"
    "$venv/bin/python" -m pip install -q --no-deps --no-build-isolation "$build"
    touch "$stamp"
fi
# The plugin, in place: what is edited here runs there. Its console program belongs to the other environment.
BLOCK_NO_COMPILE=1 "$venv/bin/python" -m pip install -q --no-deps --no-build-isolation -e "$repo"
