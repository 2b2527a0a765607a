#!/usr/bin/env python3
"""Compare losses and AP of torchvision's training and this project's, from the same weights.

    python benchmarks/parity.py

Trains torchvision's model in a plain loop and this project's model in its own loop, in float32 and
with --amp, from the same random weights on the same batches of the built-in data set, and evaluates
all alike. torchvision's float32 training runs with several seeds of the model's sampling, which
shows the variation between trainings that differ in nothing else.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import common
import detectors
import numpy as np
import torch

import coco_eval
import coco_utils
import engine
import samplers
import transforms
from internals import layouts

SIZE = 128  # pixels
NUM_CLASSES = 4
LEARNING_RATE = 0.01
ARMS = ("stock, float32", "stock, amp", "ours, float32", "ours, amp")


def load_batches(folder: Path, batch: int, steps: int) -> list[tuple]:
    """Load the batches of all arms: uint8 images and targets, in the order of the training plan."""
    index = coco_utils.CocoIndex(layouts.find_split(folder, "train", None, None))
    flip = transforms.training_preset("hflip", SIZE)
    dataset = coco_utils.CocoDetection(
        index, index.categories, index.images_with_boxes(), augmentation=flip
    )
    plan = samplers.TrainingPlan(np.zeros(len(dataset)), batch)
    batches, epoch = [], 0
    while len(batches) < steps:
        plan.start(epoch, 0)
        keys_of_batches = islice(plan, steps - len(batches))
        batches += [[dataset[key] for key in keys] for keys in keys_of_batches]
        epoch += 1
    return [tuple(map(list, zip(*rows, strict=True))) for rows in batches]


def score(model, folder: Path, count: int | None, amp_dtype) -> dict:
    """Score `engine.detect` on the first `count` validation images, None for all."""
    index = coco_utils.CocoIndex(layouts.find_split(folder, "val", None, None))
    loader = torch.utils.data.DataLoader(
        coco_utils.CocoDetection(index, index.categories),
        batch_sampler=samplers.evaluation_batches(index.sizes[:count], 1),
        collate_fn=coco_utils.collate,
    )
    detections, _ = engine.detect(model, loader, index.categories, amp_dtype)
    return coco_eval.evaluate_detections(index, detections, "hotcoco")


def measure(arm: str, work: Path, args: argparse.Namespace) -> dict:
    """Train one arm; return the loss of each step, and AP and AP50 at the end."""
    implementation, precision, seed = arm.split(", ")
    ours = implementation == "ours"
    device, amp_dtype = detectors.choose_device_and_dtype(precision)
    state = detectors.load_weights(work / "weights.pth")
    model = detectors.build_detector(ours, SIZE, NUM_CLASSES, True, state).to(device)
    lr_factor = partial(
        engine.learning_rate_factor,
        steps_per_epoch=args.steps,
        epochs=1,
        warmup_steps=args.steps // 8,
        milestones=None,
        gamma=0.1,
    )
    settings = detectors.LoopSettings(
        device,
        amp_dtype,
        seed=int(seed.removeprefix("seed ")),
        lr_factor=lr_factor,
        clip_grad_norm=10.0,
        log_every=1,
    )
    train = detectors.train_ours if ours else detectors.train_stock
    collate = detectors.collate_ours if ours else detectors.collate_stock
    optimizer = detectors.make_optimizer(model, ours, LEARNING_RATE)
    batches = load_batches(work / "shapes", args.batch, args.steps)
    losses = train(model, optimizer, settings, [collate(batch) for batch in batches])
    numbers = score(model, work / "shapes", 4 if args.quick else None, amp_dtype)
    torch.save(model.state_dict(), work / "trained.pth")
    return {"losses": losses, "AP": numbers["AP"], "AP50": numbers["AP50"]}


def measure_evaluation(arm: str, work: Path, args: argparse.Namespace) -> dict:
    """Score the weights of the last training with the model and precision of another arm."""
    implementation, precision = arm.split(", ")
    device, amp_dtype = detectors.choose_device_and_dtype(precision)
    state = detectors.load_weights(work / "trained.pth")
    ours = implementation == "ours"
    model = detectors.build_detector(ours, SIZE, NUM_CLASSES, True, state).to(device)
    numbers = score(model, work / "shapes", 4 if args.quick else None, amp_dtype)
    return {key: numbers[key] for key in ("AP", "AP50", "AP75", "AR100")}


def report(results: dict[str, list[dict]]) -> None:
    """Print the mean losses of thirds of the training, differences to the first arm, and AP."""
    expected = np.array(next(iter(results.values()))[0]["losses"])
    rows = []
    for arm, (result,) in results.items():
        losses = np.array(result["losses"])
        thirds = [third.mean() for third in np.array_split(losses, 3)]
        differences = [abs(third.mean()) for third in np.array_split(losses - expected, 3)]
        start = abs(losses[:5] - expected[:5]).max()
        rows.append([arm, *thirds, start, *differences, result["AP"], result["AP50"]])
    names = [f"{n} third" for n in ("first", "second", "last")]
    header = ["arm", *(f"loss, {name}" for name in names), "largest difference, steps 1 to 5"]
    header += [f"difference, {name}" for name in names]
    common.print_table([*header, "AP", "AP50"], rows)


def main() -> None:
    """Run the benchmark."""
    parser = common.build_parser(__doc__.partition("\n")[0], repeats=False)
    add = parser.add_argument
    add("--steps", type=int, default=200, metavar="N", help="steps per training (default: 200)")
    add("--batch", type=int, default=4, metavar="N", help="images per step (default: 4)")
    add("--seeds", type=int, default=3, metavar="N",
        help="trainings of stock, float32, with different seeds (default: 3)")  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        kind, _, arm = args.arm.rpartition(": ")
        run = measure_evaluation if kind == "evaluate" else measure
        detectors.print_result(run(arm, args.work, args))
        return
    arms = [f"{ARMS[0]}, seed {seed}" for seed in range(args.seeds)]
    arms += [f"{arm}, seed 0" for arm in ARMS[1:]]
    if args.quick:
        args.steps, args.batch, arms = 3, 1, [arms[0], arms[-1]]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        script = common.ROOT / "datasets/shapes.py"
        subprocess.run([sys.executable, script, work / "shapes"], check=True)
        images = [
            image / 255 for image in load_batches(work / "shapes", 2 if args.quick else 16, 1)[0][0]
        ]
        weights = detectors.make_random_weights(SIZE, NUM_CLASSES, images)
        torch.save(weights, work / "weights.pth")
        flags = ["--steps", str(args.steps), "--batch", str(args.batch)]
        flags += ["--quick"] if args.quick else []

        def make_arm(name: str) -> common.Arm:
            return common.Arm(
                __file__,
                name,
                work,
                use_launcher_environment="ours" in name,
                threads=None,
                flags=flags,
            )

        results = common.run_interleaved({arm: make_arm(arm) for arm in arms}, 1)
        evaluations = {arm: make_arm(f"evaluate: {arm}") for arm in ARMS[:: 2 if args.quick else 1]}
        same_weights = common.run_interleaved(evaluations, 1)
    report(results)
    print(f"\nweights of {arms[-1]}, evaluated by each arm")
    rows = [[arm, *result.values()] for arm, (result,) in same_weights.items()]
    common.print_table(["arm", *next(iter(same_weights.values()))[0]], rows)
    common.save_results(args.json, found=results, same_weights=same_weights)


if __name__ == "__main__":
    main()
