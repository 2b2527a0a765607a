#!/usr/bin/env bash
# Install what the tests need and run them, or with --fast those that take no more than a moment each;
# other arguments go to pytest: bash start_scripts/test.sh --fast -k plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

selection=()
if [ "${1:-}" = --fast ]; then
    selection=(-m "not slow")
    shift
fi
ensure_installed
has pytest ruff xdist onnx onnxruntime safetensors tensorboard ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements-dev.txt"
# pytest looks for tests where it is called, which may be anywhere.
cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal ${selection[@]+"${selection[@]}"} "$@"
