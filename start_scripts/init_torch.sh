#!/usr/bin/env bash
# Install what the recipe needs: into the active virtual or conda environment if there is one, else
# into .venv in the project. A PyTorch with torchvision that the Python found already has, as in a
# vendor's container, is used and not replaced.
#
#   bash start_scripts/init_torch.sh [pip's own options]      e.g. --index-url URL
#
# PYTHON_FOR_VENV=/path/to/python3 chooses the Python that .venv is made with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The check at the end is the one that counts: torchvision's compiled operators really run.
check='
import sys, torch, torchvision
from torchvision.ops import nms
least = sys.argv[1:]
for module, floor in zip((torch, torchvision), least):
    numbers = lambda text: [int(n) for n in text.split("+")[0].split("a")[0].split(".")[:2]]
    if numbers(module.__version__) < numbers(floor):
        sys.exit(f"{module.__name__} {module.__version__} is older than {floor}")
nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
device = "CUDA" if torch.cuda.is_available() else "CPU only"
print(f"ready: torch {torch.__version__}, torchvision {torchvision.__version__}, {device}")
'
floor() { sed -n "s/^$1>=\([0-9.]*\).*/\1/p" "$ROOT/requirements.txt"; }
torch_works() { "$1" -c "$check" "$(floor torch)" "$(floor torchvision)"; }

if ! find_python; then
    base=${PYTHON_FOR_VENV:-$(command -v python3 || command -v python || true)}
    [ -n "$base" ] || fail "no python3 found: install Python 3.10 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$base is older than Python 3.10: set PYTHON_FOR_VENV to a newer one"
    options=()
    if torch_works "$base" > /dev/null 2>&1; then
        echo "using the PyTorch of $base"
        options+=(--system-site-packages)
    fi
    "$base" -m venv ${options[@]+"${options[@]}"} "$ROOT/.venv" || {
        rm -rf "$ROOT/.venv"
        fail "$base cannot make a virtual environment: on Debian or Ubuntu, apt install python3-venv"
    }
    find_python
fi

# Unchanged requirements in an environment that has them need nothing from pip.
stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.faster-rcnn-recipe
if [ $# -gt 0 ] || ! cmp -s "$ROOT/requirements.txt" "$stamp" || ! torch_works "$PYTHON" 2> /dev/null; then
    there='^#|^$'
    if torch_works "$PYTHON" > /dev/null 2>&1; then there+='|^torch(vision)?[<>=]'; fi
    pip_install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }
    echo "installing into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
    needed=$(mktemp)
    trap 'rm -f "$needed"' EXIT
    sed '/^# Optional/,$d' "$ROOT/requirements.txt" | grep -Ev "$there" > "$needed"
    pip_install "$@" -r "$needed"
    for extra in $(sed '1,/^# Optional/d' "$ROOT/requirements.txt" | grep -Ev "$there"); do
        pip_install --only-binary=:all: "$@" "$extra" ||
            echo "going on without ${extra%%>=*}: README.md says what that costs"
    done
    torch_works "$PYTHON" || fail \
        "torchvision's operators do not run with this PyTorch (the lines above say why)." \
        "Most often the two were built for different versions: remove both and install them together:" \
        "  $PYTHON -m pip uninstall -y torch torchvision" \
        "  bash $ROOT/start_scripts/init_torch.sh"
    # Where the environment is not ours to write to, the next time merely takes longer.
    cp "$ROOT/requirements.txt" "$stamp" 2> /dev/null || true
fi
