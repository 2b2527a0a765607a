#!/usr/bin/env python3
"""Split one COCO annotation file into train and val.

    python datasets/split.py all.json all_images my_images --val-share 0.2

Both splits get their share of each category, counted in images with that category, by iterative
stratification (Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, 2011).
Each image is in one split, with all its annotations; everything else in the file is in both. The
same seed gives the same splits.
"""

import posixpath
import random
from collections import Counter
from pathlib import Path

import coco_layout as layout
import numpy as np

from internals import file_names
from internals.annotations import to_integer
from internals.command_line import fraction
from internals.errors import UserError
from internals.failures import run_command

ANY = None  # a pseudo category of all images
REQUIRED = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int},
}


def load_annotations(file: Path, folder: Path, notes: list[str]) -> dict:
    """Read the annotation file; raise UserError for wrong ids and missing images.

    File names become those of the files, relative to the folder.
    """
    content, errors = layout.read_annotations(file, REQUIRED), layout.Errors()
    images = content["images"]
    names = np.array([row["file_name"].encode() for row in images], dtype=np.bytes_)
    names, problems, resolved = file_names.resolve_names(names, folder)
    notes += map(str, resolved)
    for row, name in zip(images, names.tolist(), strict=True):
        row["file_name"] = name.decode()
    for key in ("id", "file_name"):
        values = [row[key] for row in images]
        if key == "file_name":
            values = list(map(posixpath.normpath, values))
        for value in layout.repeated_values(values):
            errors.append(f"{file}: two images have the {key} {value!r}: keep one")
    known = {row["id"] for row in images}
    for row in content["annotations"]:
        if row["image_id"] not in known:
            row_id, image_id = row.get("id", ""), row["image_id"]
            errors.append(
                f"{file}: annotation {row_id} refers to unknown image {image_id}: remove it"
            )
    ids = [row["id"] for row in images]
    errors += [f"{file}: {x}" for x in file_names.find_issues(names, problems, ids, folder)]
    errors.raise_if_any()
    set_annotation_ids(content["annotations"], notes)
    return content


def set_annotation_ids(annotations: list[dict], notes: list[str]) -> None:
    """Make the ids of annotations integers, where they have one: numbers from 1, if one is not."""
    rows = [row for row in annotations if row.get("id") is not None]
    ids = [layout.convert_or_none(row["id"], to_integer) for row in rows]
    if None in ids:
        example = rows[ids.index(None)]["id"]
        notes.append(f"annotations have ids that are no integers ({example!r}): numbered anew")
        rows, ids = annotations, range(1, len(annotations) + 1)
    for row, number in zip(rows, ids, strict=True):
        row["id"] = number


def choose_val(content: dict, val_share: float, seed: int) -> set[int]:
    """Choose the ids of the val images by iterative stratification.

    The category with the fewest remaining images comes first. Each of its images goes to the split
    that lacks more images of that category or, if both lack the same number, more images in total.
    """
    categories = {row["id"]: {ANY} for row in content["images"]}
    for row in content["annotations"]:
        categories[row["image_id"]].add(row["category_id"])
    remaining = Counter(category for ids in categories.values() for category in ids)
    lacking = {
        split: {category: count * share for category, count in remaining.items()}
        for split, share in (("train", 1 - val_share), ("val", val_share))
    }
    image_ids = list(categories)
    random.Random(seed).shuffle(image_ids)
    val = set()
    while image_ids:
        rarest = min(
            (c for c in remaining if remaining[c]), key=lambda c: (remaining[c], c is ANY, c or 0)
        )
        for image_id in [i for i in image_ids if rarest in categories[i]]:
            split = max(lacking, key=lambda split: (lacking[split][rarest], lacking[split][ANY]))
            for category in categories[image_id]:
                lacking[split][category] -= 1
                remaining[category] -= 1
            if split == "val":
                val.add(image_id)
        image_ids = [i for i in image_ids if rarest not in categories[i]]
    return val


def select_images(content: dict, image_ids: set[int]) -> dict:
    """Return the annotation file with only these images and their annotations."""
    images = [row for row in content["images"] if row["id"] in image_ids]
    annotations = [row for row in content["annotations"] if row["image_id"] in image_ids]
    return {**content, "images": images, "annotations": annotations}


def main(argv: list[str] | None = None) -> None:
    """Split the annotation file and its images."""
    parser = layout.build_parser(
        __doc__, annotations="annotation file to split", images="folder of its images"
    )
    parser.add_argument(
        "--val-share", type=fraction, default=0.2, metavar="SHARE",
        help="share of the images for val, between 0 and 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    layout.check_output(args.output)
    notes = []
    content = load_annotations(args.annotations, args.images, notes)
    val = choose_val(content, args.val_share, args.seed)
    train = {row["id"] for row in content["images"]} - val
    if not (train and val):
        raise UserError(
            f"{args.annotations} has {len(train | val)} images, too few to split with --val-share "
            f"{args.val_share}"
        )
    contents = {"train": select_images(content, train), "val": select_images(content, val)}
    files = {
        split: {row["file_name"]: args.images / row["file_name"] for row in rows["images"]}
        for split, rows in contents.items()
    }
    layout.write_dataset(args.output, contents, files, notes)


if __name__ == "__main__":
    run_command(main)
