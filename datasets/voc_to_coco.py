#!/usr/bin/env python3
"""Convert a PASCAL VOC folder to COCO's layout, which train.py reads.

    python datasets/voc_to_coco.py my_voc my_images

VOC_FOLDER has Annotations/*.xml and JPEGImages/ with images of the same names. The lists
ImageSets/Main/train.txt and val.txt define the splits; without them all images are in train, and
datasets/split.py can split them.

A box xmin, ymin, xmax, ymax becomes x = xmin, y = ymin, width = xmax - xmin, height = ymax - ymin:
labelImg, Roboflow, CVAT and most other tools write coordinates from 0. The original devkit of
PASCAL VOC counts pixels from 1, with xmax and ymax as the last pixels inside: --one-based computes
x = xmin - 1 and width = xmax - xmin + 1, and likewise y and height. Six decimals are kept.

A `difficult` object becomes a crowd (`iscrowd`): VOC's evaluation ignores the former and COCO's the
latter, and neither is trained on. Only the name, bndbox and difficult of an object are read. Boxes
of zero size are kept, but not trained on. Categories get ids from 1 in alphabetical order.
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
    """Read VOC_FOLDER; return the images by split, and the category names."""
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
                    name = find_text(element, "name") or "no name"
                    with errors.collect(f"{files[key]}: object {number} ({name})"):
                        boxes.append(read_box(element, args.one_based))
                size = read_size(root, images[key])
                file_name = key + images[key].suffix
                splits[split].append(LabeledImage(images[key], file_name, size, boxes))
    errors.raise_if_any()
    boxes = [box for labeled in splits.values() for image in labeled for box in image.boxes]
    outside = sum(min(box.bbox[:2]) < 0 for box in boxes)
    if args.one_based and outside:
        notes.append(f"{outside:,} boxes start before pixel 1: is --one-based right for this data?")
    return splits, sorted({box.category for box in boxes})


def read_splits(folder: Path, files: dict[str, Path], notes: list[str]) -> dict[str, list[str]]:
    """Read the lists of the splits; return the keys in `files` by split."""
    train, val = (folder / f"ImageSets/Main/{split}.txt" for split in ("train", "val"))
    lists = {file.stem: file for file in (train, val) if file.is_file()}
    if not files:
        raise UserError(f"{folder / 'Annotations'} has no .xml files: is it a PASCAL VOC folder?")
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
                errors.append(f"{file}:{number}: {key} is also at {places[key]}: keep one of them")
            elif key and key not in files:
                errors.append(f"{file}:{number}: {folder / 'Annotations' / key}.xml is missing")
            elif key:
                places[key] = f"{file}:{number}"
                splits[split].append(key)
    errors.raise_if_any()
    note_files(notes, "annotation files are in no list", files.keys() - places.keys(), files)
    return splits


def note_files(notes: list[str], what: str, keys: set[str], files: dict[str, Path]) -> None:
    """Add a note on skipped files: their number, `what`, and the first three."""
    if keys:
        first = ", ".join(str(files[key]) for key in sorted(keys)[:3])
        notes.append(f"{len(keys):,} {what}: {first}{', ...' if len(keys) > 3 else ''}")


class _TreeBuilder(ElementTree.TreeBuilder):
    def doctype(self, *_):
        # A DOCTYPE can define entities, which may expand without bound or read other files.
        raise ElementTree.ParseError("it has a DOCTYPE, unlike VOC's files: remove it")


def parse_xml(file: Path) -> ElementTree.Element:
    """Parse an annotation file without a DOCTYPE; raise UserError if it is not VOC's."""
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


def find_text(element: ElementTree.Element, path: str) -> str:
    """Return the text at a path, "" if there is none."""
    return (element.findtext(path) or "").strip()


def find_number(element: ElementTree.Element, path: str, default: str = "") -> float:
    """Return the finite number at a path, `default` if there is none."""
    text = find_text(element, path) or default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"<{path.rpartition('/')[2]}> is {text!r}, which is not a number")
    return value


def read_box(element: ElementTree.Element, one_based: bool) -> Box:
    """Read an <object>; a difficult one becomes a crowd."""
    name, difficult = find_text(element, "name"), find_text(element, "difficult") or "0"
    if not name:
        raise UserError("<name> is missing")
    if element.find("bndbox") is None:
        raise UserError("<bndbox> is missing: export boxes")
    if difficult not in ("0", "1"):
        raise UserError(f"<difficult> is {difficult!r} and neither 0 nor 1")
    sides = ("xmin", "ymin", "xmax", "ymax")
    xmin, ymin, xmax, ymax = (find_number(element, f"bndbox/{side}") for side in sides)
    first = 1 if one_based else 0
    bbox = [xmin - first, ymin - first, xmax - xmin + first, ymax - ymin + first]
    if min(bbox[2:]) < 0:
        corners = f"{xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}"
        raise UserError(f"xmin, ymin, xmax, ymax are {corners}: the box has a negative size")
    # Rounding removes the error of the subtraction, such as ...0001.
    return Box(name, [round(value, 6) for value in bbox], int(difficult))


def read_size(root: ElementTree.Element, image: Path) -> tuple[int, int]:
    """Read (width, height) from <size>, checked against the image, or else from the image."""
    upright, stored = layout.read_image_sizes(image)
    stated = tuple(int(find_number(root, f"size/{side}", "0")) for side in ("width", "height"))
    if 0 in stated:
        return upright
    if stated not in (upright, stored):
        raise UserError(
            "<size> is {} x {}, but {} is {} x {} pixels: replace the image by the annotated one, "
            "or correct <size> if the boxes fit this image".format(*stated, image, *upright)
        )
    return stated


def main(argv: list[str] | None = None) -> None:
    """Convert the folder."""
    parser = layout.build_parser(__doc__, voc_folder="folder to convert")
    parser.add_argument(
        "--one-based",
        action="store_true",
        help="boxes as in the original devkit: pixels count from 1, xmax and ymax are inside",
    )
    layout.convert(parser, argv, read_voc)


if __name__ == "__main__":
    run_command(main)
