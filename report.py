#!/usr/bin/env python3
"""Write report.html: a training's metrics, curves, errors and images with boxes on one page.

    python report.py output

It reads metrics.jsonl and detections.json in OUTPUT_DIR, and the validation images where the run
found them. The page is one file that loads nothing else. What is missing, such as an evaluation or
images that were moved, is said on the page and on the console.
"""

import argparse
from collections import Counter
from pathlib import Path
from statistics import median

import jinja2
import numpy as np

import coco_eval
import utils
from internals.command_line import ArgumentParser
from internals.errors import UserError
from internals.failures import run_command
from reporting.analysis import (
    DetectionResults,
    RunHistory,
    args_of,
    most_confused_categories,
    most_confused_pairs,
    read_history,
    read_results,
)
from reporting.gallery import build_galleries, list_some

TEMPLATE = Path(__file__).resolve().parent / "reporting/template.html"
MAX_MATRIX = 20  # with more categories the confusion matrix shows the most confused ones


# --------------------------------------------------------------------------------------- tables


def accuracy_table(history: RunHistory) -> dict:
    """COCO's twelve metrics of the last evaluation and of the best one."""
    test_only = args_of(history.eval_start).get("test_only")
    columns = {"last (--test-only)" if test_only else "last": history.last}
    if history.best not in (None, history.last):
        columns["best"] = history.best
    elif len(history.evals) > 1:
        columns = {"last and best": history.last}
    return {
        "heads": [name + of_epoch(line) for name, line in columns.items()],
        "rows": [
            (name, coco_eval.MEANING[name], [line.get(name) for line in columns.values()])
            for name in coco_eval.METRICS
        ],
    }


def category_table(history: RunHistory, results: DetectionResults | None) -> list[dict]:
    """AP and the number of ground-truth boxes (None if unknown) of each category, best AP first."""
    boxes = {}
    if results:
        names = results.index.categories.names
        of_usable = results.gt_category[results.index.usable]
        boxes = dict.fromkeys(names, 0) | Counter(names[k] for k in of_usable)
    per_category = (history.last or {}).get("per_category") or {}
    rows = [{"name": n, "ap": ap, "boxes": boxes.get(n)} for n, ap in per_category.items()]
    return sorted(rows, key=lambda row: -1 if row["ap"] is None else row["ap"], reverse=True)


def matrix_table(results: DetectionResults) -> dict | None:
    """The confusion matrix; None where there are neither boxes nor detections."""
    matrix, names = results.confusion_matrix(), results.index.categories.names
    if not matrix.any():
        return None
    shown = most_confused_categories(matrix, MAX_MATRIX)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    chosen = np.append(shown, len(names))
    rows = [
        {
            "name": None if t == len(names) else names[t],
            "cells": [
                {"count": int(matrix[t, d]), "share": shares[t, d], "correct": t == d}
                for d in chosen
            ],
        }
        for t in chosen
    ]
    pairs = most_confused_pairs(matrix, 10) if len(shown) < len(names) else []
    return {
        "names": [names[k] for k in shown],
        "rows": rows,
        "categories": len(names),
        "pairs": [(names[t], names[d], int(matrix[t, d])) for t, d in pairs],
    }


# ------------------------------------------------------------------------------------ the setup


def setup_facts(history: RunHistory) -> list[tuple[str, str]]:
    """What was trained on what, as (label, text)."""
    start, args = history.start, args_of(history.start)
    test_only, overfit = args.get("test_only"), args.get("overfit")
    names = category_names(start)
    processes = f", {start['world_size']} processes" if start.get("world_size", 1) > 1 else ""
    val_images = f"the same (--overfit {overfit})" if overfit else images_of(start, "val")
    rows = [
        ("Model", args.get("model")),
        ("Image size", image_size(args)),
        ("Initial weights", initial_weights(args)),
        ("Categories", names and f"{len(names)}: {list_some(names, 12)}"),
        ("Training images", images_of(start, "train")),
        ("Validation images", val_images),
        ("Augmentation", not test_only and args.get("data_augmentation")),
        ("Training", test_only and "none: evaluation only"),
        *(training_facts(history) if history.train and not test_only else []),
        ("Device", start.get("device") and start["device"] + processes),
        ("Precision", start.get("precision")),
        ("Speed", speed(history)),
        ("Time", time_taken(history)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (start.get("versions") or {}).items())),
    ]
    return [(label, text) for label, text in rows if text]


def category_names(start: dict) -> list[str]:
    return [row["name"] for row in start.get("categories") or []]


def images_of(start: dict, split: str) -> str | None:
    args, count = args_of(start), start.get(f"{split}_images")
    folder = args.get(f"{split}_annotations") or args.get("data_path")
    return None if count is None else f"{count:,}, from {folder}"


def training_facts(history: RunHistory) -> list[tuple[str, str | None]]:
    args, last = args_of(history.start), history.train[-1]
    processes, accumulate = history.start.get("world_size", 1), args.get("accumulate_steps") or 1
    batch = f"{args.get('batch_size')}"
    batch += f" x {processes} processes" if processes > 1 else ""
    batch += f" x {accumulate} accumulation steps" if accumulate > 1 else ""
    if processes * accumulate > 1 and args.get("batch_size"):
        batch += f" = {args['batch_size'] * processes * accumulate}"
    done = f"{last['step']:,} steps, up to epoch {last['epoch']} (counted from 0)"
    return [
        ("Epochs", f"{args.get('epochs')} planned; {done}"),
        ("Images per step", batch),
        ("Learning rate", learning_rate(args)),
        ("Moving average of weights", args.get("ema") and f"decay {args['ema']}"),
    ]


def image_size(args: dict) -> str | None:
    if args.get("fixed_size"):
        return "stretched to {} x {} pixels (height x width)".format(*args["fixed_size"])
    if args.get("min_size"):
        return (
            f"shorter side resized to {args['min_size']} pixels, longer side at most "
            f"{args.get('max_size')}"
        )
    return None


def initial_weights(args: dict) -> str | None:
    backbone = args.get("weights_backbone")
    if args.get("weights"):
        return f"a whole detector: {args['weights']}"
    if backbone == "none":
        return "random"
    return f"a pretrained backbone, {backbone}; the rest random" if backbone else None


def learning_rate(args: dict) -> str:
    parts = [f"{args.get('lr')} ({args.get('opt')})"]
    if args.get("warmup_steps"):
        parts.append(f"warm-up over {args['warmup_steps']} steps")
    if args.get("lr_scheduler") == "cosineannealinglr":
        parts.append("then cosine annealing to 0")
    elif args.get("lr_steps"):
        drops = " and ".join(map(str, args["lr_steps"]))
        parts.append(f"x {args.get('lr_gamma')} after {drops} epochs")
    return ", ".join(parts)


def speed(history: RunHistory) -> str | None:
    rates, memory = (
        [line[key] for line in history.train if line.get(key) is not None]
        for key in ("images_per_second", "peak_memory_mib")
    )
    if not rates:
        return None
    peak = f", peak memory {max(memory):,.0f} MiB on a device" if memory else ""
    return f"{median(rates):,.1f} images/s in training (median){peak}"


def time_taken(history: RunHistory) -> str:
    n, end = history.resumed, history.end
    resumed = f"resumed {n} times" if n > 1 else "resumed once"
    if end is None:
        return "the run did not reach its end" + (f"; {resumed}" if n else "")
    if n:
        return f"{duration(end['seconds'])} since it was resumed ({resumed})"
    return f"{duration(end['seconds'])}, evaluations included"


def duration(seconds: float) -> str:
    """The two largest units: "2 h 5 min", "3 min 4 s", "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ------------------------------------------------------------------------------------- the page


def one_sentence(history: RunHistory) -> str:
    """The run in one sentence."""
    start, args = history.start, args_of(history.start)
    model, count = args.get("model") or "A detector", len(category_names(start))
    categories = "1 category" if count == 1 else f"{count:,} categories"
    if args.get("test_only") or start.get("train_images") is None:
        return f"{model}, evaluated on {categories}."
    steps = f"after {history.train[-1]['step']:,} steps" if history.train else "no step yet"
    return f"{model}, trained to detect {categories} on {start['train_images']:,} images; {steps}."


def key_numbers(history: RunHistory, results: DetectionResults | None) -> list[tuple[str, str]]:
    """The few numbers to remember, as (number, what it is)."""
    last, best, tiles = history.last, history.best, []
    if last is not None:
        tiles.append((digits(last.get("AP")), "AP, last evaluation"))
        tiles.append((digits(last.get("AP50")), "AP50, last evaluation"))
    if best is not None and best["AP"] != last.get("AP"):
        tiles.append((digits(best["AP"]), f"AP, best{of_epoch(best)}"))
    counts = results.counts() if results else {}
    for total, name in (("ground_truth", "recall"), ("detections", "precision")):
        if counts.get(total):
            share = counts["correct"] / counts[total]
            tiles.append((f"{share:.0%}", f"{name} at score 0.5, IoU 0.5"))
    return tiles


def of_epoch(line: dict) -> str:
    return "" if line.get("epoch") is None else f", epoch\u00a0{line['epoch']}"


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def render(title: str, history: RunHistory, results: DetectionResults | None, svgs: dict) -> str:
    """The page as HTML, with the figures `svgs` by name."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["digits"] = digits
    environment.filters["count"] = lambda value: "" if value is None else f"{value:,}"
    galleries = build_galleries(results) if results else {}
    cards = [card for gallery in galleries.values() for card in gallery]
    unread = [card["problem"] for card in cards if card["problem"]]
    if unread:
        history.notes.append(
            f"{len(unread)} of {len(cards)} images for the page cannot be read, for example "
            f"{unread[0]}"
        )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        sentence=one_sentence(history),
        notes=history.notes,
        tiles=key_numbers(history, results),
        facts=setup_facts(history),
        flags={k: v for k, v in args_of(history.start).items() if v not in (None, False)},
        accuracy=history.last and accuracy_table(history),
        categories=category_table(history, results),
        svgs=svgs,
        has_val_loss=any(line.get("val_loss") for line in history.evals),
        counts=results and results.counts(),
        matrix=results and matrix_table(results),
        galleries=galleries,
    )


def write(output_dir: Path) -> Path:
    """Write `report.html` in the output folder of a training.

    What is missing for parts of it is said in it, and logged.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no usable `metrics.jsonl`, or the folder cannot be written.
    """
    from reporting import figures  # matplotlib takes its time, and only a report needs it

    history = read_history(output_dir / "metrics.jsonl")
    results = None
    try:
        results = read_results(output_dir, history)
    except UserError as error:
        history.notes.append(f"Detections cannot be compared with the ground truth: {error}")
    svgs = figures.draw_figures(history, results)
    html = render(output_dir.resolve().name, history, results, svgs)
    path = output_dir / "report.html"
    partial_file = output_dir / "report.html.partial"
    try:
        partial_file.write_text(html, encoding="utf-8")
        partial_file.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    for note in history.notes:
        utils.log(f"report: {note}")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        __doc__,
        epilog="Exit codes: 0 done; 2 the folder or what is in it is wrong; 1 anything else.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "output_dir", type=Path, metavar="OUTPUT_DIR", help="what train.py had as --output-dir"
    )
    path = write(parser.parse_args(argv).output_dir)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(main)
