# What the scripts share; each sources this file. Nothing here changes the working folder.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Keep freed memory for the next tensor: on a CPU, glibc would return every large one to the system
# and request it again, page by page, in each step (a tenth of a step at 128 pixels). OMP_WAIT_POLICY
# is left alone: "passive" made steps 13 % longer, and helps only beside another program that spins.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-200000000}

fail() {
    printf '%s\n' "$@" >&2
    exit 2
}

# Sets PYTHON: that of the active virtual or conda environment, else of .venv in the project.
find_python() {
    local environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
    PYTHON=$environment/bin/python
    [ -x "$PYTHON" ] || PYTHON=$environment/Scripts/python.exe # Windows
    [ -x "$PYTHON" ]
}

# has MODULES...: whether PYTHON has them; looking where they are is quicker than importing them.
has() {
    "$PYTHON" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"
}

# has_all: whether PYTHON has what requirements.txt lists.
has_all() {
    has torch torchvision numpy PIL tqdm msgspec hotcoco pycocotools jinja2 matplotlib yaml
}

# Installs on first use.
ensure_installed() {
    if ! find_python || ! has_all; then
        bash "$ROOT/start_scripts/init_torch.sh"
        find_python
    fi
}

# One process on one device: run_one FLAGS...
run_one() {
    ensure_installed
    exec "$PYTHON" "$ROOT/train.py" "$@"
}

# One process for each device of this machine: run_all FLAGS...
run_all() {
    ensure_installed
    exec "$PYTHON" "$ROOT/start_scripts/launch.py" "$@"
}
