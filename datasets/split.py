#!/usr/bin/env python3
"""Split one COCO annotation file into train and val, once or in K folds for cross-validation.

    python datasets/split.py all.json all_images my_images --val-share 0.2
    python datasets/split.py all.json all_images my_folds --folds 5

Both splits get their share of each category, counted in images with that category, by iterative
stratification (Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, 2011).
Each image is in one split, with all its annotations; everything else in the file is in both. The
same seed gives the same splits. With --folds the data sets are OUTPUT/fold0 and so on; each image
is in val of one of them.
"""

import posixpath
import random
from collections import Counter
from pathlib import Path

import coco_layout as layout
import numpy as np

from internals import file_names
from internals.annotations import to_integer
from internals.command_line import ArgumentParser, fraction, int_at_least_2
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


def stratify(content: dict, shares: list[float], seed: int) -> list[set[int]]:
    """Divide the ids of the images into parts with these shares by iterative stratification.

    The category with the fewest remaining images comes first. Each of its images goes to the part
    that lacks most images of that category or, if several lack the same number, most in total.
    """
    categories = {row["id"]: {ANY} for row in content["images"]}
    for row in content["annotations"]:
        categories[row["image_id"]].add(row["category_id"])
    remaining = Counter(category for ids in categories.values() for category in ids)
    lacking = [
        {category: count * share for category, count in remaining.items()} for share in shares
    ]
    image_ids = list(categories)
    random.Random(seed).shuffle(image_ids)
    parts = [set() for _ in shares]
    while image_ids:
        rarest = min(
            (c for c in remaining if remaining[c]), key=lambda c: (remaining[c], c is ANY, c or 0)
        )
        for image_id in [i for i in image_ids if rarest in categories[i]]:
            part = max(range(len(parts)), key=lambda n: (lacking[n][rarest], lacking[n][ANY]))
            for category in categories[image_id]:
                lacking[part][category] -= 1
                remaining[category] -= 1
            parts[part].add(image_id)
        image_ids = [i for i in image_ids if rarest not in categories[i]]
    return parts


def select_images(content: dict, image_ids: set[int]) -> dict:
    """Return the annotation file with only these images and their annotations."""
    images = [row for row in content["images"] if row["id"] in image_ids]
    annotations = [row for row in content["annotations"] if row["image_id"] in image_ids]
    return {**content, "images": images, "annotations": annotations}


def find_files(contents: dict[str, dict], folder: Path) -> dict[str, dict[str, Path]]:
    """Return for each split the image file of each file name."""
    return {
        split: {row["file_name"]: folder / row["file_name"] for row in content["images"]}
        for split, content in contents.items()
    }


def write_folds(output: Path, datasets: list[dict], folder: Path, notes: list[str]) -> None:
    """Write the data sets of all folds; print what `write_dataset` prints, once for all."""
    roots = [output / f"fold{number}" for number in range(len(datasets))]
    linked = []
    for root, contents in zip(roots, datasets, strict=True):
        linked += layout.write_files(root, contents, find_files(contents, folder))
    vals = {root.name: contents["val"] for root, contents in zip(roots, datasets, strict=True)}
    notes.append("the columns count val of each fold; its train has the other images")
    command = layout.next_command(roots[0], datasets[0])
    layout.print_summary(output, vals, notes, layout.describe_links(linked), command)


def build_parser() -> ArgumentParser:
    """Build the parser of this script."""
    parser = layout.build_parser(
        __doc__, annotations="annotation file to split", images="folder of its images"
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--val-share", type=fraction, default=0.2, metavar="SHARE",
        help="share of the images for val, between 0 and 1 (default: %(default)s)")  # fmt: skip
    add("--folds", type=int_at_least_2, metavar="K",
        help="write K data sets, each with another K-th of the images as val (default: one data "
        "set)")  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Split the annotation file and its images."""
    args = build_parser().parse_args(argv)
    layout.check_output(args.output)
    notes = []
    content = load_annotations(args.annotations, args.images, notes)
    folds, share = args.folds, args.val_share
    shares = [1 / folds] * folds if folds else [1 - share, share]
    parts = stratify(content, shares, args.seed)
    if not all(parts):
        flag = f"--folds {folds}" if folds else f"--val-share {share}"
        count = len(content["images"])
        raise UserError(f"{args.annotations} has {count:,} images, too few to split with {flag}")
    every = set().union(*parts)
    datasets = [
        {
            split: select_images(content, ids)
            for split, ids in (("train", every - val), ("val", val))
        }
        for val in (parts if folds else parts[1:])
    ]
    if folds:
        write_folds(args.output, datasets, args.images, notes)
    else:
        layout.write_dataset(args.output, datasets[0], find_files(datasets[0], args.images), notes)


if __name__ == "__main__":
    run_command(main)
