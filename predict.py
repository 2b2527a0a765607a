#!/usr/bin/env python3
"""Detect objects in images; write the detections to a file, and the images with boxes drawn.

With a checkpoint of train.py:

    python predict.py output/model_best.pth my_images --output-dir predictions

With torchvision's weights for the 80 categories of COCO:

    python predict.py COCO_V1 my_images --model fasterrcnn_resnet50_fpn --output-dir predictions
"""

import argparse
import csv
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from tqdm import tqdm

import checkpoint
import coco_eval
import models
import utils
from coco_utils import Categories, CocoIndex, Split
from internals import file_names
from internals.batches import Batch
from internals.bit_depth import BIT_DEPTHS, EARLIER_DEPTH
from internals.command_line import ArgumentParser, positive_int, prepare_output_dir
from internals.devices import choose_device, move_model
from internals.errors import DataError, RunError, UserError
from internals.failures import run_command
from internals.image_arguments import find_images
from internals.image_notes import ImageNote, log_notes
from internals.images import (
    DEEP_SUFFIXES,
    ImageRules,
    measure_bit_depth,
    narrowness,
    read_image,
    read_upright,
)
from internals.mixed_precision import autocast, resolve_precision
from reporting import drawing, fonts

MAX_JPEG_SIDE = 65_500  # pixels: the limit of libjpeg
EPILOG = """\
output in DIR:
  pictures/      the images with boxes, names and scores
  --format coco  detections.json (COCO results) and images.json (the file of each image_id),
                 both readable by pycocotools
  --format csv   detections.csv
  --format yolo  labels/ and classes.txt

Exit codes: 0 done; 1 failed; 2 error in the command line, the checkpoint or some of the images.
"""


BEST, BEST_PER_CATEGORY, DEFAULT_SCORE = "best", "best-per-category", 0.5


def score(text: str) -> float | str:
    """Parse a number from 0 to 1, or the name of thresholds of a checkpoint; an argparse type."""
    if text in (BEST, BEST_PER_CATEGORY):
        return text
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


# fmt: off

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="a .pth file of train.py; with --model the name of torchvision's weights: COCO_V1")
    add("images", nargs="+", metavar="IMAGES",
        help="image files, folders (with their subfolders), or patterns such as 'day*/*.jpg'")
    add("--output-dir", type=Path, required=True, metavar="DIR",
        help="a new or empty folder, required; existing files are never overwritten")
    add("--score-threshold", type=score, metavar="SCORE|best|best-per-category",
        help="drop detections with a lower score, 0 to 1; most models themselves drop those below "
        "0.05; best: the threshold of the checkpoint with the highest F1 on its validation images, "
        f"best-per-category: with those of each category (default: {DEFAULT_SCORE})")
    add("--max-detections", type=positive_int, metavar="N",
        help="keep the N highest scores of an image (default: as in training, 100 in a "
        "Faster R-CNN)")
    add("--format", choices=WRITERS, default="coco",
        help="format of the detections, see below (default: %(default)s)")
    add("--show-truth", type=Path, metavar="FILE",
        help="draw the boxes of this COCO annotation file on the left, and use its image ids "
        "(default: draw detections only, and number the images from 1)")
    add("--font", type=Path, metavar="FILE",
        help="a .ttf or .otf font for the names in the images (default: one of the system that has "
        "their characters; names that no font has are drawn as 'category ID')")
    add("--model", choices=models.MODELS, metavar="NAME",
        help=f"use a detector of torchvision with its weights: {', '.join(models.MODELS)} "
        "(default: the model of the checkpoint)")
    add("--truncated-images", choices=("refuse", "use"), default="refuse",
        help="skip a JPEG whose end is missing, or use it if three quarters of its rows can be "
        "decoded (default: %(default)s)")
    add("--bit-depth", type=int, choices=BIT_DEPTHS, metavar="BITS",
        help="the bits that 16-bit gray images hold: 8, 10, 12, 14 or 16 (default: as in training, "
        "or else those of the largest value in a sample of the images)")
    add("--device", metavar="DEVICE", help="cuda, cuda:N, mps (Apple) or cpu (default: cuda if "
        "available)")
    add("--batch-size", type=positive_int, metavar="N",
        help="run up to N consecutive images of one size together; affects only speed and memory "
        "(default: 8 on CUDA, 1 on a CPU)")
    add("--amp", action="store_true",
        help="mixed precision: float16 on CUDA, bfloat16 on a CPU with instructions for it "
        "(default: float32)")
    return parser.parse_intermixed_args(argv)

# fmt: on


# -------------------------------------------------------------------------------- the images


@dataclass
class InputImage:
    """An image file, its names in the results, its content and its detections."""

    path: Path
    file_name: str  # relative to the common folder of all images, or as annotated if that is a path
    stem: str  # of its output files, unique
    image_id: int
    row: int | None = None  # position in the annotation file
    annotated_size: tuple[int, int] | None = None  # width and height
    size: tuple[int, int] | None = None  # width and height
    pixels: torch.Tensor | None = None  # uint8 [3, H, W], until it is drawn
    error: str | None = None  # why it cannot be used
    notes: list[ImageNote] = field(default_factory=list)
    detections: np.ndarray | None = None  # rows of coco_eval.detection_rows, highest score first


def match_annotations(images: list[InputImage], file: Path, categories: Categories) -> CocoIndex:
    """Read an annotation file, and set the file name, id and size of its images.

    An image matches the longest annotated file name that its path ends with, or else the one that
    means it in another spelling (`file_names`). Images without a match get new ids.

    Raises:
        UserError: The annotation file has other categories, no image matches, or several images
            match one file name.
    """
    index = CocoIndex(Split(file, file.parent), resolve_names=False)
    categories.check_contains(index.categories, file)
    for issue in index.issues:
        utils.log(f"not drawn: {issue}")
    names = [os.path.normpath(index.file_name(i)).replace("\\", "/") for i in range(len(index))]
    rows = match_names(images, {name: i for i, name in reversed(list(enumerate(names)))})
    owners, last_id = {}, int(index.image_ids.max())
    for image in images:
        row = rows.get(image.file_name)
        if row is None:
            last_id += 1
            image.image_id = last_id
            continue
        name, image_id = index.file_name(row), int(index.image_ids[row])
        if row in owners:
            raise UserError(
                f"--show-truth: {file} lists {name} once (id {image_id}), but it "
                f"may be {owners[row]} or {image.path}: remove one from the images"
            )
        owners[row] = image.path
        image.row, image.annotated_size = row, tuple(index.sizes[row].tolist())
        image.image_id = image_id
        if image.path.as_posix().endswith(names[row]):  # else in another spelling
            image.file_name = name
    if not owners:
        raise UserError(f"--show-truth: {file} lists none of the images: compare the file names")
    return index


def match_names(images: list[InputImage], rows: dict[str, int]) -> dict[str, int]:
    """Return the row of each image that one of the names of `rows` means, by its file name."""
    matched, others = {}, []
    for image in images:
        parts = image.path.parts
        endings = ("/".join(parts[n:]) for n in range(len(parts)))
        ending = next((ending for ending in endings if ending in rows), None)
        if ending is None:
            others.append(image.file_name)
        else:
            matched[image.file_name] = rows[ending]
    if others:
        folder = images[0].path.as_posix().removesuffix(images[0].file_name)
        used = set(matched.values())
        names = (name for name, row in rows.items() if row not in used)
        for file, name in file_names.match_files(names, Path(folder), others).items():
            matched[file] = rows[name]
    return matched


def read_input(
    image: InputImage, transform: GeneralizedRCNNTransform, rules: ImageRules
) -> InputImage:
    """Set the pixels and size of an image, or its error."""
    try:
        size = image.annotated_size
        if size:
            pixels = read_image(image.path, *size, rules, image.notes)
        else:
            pixels = read_upright(image.path, rules, image.notes)
    except DataError as error:
        image.error = str(error)
        return image
    height, width = pixels.shape[1:]
    if problem := narrowness(height, width, transform):
        image.error = f"{image.path}: {problem}"
    else:
        image.pixels, image.size = pixels, (width, height)
    return image


# --------------------------------------------------------------------------------- inference


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and what is known about it.

    Attributes:
        model: On the CPU.
        categories: Those it detects.
        bit_depth: The bits of the 16-bit images that it was trained on, if any.
        thresholds: Of `coco_eval.chosen_thresholds`, if any.
    """

    model: nn.Module
    categories: Categories
    bit_depth: int | None = None
    thresholds: dict | None = None


def load_model(weights: str, name: str | None) -> LoadedModel:
    """Load a model from a checkpoint, or one of torchvision by `name`."""
    path = Path(weights)
    if name:
        if path.exists():
            raise UserError(f"--model is for torchvision's weights: remove it, {path} is a file")
        return LoadedModel(*models.torchvision_detector(name, weights))
    if path.is_dir():
        raise UserError(f"{path} is a folder: use a checkpoint in it, {path / checkpoint.BEST}")
    if not path.exists():
        raise UserError(f"{path}: no such file. For torchvision's weights add --model NAME")
    saved = checkpoint.load(path)
    return LoadedModel(
        model=models.from_checkpoint(saved),
        categories=Categories.from_list(saved["categories"]),
        bit_depth=saved["args"].get("bit_depth", EARLIER_DEPTH),
        thresholds=saved.get("score_thresholds"),
    )


def choose_thresholds(args: argparse.Namespace, loaded: LoadedModel) -> dict[int, float]:
    """Return the score threshold of each category id, and log those of the checkpoint.

    Raises:
        UserError: --score-threshold asks for those of the checkpoint, and it has none.
    """
    chosen, ids = args.score_threshold, loaded.categories.ids
    if chosen is None:
        chosen = DEFAULT_SCORE
        if loaded.thresholds:
            overall = loaded.thresholds["overall"]
            utils.log(f"score threshold: {chosen}; the best F1 on the validation images is at "
                      f"{overall:.3f} (--score-threshold best)")  # fmt: skip
    if chosen not in (BEST, BEST_PER_CATEGORY):
        return dict.fromkeys(ids, chosen)
    if args.model:
        raise UserError(f"--score-threshold {chosen} is for checkpoints: torchvision's weights "
                        "have no threshold, give a number")  # fmt: skip
    if loaded.thresholds is None:
        raise UserError(
            f"--score-threshold {chosen}: {args.checkpoint} has no threshold. It was saved within "
            "an epoch or by an earlier version, or nothing was found in its evaluation: use "
            f"{checkpoint.BEST}, or give a number"
        )
    overall = loaded.thresholds["overall"]
    if chosen == BEST:
        utils.log(f"score threshold: {overall:.3f}, with the best F1 on the validation images")
        return dict.fromkeys(ids, overall)
    own = loaded.thresholds["per_category"]
    names = [fonts.one_line(loaded.categories.id_to_name[i]) for i in own]
    listed = ", ".join(f"{name} {own[i]:.3f}" for i, name in zip(own, names, strict=True))
    utils.log(f"score thresholds, with the best F1 on the validation images: {listed}; "
              f"others {overall:.3f}")  # fmt: skip
    return dict.fromkeys(ids, overall) | own


def choose_rules(images: list[InputImage], bit_depth: int | None, truncated: str) -> ImageRules:
    """Decide how images are read: 16-bit ones as in training, else by the largest value of all."""
    if bit_depth is None:
        files = [image.path for image in images if image.path.suffix.lower() in DEEP_SUFFIXES]
        bit_depth, text = measure_bit_depth(files) or (None, "")
        if text:
            utils.log(text)
    return ImageRules(bit_depth, truncated == "use")


@dataclass
class Detector:
    """A model in evaluation mode on its device; call it with a batch of images of one size."""

    model: nn.Module
    categories: Categories
    device: torch.device
    amp_dtype: torch.dtype | None
    thresholds: dict[int, float]  # the lowest score by category id
    highest_score: float = 0.0  # so far

    @torch.inference_mode()
    def __call__(self, batch: list[InputImage]) -> list[InputImage]:
        """Set the detections of images of one size."""
        with autocast(self.device, self.amp_dtype):
            images, _ = Batch([image.pixels for image in batch]).to(self.device)
            outputs = self.model(images)
        category_ids = self.categories.ids_of_labels()
        for image, output in zip(batch, outputs, strict=True):
            rows = coco_eval.detection_rows([output], [image.image_id], category_ids)
            lowest = [self.thresholds[i] for i in rows[:, 6].astype(int).tolist()]
            image.detections = rows[rows[:, 5] >= lowest]
            self.highest_score = max(self.highest_score, rows[:, 5].max(initial=0))
        return batch


def run_inference(
    images: list[InputImage],
    rules: ImageRules,
    detector: Detector,
    draw: Callable,
    batch_size: int,
) -> Iterator[InputImage]:
    """Read, detect and draw; threads read and draw images while the model runs on others.

    Yields:
        The usable images. The errors of the others are printed to stderr.
    """
    threads = min(4, os.cpu_count() or 1)
    load = partial(read_input, transform=detector.model.transform, rules=rules)
    loaded = prefetch_map(load, images, threads, batch_size + threads)
    batches = batch_by_size(skip_unusable(loaded), batch_size)
    detected = chain.from_iterable(map(detector, batches))
    return prefetch_map(draw, detected, threads, 2 * threads)


def prefetch_map(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """Yield `function` of each item in order; threads compute up to `ahead` items in advance."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def skip_unusable(images: Iterable[InputImage]) -> Iterator[InputImage]:
    """Yield the images without an error; print the errors of the others to stderr."""
    for image in images:
        log_notes(image.notes)
        if image.error:
            tqdm.write(f"skipped: {image.error}", file=sys.stderr)
        else:
            yield image


def batch_by_size(images: Iterable[InputImage], batch_size: int) -> Iterator[list[InputImage]]:
    """Batch consecutive images of one size: padding would change detections near borders."""
    for _, group in groupby(images, key=lambda image: image.size):
        while batch := list(islice(group, batch_size)):
            yield batch


# ---------------------------------------------------------------------------------- drawing


def draw_image(
    image: InputImage, folder: Path, categories: Categories, index: CocoIndex | None
) -> InputImage:
    """Write an image with its detections, beside its ground truth if it is annotated."""
    pixels, detections = image.pixels, image.detections
    if image.row is None:
        drawn = drawing.draw_detections(pixels, detections, categories)
    else:
        drawn = drawing.draw_comparison(pixels, index, image.row, detections, categories)
    image.pixels = None
    suffix = ".png" if max(drawn.shape) > MAX_JPEG_SIDE else ".jpg"
    file = folder / (image.stem + suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Subsampled colors, Pillow's default, would smear the thin lines.
    options = {"quality": 90, "subsampling": 0} if suffix == ".jpg" else {}
    Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()).save(file, **options)
    return image


# --------------------------------------------------------------------------------- the results


def write_coco(folder: Path, images: list[InputImage], categories: Categories) -> Path:
    """Write `detections.json` in COCO's results format, and `images.json`.

    `images.json` is an annotation file without annotations, with the file of each `image_id`, for
    `COCO("images.json").loadRes("detections.json")`.
    """
    file = folder / "detections.json"
    rows = np.concatenate([np.empty((0, 7)), *(image.detections for image in images)])
    coco_eval.write_results(rows, file)
    content = {
        "images": [
            {"id": i.image_id, "file_name": i.file_name, "width": i.size[0], "height": i.size[1]}
            for i in images
        ],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in categories.id_to_name.items()],
    }
    (folder / "images.json").write_text(json.dumps(content), encoding="utf-8")
    return file


def write_csv(folder: Path, images: list[InputImage], categories: Categories) -> Path:
    """Write `detections.csv`: one line per box, x and y of its upper left corner, in pixels."""
    file = folder / "detections.csv"
    names = {i: fonts.one_line(name) for i, name in categories.id_to_name.items()}
    # File names on Linux need not be UTF-8: their bytes are written unchanged.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.writer(opened)
        box = ("x", "y", "width", "height")
        writer.writerow(("file_name", "category_id", "category", "score", *box))
        for image in images:
            # The model computes in float32: more digits have no information.
            for _, *xywh, score, i in image.detections.astype(np.float32):
                writer.writerow((image.file_name, int(i), names[int(i)], score, *xywh))
    return file


def write_yolo(folder: Path, images: list[InputImage], categories: Categories) -> Path:
    """Write `labels/`, a text file for each image, and `classes.txt`, the names of class 0, 1, ...

    Each line is `class cx cy w h score`, relative to the width and height of the image.
    """
    for image in images:
        file = folder / "labels" / f"{image.stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for _, x, y, w, h, score, i in image.detections.tolist():
            relative = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(image.size, 2)
            numbers = " ".join(f"{number:.6f}" for number in (*relative, score))
            lines.append(f"{categories.ids.index(i)} {numbers}\n")
        file.write_text("".join(lines), encoding="utf-8")
    names = "".join(
        f"{fonts.one_line(name) or f'category {i}'}\n" for i, name in categories.id_to_name.items()
    )
    (folder / "classes.txt").write_text(names, encoding="utf-8")
    return folder / "labels"


WRITERS = {"coco": write_coco, "csv": write_csv, "yolo": write_yolo}


def summarize(images: list[InputImage], categories: Categories) -> str:
    """Return the number of detections by category, the most frequent first, as a line."""
    counts = Counter(i for image in images for i in image.detections[:, 6])
    names = [
        f"{count:,} {fonts.one_line(categories.id_to_name[i])}" for i, count in counts.most_common()
    ]
    more = f" and {len(names) - 10} more categories" if names[10:] else ""
    by_category = f" ({', '.join(names[:10])}{more})" if names else ""
    return f"images: {len(images):,}; detections: {counts.total():,}{by_category}"


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_arguments(argv)
    fonts.prefer_font(args.font)
    device = choose_device(args.device)
    paths_and_names = find_images(args.images)
    images = [InputImage(*row, image_id) for image_id, row in enumerate(paths_and_names, start=1)]
    loaded = load_model(args.checkpoint, args.model)
    model, categories, bit_depth, _ = loaded
    if args.max_detections:
        models.limit_detections(model, args.max_detections)
    thresholds = choose_thresholds(args, loaded)
    index = match_annotations(images, args.show_truth, categories) if args.show_truth else None
    prepare_output_dir(args.output_dir, must_be_empty=True)
    amp_dtype, precision = resolve_precision(device, args.amp)
    utils.log(f"{args.checkpoint}: {len(categories.ids)} categories; on {device}, {precision}")

    rules = choose_rules(images, args.bit_depth or bit_depth, args.truncated_images)
    detector = Detector(move_model(model, device), categories, device, amp_dtype, thresholds)
    folder = args.output_dir / "pictures"
    draw = partial(draw_image, folder=folder, categories=categories, index=index)
    batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
    finished = run_inference(images, rules, detector, draw, batch_size)
    done, interrupted = [], False
    start = time.perf_counter()
    try:
        for image in tqdm(finished, total=len(images), unit="image", leave=False, disable=None):
            done.append(image)
    except KeyboardInterrupt:
        interrupted = True
    speed = len(done) / (time.perf_counter() - start)

    file = WRITERS[args.format](args.output_dir, done, categories)
    unlisted = [image.file_name for image in done if image.row is None]
    if index and unlisted:
        names = ", ".join(unlisted[:20]) + (", ..." if len(unlisted) > 20 else "")
        utils.log(f"not in {args.show_truth}, no ground truth drawn: {names}")
    utils.log(f"{summarize(done, categories)}; {speed:.2f} images/s")
    if done and detector.highest_score < min(thresholds.values()):
        utils.log(f"highest score: {detector.highest_score:.2f}; try a lower --score-threshold")
    utils.log(f"output: {file} and {folder}{os.sep}")
    if interrupted:
        raise RunError(f"interrupted after {len(done)} of {len(images)} images")
    skipped = sum(image.error is not None for image in images)
    if skipped:
        raise UserError(
            f"{skipped} of {len(images)} images could not be used, see above; the others are done"
        )


if __name__ == "__main__":
    run_command(main)
