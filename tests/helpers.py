"""What the tests share: small data, and ways to run the recipe as a user does."""

import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coco_utils import Split

ROOT = Path(__file__).resolve().parent.parent
# With this in PYTHONPATH a training fails as FAULT in its environment says.
FAULT_INJECTION = str(Path(__file__).resolve().parent / "fault_injection")
SCRIPTS = ROOT / "start_scripts"
ONE = SCRIPTS / "train_fasterrcnn_resnet50_torch.sh"
ALL = SCRIPTS / "train_fasterrcnn_resnet50_dist_torch.sh"

# One thread, so that sums have one order whatever the machine; also in processes to come.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def write_part(
    root: Path, part: str, sizes: list[tuple[int, int]], boxes: list[list[list]]
) -> Path:
    """COCO 2017's layout: noise images of `sizes` with `boxes` (category_id, x, y, w, h)."""
    folder = root / f"{part}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(len(part))
    images, annotations = [], []
    for n, ((width, height), rows) in enumerate(zip(sizes, boxes, strict=True)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        images.append({"id": 100 + n, "file_name": f"{n}.png", "width": width, "height": height})
        annotations += [
            {
                "id": 1000 * n + k,
                "image_id": 100 + n,
                "category_id": category_id,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for k, (category_id, *box) in enumerate(rows)
        ]
    categories = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}]
    file = root / "annotations" / f"instances_{part}2017.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return file


def make_tiny(root: Path) -> Path:
    """Eight training and three validation images of two shapes with one or two boxes each."""
    sizes = [(64, 48), (48, 64)] * 4
    boxes = [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30], [2, 0, 0, 12, 16]]] * 4
    write_part(root, "train", sizes, boxes)
    write_part(root, "val", sizes[:3], boxes[:3])
    return root


# A small model, small images and few threads: a training of seconds.
SMALL = (
    *("--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--weights-backbone", "none"),
    *("--min-size", "64", "--print-freq", "1", "-j", "0", "--epochs", "1", "--no-report"),
)


def run(*command, timeout: float = 300, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run a command as a user does, without a GPU and with one thread for each process."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    env.pop("RANK", None)
    if "FAULT" in environment:
        env["PYTHONPATH"] = FAULT_INJECTION
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        cwd=cwd,
    )


def train_in_process(*flags) -> str:
    """Train, but small, in this process, where errors are raised; return what was printed."""
    return main_in_process(*SMALL, *flags)


def main_in_process(*flags) -> str:
    """The same with these flags alone."""
    import train

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(list(map(str, flags)))
    return printed.getvalue()


def train(*flags, **kwargs) -> subprocess.CompletedProcess:
    """Train as a user does, but small."""
    return run_train(*SMALL, *flags, **kwargs)


def run_train(*flags, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """Run train.py with these flags alone."""
    argv = [str(ROOT / "train.py"), *map(str, flags)]
    if os.name != "posix":
        return run(sys.executable, *argv, timeout=timeout, **environment)
    return run_forked(_run_train, argv, timeout=timeout, **environment)


def _run_train(argv: list[str]) -> None:
    sys.argv = argv
    import train

    train.run_and_exit()


def run_forked(
    function: Callable, *args, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """Call `function(*args)` in a process of its own.

    It is forked from one that has imported train.py, as the imports take three seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "reporting.figures"])
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_call, args=(function, args, environment, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(str(function), timeout)
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(args, process.exitcode, out, err)


def train_two(*flags, **kwargs) -> list[subprocess.CompletedProcess]:
    """Train, but small, in two processes, which meet as those of torchrun do; one result each."""
    return run_train_two(*SMALL, *flags, **kwargs)


def run_train_two(*flags, timeout: float = 120, **environment) -> list[subprocess.CompletedProcess]:
    """The same with these flags alone."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def run_rank(rank: int) -> subprocess.CompletedProcess:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        return run_train(*flags, timeout=timeout, **environment, **ranks)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_rank, range(2)))


def _call(function: Callable, args: tuple, environment: dict, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.pop("RANK", None)
    os.environ.update(CUDA_VISIBLE_DEVICES="", **environment)
    if "FAULT" in environment:
        # Not by name: the system may have a sitecustomize of its own.
        file = f"{FAULT_INJECTION}/sitecustomize.py"
        spec = importlib.util.spec_from_file_location("fault_injection", file)
        faults = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(faults)
        faults.install(environment["FAULT"])
    function(*args)


def metrics(output_dir: Path, kind: str) -> list[dict]:
    """The lines of this kind that `metrics.jsonl` has."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(output_dir: Path) -> list[float]:
    """The loss of every step that `metrics.jsonl` has."""
    return [line["loss"] for line in metrics(output_dir, "train")]


def start(*command, **environment) -> subprocess.Popen:
    """The same without waiting for its end; to be read while it runs."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: str(value) for key, value in env.items()},
    )


def wait_for(process: subprocess.Popen, text: str) -> list[str]:
    """Read what a process says until a line with this text; returns the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in\n{''.join(lines)}")


def processes_of(mark: object) -> list[int]:
    """The processes whose command line has `mark` in it (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if str(mark).encode() in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def split_of(root, part="train") -> Split:
    return Split(root / f"annotations/instances_{part}2017.json", root / f"{part}2017")


def rewrite(split: Split, change) -> None:
    data = json.loads(split.annotations.read_text())
    change(data)
    split.annotations.write_text(json.dumps(data))


def weights_hash(file: Path) -> str:
    model = torch.load(file, weights_only=True)["model"]
    digest = hashlib.sha256()
    for name, value in model.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def launch(script: Path, *flags, **kwargs) -> subprocess.CompletedProcess:
    """Run a launcher in the environment that the tests run in."""
    return run("bash", script, *SMALL, *flags, VIRTUAL_ENV=sys.prefix, **kwargs)
