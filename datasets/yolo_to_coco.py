#!/usr/bin/env python3
"""Convert a YOLO folder to COCO's layout, which train.py reads.

    python datasets/yolo_to_coco.py my_yolo my_images

YOLO_FOLDER has images in images/train and images/val, and for each a text file of the same name in
labels/train and labels/val with a line for each box: class, centre x, centre y, width and height,
the last four as fractions of the image's width or height. The folders may also be train/images,
train/labels, val/images and so on, and valid for val. Where images and labels have no such folders
in them, all images become train, for datasets/split.py to split. The classes are named by
classes.txt, a name a line, or by data.yaml.

An image without a label file has no objects. Class 0 becomes category 1, and so on. Boxes get
pixels that are as round as the six decimals of YOLO's files allow: what was in whole pixels, or in
hundredths, is so again. A box of zero size is kept, though it does not train.
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

ROUNDING = 0.51e-6  # half a unit of the sixth decimal, and a little for floats
SLACK = 1e-5  # how far a fraction may be outside of 0 to 1, because of such rounding
FOLDER_NAMES = {"train": ["train"], "val": ["val", "valid"], "test": ["test"]}


def read_yolo(
    args: argparse.Namespace, notes: list[str]
) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """Read YOLO_FOLDER: the images by split, and the names of the classes."""
    names = read_class_names(args.yolo_folder)
    errors, splits = Errors(), {}
    for split, (image_folder, label_folder) in find_splits(args.yolo_folder, notes).items():
        images = layout.find_files(image_folder, IMAGE_SUFFIXES, notes)
        labels = layout.find_files(label_folder, {".txt"}, notes)
        if "classes" not in images:
            labels.pop("classes", None)  # labelImg puts its list of names there
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
    """Find the folders of images and of labels of train and, if there is one, of val."""
    splits = {}
    for split, names in FOLDER_NAMES.items():
        homes = [home for name in names for home in (f"{{}}/{name}", f"{name}/{{}}")]
        found = [home for home in homes if (folder / home.format("images")).is_dir()]
        if len(found) > 1:
            both = " and ".join(str(folder / home.format("images")) for home in found[:2])
            raise UserError(f"{both} both exist: keep one of them")
        if found:
            splits[split] = tuple(folder / found[0].format(kind) for kind in ("images", "labels"))
    if "test" in splits:
        notes.append(f"{splits.pop('test')[0]} is ignored: training reads train and val")
    images = folder / "images"
    if not splits and images.is_dir() and not any(map(Path.is_dir, images.glob("[!.]*"))):
        return {"train": (images, folder / "labels")}
    if "train" not in splits:
        looked = f"{folder / 'images/train'}, {folder / 'train/images'}"
        raise UserError(f"no images to train on; looked for the folders {looked}")
    return splits


def read_class_names(folder: Path) -> list[str]:
    """Read the class names, from class 0 on, from classes.txt or else from data.yaml."""
    file = folder / "classes.txt"
    if file.is_file():
        names = [line.strip() for line in layout.read_text(file).rstrip().splitlines()]
    else:
        file = folder / "data.yaml"
        if not file.is_file():
            raise UserError(f"{folder}/classes.txt and {file} are missing: add one of them")
        names = read_yaml_names(file)
    if not names or "" in names:
        raise UserError(f"{file} has a class without a name, or no class at all")
    if repeated := layout.repeated_values(names):
        raise UserError(f"{file} has two classes of the name {repeated[0]!r}")
    return names


def read_yaml_names(file: Path) -> list[str]:
    """Read `names` of a data.yaml: a list, or a map with the class numbers as keys."""
    remedy = f"correct it, or write the names into {file.parent}/classes.txt, one a line"
    try:
        # Everything stays text: a class named 1, 007, no or on is not a number or a boolean.
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
    """Read a line of a label file of an image of `size` (width, height)."""
    label, *numbers = line.split()
    if len(numbers) != 4:
        hint = ", as of a polygon or a rotated box: export upright boxes"
        found = f"{len(numbers) + 1} columns instead of 5 (class, x, y, width, height)"
        raise UserError(found + (hint if len(numbers) > 5 else ""))
    if not re.fullmatch(r"\d+", label, re.ASCII) or int(label) >= len(names):
        raise UserError(f"class {label} has no name: there are 0 to {len(names) - 1}")
    try:
        fractions = [float(number) for number in numbers]
    except ValueError as error:
        raise UserError(str(error)) from None
    for number, fraction in zip(numbers, fractions, strict=True):
        if not -SLACK <= fraction <= 1 + SLACK:
            raise UserError(f"{number} is not between 0 and 1: it has to be a fraction of the side")
    return Box(names[int(label)], to_pixels(fractions, size))


def to_pixels(fractions: list[float], size: tuple[int, int]) -> list[float]:
    """Convert centre, width and height in fractions to x, y, width, height in pixels."""
    (cx, cy, w, h), (width, height) = fractions, size
    return [
        # The corner has the rounding of the centre and half of that of the side.
        round_within((cx - w / 2) * width, 1.5 * ROUNDING * width),
        round_within((cy - h / 2) * height, 1.5 * ROUNDING * height),
        round_within(w * width, ROUNDING * width),
        round_within(h * height, ROUNDING * height),
    ]


def round_within(value: float, tolerance: float) -> float:
    """The number with the fewest decimals that differs by no more than `tolerance`."""
    decimals = 0
    while abs(round(value, decimals) - value) > tolerance:
        decimals += 1
    return round(value, decimals) + 0.0  # never -0.0


def main(argv: list[str] | None = None) -> None:
    layout.convert(
        layout.build_parser(__doc__, yolo_folder="the folder to convert"), argv, read_yolo
    )


if __name__ == "__main__":
    run_command(main)
