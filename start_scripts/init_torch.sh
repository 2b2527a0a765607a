#!/usr/bin/env bash
# Install the requirements into the active virtual or conda environment, else into .venv in the
# project. An existing PyTorch with torchvision, as in a vendor's container, is kept.
#
#   bash start_scripts/init_torch.sh [PIP OPTIONS]      e.g. --index-url URL
#
# PYTHON_FOR_VENV=/path/to/python3 sets the Python that creates .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ! find_python; then
    base=${PYTHON_FOR_VENV:-$(command -v python3 || command -v python || true)}
    [ -n "$base" ] || fail "no python3 found: install Python 3.10 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$base is older than Python 3.10: set PYTHON_FOR_VENV to a newer one"
    options=()
    if "$base" -c 'import torch, torchvision' > /dev/null 2>&1; then
        echo "using the PyTorch of $base"
        options+=(--system-site-packages)
    fi
    "$base" -m venv ${options[@]+"${options[@]}"} "$ROOT/.venv" || {
        rm -rf "$ROOT/.venv"
        fail "$base cannot create a virtual environment: on Debian or Ubuntu, apt install python3-venv"
    }
    find_python
fi

# pip keeps packages that are new enough, without network access.
has_all || echo "installing into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
"$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" -r "$ROOT/requirements.txt"

# torchvision may import although its compiled operators do not match this PyTorch: call one.
"$PYTHON" -c '
import torch, torchvision
from torchvision.ops import nms
nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
device = "CUDA" if torch.cuda.is_available() else "CPU only"
print(f"ready: torch {torch.__version__}, torchvision {torchvision.__version__}, {device}")' || fail \
    "torchvision's operators do not run with this PyTorch (see the error above)." \
    "The usual reason is that their versions do not match: remove both and install them together:" \
    "  $PYTHON -m pip uninstall -y torch torchvision" \
    "  bash $ROOT/start_scripts/init_torch.sh"
