# Sourced by all scripts. Keeps the working directory.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Keep freed memory in the process: by default, glibc returns every large tensor to the system and
# requests it again, page by page, in each step (a tenth of a CPU step at 128 pixels). OMP_WAIT_POLICY
# keeps its default: "passive" made steps 13 % longer, and helps only beside a busy-waiting program.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-200000000}

fail() {
    printf '%s\n' "$@" >&2
    exit 2
}

# Sets PYTHON to that of the active virtual or conda environment, else of .venv in the project; fails
# if it does not exist.
find_python() {
    local environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
    PYTHON=$environment/bin/python
    [ -x "$PYTHON" ] || PYTHON=$environment/Scripts/python.exe # Windows
    [ -x "$PYTHON" ]
}

# has MODULES...: succeeds if PYTHON finds all of them; finding is faster than importing.
has() {
    "$PYTHON" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"
}

# Succeeds if PYTHON finds all packages of requirements.txt.
has_all() {
    has torch torchvision numpy PIL tqdm msgspec hotcoco pycocotools jinja2 matplotlib yaml
}

# Installs the packages if any is missing.
ensure_installed() {
    if ! find_python || ! has_all; then
        bash "$ROOT/start_scripts/init_torch.sh"
        find_python
    fi
}

# run_one FLAGS...: trains in one process on one device.
run_one() {
    ensure_installed
    exec "$PYTHON" "$ROOT/train.py" "$@"
}

# run_all FLAGS...: trains with one process per device of this machine.
run_all() {
    ensure_installed
    exec "$PYTHON" "$ROOT/start_scripts/launch.py" "$@"
}
