#!/usr/bin/env python3
"""How long a training step and an evaluation take, here and in torchvision's model and loop.

    python benchmarks/step.py

Runs the arms by turns, each in a process of its own, on the same weights and the same batches of
made-up pictures at COCO's sizes, on a GPU if there is one. `stock` is torchvision's
`fasterrcnn_resnet50_fpn` in a plain loop like that of its references, `ours` this project's model
and loop, both in float32 and with --amp. `--without` measures ours with one of its parts switched
off, for what each of them brings.
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
SHAPES = ((480, 640), (427, 640), (640, 480), (480, 640))  # height, width; usual ones of COCO
CLASSES = 91


class Clock:
    """The times at which a step passes from one part to the next, in seconds."""

    def __init__(self, model, optimizer, device: torch.device):
        self.device, self.marks = device, []
        model.register_forward_pre_hook(lambda *_: self.mark("start"))
        model.register_forward_hook(lambda *_: self.mark("forward"))
        optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))
        self.wait = True  # for the device, at every mark, so that parts can be told apart

    def mark(self, name: str) -> None:
        if self.wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append((name, time.perf_counter()))

    def parts(self) -> dict[str, list[float]]:
        """Milliseconds of each part in each step since the last call."""
        parts = {"forward": [], "backward": [], "optimizer": []}
        for (_, before), (name, now) in zip(self.marks, self.marks[1:], strict=False):
            if name in parts:
                parts[name].append(1000 * (now - before))
        self.marks.clear()
        return parts


def finished(run, device: torch.device) -> float:
    """Seconds that `run` takes, with all that it has the device do."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure_step(run, make_batch, steps: int, clock: Clock, device: torch.device) -> dict:
    """Steps after one to warm up: milliseconds, counts and memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = [make_batch()]
    finished(partial(run, batches), device)
    first_step = time.time() - float(os.environ["BENCHMARK_BEGIN"])
    batches += [make_batch() for _ in range(steps)]
    clock.wait, seconds = False, []
    for batch in batches[1:]:
        seconds.append(finished(partial(run, [batch]), device))
    clock.wait = True
    clock.parts()
    run(batches[1:2])
    parts = {f"{name}_ms": statistics.median(ms) for name, ms in clock.parts().items()}
    with detectors.synchronisations(device) as waits, detectors.Operators() as operators:
        run(batches[:1])
    milliseconds = [1000 * s for s in seconds]
    return {
        "step_ms": statistics.median(milliseconds),
        "step_ms_range": [min(milliseconds), max(milliseconds)],
        **parts,
        "first_step_s": first_step,
        "peak_mib": utils.peak_memory(device),
        "operators": operators.total,
        "host_reads": sum(operators.reads.values()),
        "host_reads_by_kind": operators.reads,
        "host_constants": operators.constants,
        "synchronisations": len(waits) if device.type == "cuda" else None,
        **detectors.profile(partial(run, batches[:1]), device),
    }


@torch.inference_mode()
def measure_evaluation(ours: bool, model, batches: list, device, amp_dtype) -> dict:
    """Images a second from the loader's batch to rows of detections; the references use float32."""
    model.eval()
    category_ids = np.arange(CLASSES)

    def run(batch):
        images = batch[0].to(device) if ours else [image.to(device) for image in batch[0]]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=ours and amp_dtype is not None):
            outputs = model(images)
        coco_eval.detection_rows(outputs, list(range(len(images))), category_ids)

    run(batches[0])
    seconds = [finished(partial(run, batch), device) for batch in batches[1:]]
    images = len(batches[1][1])
    return {"evaluation_images_per_second": images / statistics.median(seconds)}


def measure_end_to_end(ours: bool, run, folder: Path, steps: int, batch: int) -> dict:
    """Images a second from JPEG files through loading processes, the first batch not counted."""
    split = synthetic.make_coco(folder, (steps + 1) * batch, 8 * (steps + 1) * batch)
    workers = min(4, os.cpu_count())
    if ours:
        index = coco_utils.CocoIndex(split)
        flip = transforms.training_preset("hflip", 800)
        dataset = coco_utils.CocoDetection(index, index.categories, augmentation=flip)
        order = {"batch_sampler": samplers.TrainingPlan(np.zeros(len(index)), batch)}
        order["collate_fn"] = coco_utils.collate
    else:
        from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
        from torchvision.transforms import v2

        plain = [v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
        plain.append(v2.ToPureTensor())
        dataset = wrap_dataset_for_transforms_v2(
            CocoDetection(split.images, split.annotations, transforms=v2.Compose(plain)),
            target_keys=("boxes", "labels"),
        )
        order = {"batch_size": batch, "shuffle": True, "drop_last": True}
        order["collate_fn"] = lambda rows: tuple(zip(*rows, strict=True))
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, **order)
    batches = iter(loader)
    run([next(batches)])
    rest = [None] * steps
    begin = time.perf_counter()
    for _ in rest:
        run([next(batches)])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"end_to_end_images_per_second": steps * batch / (time.perf_counter() - begin)}


def measure(arm: str, work: Path, args: argparse.Namespace) -> dict:
    """All figures of one arm."""
    way, precision, *more = arm.split(", ")
    ours, part = way == "ours", next((m[8:] for m in more if m.startswith("without ")), None)
    detectors.without(part)
    device, amp_dtype = detectors.device_and_type(precision)
    state = detectors.read_weights(work / "weights.pth")
    model = detectors.build(ours, args.size, CLASSES, True, state).to(device)
    if "compiled" in more:
        model.backbone.compile(dynamic=True)
    fused = ours and part != "fused optimizer"
    optimizer = detectors.make_optimizer(model, fused, lr=1e-4)
    clock = Clock(model, optimizer, device)
    convert = detectors.as_ours if ours else detectors.as_stock
    train = detectors.run_ours if ours else detectors.run_stock
    run = partial(train, model, optimizer=optimizer, device=device, amp_dtype=amp_dtype)
    found = {}
    for batch in args.batches:
        rng, shapes = np.random.default_rng(1), cycle(SHAPES)

        def make_batch(count=batch, shape=None, rng=rng, shapes=shapes):
            return convert(detectors.picture_batch(rng, count, shape or next(shapes), CLASSES))

        figures = found[batch] = measure_step(run, make_batch, args.steps, clock, device)
        if batch != args.batches[0]:
            del figures["first_step_s"]
        if not part:
            figures |= measure_end_to_end(ours, run, work / f"jpeg{batch}", 3, batch)
    if not part:
        many = 8 if device.type == "cuda" and ours else 1
        pictures = [make_batch(many, SHAPES[0]) for _ in range(3)]
        found[args.batches[0]] |= measure_evaluation(ours, model, pictures, device, amp_dtype)
    return found


def report(batch: str, turns: dict[str, list[dict]]) -> None:
    """A table of medians, and how much faster each arm's step is than torchvision's."""
    keys = ("step_ms_range", "host_reads_by_kind", "profile")
    keys = [key for key in next(iter(turns.values()))[0] if key not in keys]
    print(f"\nbatch {batch}")
    rows = [[key, *(common.median(rows, key) for rows in turns.values())] for key in keys]
    common.table(["", *turns], [row for row in rows if any(v is not None for v in row[1:])])
    steps = {arm: common.median(rows, "step_ms") for arm, rows in turns.items()}
    for arm, milliseconds in steps.items():
        ratios = [f"{steps[s] / milliseconds:.2f} x {s}" for s in ARMS[:2] if s in steps]
        print(f"  {arm}: {', '.join(ratios)}")


def main() -> None:
    parser = common.parser(__doc__.partition("\n")[0])
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--batches", type=int, nargs="+", metavar="N", default=[1, 2, 4, 8, 16] if cuda else [2],
        help="images in a step (default: 1 2 4 8 16 on a GPU, 2 on a CPU)")  # fmt: skip
    add("--size", type=int, default=800, metavar="PIXELS", help="shortest side (default: 800)")
    add("--steps", type=int, default=20 if cuda else 3, metavar="N", help="steps that are timed")
    arms = f"of: {'; '.join(ARMS)} (default: all; on a CPU, without the last, which compiles long)"
    add("--arms", nargs="+", default=ARMS if cuda else ARMS[:4], metavar="ARM", help=arms)
    add("--without", action="store_true", help="measure ours without each of its parts, too")
    args = parser.parse_args()
    if args.arm:
        detectors.say(measure(args.arm, args.work, args))
        return
    if args.quick:
        args.batches, args.size, args.steps, args.repeats = [1], 64, 1, 1
        args.arms = [ARMS[0], ARMS[3]]
    found = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        images, _ = detectors.picture_batch(np.random.default_rng(0), 4, SHAPES[0], CLASSES)
        state = detectors.random_weights(min(args.size, 400), CLASSES, [i / 255 for i in images])
        torch.save(state, Path(folder) / "weights.pth")
        arms = list(args.arms)
        if args.without:
            arms += [f"ours, amp, without {part}" for part in detectors.PARTS]
        flags = ["--size", str(args.size), "--steps", str(args.steps)]
        flags += ["--batches", *map(str, args.batches)]
        calls = {
            arm: partial(
                common.in_process, __file__, arm, Path(folder), flags=flags, threads=None,
                ours=arm.startswith("ours") and "memory settings" not in arm,
            )
            for arm in arms
        }  # fmt: skip
        turns = common.by_turns(calls, args.repeats)
    for batch in turns[arms[0]][0]:
        found[batch] = {arm: [turn[batch] for turn in rows] for arm, rows in turns.items()}
        report(batch, found[batch])
    for arm, figures in found[str(args.batches[0])].items():
        print(f"\nwhere the time of a step goes, {arm}, batch {args.batches[0]}")
        common.table(["operator", "ms", "calls"], figures[-1]["profile"])
    common.save(args.json, found=found)


if __name__ == "__main__":
    main()
