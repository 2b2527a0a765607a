#!/usr/bin/env python3
"""One page, report.html, of what a training has come to: numbers, curves, mistakes and pictures.

    python report.py output

reads metrics.jsonl and detections.json in OUTPUT_DIR, and the validation pictures where the run
found them. The page needs nothing but itself: send it to whom you like. What is not there, such as
an evaluation, or pictures that were moved, is said on the page and here.
"""

import argparse
import base64
import io
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

import coco_eval
import utils
from internals.errors import UserError
from reporting import drawing
from reporting.analysis import (
    Record,
    Results,
    arguments,
    column,
    confusion,
    digits,
    most_confused,
    number,
    read_picture,
    read_record,
    read_results,
    short,
)

TEMPLATE = Path(__file__).resolve().parent / "reporting/template.html"
MANY = 20  # of more categories than these the matrix shows the most confused ones
GALLERIES = {"best": 4, "worst": 6, "random": 4}
LONGEST_SIDE = 640  # pixels of the pictures on the page: 28 of them take two or three megabytes


# ------------------------------------------------------------------- tables that the page draws


def bars(numbers: dict, results: Results | None) -> list[dict]:
    """AP of each category with how many boxes it has (None if unknown), the best first."""
    per_category = numbers.get("per_category")
    per_category = per_category if isinstance(per_category, dict) else {}
    names = results.index.categories.names if results else ()
    true = results.true_category[results.index.usable] if results else []
    boxes = dict.fromkeys(names, 0) | Counter(names[k] for k in true)
    rows = [
        {"name": name, "ap": number(per_category, name), "boxes": boxes.get(name)}
        for name in per_category
    ]
    return sorted(rows, key=lambda row: -1 if row["ap"] is None else row["ap"], reverse=True)


def matrix_table(results: Results) -> dict | None:
    """The confusion matrix as the page shows it; None where nothing was there or found."""
    matrix, names = confusion(results), results.index.categories.names
    if not matrix.any():
        return None
    everything = len(names) <= MANY
    kept = np.arange(len(names)) if everything else most_confused(matrix, MANY)
    chosen = np.append(kept, len(names))
    part, whole = matrix[np.ix_(chosen, chosen)], matrix[chosen].sum(axis=1).clip(min=1)
    rows = []
    for n, (counts, total) in enumerate(zip(part.tolist(), whole.tolist(), strict=True)):
        cells = [
            {"count": count, "share": count / total, "right": n == m}
            for m, count in enumerate(counts)
        ]
        rows.append({"name": names[kept[n]] if n < len(kept) else None, "cells": cells})
    return {
        "names": [names[k] for k in kept],
        "rows": rows,
        "all": len(names),
        "pairs": [] if everything else mixed_up_pairs(matrix, names),
    }


def mixed_up_pairs(matrix: np.ndarray, names: tuple[str, ...], most: int = 10) -> list[dict]:
    """The categories that are taken for each other most often."""
    mixed = matrix[:-1, :-1] * (1 - np.eye(len(names), dtype=np.int64))
    best = np.argsort(-mixed, axis=None, kind="stable")[:most]
    pairs = zip(*(axis.tolist() for axis in np.unravel_index(best, mixed.shape)), strict=True)
    return [
        {"true": names[t], "found": names[f], "count": int(mixed[t, f])}
        for t, f in pairs
        if mixed[t, f]
    ]


# ----------------------------------------------------------------------------------- galleries

RIGHT, WRONG, MIXED, IGNORED = (0, 114, 178), (213, 94, 0), (240, 228, 66), (150, 150, 150)


def choose_pictures(results: Results) -> dict[str, list[int]]:
    """Positions of images: with the fewest and with the most mistakes, and others by chance.

    Mistakes are boxes missed, false, or of the wrong category. No image is there twice.
    """
    count = partial(np.bincount, minlength=len(results.index))
    of_found = results.index.positions_of(results.sure[:, 0].astype(np.int64))
    of_true = results.index.image_of_rows()
    right, wrong = count(of_found[results.right]), count(of_found[results.mixed_up])
    mistakes = wrong + count(of_found[results.false]) + count(of_true[results.missed])
    best = np.lexsort((-right, mistakes))
    best = best[right[best] > 0][: min(GALLERIES["best"], -(-len(results.index) // 3))]
    worst = np.argsort(-mistakes, kind="stable")
    worst = worst[(mistakes[worst] > 0) & ~np.isin(worst, best)][: GALLERIES["worst"]]
    others = np.setdiff1d(np.arange(len(results.index)), np.concatenate([best, worst]))
    few = min(GALLERIES["random"], len(others))
    random = np.random.default_rng(0).choice(others, few, replace=False)
    return {"best": best.tolist(), "worst": worst.tolist(), "random": sorted(random.tolist())}


def card(results: Results, i: int) -> dict:
    """Image i of the index for the page: what is wrong with it in words, and two pictures.

    Where it cannot be read, `problem` says why, and there are no pictures.
    """
    index = results.index
    found = np.flatnonzero(results.sure[:, 0] == index.image_ids[i])
    true, found, said = notes_on(results, index.box_range(i), found)
    result = {
        "file": index.file_name(i),
        "id": int(index.image_ids[i]),
        "said": said,
        "pictures": [],
        "problem": None,
    }
    try:
        image, factor = shrunk(read_picture(index, i))
    except UserError as error:
        return {**result, "problem": str(error)}
    for label, boxes in (("truth", true), ("found", found)):
        result["pictures"].append({"label": label, **jpeg(image, factor, boxes)})
    return result


def notes_on(results: Results, true: slice, found: np.ndarray) -> tuple[list, list, list]:
    """What to draw of an image, as (box, text, colour), of the truth and of what was found; and
    the mistakes in words. `true` are its rows of the index, `found` those of `results.sure`.
    """
    names = dict(enumerate(results.index.categories.names))
    truth, detections, said = [], [], {"right": [], "called": [], "missed": [], "false": []}
    for row in range(true.start, true.stop):
        name, partner = names.get(int(results.true_category[row]), "?"), results.found_by[row]
        box = results.index.boxes[row]
        if partner == -2:
            if results.index.iscrowd[row]:
                truth.append((box, f"{name}, crowd", IGNORED))
        elif partner == -1:
            truth.append((box, f"{name}, missed", WRONG))
            said["missed"].append(name)
        elif results.right[partner]:
            truth.append((box, name, RIGHT))
        else:
            truth.append((box, name, MIXED))
    for row in found.tolist():
        name = names[int(results.found_category[row])]
        text, partner = f"{name} {results.sure[row, 5]:.2f}", results.truth_of[row]
        box = results.sure[row, 1:5]
        if partner == -2:
            detections.append((box, f"{text}, in a crowd", IGNORED))
        elif partner == -1:
            detections.append((box, f"{text}, false", WRONG))
            said["false"].append(text)
        elif results.right[row]:
            detections.append((box, text, RIGHT))
            said["right"].append(name)
        else:
            true_name = names.get(int(results.true_category[partner]), "?")
            detections.append((box, f"{text}, is {true_name}", MIXED))
            said["called"].append(f"{true_name} called {text}")
    return truth, detections, in_words(said)


def in_words(said: dict[str, list[str]]) -> list[str]:
    words = [f"{len(said['right'])} right"]
    for key, what in (("missed", "missed"), ("false", "false"), ("called", "with a wrong name")):
        if said[key]:
            words.append(f"{len(said[key])} {what} ({some(said[key], 5)})")
    return words


def shrunk(image: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The image with a longest side of at most `LONGEST_SIDE`, and the factor."""
    factor = min(1.0, LONGEST_SIDE / max(image.shape[-2:]))
    if factor < 1:
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        image = interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        image = image.round().clamp(0, 255).to(torch.uint8)
    return image, factor


def jpeg(image: torch.Tensor, factor: float, drawn: list[tuple]) -> dict:
    """The image with boxes, as x, y, width, height before it was resized by `factor`."""
    mistakes_last = sorted(drawn, key=lambda item: item[2] == WRONG)
    xywh = np.array([box for box, *_ in mistakes_last]).reshape(-1, 4) * factor
    xyxy = torch.from_numpy(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])).float()
    texts = [short(text, 40) for _, text, _ in mistakes_last]
    picture = drawing.draw_boxes(image, xyxy, texts, [colour for *_, colour in mistakes_last])
    out = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=78)
    height, width = picture.shape[-2:]
    data = base64.b64encode(out.getvalue()).decode()
    return {"uri": f"data:image/jpeg;base64,{data}", "width": width, "height": height}


# ------------------------------------------------------------------------------------ in words


def some(texts: list[str], most: int) -> str:
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def duration(seconds: float) -> str:
    """The two largest units: "2 h 5 min", "3 min 4 s", "12 s"."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def facts(record: Record) -> list[tuple[str, str]]:
    """What was trained on what, as (label, text)."""
    start, args = record.start, arguments(record.start)
    categories = start.get("categories")
    names = [str(row.get("name")) for row in categories] if isinstance(categories, list) else []
    rows = [
        ("Model", args.get("model")),
        ("Picture size", picture_size(args)),
        ("Begins with", beginning(args)),
        ("Categories", names and f"{len(names)}: {some(names, 12)}"),
        *data_facts(start, args),
        *training_facts(record, args),
        ("Device", device(start)),
        ("Precision", start.get("precision")),
        ("Speed", speed(record)),
        ("Time", time_taken(record)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (start.get("versions") or {}).items())),
    ]
    return [(label, str(text)) for label, text in rows if text]


def data_facts(start: dict, args: dict) -> list[tuple[str, str | None]]:
    home = args.get("data_path")
    rows = []
    for part, name in (("train", "Training pictures"), ("val", "Validation pictures")):
        count = number(start, f"{part}_images")
        folder = args.get(f"{part}_annotations") or home
        rows.append((name, count is not None and f"{count:,}, from {folder}"))
    if args.get("overfit"):
        rows[1] = ("Validation pictures", f"the same (--overfit {args['overfit']})")
    rows.append(("Augmentation", not args.get("test_only") and args.get("data_augmentation")))
    return rows


def training_facts(record: Record, args: dict) -> list[tuple[str, str | None]]:
    if args.get("test_only") or not record.train:
        return [("Training", "none here: an evaluation only" if args.get("test_only") else None)]
    batch, times = args.get("batch_size"), args.get("accumulate_steps") or 1
    world = number(record.start, "world_size") or 1
    share = f"{batch}" + (f" on each of {world} processes" if world > 1 else "")
    share += f", {times} times" if times > 1 else ""
    total = f" = {batch * world * times}" if isinstance(batch, int) and world * times > 1 else ""
    steps, last = number(record.train[-1], "step") or 0, number(record.train[-1], "epoch")
    done = f"{steps:,} steps, up to epoch {last} (counted from 0)" if last is not None else ""
    return [
        ("Epochs", f"{args.get('epochs')} planned; {done}"),
        ("Images in a step", share + total),
        ("Learning rate", learning_rate(args)),
        ("Average of weights", args.get("ema") and f"the last ones, decay {args['ema']}"),
    ]


def picture_size(args: dict) -> str | None:
    if args.get("fixed_size"):
        return "stretched to {} x {} pixels (height x width)".format(*args["fixed_size"])
    if args.get("min_size") is None:
        return None
    return (
        f"shortest side resized to {args['min_size']} pixels, longest at most "
        f"{args.get('max_size')}"
    )


def beginning(args: dict) -> str | None:
    if args.get("weights"):
        return f"a whole detector: {args['weights']}"
    if args.get("weights_backbone") == "none":
        return "random weights"
    backbone = args.get("weights_backbone")
    return f"a pretrained backbone, {backbone}; the rest random" if backbone else None


def learning_rate(args: dict) -> str:
    words = [f"{args.get('lr')} ({args.get('opt')})"]
    if args.get("warmup_steps"):
        words.append(f"warm-up over {args['warmup_steps']} steps")
    if args.get("lr_scheduler") == "cosineannealinglr":
        words.append("then along a cosine down to 0")
    elif args.get("lr_steps"):
        drops = " and ".join(map(str, args["lr_steps"]))
        words.append(f"x {args.get('lr_gamma')} after {drops} epochs")
    return ", ".join(words)


def device(start: dict) -> str | None:
    world = number(start, "world_size") or 1
    return start.get("device") and start["device"] + (f", {world} processes" if world > 1 else "")


def speed(record: Record) -> str | None:
    rates = column(record.train, "images_per_second")
    memory = column(record.train, "peak_memory_mib")
    if not np.isfinite(rates).any():
        return None
    text = f"{np.nanmedian(rates):,.1f} images/s in training (median)"
    if np.isfinite(memory).any():
        text += f", at most {np.nanmax(memory):,.0f} MiB of memory on a device"
    return text


def time_taken(record: Record) -> str | None:
    seconds = number(record.end, "seconds")
    often = f"resumed {record.resumed} times" if record.resumed > 1 else "resumed once"
    if seconds is None:
        return f"not at its end{f'; {often}' if record.resumed else ''}"
    if record.resumed:
        return f"{duration(seconds)} since it was resumed ({often})"
    return f"{duration(seconds)}, evaluations included"


def accuracy_table(record: Record) -> dict:
    """COCO's twelve numbers of the last evaluation and of the best one."""
    which = "last (--test-only)" if arguments(record.tested).get("test_only") else "last"
    lines = {which: record.last}
    if record.best is not None and record.best is not record.last:
        lines["best"] = record.best
    elif len(record.evals) > 1:
        lines = {"last and best": record.last}
    rows = [
        {
            "name": name,
            "meaning": coco_eval.MEANING[name],
            "values": [digits(number(line, name)) for line in lines.values()],
        }
        for name in coco_eval.METRICS
    ]
    return {"heads": [f"{name}{of_epoch(line)}" for name, line in lines.items()], "rows": rows}


def of_epoch(line: dict) -> str:
    epoch = number(line, "epoch")
    return "" if epoch is None else f", epoch\u00a0{epoch:g}"


# ------------------------------------------------------------------------------------- the page


def summary(record: Record) -> str:
    """The whole report in one sentence."""
    start, args = record.start, arguments(record.start)
    model, pictures = args.get("model") or "A detector", number(start, "train_images")
    categories = start.get("categories")
    words = f"{len(categories):,} categories" if isinstance(categories, list) else "objects"
    words = "one category" if words == "1 categories" else words
    if pictures is None or args.get("test_only"):
        return f"{model}, evaluated for {words}."
    steps = number(record.train[-1], "step") if record.train else 0
    learnt = f"after {steps:,} steps" if steps else "no step reported yet"
    return f"{model}, trained to find {words} in {pictures:,} pictures; {learnt}."


def tiles(record: Record, results: Results | None) -> list[tuple[str, str]]:
    """The few numbers to remember, as (number, what it is)."""
    counts = results.counts() if results else {"true": 0, "found": 0}
    best, last = number(record.best, "AP"), number(record.last, "AP")
    found = []
    if record.last is not None:
        found.append((digits(last), "AP, last evaluation"))
        found.append((digits(number(record.last, "AP50")), "AP50, last evaluation"))
    if best is not None and best != last:
        found.append((digits(best), f"AP, best{of_epoch(record.best)}"))
    for whole, what in (("true", "of the true boxes found"), ("found", "of the found boxes right")):
        if counts[whole]:
            share = counts["right"] / counts[whole]
            found.append((f"{share:.0%}", f"{what}, score 0.5 or more"))
    return found


def page(title: str, record: Record, results: Results | None, drawn: dict) -> str:
    """The HTML, with the figures `drawn` by name."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["digits"] = digits
    environment.filters["count"] = lambda value: "" if value is None else f"{value:,}"
    galleries = {}
    if results:
        chosen = choose_pictures(results).items()
        galleries = {kind: [card(results, i) for i in images] for kind, images in chosen}
    unread = [c for cards in galleries.values() for c in cards if c["problem"]]
    if unread:
        record.notes.append(
            f"{len(unread)} of {sum(map(len, galleries.values()))} pictures for the page cannot be "
            f"read, for example {unread[0]['problem']}"
        )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        summary=summary(record),
        notes=record.notes,
        tiles=tiles(record, results),
        facts=facts(record),
        flags={k: v for k, v in arguments(record.start).items() if v not in (None, False)},
        accuracy=record.last and accuracy_table(record),
        bars=bars(record.last or {}, results),
        drawn=drawn,
        validated=any(isinstance(line.get("val_loss"), dict) for line in record.evals),
        counts=results and results.counts(),
        matrix=results and matrix_table(results),
        galleries=galleries,
    )


def write(output_dir: Path) -> Path:
    """Write `report.html` in a training's output folder and return its path.

    What is missing for parts of it is said in it, and logged. Raises UserError where there can be
    none: without matplotlib, without a `metrics.jsonl` that is whole, in a folder that cannot be
    written.
    """
    try:
        from reporting import (
            figures,  # only here, so that nothing else needs matplotlib or waits for it
        )
    except ImportError as error:
        raise UserError("report.html needs matplotlib: pip install matplotlib") from error
    record = read_record(output_dir / "metrics.jsonl")
    results = None
    try:
        results = read_results(output_dir, record)
    except UserError as error:
        record.notes.append(f"No boxes can be compared with the truth: {error}")
    drawn = figures.draw_all(record, results)
    html = page(output_dir.resolve().name, record, results, drawn)
    path = output_dir / "report.html"
    unfinished = output_dir / "report.html.partial"
    try:
        unfinished.write_text(html, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    for note in record.notes:
        utils.log(f"report: {note}")
    return path


# ------------------------------------------------------------------------------------- the command


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        epilog="Exit codes: 0 done; 2 the folder or what is in it is wrong; 1 anything else.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "output_dir", type=Path, metavar="OUTPUT_DIR", help="what train.py had as --output-dir"
    )
    path = write(parser.parse_args(argv).output_dir)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
