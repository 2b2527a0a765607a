#!/usr/bin/env python3
"""Write report.html: metrics, curves, errors and example images of a training on one page.

    python report.py output

Beside it, suspects.json lists the annotations that may be wrong, worst first, in COCO's format.

Reads metrics.jsonl and detections.json in OUTPUT_DIR, and the validation images at the paths of the
run. The page is a single file without external resources. Missing inputs, such as moved images, are
noted on the page and on the console.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import median

import jinja2
import numpy as np

import coco_eval
import utils
from internals import anchors
from internals.command_line import ArgumentParser
from internals.errors import UserError
from internals.failures import run_command
from internals.score_thresholds import best_point, best_points, overall_curve
from reporting import fonts
from reporting.analysis import (
    DetectionResults,
    RunHistory,
    flags_of,
    most_confused_categories,
    most_confused_pairs,
    read_history,
    read_results,
)
from reporting.gallery import build_galleries, build_suspect_cards, list_some
from reporting.suspects import Suspect, find_suspects, summarize, to_coco

TEMPLATE = Path(__file__).resolve().parent / "reporting/template.html"
MAX_SUSPECTS = 12  # on the page; suspects.json has them all
MAX_MATRIX = 20  # of more categories the confusion matrix shows the most confused ones


# --------------------------------------------------------------------------------------- tables


def accuracy_table(history: RunHistory) -> dict:
    """Return the twelve metrics of COCO, of the last and of the best evaluation."""
    test_only = flags_of(history.eval_start).get("test_only")
    limit = coco_eval.limit_of(history.last)
    columns = {"last (--test-only)" if test_only else "last": history.last}
    if history.best not in (None, history.last):
        columns["best"] = history.best
    elif len(history.evals) > 1:
        columns = {"last and best": history.last}
    return {
        "heads": [name + epoch_suffix(line) for name, line in columns.items()],
        "rows": [
            (name, meaning, [line.get(name) for line in columns.values()])
            for name, meaning in coco_eval.metric_meanings(limit).items()
        ],
    }


def category_table(history: RunHistory, results: DetectionResults | None) -> list[dict]:
    """Return AP, best score threshold and number of ground-truth boxes by category, best AP first.

    None: unknown.
    """
    last, boxes = history.last or {}, {}
    aps, points = coco_eval.ap_by_category(last), coco_eval.points_by_category(last)
    if results:
        names = results.index.categories.display_names
        points = dict(zip(names, best_points(results.matches)[1], strict=True))
        of_usable = results.gt_category[results.index.usable]
        boxes = dict.fromkeys(names, 0) | Counter(names[k] for k in of_usable)
    rows = [
        {
            "name": n,
            "ap": ap,
            "threshold": points[n]["threshold"] if points.get(n) else None,
            "boxes": boxes.get(n),
        }
        for n, ap in aps.items()
    ]
    return sorted(rows, key=lambda row: -1 if row["ap"] is None else row["ap"], reverse=True)


def matrix_table(results: DetectionResults) -> dict | None:
    """Return the confusion matrix, None if there are neither boxes nor detections."""
    matrix, names = results.confusion_matrix(), results.index.categories.display_names
    if not matrix.any():
        return None
    categories = most_confused_categories(matrix, MAX_MATRIX)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    positions = np.append(categories, len(names))  # the last row and column: background
    rows = [
        {
            "name": None if t == len(names) else names[t],
            "cells": [
                {"count": int(matrix[t, d]), "share": shares[t, d], "correct": t == d}
                for d in positions
            ],
        }
        for t in positions
    ]
    pairs = most_confused_pairs(matrix, 10) if len(categories) < len(names) else []
    return {
        "names": [names[k] for k in categories],
        "rows": rows,
        "categories": len(names),
        "pairs": [(names[t], names[d], int(matrix[t, d])) for t, d in pairs],
    }


# ------------------------------------------------------------------------------------ the setup


def setup_facts(history: RunHistory) -> list[tuple[str, str]]:
    """Return the data, model, schedule and hardware of a run, as (label, text)."""
    start, args = history.start, flags_of(history.start)
    names, device = category_names(start), start.get("device")
    val_images = images_of_split(start, "val")
    if args.get("overfit"):
        val_images = f"the same (--overfit {args['overfit']})"
    rows = [
        ("Model", args.get("model")),
        ("Backbone", args.get("backbone")),
        ("Anchors", anchor_boxes(args)),
        ("Image size", image_size(args)),
        ("Initial weights", initial_weights(args)),
        ("Categories", f"{len(names)}: {list_some(names, 12)}" if names else None),
        ("Training images", images_of_split(start, "train")),
        ("Validation images", val_images),
    ]
    if args.get("test_only"):
        rows.append(("Training", "none: evaluation only"))
    else:
        rows += [("Augmentation", args.get("data_augmentation")), *training_facts(history)]
    if device and start.get("world_size", 1) > 1:
        device += f", {start['world_size']} processes"
    rows += [
        ("Device", device),
        ("Precision", start.get("precision")),
        ("Speed", speed(history)),
        ("Time", run_time(history)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (start.get("versions") or {}).items())),
    ]
    return [(label, text) for label, text in rows if text]


def category_names(start: dict) -> list[str]:
    """Return the names of the categories from a "start" line."""
    return [row["name"] for row in start.get("categories") or []]


def images_of_split(start: dict, split: str) -> str | None:
    """Describe the number and the source of the images of a split."""
    args, count = flags_of(start), start.get(f"{split}_images")
    source = args.get(f"{split}_annotations") or args.get("data_path")
    return None if count is None else f"{count:,}, from {source}"


def training_facts(history: RunHistory) -> list[tuple[str, str | None]]:
    """Return epochs, batch and optimizer of a training, as (label, text); empty before a step."""
    if not history.train:
        return []
    args, last = flags_of(history.start), history.train[-1]
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
        ("Recipe", args.get("recipe")),
        ("Learning rate", learning_rate(args)),
        ("Moving average of weights", f"decay {args['ema']}" if args.get("ema") else None),
    ]


def anchor_boxes(args: dict) -> str | None:
    """Describe the anchors, if they are not torchvision's of the model."""
    if args.get("anchor_sizes") is None:
        return None
    return anchors.describe(args["anchor_sizes"], args["anchor_ratios"])


def image_size(args: dict) -> str | None:
    """Describe the size that images are resized to."""
    if args.get("fixed_size"):
        return "stretched to {} x {} pixels (height x width)".format(*args["fixed_size"])
    if args.get("min_size"):
        return (
            f"shorter side resized to {args['min_size']} pixels, longer side at most "
            f"{args.get('max_size')}"
        )
    return None


def initial_weights(args: dict) -> str | None:
    """Describe the source of the initial weights."""
    backbone = args.get("weights_backbone")
    if args.get("weights"):
        return f"pretrained detector, {args['weights']}"
    if backbone == "none":
        return "random"
    return f"pretrained backbone, {backbone}; others random" if backbone else None


def learning_rate(args: dict) -> str:
    """Describe the optimizer, the learning rate and its schedule."""
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
    """Describe the training speed and the peak memory."""
    rates, memory = (
        [line[key] for line in history.train if line.get(key) is not None]
        for key in ("images_per_second", "peak_memory_mib")
    )
    if not rates:
        return None
    peak = f", peak memory {max(memory):,.0f} MiB on a device" if memory else ""
    return f"{median(rates):,.1f} images/s in training (median){peak}"


def run_time(history: RunHistory) -> str:
    """Describe the duration of the run, and how often it was resumed."""
    end = history.end
    resumed = f"resumed {history.resumed} times" if history.resumed > 1 else "resumed once"
    if end is None:
        return "the run did not finish" + (f"; {resumed}" if history.resumed else "")
    if history.resumed:
        return f"{format_duration(end['seconds'])} since it was resumed ({resumed})"
    return f"{format_duration(end['seconds'])}, evaluations included"


def format_duration(seconds: float) -> str:
    """Format seconds in the two largest units: "2 h 5 min", "3 min 4 s", "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ------------------------------------------------------------------------------------- the page


def summary_sentence(history: RunHistory) -> str:
    """Summarize the run in one sentence."""
    start, args = history.start, flags_of(history.start)
    model, count = args.get("model") or "A detector", len(category_names(start))
    categories = "1 category" if count == 1 else f"{count:,} categories"
    if args.get("test_only") or start.get("train_images") is None:
        return f"{model}, evaluated on {categories}."
    steps = f"after {history.train[-1]['step']:,} steps" if history.train else "no step yet"
    return f"{model}, trained to detect {categories} on {start['train_images']:,} images; {steps}."


def key_numbers(history: RunHistory, results: DetectionResults | None) -> list[tuple[str, str]]:
    """Return the numbers for the top of the page, as (number, label)."""
    last, best, tiles = history.last, history.best, []
    if last is not None:
        tiles.append((format_metric(last.get("AP")), "AP, last evaluation"))
        tiles.append((format_metric(last.get("AP50")), "AP50, last evaluation"))
    if best is not None and best["AP"] != last.get("AP"):
        tiles.append((format_metric(best["AP"]), f"AP, best{epoch_suffix(best)}"))
    counts = results.counts() if results else {}
    for total, name in (("ground_truth", "recall"), ("detections", "precision")):
        if counts.get(total):
            share = counts["correct"] / counts[total]
            tiles.append((f"{share:.0%}", f"{name} at score 0.5, IoU 0.5"))
    return tiles


def epoch_suffix(line: dict) -> str:
    """Return ", epoch N", or "" for an evaluation without a training."""
    return "" if line.get("epoch") is None else f", epoch\u00a0{line['epoch']}"


def format_metric(value: float | None) -> str:
    """Format a metric with three decimals, None as a dash."""
    return "-" if value is None else f"{value:.3f}"


def render(
    title: str,
    history: RunHistory,
    results: DetectionResults | None,
    suspects: list[Suspect],
    svgs: dict,
) -> str:
    """Render the page as HTML, with the figures `svgs` by name."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["metric"] = format_metric
    environment.filters["count"] = lambda value: "" if value is None else f"{value:,}"
    galleries = build_galleries(results) if results else {}
    cards = [card for gallery in galleries.values() for card in gallery]
    errors = [card["problem"] for card in cards if card["problem"]]
    if errors:
        history.notes.append(
            f"{len(errors)} of {len(cards)} images for the page cannot be read, for example: "
            f"{errors[0]}"
        )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        sentence=summary_sentence(history),
        notes=history.notes,
        tiles=key_numbers(history, results),
        facts=setup_facts(history),
        flags={k: v for k, v in flags_of(history.start).items() if v not in (None, False)},
        accuracy=accuracy_table(history) if history.last else None,
        categories=category_table(history, results),
        best=best_point(overall_curve(results.matches)) if results else None,
        svgs=svgs,
        has_val_loss=any(line.get("val_loss") for line in history.evals),
        counts=results.counts() if results else None,
        matrix=matrix_table(results) if results else None,
        galleries=galleries,
        suspects=summarize(suspects),
        suspect_cards=build_suspect_cards(results, suspects[:MAX_SUSPECTS]),
    )


def write(output_dir: Path) -> Path:
    """Write `report.html` and `suspects.json` in the output folder of a training.

    Missing inputs are noted on the page and logged.

    Returns:
        The path of the page.

    Raises:
        UserError: `metrics.jsonl` is missing or invalid, or the folder cannot be written to.
    """
    from reporting import figures  # imports matplotlib, which is slow

    history = read_history(output_dir / "metrics.jsonl")
    results = None
    try:
        results = read_results(output_dir, history)
    except UserError as error:
        history.notes.append(f"Detections cannot be compared with the ground truth: {error}")
    suspects = find_suspects(results) if results else []
    svgs = figures.draw_figures(history, results)
    html = render(output_dir.resolve().name, history, results, suspects, svgs)
    path = output_dir / "report.html"
    write_file(path, html)
    if results:
        file = output_dir / "suspects.json"
        write_file(file, json.dumps(to_coco(results, suspects)))
        kinds = f": {summarize(suspects)}" if suspects else ""
        utils.log(f"report: {len(suspects):,} suspect annotations in {file}{kinds}")
    for note in history.notes:
        utils.log(f"report: {note}")
    return path


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    partial_file = path.with_name(f"{path.name}.partial")
    try:
        partial_file.write_text(text, encoding="utf-8", errors="replace")
        partial_file.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = ArgumentParser(
        __doc__,
        epilog="Exit codes: 0 done; 2 error in the folder or its files; 1 any other error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "output_dir", type=Path, metavar="OUTPUT_DIR", help="the --output-dir of train.py"
    )
    parser.add_argument(
        "--font",
        type=Path,
        metavar="FILE",
        help="a .ttf or .otf font for the names in the images (default: one of the system that has "
        "their characters; names that no font has are drawn as 'category ID')",
    )
    args = parser.parse_args(argv)
    fonts.prefer_font(args.font)
    path = write(args.output_dir)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(main)
