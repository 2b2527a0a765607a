#!/usr/bin/env python3
"""Measure training steps and evaluation, of this project and of torchvision's model and loop.

    python benchmarks/step.py

Runs the arms interleaved, in separate processes, with the same weights and batches of synthetic
images at COCO's sizes, on a GPU if there is one. `stock` is torchvision's `fasterrcnn_resnet50_fpn`
in a plain loop like that of its references, `ours` is this project's model and loop, both in
float32 and with --amp. `--without` also measures `ours, amp` with each of its optimizations
disabled, to show the effect of each.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import cycle
from pathlib import Path

import common
import detectors
import numpy as np
import synthetic
import torch

import coco_eval
import coco_utils
import samplers
import transforms
import utils

ARMS = ("stock, float32", "stock, amp", "ours, float32", "ours, amp", "ours, amp, compiled")
SHAPES = ((480, 640), (427, 640), (640, 480), (480, 640))  # height, width; common in COCO
NUM_CLASSES = 91


class PhaseTimer:
    """Times the forward pass, the backward pass and the optimizer, by hooks.

    Attributes:
        synchronize: Whether to wait for the device between phases, which slows the step.
    """

    def __init__(self, model, optimizer, device: torch.device):
        self.device = device
        self.marks = []
        model.register_forward_pre_hook(lambda *_: self.mark("start"))
        model.register_forward_hook(lambda *_: self.mark("forward"))
        optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))
        self.synchronize = True

    def mark(self, name: str) -> None:
        """Record the end of a phase."""
        if self.synchronize and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append((name, time.perf_counter()))

    def pop_milliseconds(self) -> dict[str, list[float]]:
        """Return the milliseconds of each phase and step since the last call."""
        phases = {"forward": [], "backward": [], "optimizer": []}
        for (_, before), (name, now) in zip(self.marks, self.marks[1:], strict=False):
            if name in phases:
                phases[name].append(1000 * (now - before))
        self.marks.clear()
        return phases


def time_call(run, device: torch.device) -> float:
    """Call `run` and wait for the device; return the seconds."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_step(run, make_batch, steps: int, timer: PhaseTimer, device: torch.device) -> dict:
    """Measure steps after a warm-up step: milliseconds, operators and peak memory.

    Args:
        run: Trains on a list of batches.
        make_batch: Makes a batch.
        steps: Number of timed steps; phases, operators and kernels are counted in further steps.
        timer: Hooked to the model and the optimizer.
        device: Device of the model.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = [make_batch()]
    time_call(partial(run, batches), device)
    first_step = time.time() - float(os.environ["BENCHMARK_BEGIN"])
    batches += [make_batch() for _ in range(steps)]
    timer.synchronize = False
    seconds = [time_call(partial(run, [batch]), device) for batch in batches[1:]]
    timer.synchronize = True
    timer.pop_milliseconds()
    run(batches[1:2])
    phases = timer.pop_milliseconds()
    with (
        detectors.record_synchronizations(device) as synchronizations,
        detectors.OperatorCounter() as operators,
    ):
        run(batches[:1])
    milliseconds = [1000 * s for s in seconds]
    return {
        "step_ms": statistics.median(milliseconds),
        "step_ms_range": [min(milliseconds), max(milliseconds)],
        **{f"{name}_ms": statistics.median(values) for name, values in phases.items()},
        "first_step_s": first_step,
        "peak_mib": utils.peak_memory(device),
        "operators": operators.total,
        "host_reads": sum(operators.reads.values()),
        "host_reads_by_kind": operators.reads,
        "host_constants": operators.constants,
        "synchronisations": len(synchronizations) if device.type == "cuda" else None,
        **detectors.profile(partial(run, batches[:1]), device),
    }


@torch.inference_mode()
def measure_evaluation(ours: bool, model, batches: list, images: int, device, amp_dtype) -> dict:
    """Measure images per second, from batch to rows of detections; `stock` is always float32.

    The batches have `images` images each.
    """
    model.eval()
    category_ids = np.arange(NUM_CLASSES)

    def run(batch):
        pixels = batch.to(device)[0] if ours else [image.to(device) for image in batch[0]]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=ours and amp_dtype is not None):
            outputs = model(pixels)
        coco_eval.detection_rows(outputs, list(range(images)), category_ids)

    run(batches[0])
    seconds = [time_call(partial(run, batch), device) for batch in batches[1:]]
    return {"evaluation_images_per_second": images / statistics.median(seconds)}


def measure_end_to_end(ours: bool, run, folder: Path, steps: int, batch: int) -> dict:
    """Measure images per second from JPEG files with workers, after the first batch."""
    split = synthetic.make_coco(folder, (steps + 1) * batch, 8 * (steps + 1) * batch)
    workers = min(4, os.cpu_count())
    if ours:
        index = coco_utils.CocoIndex(split)
        flip = transforms.training_preset("hflip", 800)
        dataset = coco_utils.CocoDetection(index, index.categories, augmentation=flip)
        options = {"batch_sampler": samplers.TrainingPlan(np.zeros(len(index)), batch)}
        options["collate_fn"] = coco_utils.collate
    else:
        from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
        from torchvision.transforms import v2

        augmentation = [
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
        ]
        augmentation.append(v2.ToPureTensor())
        dataset = wrap_dataset_for_transforms_v2(
            CocoDetection(split.images, split.annotations, transforms=v2.Compose(augmentation)),
            target_keys=("boxes", "labels"),
        )
        options = {"batch_size": batch, "shuffle": True, "drop_last": True}
        options["collate_fn"] = lambda rows: tuple(zip(*rows, strict=True))
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, **options)
    batches = iter(loader)
    run([next(batches)])
    start = time.perf_counter()
    for _ in range(steps):
        run([next(batches)])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"end_to_end_images_per_second": steps * batch / (time.perf_counter() - start)}


def measure(arm: str, work: Path, args: argparse.Namespace) -> dict:
    """Measure one arm; return its results by batch size."""
    implementation, precision, *options = arm.split(", ")
    ours = implementation == "ours"
    disabled = next((o.removeprefix("without ") for o in options if o != "compiled"), None)
    detectors.disable(disabled)
    device, amp_dtype = detectors.choose_device_and_dtype(precision)
    state = detectors.load_weights(work / "weights.pth")
    model = detectors.build_detector(ours, args.size, NUM_CLASSES, True, state).to(device)
    if "compiled" in options:
        model.backbone.compile(dynamic=True)
    fused = ours and disabled != "fused optimizer"
    optimizer = detectors.make_optimizer(model, fused, lr=1e-4)
    timer = PhaseTimer(model, optimizer, device)
    collate = detectors.collate_ours if ours else detectors.collate_stock
    train = detectors.train_ours if ours else detectors.train_stock
    run = partial(train, model, optimizer, device, amp_dtype)
    results = {}
    for batch in args.batches:
        rng, shapes = np.random.default_rng(1), cycle(SHAPES)

        def make_batch(count=batch, shape=None, rng=rng, shapes=shapes):
            return collate(detectors.make_batch(rng, count, shape or next(shapes), NUM_CLASSES))

        result = measure_step(run, make_batch, args.steps, timer, device)
        if batch != args.batches[0]:
            del result["first_step_s"]
        if not disabled:
            result |= measure_end_to_end(ours, run, work / f"jpeg{batch}", 3, batch)
        results[batch] = result
    if not disabled:
        count = 8 if device.type == "cuda" and ours else 1
        batches = [make_batch(count, SHAPES[0]) for _ in range(3)]
        evaluation = measure_evaluation(ours, model, batches, count, device, amp_dtype)
        results[args.batches[0]] |= evaluation
    return results


def report(batch: str, results: dict[str, list[dict]]) -> None:
    """Print medians, and the speedup of each arm's step over torchvision's."""
    skipped = ("step_ms_range", "host_reads_by_kind", "profile")
    keys = [key for key in next(iter(results.values()))[0] if key not in skipped]
    print(f"\nbatch {batch}")
    rows = [[key, *(common.median(runs, key) for runs in results.values())] for key in keys]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    common.print_table(["", *results], rows)
    steps = {arm: common.median(runs, "step_ms") for arm, runs in results.items()}
    for arm, milliseconds in steps.items():
        ratios = [f"{steps[s] / milliseconds:.2f} x {s}" for s in ARMS[:2] if s in steps]
        print(f"  {arm}: {', '.join(ratios)}")


def main() -> None:
    """Run the benchmark."""
    parser = common.build_parser(__doc__.partition("\n")[0])
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--batches", type=int, nargs="+", metavar="N", default=[1, 2, 4, 8, 16] if cuda else [2],
        help="images per step (default: 1 2 4 8 16 on a GPU, 2 on a CPU)")  # fmt: skip
    add("--size", type=int, default=800, metavar="PIXELS", help="shorter side (default: 800)")
    add("--steps", type=int, default=20 if cuda else 3, metavar="N",
        help="timed steps (default: 20 on a GPU, 3 on a CPU)")  # fmt: skip
    add("--arms", nargs="+", default=ARMS if cuda else ARMS[:4], metavar="ARM",
        help=f"of: {'; '.join(ARMS)} (default: all; on a CPU all but the last, which takes minutes "
        "to compile)")  # fmt: skip
    add("--without", action="store_true",
        help="also measure ours, amp, with each of its optimizations disabled")  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        detectors.print_result(measure(args.arm, args.work, args))
        return
    if args.quick:
        args.batches, args.size, args.steps, args.repeats = [1], 64, 1, 1
        args.arms = [ARMS[0], ARMS[3]]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        images, _ = detectors.make_batch(np.random.default_rng(0), 4, SHAPES[0], NUM_CLASSES)
        images = [image / 255 for image in images]
        weights = detectors.make_random_weights(min(args.size, 400), NUM_CLASSES, images)
        torch.save(weights, Path(folder) / "weights.pth")
        names = list(args.arms)
        if args.without:
            names += [f"ours, amp, without {name}" for name in detectors.OPTIMIZATIONS]
        flags = ["--size", str(args.size), "--steps", str(args.steps)]
        flags += ["--batches", *map(str, args.batches)]
        arms = {
            name: common.Arm(
                __file__,
                name,
                Path(folder),
                use_launcher_environment=name.startswith("ours") and "memory settings" not in name,
                threads=None,
                flags=flags,
            )
            for name in names
        }
        runs = common.run_interleaved(arms, args.repeats)
    results = {}
    for batch in runs[names[0]][0]:
        results[batch] = {arm: [run[batch] for run in arm_runs] for arm, arm_runs in runs.items()}
        report(batch, results[batch])
    for arm, arm_results in results[str(args.batches[0])].items():
        print(f"\nslowest operators: {arm}, batch {args.batches[0]}")
        common.print_table(["operator", "ms", "calls"], arm_results[-1]["profile"])
    common.save_results(args.json, found=results)


if __name__ == "__main__":
    main()
