#!/usr/bin/env python3
"""Measure everything that only a GPU shows, in one command of twenty minutes.

    python benchmarks/gpu.py                  # writes benchmarks/results/gpu_<card>.json and .md
    python benchmarks/gpu.py --rehearse       # every phase on a CPU at toy size, in two minutes

Each phase is a process with a time limit of its own, the most valuable ones first; a phase that
fails or for which no time is left is named, and the others go on. Results are written as they come.

The arms: `stock` is torchvision's model in a plain loop like that of its references, with mixed
precision. The others are this project's loop with --amp: `parts` with torchvision's parts, as on a
CPU; `fixed` with tensors of fixed shape, the default on a GPU; `plain` the same without Triton
kernels; `graphs` with --cuda-graphs; `compiled` with a compiled backbone.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import detectors
import numpy as np
import synthetic
import torch

import coco_eval
import coco_utils
import models
import samplers
import transforms
from detector import Detector, LoadedModel
from internals.batches import Batch
from internals.detections import Settings
from internals.fast import FastFasterRCNN, plain_kernels, roi_heads, rpn, use_cuda_graphs
from internals.fast.kernels import kernels_for
from reporting import drawing, prediction_speed
from reporting.annotation_files import NamedImage

ROOT, RESULTS = common.ROOT, common.ROOT / "benchmarks/results"
CUDA = torch.cuda.is_available()
NUM_CLASSES = 91
SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"  # for rehearsals
PREDICTION_MODELS = ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", SMALL)
STEP_ARMS = ("stock", "parts", "fixed", "graphs", "plain")
# Height and width: the most frequent sizes in COCO, as they alternate in a training.
REAL_SHAPES = ((480, 640), (427, 640), (640, 480), (333, 500), (640, 427), (375, 500))


class Phase:
    """One phase of the measurement, in a process of its own.

    Attributes:
        tiny: Whether this is a rehearsal.
        work: A folder that all phases share, with `weights.pth` and `batch.pth`.
        results: What this phase has found so far; written to `file` with each `record`.
    """

    def __init__(self, args: argparse.Namespace):
        self.tiny, self.work = args.rehearse, args.work
        self.data_path, self.file = args.data_path, args.work / f"{args.phase}.json"
        self.results: dict[str, object] = {}
        self.size = 64 if self.tiny else 800
        self.steps, self.warm_up = (1, 1) if self.tiny else (10, 10)
        self.device, self.amp_dtype = detectors.choose_device_and_dtype("amp")
        if self.tiny:
            FastFasterRCNN.fixed_shapes = True  # what is measured on a GPU
            detectors.NAME = SMALL

    def record(self, name: str, **values) -> None:
        """Print a result and write it."""
        self.results[name] = values
        text = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        print(f"  {name}: {text}", flush=True)
        self.file.write_text(json.dumps(self.results))

    def attempt(self, name: str, run: Callable[[], dict]) -> None:
        """Record the result of `run`, or the error that it ends with."""
        try:
            values = run()
        except Exception as error:
            traceback.print_exc()
            values = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        self.record(name, **values)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

    def batches_of(self, count: int, *batches: int) -> list[int]:
        """Return these batch sizes, or in a rehearsal the first `count` numbers from 1."""
        return list(range(1, count + 1)) if self.tiny else list(batches)

    def make_batch(self, images: int, shape: tuple[int, int] = REAL_SHAPES[0]) -> tuple:
        """Return images of a height and width, cut from those that were made once, and targets."""
        pixels, targets = torch.load(self.work / "batch.pth", weights_only=True)
        height, width = [side // 8 for side in shape] if self.tiny else shape
        scale = torch.tensor([width, height] * 2) / 640
        chosen = range(images)
        return (
            [pixels[n % len(pixels)][:, :height, :width].contiguous() for n in chosen],
            [
                {**targets[n % len(targets)], "boxes": targets[n % len(targets)]["boxes"] * scale}
                for n in chosen
            ],
        )

    def build(self, arm: str) -> torch.nn.Module:
        """Build the detector of an arm on the device."""
        state = torch.load(self.work / "weights.pth", weights_only=True)
        model = detectors.build_detector(arm != "stock", self.size, NUM_CLASSES, True, state)
        model = model.to(self.device)
        if self.tiny:
            model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
        if arm == "parts":
            model.fixed_shapes = False
        choose = (lambda device: plain_kernels) if arm == "plain" else kernels_for
        rpn.kernels_for = roi_heads.kernels_for = choose
        if arm == "graphs":
            use_cuda_graphs(model)
        if arm == "compiled":
            model.backbone.compile(dynamic=True, backend="eager" if self.tiny else "inductor")
        return model

    def training(self, arm: str) -> tuple[Callable, Callable]:
        """Return a function that trains on batches, and one that makes a batch for it."""
        model, ours = self.build(arm), arm != "stock"
        optimizer = detectors.make_optimizer(model, fused=ours, lr=1e-5)
        train = detectors.train_ours if ours else detectors.train_stock

        def make(*args) -> Batch | tuple:
            batch = self.make_batch(*args)
            if not ours:
                return detectors.collate_stock(batch)
            return Batch(*batch).pin_memory() if CUDA else Batch(*batch)

        return partial(train, model, optimizer, self.device, self.amp_dtype), make


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def wait_for_device() -> None:
    """Wait until the GPU, if any, has finished."""
    if CUDA:
        torch.cuda.synchronize()


def has_graphs(arm: str, images: int) -> bool:
    """Check whether an arm exists for a batch size."""
    return arm != "graphs" or (CUDA and images <= 8)


# ----------------------------------------------------------------------------------- the phases


def machine(phase: Phase) -> None:
    """Measure what the hardware can do, and whether the Triton kernels run."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    phase.record("versions", card=name, **common.describe_machine())
    phase.record("kernels", triton=kernels_for(phase.device) is not plain_kernels)
    side = 256 if phase.tiny else 8192
    a = torch.randn(side, side, device=phase.device, dtype=torch.bfloat16)
    flops = 2 * side**3
    phase.record("matrix product", bfloat16_tflops=flops / _seconds(lambda: a @ a) / 1e12)
    if CUDA:
        host = torch.empty(2**29, dtype=torch.uint8).pin_memory()
        seconds = _seconds(lambda: host.to(phase.device, non_blocking=True))
        phase.record("copy from pinned memory", gb_per_s=len(host) / seconds / 1e9)


def _seconds(run: Callable[[], object]) -> float:
    """Return the duration of a call, of five after a first one."""
    run()
    wait_for_device()
    start = time.perf_counter()
    for _ in range(5):
        run()
    wait_for_device()
    return (time.perf_counter() - start) / 5


def tests(phase: Phase) -> None:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-vv", "-rfE", "--tb=short"]
    environment = dict(os.environ)
    if phase.tiny:
        environment["TEST_DEVICE"] = "cpu"
        command += ["-k", "nms or find or detections"]
    log = phase.work / "tests.log"
    with log.open("w") as file:  # what has run is there also after a timeout
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(None if phase.tiny else PHASES[tests] - 10)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -signal.SIGKILL
    lines = log.read_text().strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    passed = sum(" PASSED" in line for line in lines)
    phase.record("tests/test_cuda.py", exit=code, passed=passed, last_line=lines[-1], failed=failed)


def waits(phase: Phase) -> None:
    """Count how often the host waits in a step, by PyTorch's own warnings."""
    for images in phase.batches_of(1, 2, 16):
        for arm in STEP_ARMS:
            if has_graphs(arm, images):
                phase.attempt(f"{arm}, batch {images}", partial(_count_waits, phase, arm, images))


def _count_waits(phase: Phase, arm: str, images: int) -> dict:
    run, make = phase.training(arm)
    batch = make(images)
    run([batch] * 3)
    found = []
    for count in (1, 2) if phase.tiny else (2, 6):
        with detectors.record_synchronizations(phase.device) as seen:
            run([batch] * count)
        found.append((count, len(seen)))
    (few, waits_of_few), (many, waits_of_many) = found
    # What comes once an epoch, such as its last log line, is in both.
    return {"waits_per_step": (waits_of_many - waits_of_few) / (many - few)}


def steps(phase: Phase) -> None:
    """Time a training step of all arms; of the first arm again at the end."""
    for images in phase.batches_of(1, 2, 16, 8):
        for arm in (*STEP_ARMS, "stock again"):
            if has_graphs(arm, images):
                name = f"{arm}, batch {images}"
                phase.attempt(name, partial(_time_steps, phase, arm.split()[0], images))


def _time_steps(phase: Phase, arm: str, images: int) -> dict:
    run, make = phase.training(arm)
    batches = [make(images)] * phase.steps
    first = time.perf_counter()
    run(batches[:1] * phase.warm_up)
    wait_for_device()
    first = time.perf_counter() - first
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 if phase.tiny else 3):
        start = time.perf_counter()
        run(batches)
        wait_for_device()
        seconds.append((time.perf_counter() - start) / len(batches))
    step = statistics.median(seconds)
    result = {"ms": 1000 * step, "images_per_s": images / step, "warm_up_s": first}
    if CUDA:
        # Graphs compute in memory that counts as reserved, not as allocated.
        result["allocated_mib"] = torch.cuda.max_memory_allocated() >> 20
        result["reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
        result["kernels"] = detectors.profile(partial(run, batches[:1]), phase.device)["kernels"]
    return result


def shapes(phase: Phase) -> None:
    """Train on 60 batches of the shapes that alternate in COCO, captures included."""
    for images in phase.batches_of(1, 2, 8):
        for arm in ("stock", "parts", "fixed", "graphs"):
            if has_graphs(arm, images):
                phase.attempt(f"{arm}, batch {images}", partial(_time_shapes, phase, arm, images))


def _time_shapes(phase: Phase, arm: str, images: int) -> dict:
    run, make = phase.training(arm)
    count = 3 if phase.tiny else 60
    made = {shape: make(images, shape) for shape in REAL_SHAPES}
    order = np.random.default_rng(0).integers(len(REAL_SHAPES), size=count).tolist()
    run([made[REAL_SHAPES[0]]])
    wait_for_device()
    start = time.perf_counter()
    run([made[REAL_SHAPES[n]] for n in order])
    wait_for_device()
    return {"images_per_s": count * images / (time.perf_counter() - start)}


def evaluation(phase: Phase) -> None:
    """Evaluate, from batch to rows of detections, as many as of a trained detector."""
    for images in phase.batches_of(1, 1, 8, 16):
        for arm in ("stock", "parts", "fixed"):
            name = f"{arm}, batch {images}"
            phase.attempt(name, partial(_time_evaluation, phase, arm, images))


def _time_evaluation(phase: Phase, arm: str, images: int) -> dict:
    model = phase.build(arm).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    batch, category_ids = phase.make_batch(images), np.arange(NUM_CLASSES)
    packed = Batch(batch[0])
    packed = packed.pin_memory() if CUDA else packed
    pending, found = [], 0

    @torch.inference_mode()
    def run() -> None:
        if arm == "stock":
            pixels = [(image / 255).to(phase.device) for image in batch[0]]
        else:
            pixels, _ = packed.to(phase.device)
        dtype = phase.amp_dtype
        with torch.autocast(phase.device.type, dtype=dtype, enabled=dtype is not None):
            pending.append(model(pixels))
        if arm == "stock" or len(pending) > 1:  # as `engine.detect`
            read()

    def read() -> None:
        nonlocal found
        rows = coco_eval.detection_rows(pending.pop(0), list(range(images)), category_ids)
        found = len(rows) / images

    count = 1 if phase.tiny else max(4, 48 // images)
    for _ in range(3):
        run()
    wait_for_device()
    start = time.perf_counter()
    for _ in range(count):
        run()
    while pending:
        read()
    return {
        "images_per_s": count * images / (time.perf_counter() - start),
        "detections_per_image": found,
    }


def end_to_end(phase: Phase) -> None:
    """Train from JPEG files of COCO's size, by the number of loading processes."""
    count, images = (8, 1) if phase.tiny else (512, 8)
    split = synthetic.make_coco(phase.work / "jpeg", count, 7 * count, noise=30.0)
    bytes_per_file = sum(f.stat().st_size for f in split.images.iterdir()) / count
    phase.record("files", count=count, kb=bytes_per_file / 1000)
    for workers in (1,) if phase.tiny else (4, 8, 16):
        run = partial(_time_end_to_end, phase, split, images, workers)
        phase.attempt(f"fixed, batch {images}, {workers} workers", run)


def _time_end_to_end(phase: Phase, split, images: int, workers: int) -> dict:
    index = coco_utils.CocoIndex(split)
    flip = transforms.training_preset("hflip", phase.size)
    dataset = coco_utils.CocoDetection(index, index.categories, augmentation=flip)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=samplers.TrainingPlan(np.zeros(len(index)), images),
        collate_fn=coco_utils.collate,
        num_workers=workers,
        pin_memory=CUDA,
    )
    run, _ = phase.training("fixed")
    batches = WaitMeter(loader)
    run(batches.take(1))
    wait_for_device()
    batches.waited, start = 0.0, time.perf_counter()
    run(batches.take(len(loader) - 1))
    wait_for_device()
    seconds = time.perf_counter() - start
    return {
        "images_per_s": (len(loader) - 1) * images / seconds,
        "waiting": batches.waited / seconds,
    }


class WaitMeter:
    """Takes batches from a loader, and adds up the seconds of waiting for them."""

    def __init__(self, loader):
        self.batches, self.count, self.waited = iter(loader), 0, 0.0

    def take(self, count: int) -> "WaitMeter":
        """Let the next iteration end after `count` batches."""
        self.count = count
        return self

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            start = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - start
            yield batch


def commands(phase: Phase) -> None:
    """Run a user's commands: the largest batch, and two epochs on --data-path if given."""
    data = phase.data_path or synthetic.make_small_coco(phase.work / "small", 8)
    common_flags = ["--data-path", data, "--weights-backbone", "none", "--amp", "--no-report"]
    common_flags += ["--output-dir", phase.work / "output"]
    if phase.tiny:
        common_flags += ["--min-size", 64, "--model", SMALL]
    two_epochs = ["--epochs", 2, "--batch-size", 4, "--lr", 0.01, "--clip-grad-norm", 10]
    for name, flags in (("find batch size", ["--find-batch-size"]), ("two epochs", two_epochs)):
        command = [sys.executable, "train.py", *map(str, common_flags + flags)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout + done.stderr[-1000:]).splitlines()
        kept = [x for x in lines if "images/s" in x or "AP " in x or "--batch-size" in x]
        print(done.stdout[-3000:], done.stderr[-2000:])
        seconds = time.perf_counter() - start
        phase.record(name, exit=done.returncode, seconds=seconds, lines=(kept or lines)[-8:])


def prediction(phase: Phase) -> None:
    """Time predict.py on JPEG files: reading, the model, drawing, and all of them together."""
    files = phase.work / "pictures"
    split = synthetic.make_coco(files, 4 if phase.tiny else 64, 8, noise=30.0)
    images = sorted(split.images.iterdir())
    for name in (SMALL,) if phase.tiny else PREDICTION_MODELS:
        for batch in phase.batches_of(1, 1, 8):
            run = partial(_time_prediction, phase, name, batch, images)
            phase.attempt(f"{name}, batch {batch}", run)


def _time_prediction(phase: Phase, name: str, batch: int, images: list[Path]) -> dict:
    torch.manual_seed(0)
    sizes = {"min_sizes": (phase.size,), "max_size": 2 * phase.size} if phase.tiny else {}
    model = models.build_model(name, NUM_CLASSES, pretrained="detector", **sizes).eval()
    with torch.no_grad():  # for as many detections as of a trained detector
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    ids = tuple(range(1, NUM_CLASSES))
    loaded = LoadedModel(model, coco_utils.Categories(ids, tuple(map(str, ids)), ids))
    settings = Settings(batch_size=batch, amp=CUDA, device=phase.device.type)
    detector = Detector(loaded, settings, dict.fromkeys(ids, 0.05))
    items = [
        NamedImage(path=path, file_name=path.name, stem=path.stem, image_id=n)
        for n, path in enumerate(images, start=1)
    ]

    def draw(item: NamedImage) -> torch.Tensor:
        return drawing.draw_detections(item.pixels, item.rows(), detector.categories)

    count = 2 if phase.tiny else 64
    speeds = prediction_speed.measure_speeds(detector, items, draw, count)
    return {f"{stage}, {key}": x for stage, row in speeds.items() for key, x in row.items()}


def profile(phase: Phase) -> None:
    """List the kernels that take the most time in a step."""
    for images in phase.batches_of(1, 2, 16):
        run, make = phase.training("fixed")
        batch = make(images)
        run([batch] * 3)
        rows = detectors.profile(partial(run, [batch]), phase.device, rows=25)["profile"]
        phase.record(f"fixed, batch {images}", rows=rows)
        common.print_table(["kernel", "ms", "calls"], rows)


def compiled(phase: Phase) -> None:
    """Time a step with a compiled backbone."""
    for images in phase.batches_of(1, 2, 16):
        phase.attempt(f"compiled, batch {images}", partial(_time_steps, phase, "compiled", images))


# Seconds that a phase may take: about twice what it took on a slow host.
PHASES = {
    machine: 40,
    tests: 240,
    steps: 240,
    waits: 80,
    shapes: 160,
    evaluation: 70,
    commands: 120,
    end_to_end: 80,
    prediction: 90,
    profile: 40,
    compiled: 240,
}
LONGEST_REHEARSAL = 100  # seconds of a phase, on slow CPUs


# ------------------------------------------------------------------------------------ the driver


def prepare(work: Path, tiny: bool) -> None:
    """Make the weights and the images that all phases use."""
    if tiny:
        detectors.NAME = SMALL
    size = 64 if tiny else 800
    shape = (64, 80) if tiny else (640, 640)
    images, targets = detectors.make_batch(np.random.default_rng(0), 4, shape, NUM_CLASSES)
    torch.save((images, targets), work / "batch.pth")
    floats = [image / 255 for image in images]
    weights = detectors.make_random_weights(min(size, 320), NUM_CLASSES, floats)
    torch.save(weights, work / "weights.pth")


def run_phases(args: argparse.Namespace, work: Path, deadline: float) -> dict:
    """Run each phase in a process; return the results of all of them."""
    found = {}
    for function, limit in PHASES.items():
        name = function.__name__
        if args.phases and name not in args.phases:
            continue
        left = deadline - time.monotonic()
        print(f"\n{name}: {function.__doc__.splitlines()[0]}", flush=True)
        if left < 5:
            found[name] = {"left out": {"reason": "no time"}}
            print("  left out: no time is left")
            continue
        command = [sys.executable, __file__, "--phase", name, "--work", str(work)]
        command += ["--rehearse"] * args.rehearse
        command += ["--data-path", str(args.data_path)] if args.data_path else []
        start = time.monotonic()
        problem = None
        limit = min(LONGEST_REHEARSAL if args.rehearse else limit, left)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            problem = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the commands that it has started
            process.wait()
            problem = f"ended after its {limit:.0f} s"
        if name == "tests" and (work / "tests.log").exists():
            print((work / "tests.log").read_text()[-8000:])
        file = work / f"{name}.json"
        found[name] = json.loads(file.read_text()) if file.exists() else {}
        if problem:
            found[name]["incomplete"] = {"reason": problem}
            print(f"  {name} is incomplete: {problem}")
        print(f"  ({time.monotonic() - start:.0f} s)")
        write_results(args.out, found)
    return found


def write_results(folder: Path, found: dict) -> None:
    """Write all results so far as JSON, and a table of the speeds."""
    versions = found.get("machine", {}).get("versions", {})
    card = str(versions.get("card", "unknown")).lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu_{card}.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# {versions.get('card')}", ""]
    lines += [f"`python benchmarks/gpu.py`, torch {versions.get('torch')}.", ""]
    for phase, results in found.items():
        rows = [r for r in results.items() if phase != "profile" and r[0] != "versions"]
        keys = list(dict.fromkeys(key for _, values in rows for key in values))
        if rows:
            lines += [
                f"## {phase}",
                "",
                f"| | {' | '.join(keys)} |",
                "|---" * (len(keys) + 1) + "|",
            ]
            lines += [
                f"| {name} | {' | '.join(str(_short(v.get(key, ''))) for key in keys)} |"
                for name, v in rows
            ]
            lines.append("")
    (folder / f"gpu_{card}.md").write_text("\n".join(lines))


def main() -> int:
    """Run the phases, or one of them; return 1 if any is incomplete."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rehearse", action="store_true", help="toy sizes, on a CPU, too")
    add("--seconds", type=float, default=1200, metavar="S",
        help="end after this time (default: %(default)s; a rehearsal has no limit)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER",
        help="where to write (default: benchmarks/results; not kept for a rehearsal)")  # fmt: skip
    add("--data-path", type=Path, metavar="FOLDER", help="data set for two epochs of training")
    add("--phases", nargs="+", choices=[f.__name__ for f in PHASES], metavar="PHASE",
        help=f"only these of: {', '.join(f.__name__ for f in PHASES)}")  # fmt: skip
    add("--phase", choices=[f.__name__ for f in PHASES], help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        next(f for f in PHASES if f.__name__ == args.phase)(Phase(args))
        return 0
    if not CUDA and not args.rehearse:
        parser.error("there is no GPU: use --rehearse")
    deadline = time.monotonic() + (args.seconds if not args.rehearse else 10**6)
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
        work = Path(folder)
        args.out = args.out or (work / "results" if args.rehearse else RESULTS)
        prepare(work, args.rehearse)
        found = run_phases(args, work, deadline)
        print(f"\nresults: {args.out}")
    failed = {n: r for n, r in found.items() if "incomplete" in r or "left out" in r}
    failed |= {
        n: r for n, r in found.items() if any(v.get("failed") or v.get("exit") for v in r.values())
    }
    print(f"incomplete: {', '.join(failed)}" if failed else "all phases are complete")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
