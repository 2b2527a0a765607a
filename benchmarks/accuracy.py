#!/usr/bin/env python3
"""Train torchvision's model in a plain loop and by train.py, and compare their AP over seeds.

    python benchmarks/accuracy.py --data-path my_data --min-size 192 --epochs 6

Both train from the same random weights (those of the seed) on the same images, with the same flips,
batch size, optimizer and schedule, that of torchvision's references, and are evaluated on all
validation images after the last epoch. What else is random differs: the order of the images, what
is drawn for them. "stock" is torchvision's model, data set, transforms and loss in a loop like that
of its references, in float32; "recipe" is train.py with --amp. Without --data-path they train on
the built-in data set.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import detectors
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.transforms import v2

import coco_eval
import coco_utils
import engine
from internals.devices import choose_device
from internals.layouts import Split, find_split

ARMS = ("stock", "recipe")
WORKERS = 2


# ----------------------------------------------------------------------------------- torchvision


def make_dataset(split: Split, training: bool) -> CocoDetection:
    """Make torchvision's data set; training is without crowds and images without boxes."""
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.RandomHorizontalFlip(0.5), v2.SanitizeBoundingBoxes()] if training else []
    dataset = CocoDetection(split.images, split.annotations, transforms=v2.Compose(steps))
    if training:
        boxes = dataset.coco.imgToAnns
        for i in dataset.ids:
            boxes[i] = [row for row in boxes[i] if not row.get("iscrowd")]
        dataset.ids = [i for i in dataset.ids if boxes[i]]
    return wrap_dataset_for_transforms_v2(dataset, target_keys=("image_id", "boxes", "labels"))


def collate(samples: list) -> tuple[list, list]:
    """Return the images and targets of a batch as plain tensors."""
    images, targets = zip(*samples, strict=True)
    plain = [
        {k: v.as_subclass(torch.Tensor) for k, v in t.items() if isinstance(v, torch.Tensor)}
        | {"image_id": t["image_id"]}
        for t in targets
    ]
    return [image.as_subclass(torch.Tensor) for image in images], plain


def relabel(targets: list[dict], categories: coco_utils.Categories) -> Iterator[dict]:
    """Yield the boxes and the model's labels of targets whose labels are category ids."""
    for target in targets:
        boxes = target.get("boxes", torch.zeros(0, 4))
        ids = target.get("labels", torch.zeros(0, dtype=torch.int64))
        labels = torch.from_numpy(categories.labels_of(ids.numpy()))
        yield {"boxes": boxes.reshape(-1, 4), "labels": labels}


def train_stock(args: argparse.Namespace, seed: int, index: coco_utils.CocoIndex) -> dict:
    """Train torchvision's model in a plain loop; return its metrics and images per second."""
    device, categories = choose_device(None), index.categories
    torch.manual_seed(seed)
    sizes = {"min_size": args.min_size, "max_size": round(args.min_size * 1333 / 800)}
    model = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=categories.num_classes, **sizes
    )
    weights_hash = hash_weights(model.state_dict())
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    dataset = make_dataset(find_split(args.data_path, "train", None, None), training=True)
    loader = DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS,
        collate_fn=collate, persistent_workers=True,
    )  # fmt: skip
    start = time.perf_counter()
    for epoch in range(args.epochs):
        train_stock_epoch(model, loader, optimizer, args, epoch, categories)
    speed = args.epochs * len(loader) * args.batch_size / (time.perf_counter() - start)
    detections = detect_stock(model, args, categories)
    metrics = coco_eval.evaluate_detections(index, detections, "pycocotools")
    return {"weights": weights_hash, "images_per_second": speed, **metrics}


def train_stock_epoch(model, loader, optimizer, args, epoch: int, categories) -> None:
    """Train for one epoch, with the schedule of torchvision's references."""
    device = next(model.parameters()).device
    model.train()
    for step, (images, targets) in enumerate(loader, start=epoch * len(loader)):
        factor = engine.learning_rate_factor(
            step, len(loader), args.epochs, min(1000, len(loader)), args.lr_steps, 0.1
        )
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) for k, v in t.items()} for t in relabel(targets, categories)]
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        optimizer.step()


@torch.inference_mode()
def detect_stock(model, args: argparse.Namespace, categories) -> np.ndarray:
    """Return the detections of the validation images, rows of `coco_eval.detection_rows`."""
    device = next(model.parameters()).device
    model.eval()
    dataset = make_dataset(find_split(args.data_path, "val", None, None), training=False)
    ids, rows = categories.ids_of_labels(), [np.empty((0, 7))]
    for images, targets in DataLoader(dataset, 1, num_workers=WORKERS, collate_fn=collate):
        outputs = model([image.to(device) for image in images])
        rows.append(coco_eval.detection_rows(outputs, [t["image_id"] for t in targets], ids))
    return np.concatenate(rows)


# ------------------------------------------------------------------------------------- the recipe


def train_recipe(args: argparse.Namespace, seed: int, index: coco_utils.CocoIndex) -> dict:
    """Run train.py; return its last metrics and images per second of its epochs."""
    output_dir = args.work / f"recipe_{seed}"
    flags = {
        "--data-path": args.data_path, "--output-dir": output_dir, "--seed": seed,
        "--weights-backbone": "none", "--min-size": args.min_size, "--epochs": args.epochs,
        "--batch-size": args.batch_size, "--lr": args.lr, "--workers": WORKERS,
        "--clip-grad-norm": args.clip_grad_norm, "--evaluator": "pycocotools",
    }  # fmt: skip
    command = [sys.executable, common.ROOT / "train.py", "--amp", "--no-keep-empty", "--no-report"]
    command += [str(word) for pair in flags.items() for word in pair]
    command += ["--lr-steps", *map(str, args.lr_steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").open(encoding="utf-8")]
    evals = [line for line in lines if line["kind"] == "eval"]
    steps = [line for line in lines if line["kind"] == "train"]
    torch.manual_seed(seed)
    model = detectors.models.build_model(
        detectors.NAME, index.categories.num_classes, pretrained=None
    )
    return {
        "weights": hash_weights(model.state_dict()),
        "images_per_second": statistics.harmonic_mean([s["images_per_second"] for s in steps]),
        **{name: evals[-1][name] for name in (*coco_eval.METRICS, "per_category")},
    }


def hash_weights(state: dict[str, torch.Tensor]) -> str:
    """Hash a state_dict, to show that both arms start from the same weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------ the report


def report(results: dict[str, list[dict]]) -> None:
    """Print AP of each seed, mean and standard deviation, and the difference of the means."""
    rows, ap = [], {}
    for arm in ARMS:
        runs = [result for name, (result,) in results.items() if name.startswith(arm)]
        ap[arm] = [run["AP"] for run in runs]
        spread = statistics.stdev(ap[arm]) if len(runs) > 1 else None
        others = [statistics.mean(run[name] for run in runs) for name in ("AP50", "AP75")]
        speed = statistics.median(run["images_per_second"] for run in runs)
        seeds = ", ".join(f"{value:.3f}" for value in ap[arm])
        rows.append([arm, seeds, statistics.mean(ap[arm]), spread, *others, speed])
    header = ["arm", "AP of each seed", "mean AP", "standard deviation", "AP50", "AP75"]
    common.print_table([*header, "images/s"], rows)
    stock, recipe = (ap[arm] for arm in ARMS)
    difference = f"recipe - stock: {statistics.mean(recipe) - statistics.mean(stock):+.4f} AP"
    if len(stock) > 1:
        variance = (statistics.variance(stock) + statistics.variance(recipe)) / len(stock)
        difference += f", standard error {variance**0.5:.4f}"
    print(f"\n{difference}")


def keep_first_images(folder: Path, count: int) -> None:
    """Cut the built-in data set to a few images of each split, for --quick."""
    for split in ("train", "val"):
        file = find_split(folder, split, None, None).annotations
        content = json.loads(file.read_bytes())
        content["images"] = content["images"][:count]
        ids = {row["id"] for row in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        file.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    parser = common.build_parser(__doc__.partition("\n")[0], repeats=False)
    add = parser.add_argument
    add("--data-path", type=Path, metavar="FOLDER", help="as of train.py (default: built-in data)")
    add("--min-size", type=int, default=192, help="as of train.py (default: 192)")
    add("--epochs", type=int, default=6, help="as of train.py (default: 6)")
    add("--batch-size", type=int, default=4, help="as of train.py (default: 4)")
    add("--lr", type=float, default=0.01, help="as of train.py (default: 0.01)")
    add("--clip-grad-norm", type=float, default=10, help="as of train.py (default: 10)")
    add("--seeds", type=int, default=3, metavar="N", help="seeds of each arm (default: 3)")
    args = parser.parse_args()
    args.lr_steps = [max(1, round(args.epochs * e / 26)) for e in (16, 22)]
    if args.arm:
        arm, _, seed = args.arm.rpartition(", seed ")
        split = find_split(args.data_path, "val", None, None)
        train = {"stock": train_stock, "recipe": train_recipe}[arm]
        return detectors.print_result(train(args, int(seed), coco_utils.CocoIndex(split)))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        if not args.data_path:
            args.data_path = work / "shapes"
            script = common.ROOT / "datasets/shapes.py"
            subprocess.run([sys.executable, script, args.data_path], check=True)
        if args.quick:
            keep_first_images(args.data_path, 8)
            args.seeds, args.epochs, args.min_size, args.lr_steps = 1, 1, 64, [1]
        names = ("data_path", "min_size", "epochs", "batch_size", "lr", "clip_grad_norm")
        flags = [(f"--{name.replace('_', '-')}", str(getattr(args, name))) for name in names]
        flags = [word for pair in flags for word in pair]
        arms = {
            f"{arm}, seed {seed}": common.Arm(
                __file__,
                f"{arm}, seed {seed}",
                work,
                use_launcher_environment=arm == "recipe",
                threads=None,
                flags=flags,
            )
            for seed in range(args.seeds)
            for arm in ARMS
        }
        results = common.run_interleaved(arms, 1)
    for seed in range(args.seeds):
        first = {results[f"{arm}, seed {seed}"][0]["weights"] for arm in ARMS}
        assert len(first) == 1, "the arms have trained from different weights"
    report(results)
    settings = {name: getattr(args, name) for name in names[1:]}
    common.save_results(args.json, settings=settings, found=results)
    return None


if __name__ == "__main__":
    main()
