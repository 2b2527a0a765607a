#!/usr/bin/env python3
"""Convert a PASCAL VOC folder to COCO's layout, which train.py reads.

    python datasets/voc_to_coco.py my_voc my_images

VOC_FOLDER has Annotations/*.xml and JPEGImages/ with images of the same names. The lists
ImageSets/Main/train.txt and val.txt say what is train and what is val; without them all images
become train, for datasets/split.py to split.

A box of xmin, ymin, xmax, ymax gets x = xmin, y = ymin, width = xmax - xmin and height = ymax -
ymin: labelImg, Roboflow, CVAT and most other tools write corners that count from 0. Only the
original devkit of PASCAL VOC, and what keeps to it, counts pixels from 1 and means xmax and ymax to
be the last pixels inside: with --one-based x = xmin - 1 and width = xmax - xmin + 1, and likewise y
and height. Coordinates may have decimals, of which six are kept.

An object that is `difficult` becomes a crowd (`iscrowd`): VOC's evaluation ignores the one as
COCO's ignores the other, and neither trains. Nothing else of an object is read but its name and its
bndbox. A box of zero size is kept, though it does not train. Categories are numbered from 1 in the
order of their names.
"""

import argparse
import math
from pathlib import Path
from xml.etree import ElementTree

import coco_layout as layout
from coco_layout import Box, Errors, LabeledImage

from internals.errors import UserError
from internals.failures import run_command
from internals.images import IMAGE_SUFFIXES


def read_voc(
    args: argparse.Namespace, notes: list[str]
) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """Read VOC_FOLDER: the images by split, and the names of the categories."""
    files = layout.find_files(args.voc_folder / "Annotations", {".xml"}, notes)
    images = layout.find_files(args.voc_folder / "JPEGImages", IMAGE_SUFFIXES, notes)
    note_files(notes, "images have no annotation file", images.keys() - files.keys(), images)
    errors, splits = Errors(), {}
    for split, keys in read_splits(args.voc_folder, files, notes).items():
        splits[split] = []
        for key in keys:
            with errors.collect(files[key]):
                if key not in images:
                    raise UserError(f"its image {args.voc_folder}/JPEGImages/{key}.jpg is missing")
                root, boxes = parse_xml(files[key]), []
                for number, element in enumerate(root.findall("object"), start=1):
                    name = text_of(element, "name") or "no name"
                    with errors.collect(f"{files[key]}: object {number} ({name})"):
                        boxes.append(read_box(element, args.one_based))
                size = read_size(root, images[key])
                file_name = key + images[key].suffix
                splits[split].append(LabeledImage(images[key], file_name, size, boxes))
    errors.raise_if_any()
    boxes = [box for labeled in splits.values() for image in labeled for box in image.boxes]
    if args.one_based and (early := sum(min(box.bbox[:2]) < 0 for box in boxes)):
        notes.append(f"{early:,} boxes begin before pixel 1: is --one-based right for this data?")
    return splits, sorted({box.category for box in boxes})


def read_splits(folder: Path, files: dict[str, Path], notes: list[str]) -> dict[str, list[str]]:
    """Read which annotation files, by their keys in `files`, are train and which val."""
    train, val = (folder / f"ImageSets/Main/{split}.txt" for split in ("train", "val"))
    lists = {file.stem: file for file in (train, val) if file.is_file()}
    if not lists:
        return {"train": list(files)}
    if "train" not in lists:
        raise UserError(
            f"{val} exists and {train} does not: add it, or remove {val} to split later"
        )
    errors, places, splits = Errors(), {}, {split: [] for split in lists}
    for split, file in lists.items():
        for number, line in enumerate(layout.read_text(file).splitlines(), start=1):
            key = line.strip()
            if key in places:
                errors.append(f"{file}:{number}: {key} is at {places[key]}, too: keep one of them")
            elif key and key not in files:
                errors.append(f"{file}:{number}: {folder / 'Annotations' / key}.xml is missing")
            elif key:
                places[key] = f"{file}:{number}"
                splits[split].append(key)
    errors.raise_if_any()
    note_files(notes, "annotation files are in no list", files.keys() - places.keys(), files)
    return splits


def note_files(notes: list[str], what: str, keys: set[str], files: dict[str, Path]) -> None:
    """Note how many files are left out, with the first three."""
    if keys:
        first = ", ".join(str(files[key]) for key in sorted(keys)[:3])
        notes.append(f"{len(keys):,} {what}: {first}{', ...' if len(keys) > 3 else ''}")


class _TreeBuilder(ElementTree.TreeBuilder):
    def doctype(self, *_):
        # Only there can entities be defined, which grow without bound or read other files.
        raise ElementTree.ParseError("it has a DOCTYPE, which VOC does not have: remove it")


def parse_xml(file: Path) -> ElementTree.Element:
    try:
        parser = ElementTree.XMLParser(target=_TreeBuilder())
        root = ElementTree.fromstring(file.read_bytes(), parser=parser)
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"cannot be read as XML: {error}") from None
    except (ValueError, LookupError) as error:
        raise UserError(f"its encoding cannot be read ({error}): save it as UTF-8") from None
    if root.tag != "annotation":
        raise UserError(f"the root is <{root.tag}> and not <annotation>: is it PASCAL VOC?")
    return root


def text_of(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def number_of(element: ElementTree.Element, path: str, default: str = "") -> float:
    text = text_of(element, path) or default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"<{path.rpartition('/')[2]}> is {text!r}, which is not a number")
    return value


def read_box(element: ElementTree.Element, one_based: bool) -> Box:
    """Read an <object>, whose difficulty makes it a crowd."""
    name, difficult = text_of(element, "name"), text_of(element, "difficult") or "0"
    if not name:
        raise UserError("there is no <name>")
    if element.find("bndbox") is None:
        raise UserError("there is no <bndbox>: export boxes")
    if difficult not in ("0", "1"):
        raise UserError(f"<difficult> is {difficult!r} and neither 0 nor 1")
    sides = ("xmin", "ymin", "xmax", "ymax")
    xmin, ymin, xmax, ymax = (number_of(element, f"bndbox/{side}") for side in sides)
    first = 1 if one_based else 0
    bbox = [xmin - first, ymin - first, xmax - xmin + first, ymax - ymin + first]
    if min(bbox[2:]) < 0:
        corners = f"{xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}"
        raise UserError(f"xmin, ymin, xmax, ymax are {corners}: the box ends before it begins")
    # A difference of floats may end in ...0001, which no annotation file had.
    return Box(name, [round(value, 6) for value in bbox], int(difficult))


def read_size(root: ElementTree.Element, image: Path) -> tuple[int, int]:
    """Width and height from <size>, which the image has to confirm, or else from the image."""
    upright, stored = layout.read_image_sizes(image)
    stated = tuple(int(number_of(root, f"size/{side}", "0")) for side in ("width", "height"))
    if 0 in stated:
        return upright
    if stated not in (upright, stored):
        raise UserError(
            "<size> is {} x {}, but {} is {} x {} pixels: put the annotated image there, or "
            "correct <size> if the boxes fit this one".format(*stated, image, *upright)
        )
    return stated


def main(argv: list[str] | None = None) -> None:
    parser = layout.build_parser(__doc__, voc_folder="the folder to convert")
    parser.add_argument(
        "--one-based",
        action="store_true",
        help="boxes are as in the original devkit: pixels from 1, xmax and ymax the last inside",
    )
    layout.convert(parser, argv, read_voc)


if __name__ == "__main__":
    run_command(main)
