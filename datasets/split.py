#!/usr/bin/env python3
"""Divide one COCO annotation file into a part to train on and a part to validate on.

    python datasets/split.py all.json all_pictures my_pictures --val-share 0.2

Both parts get their share of every category, counted in pictures that have it: iterative
stratification (Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, 2011),
the rarest category first. Each picture is in one part, with all of its annotations; everything else
in the file is in both. The same seed gives the same parts.
"""

import argparse
import random
from collections import Counter
from pathlib import Path, PurePosixPath

from coco_layout import (
    Parser,
    Problems,
    UsageError,
    list_of,
    read_annotations,
    refuse_existing,
    repeated_values,
    run_and_exit,
    write,
)

PICTURES = None  # stands among the category ids for what every picture has


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS.json", help="what to divide")
    parser.add_argument("images", type=Path, metavar="IMAGES_FOLDER", help="its pictures")
    parser.add_output()
    parser.add_argument(
        "--val-share",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="how much validates, between 0 and 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice (default: %(default)s)"
    )
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------- what there is


def read(file: Path, folder: Path) -> dict:
    """The content of the annotation file; UsageError for all that stands in the way of dividing."""
    content = read_annotations(file)
    images = list_of(content, "images", {"id": int, "file_name": str}, file)
    annotations = list_of(content, "annotations", {"image_id": int, "category_id": int}, file)
    list_of(content, "categories", {"id": int}, file)
    problems = Problems()
    for name in ("id", "file_name"):
        for value in repeated_values(row[name] for row in images):
            problems.found.append(f"{file}: two images have the {name} {value!r}: keep one")
    known = {row["id"] for row in images}
    for row in annotations:
        if row["image_id"] not in known:
            place = f"annotation {row.get('id', '')} of image {row['image_id']}"
            problems.found.append(f"{file}: {place}, which is not in the file: take it out")
    for row in images:
        path = PurePosixPath(row["file_name"])
        if path.is_absolute() or ".." in path.parts:
            problems.found.append(f"{file}: {path} (image {row['id']}) leads out of {folder}")
        elif not (folder / path).is_file():
            problems.found.append(f"{folder / path} (image {row['id']}) is missing")
    problems.refuse()
    return content


# ------------------------------------------------------------------------------------- dividing


def choose(content: dict, val_share: float, seed: int) -> set[int]:
    """The ids of the images that validate.

    Of the category with the fewest pictures left, one picture after the other goes to the part
    that still wants more pictures of that category or, if both want as many, more pictures at all.
    """
    categories = {row["id"]: {PICTURES} for row in content["images"]}
    for row in content["annotations"]:
        categories[row["image_id"]].add(row["category_id"])
    left = Counter(category for having in categories.values() for category in having)
    wanted = {
        part: {category: number * amount for category, number in left.items()}
        for part, amount in (("train", 1 - val_share), ("val", val_share))
    }
    waiting = list(categories)
    random.Random(seed).shuffle(waiting)
    val = set()
    while waiting:
        rarest = min((c for c in left if left[c]), key=lambda c: (left[c], c is PICTURES, c or 0))
        for image_id in [i for i in waiting if rarest in categories[i]]:
            part = max(wanted, key=lambda part: (wanted[part][rarest], wanted[part][PICTURES]))
            for category in categories[image_id]:
                wanted[part][category] -= 1
                left[category] -= 1
            if part == "val":
                val.add(image_id)
        waiting = [i for i in waiting if rarest not in categories[i]]
    return val


def part_of(content: dict, image_ids: set[int]) -> dict:
    """The annotation file with these images alone, and their annotations; the rest as it is."""
    images = [row for row in content["images"] if row["id"] in image_ids]
    annotations = [row for row in content["annotations"] if row["image_id"] in image_ids]
    return {**content, "images": images, "annotations": annotations}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    refuse_existing(args.output)
    content = read(args.annotations, args.images)
    val = choose(content, args.val_share, args.seed)
    train = {row["id"] for row in content["images"]} - val
    if not (train and val):
        raise UsageError(
            f"{args.annotations} has {len(train | val)} images, too few for two parts with "
            f"--val-share {args.val_share}"
        )
    parts = {"train": part_of(content, train), "val": part_of(content, val)}
    files = {
        part: {row["file_name"]: args.images / row["file_name"] for row in rows["images"]}
        for part, rows in parts.items()
    }
    write(args.output, parts, files, [])


if __name__ == "__main__":
    run_and_exit(main)
