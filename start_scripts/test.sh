#!/usr/bin/env bash
# Install what the tests need and run them; arguments go to pytest: bash start_scripts/test.sh -k plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_installed
has pytest ruff xdist onnx onnxruntime safetensors tensorboard ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements-dev.txt"
# pytest looks for tests where it is called, which may be anywhere.
cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
