#!/usr/bin/env python3
"""Convert a YOLO folder to COCO's layout, which train.py reads.

    python datasets/yolo_to_coco.py my_yolo my_images

YOLO_FOLDER has images in images/train and images/val, and for each a text file of the same name in
labels/train and labels/val with one line per box: class, center x, center y, width and height, the
last four as fractions of the image's width or height. The folders may also be train/images,
train/labels, val/images and so on, and `valid` instead of `val`. If images and labels have no
subfolders, all images are in train, and datasets/split.py can split them. The class names come from
classes.txt, one per line, or from data.yaml.

An image without a label file has no objects. Class 0 becomes category 1, and so on. Boxes in pixels
are rounded within the precision of YOLO's six decimals, which restores whole pixels and hundredths.
Boxes of zero size are kept, but not trained on.
"""

import argparse
import re
from pathlib import Path

import coco_layout as layout
import yaml
from coco_layout import Box, Errors, LabeledImage

from internals.errors import UserError
from internals.failures import run_command
from internals.images import IMAGE_SUFFIXES

ROUNDING = 0.51e-6  # half a unit of the sixth decimal, with a margin for floats
SLACK = 1e-5  # rounding may put a fraction this far outside of 0 to 1
FOLDER_NAMES = {"train": ["train"], "val": ["val", "valid"], "test": ["test"]}


def read_yolo(
    args: argparse.Namespace, notes: list[str]
) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """Read YOLO_FOLDER; return the images by split, and the class names."""
    names = read_class_names(args.yolo_folder)
    errors, splits = Errors(), {}
    for split, (image_folder, label_folder) in find_splits(args.yolo_folder, notes).items():
        images = layout.find_files(image_folder, IMAGE_SUFFIXES, notes)
        labels = layout.find_files(label_folder, {".txt"}, notes)
        if "classes" not in images:
            labels.pop("classes", None)  # labelImg writes the class names to the labels
        for key in sorted(labels.keys() - images.keys()):
            errors.append(f"{labels[key]}: its image {image_folder / key}.jpg is missing")
        if unlabeled := len(images.keys() - labels.keys()):
            notes.append(f"{unlabeled:,} images of {split} have no label file, so no objects")
        splits[split] = []
        for key, file in images.items():
            with errors.collect():
                size, boxes = layout.read_image_sizes(file)[0], []
                lines = layout.read_text(labels[key]).splitlines() if key in labels else []
                for number, line in enumerate(lines, start=1):
                    with errors.collect(f"{labels[key]}:{number}"):
                        if line.strip():
                            boxes.append(read_box(line, size, names))
                splits[split].append(LabeledImage(file, key + file.suffix, size, boxes))
    errors.raise_if_any()
    return splits, names


def find_splits(folder: Path, notes: list[str]) -> dict[str, tuple[Path, Path]]:
    """Find the folders (images, labels) of train and, if it exists, of val."""
    splits = {}
    for split, names in FOLDER_NAMES.items():
        patterns = [pattern for name in names for pattern in (f"{{}}/{name}", f"{name}/{{}}")]
        patterns = [p for p in patterns if (folder / p.format("images")).is_dir()]
        if len(patterns) > 1:
            both = " and ".join(str(folder / pattern.format("images")) for pattern in patterns[:2])
            raise UserError(f"{both} both exist: keep one of them")
        if patterns:
            pattern = patterns[0]
            splits[split] = (folder / pattern.format("images"), folder / pattern.format("labels"))
    if "test" in splits:
        notes.append(f"{splits.pop('test')[0]} is ignored: only train and val are converted")
    images = folder / "images"
    if not splits and images.is_dir() and not any(map(Path.is_dir, images.glob("[!.]*"))):
        return {"train": (images, folder / "labels")}
    if "train" not in splits:
        expected = f"{folder / 'images/train'} or {folder / 'train/images'}"
        raise UserError(f"{folder} has no training images: add the folder {expected}")
    return splits


def read_class_names(folder: Path) -> list[str]:
    """Read the class names in the order of their numbers, from classes.txt or else data.yaml."""
    file = folder / "classes.txt"
    if file.is_file():
        names = [line.strip() for line in layout.read_text(file).rstrip().splitlines()]
    else:
        file = folder / "data.yaml"
        if not file.is_file():
            raise UserError(f"{folder}/classes.txt and {file} are missing: add one of them")
        names = read_yaml_names(file)
    if not names or "" in names:
        raise UserError(f"{file} has a class without a name, or no classes")
    if repeated := layout.repeated_values(names):
        raise UserError(f"{file} has two classes with the name {repeated[0]!r}")
    return names


def read_yaml_names(file: Path) -> list[str]:
    """Read `names` of a data.yaml: a list, or a mapping from class numbers to names."""
    remedy = f"correct it, or write the names to {file.parent}/classes.txt, one per line"
    try:
        # BaseLoader reads text only: class names such as 1, 007, no and on are not converted.
        content = yaml.load(layout.read_text(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place} is not valid YAML ({problem}): {remedy}") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        for number in range(len(names)):
            if str(number) not in names:
                raise UserError(f"{file}: 'names' has no class {number}: {remedy}")
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} has no list 'names' of strings: {remedy}")
    return names


def read_box(line: str, size: tuple[int, int], names: list[str]) -> Box:
    """Read a line of the label file of an image with `size` (width, height)."""
    label, *numbers = line.split()
    if len(numbers) != 4:
        message = f"{len(numbers) + 1} columns instead of 5 (class, x, y, width, height)"
        if len(numbers) > 5:
            message += ", as for a polygon or a rotated box: export upright boxes"
        raise UserError(message)
    if not re.fullmatch(r"\d+", label, re.ASCII) or int(label) >= len(names):
        raise UserError(f"class {label} has no name: the classes are 0 to {len(names) - 1}")
    try:
        fractions = [float(number) for number in numbers]
    except ValueError as error:
        raise UserError(str(error)) from None
    for number, fraction in zip(numbers, fractions, strict=True):
        if not -SLACK <= fraction <= 1 + SLACK:
            raise UserError(f"{number} is not between 0 and 1: use fractions of the image size")
    return Box(names[int(label)], to_pixels(fractions, size))


def to_pixels(fractions: list[float], size: tuple[int, int]) -> list[float]:
    """Convert center, width and height in fractions to x, y, width, height in pixels."""
    (cx, cy, w, h), (width, height) = fractions, size
    return [
        # The corner has the rounding error of the center and half of that of the size.
        round_within((cx - w / 2) * width, 1.5 * ROUNDING * width),
        round_within((cy - h / 2) * height, 1.5 * ROUNDING * height),
        round_within(w * width, ROUNDING * width),
        round_within(h * height, ROUNDING * height),
    ]


def round_within(value: float, tolerance: float) -> float:
    """Round to the fewest decimals that change the value by at most `tolerance`."""
    decimals = 0
    while abs(round(value, decimals) - value) > tolerance:
        decimals += 1
    return round(value, decimals) + 0.0  # + 0.0 converts -0.0


def main(argv: list[str] | None = None) -> None:
    """Convert the folder."""
    parser = layout.build_parser(__doc__, yolo_folder="folder to convert")
    layout.convert(parser, argv, read_yolo)


if __name__ == "__main__":
    run_command(main)
