#!/usr/bin/env bash
# Install the test requirements and run the tests; --fast skips the slow ones. Other arguments are
# passed to pytest: bash start_scripts/test.sh --fast -k plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

selection=()
if [ "${1:-}" = --fast ]; then
    selection=(-m "not slow")
    shift
fi
ensure_installed
has pytest ruff xdist onnx onnxruntime safetensors tensorboard mlflow sqlalchemy alembic wandb rasterio av ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements-dev.txt"
# pytest collects tests below the working directory.
cd "$ROOT"
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal ${selection[@]+"${selection[@]}"} "$@"
