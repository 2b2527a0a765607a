#!/usr/bin/env python3
"""Whether speed was bought with accuracy: losses and AP of every way to train, from the same start.

    python benchmarks/parity.py

Trains torchvision's model in a plain loop and this project's in its own, in float32 and with --amp,
from the same random weights on the same batches of the built-in data set, and evaluates all in the
same way. torchvision's float32 training runs with several seeds of the model's sampling, which
shows how far apart two trainings come that differ in nothing else.
"""

import argparse
import runpy
import sys
import tempfile
from functools import partial
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

SIZE, CLASSES, RATE = 128, 4, 0.01
ARMS = ("stock, float32", "stock, amp", "ours, float32", "ours, amp")


def training_batches(folder: Path, batch: int, steps: int) -> list[tuple]:
    """The same in every arm: images uint8 and targets, in the order of this project's plan."""
    index = coco_utils.CocoIndex(coco_utils.find_split(folder, "train", None, None))
    flip = transforms.training_preset("hflip", SIZE)
    dataset = coco_utils.CocoDetection(
        index, index.categories, index.images_with_boxes(), augmentation=flip
    )
    plan, batches, epoch = samplers.TrainingPlan(np.zeros(len(dataset)), batch), [], 0
    while len(batches) < steps:
        plan.start(epoch, 0)
        batches += [[dataset[key] for key in keys] for keys in plan]
        epoch += 1
    return [tuple(map(list, zip(*rows, strict=True))) for rows in batches[:steps]]


def score(model, folder: Path, count: int | None, amp_dtype) -> dict:
    """COCO's numbers of `engine.detect` on the first `count` validation images, or all."""
    index = coco_utils.CocoIndex(coco_utils.find_split(folder, "val", None, None))
    loader = torch.utils.data.DataLoader(
        coco_utils.CocoDetection(index, index.categories),
        batch_sampler=samplers.evaluation_batches(index.sizes[:count], 1),
        collate_fn=coco_utils.collate,
    )
    detections, _ = engine.detect(model, loader, index.categories, amp_dtype)
    return coco_eval.evaluate_detections(index, detections, "hotcoco")


def measure(arm: str, work: Path, args: argparse.Namespace) -> dict:
    way, precision, seed = arm.split(", ")
    ours = way == "ours"
    device, amp_dtype = detectors.device_and_type(precision)
    state = detectors.read_weights(work / "weights.pth")
    model = detectors.build(ours, SIZE, CLASSES, True, state).to(device)
    rate = partial(
        engine.learning_rate_factor,
        steps_per_epoch=args.steps,
        epochs=1,
        warmup_steps=args.steps // 8,
        milestones=None,
        gamma=0.1,
    )
    train = detectors.run_ours if ours else detectors.run_stock
    convert = detectors.as_ours if ours else detectors.as_stock
    losses = train(
        model,
        list(map(convert, training_batches(work / "shapes", args.batch, args.steps))),
        detectors.make_optimizer(model, ours, RATE),
        device,
        amp_dtype,
        seed=int(seed.removeprefix("seed ")),
        factor=rate,
        clip=10.0,
    )
    numbers = score(model, work / "shapes", 4 if args.quick else None, amp_dtype)
    torch.save(model.state_dict(), work / "trained.pth")
    return {"losses": losses, "AP": numbers["AP"], "AP50": numbers["AP50"]}


def measure_evaluation(arm: str, work: Path, args: argparse.Namespace) -> dict:
    """AP of the weights that the last training left, by another arm's model and precision."""
    way, precision = arm.split(", ")
    device, amp_dtype = detectors.device_and_type(precision)
    state = detectors.read_weights(work / "trained.pth")
    model = detectors.build(way == "ours", SIZE, CLASSES, True, state).to(device)
    numbers = score(model, work / "shapes", 4 if args.quick else None, amp_dtype)
    return {key: numbers[key] for key in ("AP", "AP50", "AP75", "AR100")}


def report(found: dict[str, list[dict]]) -> None:
    """Losses over thirds of the training, how far they lie from the first arm's, and AP."""
    expected = np.array(next(iter(found.values()))[0]["losses"])
    rows = []
    for arm, ((figures),) in found.items():
        losses = np.array(figures["losses"])
        thirds = [part.mean() for part in np.array_split(losses, 3)]
        apart = [abs(part.mean()) for part in np.array_split(losses - expected, 3)]
        first = abs(losses[:5] - expected[:5]).max()
        rows.append([arm, *thirds, first, *apart, figures["AP"], figures["AP50"]])
    thirds = [f"{n} third" for n in ("first", "second", "last")]
    names = [f"difference, {n}" for n in ("at most in steps 1 to 5", *thirds)]
    common.table(["arm", *(f"loss, {n}" for n in thirds), *names, "AP", "AP50"], rows)


def main() -> None:
    parser = common.parser(__doc__.partition("\n")[0], repeats=False)
    add = parser.add_argument
    add("--steps", type=int, default=200, metavar="N", help="of training (default: 200)")
    add("--batch", type=int, default=4, metavar="N", help="images in a step (default: 4)")
    add("--seeds", type=int, default=3, metavar="N", help="of stock, float32 (default: 3)")
    args = parser.parse_args()
    if args.arm:
        kind, _, arm = args.arm.rpartition(": ")
        run = measure_evaluation if kind == "evaluate" else measure
        detectors.say(run(arm, args.work, args))
        return
    arms = [f"{ARMS[0]}, seed {seed}" for seed in range(args.seeds)]
    arms += [f"{arm}, seed 0" for arm in ARMS[1:]]
    if args.quick:
        args.steps, args.batch, arms = 3, 1, [arms[0], arms[-1]]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        sys.argv = ["shapes.py", str(work / "shapes")]
        runpy.run_path(str(common.ROOT / "datasets/shapes.py"), run_name="__main__")
        images = [image / 255 for image in training_batches(work / "shapes", 16, 1)[0][0]]
        torch.save(detectors.random_weights(SIZE, CLASSES, images), work / "weights.pth")
        flags = ["--steps", str(args.steps), "--batch", str(args.batch)]
        flags += ["--quick"] if args.quick else []

        def call(arm: str):
            ours = "ours" in arm
            return lambda: common.in_process(
                __file__, arm, work, threads=None, flags=flags, ours=ours
            )

        found = common.by_turns({arm: call(arm) for arm in arms}, 1)
        ways = ARMS[::2] if args.quick else ARMS
        same = common.by_turns({arm: call(f"evaluate: {arm}") for arm in ways}, 1)
    report(found)
    print(f"\nthe weights of {arms[-1]}, evaluated by each")
    rows = [[arm, *figures.values()] for arm, (figures,) in same.items()]
    common.table(["arm", *next(iter(same.values()))[0]], rows)
    common.save(args.json, found=found, same_weights=same)


if __name__ == "__main__":
    main()
