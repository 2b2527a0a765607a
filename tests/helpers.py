"""Helpers of the tests: small data sets, and ways to run the recipe as a user does."""

import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import nms

from coco_utils import Split

ROOT = Path(__file__).resolve().parent.parent
# With this folder in PYTHONPATH, a training fails as its environment variable FAULT specifies.
FAULT_INJECTION = str(Path(__file__).resolve().parent / "fault_injection")
SCRIPTS = ROOT / "start_scripts"
SINGLE_LAUNCHER = SCRIPTS / "train_fasterrcnn_resnet50_torch.sh"
DISTRIBUTED_LAUNCHER = SCRIPTS / "train_fasterrcnn_resnet50_dist_torch.sh"

# One thread, here and in child processes, so that sums have the same order on every machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def write_split(
    root: Path, name: str, sizes: list[tuple[int, int]], boxes: list[list[list]]
) -> Path:
    """Write a split of noise images in the layout of COCO 2017; return its annotation file.

    Args:
        root: Folder of the data set.
        name: Name of the split, "train" or "val".
        sizes: Width and height of each image in pixels.
        boxes: For each image its boxes, as (category_id, x, y, width, height) in pixels.
    """
    folder = root / f"{name}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name))
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
    file = root / "annotations" / f"instances_{name}2017.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return file


def make_tiny(root: Path) -> Path:
    """Write eight training and three validation images of two sizes with one or two boxes each."""
    sizes = [(64, 48), (48, 64)] * 4
    boxes = [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30], [2, 0, 0, 12, 16]]] * 4
    write_split(root, "train", sizes, boxes)
    write_split(root, "val", sizes[:3], boxes[:3])
    return root


# A small model and small images, so that a training takes seconds.
SMALL_FLAGS = (
    *("--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--weights-backbone", "none"),
    *("--min-size", "64", "--print-freq", "1", "-j", "0", "--epochs", "1", "--no-report"),
)


def run(*command, timeout: float = 300, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run a command as a user does, without a GPU and with one thread per process."""
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
    """Train with `SMALL_FLAGS` in this process; return the printed output. Errors are raised."""
    return main_in_process(*SMALL_FLAGS, *flags)


def main_in_process(*flags) -> str:
    """Run train.py in this process with these flags only; return the printed output."""
    import train

    with contextlib.redirect_stdout(io.StringIO()) as output:
        train.main(list(map(str, flags)))
    return output.getvalue()


def train(*flags, **kwargs) -> subprocess.CompletedProcess:
    """Run train.py with `SMALL_FLAGS` in a separate process."""
    return run_train(*SMALL_FLAGS, *flags, **kwargs)


def run_train(*flags, **kwargs) -> subprocess.CompletedProcess:
    """Run train.py with these flags only in a separate process."""
    return run_script(ROOT / "train.py", *flags, **kwargs)


def run_script(
    script: Path, *argv, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """Run a script of this repository in a separate process."""
    argv = [str(script), *map(str, argv)]
    if os.name != "posix":
        return run(sys.executable, *argv, timeout=timeout, **environment)
    return run_forked(_run_script, argv, timeout=timeout, **environment)


def _run_script(argv: list[str]) -> None:
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).parent), str(ROOT)]
    runpy.run_path(argv[0], run_name="__main__")


def run_forked(
    function: Callable, *args, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """Call `function(*args)` in a separate process.

    It is forked from a process that has imported train.py, as the imports take three seconds.
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


def train_two_processes(*flags, **kwargs) -> list[subprocess.CompletedProcess]:
    """Train with `SMALL_FLAGS` in two processes; return the result of each."""
    return run_two_processes(*SMALL_FLAGS, *flags, **kwargs)


def run_two_processes(
    *flags, timeout: float = 120, **environment
) -> list[subprocess.CompletedProcess]:
    """Run train.py in two processes that connect like those of torchrun; return both results."""
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
        # Loaded by path, as the system may have another sitecustomize.
        file = f"{FAULT_INJECTION}/sitecustomize.py"
        spec = importlib.util.spec_from_file_location("fault_injection", file)
        faults = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(faults)
        faults.install(environment["FAULT"])
    function(*args)


def read_metrics(output_dir: Path, kind: str) -> list[dict]:
    """Return the lines of this kind in `metrics.jsonl`."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def read_losses(output_dir: Path) -> list[float]:
    """Return the loss of every logged step in `metrics.jsonl`."""
    return [line["loss"] for line in read_metrics(output_dir, "train")]


def start(*command, **environment) -> subprocess.Popen:
    """Start a command without waiting for its end; its output can be read while it runs."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: str(value) for key, value in env.items()},
    )


def wait_for(process: subprocess.Popen, text: str) -> list[str]:
    """Read the output of a process up to a line with this text; return the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in\n{''.join(lines)}")


def find_processes(mark: object) -> list[int]:
    """Return the ids of the processes with `mark` in their command line (Linux only)."""
    process_ids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # the process has just ended
            continue
        if str(mark).encode() in command and int(folder.name) != os.getpid():
            process_ids.append(int(folder.name))
    return process_ids


def split_of(root, name="train") -> Split:
    return Split(root / f"annotations/instances_{name}2017.json", root / f"{name}2017")


def read_labels(root: Path, split: str) -> dict:
    """Return the size and the annotations of each image of a split, by file name."""
    content = json.loads(split_of(root, split).annotations.read_text(encoding="utf-8"))
    images = {row["id"]: row for row in content["images"]}
    labels = {r["file_name"]: ((r["width"], r["height"]), []) for r in images.values()}
    for row in content["annotations"]:
        fields = (row["category_id"], row["bbox"], pytest.approx(row["area"]), row["iscrowd"])
        labels[images[row["image_id"]]["file_name"]][1].append(fields)
    return labels


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
    """Run a launcher with `SMALL_FLAGS` in the virtual environment of the tests."""
    return run("bash", script, *SMALL_FLAGS, *flags, VIRTUAL_ENV=sys.prefix, **kwargs)


def stable_batched_nms(boxes, scores, labels, threshold):
    """Suppress as torchvision's `batched_nms`, of which only the order of equal scores differs."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        keep[rows[nms(boxes[rows], scores[rows], threshold)]] = True
    rows = keep.nonzero()[:, 0]
    return rows[scores[rows].sort(descending=True, stable=True)[1]]


def coarse_boxes(count: int, seed: int) -> torch.Tensor:
    """Return boxes on a coarse grid, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 8, (count, 2), generator=generator).float()
    sides = torch.randint(1, 5, (count, 2), generator=generator).float()
    return torch.cat([corners, corners + sides], dim=1)


def write_video(file: Path, frames, rate=25, codec: str = "ffv1", **options) -> Path:
    """Write a video with PyAV; the defaults (in .mkv) keep every pixel as it is. Return the file.

    Args:
        file: The suffix is the format.
        frames: uint8 `[H, W, 3]` RGB arrays, or av.VideoFrame with time stamps of their own.
        rate: Frames per second.
        codec: Of FFmpeg; codecs other than ffv1 store `pix_fmt`.
        options: `pix_fmt` (yuv420p), `time_base`, `container` (a dict of options of the format),
            attributes of the codec context such as `color_range`, and options of the codec.
    """
    import av

    container_options = options.pop("container", {})
    pix_fmt = options.pop("pix_fmt", "bgr0" if codec == "ffv1" else "yuv420p")
    with av.open(str(file), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate)
        context = stream.codec_context
        context.pix_fmt = pix_fmt
        for key in [key for key in options if hasattr(context, key)]:
            setattr(context, key, options.pop(key))
        context.options = {key: str(value) for key, value in options.items()}
        for frame in frames:
            if not isinstance(frame, av.VideoFrame):
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if not context.is_open:
                context.width, context.height = frame.width, frame.height
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file
