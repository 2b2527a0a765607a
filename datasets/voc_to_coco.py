#!/usr/bin/env python3
"""Turn a PASCAL VOC folder into COCO's layout, which train.py reads.

    python datasets/voc_to_coco.py my_voc my_pictures

VOC_FOLDER has Annotations/*.xml and JPEGImages/ with pictures of the same names. The lists
ImageSets/Main/train.txt and val.txt say what trains and what validates; without them all pictures
are one part, for datasets/split.py to divide.

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

from coco_layout import (
    SUFFIXES,
    Object,
    Parser,
    Picture,
    Problems,
    UsageError,
    at,
    files_in,
    picture_sizes,
    read_categories,
    read_text,
    refuse_existing,
    run_and_exit,
    some_of,
    write_pictures,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("voc_folder", type=Path, metavar="VOC_FOLDER", help="what to convert")
    parser.add_output()
    parser.add_argument(
        "--one-based",
        action="store_true",
        help="boxes are as in the original devkit: pixels from 1, xmax and ymax the last inside",
    )
    parser.add_categories()
    return parser.parse_args(argv)


def read_parts(folder: Path, files: dict[str, Path], notes: list[str]) -> dict[str, list[str]]:
    """Which annotation files, by their keys in `files`, are "train" and which "val"."""
    lists = {part: folder / f"ImageSets/Main/{part}.txt" for part in ("train", "val")}
    there = {part: file for part, file in lists.items() if file.is_file()}
    if not there:
        return {"train": list(files)}
    if "train" not in there:
        raise UsageError(
            f"{lists['val']} is there and {lists['train']} is not: add it, or remove the other to "
            "have all pictures as one part"
        )
    problems, places, parts = Problems(), {}, {}
    for part, file in there.items():
        parts[part] = []
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            key = line.strip()
            with problems.collect(), at(f"{file}:{number}"):
                if key in places:
                    raise UsageError(f"{key} is at {places[key]}, too: keep one of them")
                if key and key not in files:
                    raise UsageError(f"{folder / 'Annotations' / key}.xml is missing")
                if key:
                    places[key] = f"{file}:{number}"
                    parts[part].append(key)
    problems.refuse()
    if left := [str(files[key]) for key in files if key not in places]:
        notes.append(f"{len(left):,} annotation files are in no list: {some_of(left)}")
    return parts


# -------------------------------------------------------------------------- one annotation file


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, *_):
        # Only there can entities be defined, which grow without bound or read other files.
        raise UsageError("there is a DOCTYPE, which VOC does not have: remove it")


def read_xml(file: Path) -> ElementTree.Element:
    """The root of an annotation file; UsageError for what is no XML or has a DOCTYPE."""
    try:
        parser = ElementTree.XMLParser(target=_Builder())
        root = ElementTree.fromstring(file.read_bytes(), parser=parser)
    except UsageError:
        raise
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also: unknown encodings
        raise UsageError(f"not valid XML: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from None
    if root.tag != "annotation":
        raise UsageError(f"the file holds <{root.tag}> and not <annotation>: is it PASCAL VOC?")
    return root


def text_in(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def number_in(element: ElementTree.Element, name: str) -> float:
    try:
        value = float(text_in(element, name))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"<{name}> is {text_in(element, name)!r}, which is not a number")
    return value


def read_object(element: ElementTree.Element, one_based: bool) -> Object:
    name, bndbox = text_in(element, "name"), element.find("bndbox")
    if not name:
        raise UsageError("there is no <name>")
    if bndbox is None:
        raise UsageError("there is no <bndbox>: export boxes")
    difficult = text_in(element, "difficult") or "0"
    if difficult not in ("0", "1"):
        raise UsageError(f"<difficult> is {difficult!r} and neither 0 nor 1")
    left, top, right, bottom = (number_in(bndbox, end) for end in ("xmin", "ymin", "xmax", "ymax"))
    first = 1 if one_based else 0
    bbox = [left - first, top - first, right - left + first, bottom - top + first]
    if min(bbox[2:]) < 0:
        raise UsageError(
            f"xmin, ymin, xmax, ymax are {left:g}, {top:g}, {right:g}, {bottom:g}, so the box ends "
            "before it begins"
        )
    # A difference of floats may end in ...0001, which no annotation file had.
    return Object(name, [round(value, 6) for value in bbox], int(difficult))


def read_size(root: ElementTree.Element, picture: Path) -> tuple[int, int]:
    """Width and height by <size>, which the picture has to confirm, or else by the picture."""
    upright, stored = picture_sizes(picture)
    size = root.find("size")
    sides = [] if size is None else [s for s in ("width", "height") if text_in(size, s)]
    stated = tuple(int(number_in(size, side)) for side in sides)
    if len(stated) < 2 or 0 in stated:
        return upright
    if stated not in (upright, stored):
        raise UsageError(
            "<size> is {} x {}, but {} is {} x {} pixels: put the annotated picture there, or "
            "correct <size> if the boxes fit this one".format(*stated, picture, *upright)
        )
    return stated


def read_objects(root: ElementTree.Element, one_based: bool) -> list[Object]:
    objects = []
    for number, element in enumerate(root.findall("object"), start=1):
        with at(f"object {number} ({text_in(element, 'name') or 'no name'})"):
            objects.append(read_object(element, one_based))
    return objects


def read_pictures(folder: Path, one_based: bool, notes: list[str]) -> dict[str, list[Picture]]:
    """All pictures by part, with their objects."""
    files = files_in(folder / "Annotations", {".xml"}, notes)
    pictures = files_in(folder / "JPEGImages", SUFFIXES, notes)
    if left := [str(pictures[key]) for key in pictures if key not in files]:
        notes.append(f"{len(left):,} pictures have no annotation file: {some_of(left)}")
    problems, parts = Problems(), {}
    for part, keys in read_parts(folder, files, notes).items():
        parts[part] = []
        for key in keys:
            with problems.collect(), at(files[key]):
                if key not in pictures:
                    raise UsageError(f"its picture {folder / 'JPEGImages' / key}.jpg is missing")
                root, picture = read_xml(files[key]), pictures[key]
                objects = read_objects(root, one_based)
                size = read_size(root, picture)
                parts[part].append(Picture(picture, key + picture.suffix, size, objects))
    problems.refuse()
    return parts


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    refuse_existing(args.output)
    categories = args.categories and read_categories(args.categories)
    notes = []
    parts = read_pictures(args.voc_folder, args.one_based, notes)
    objects = [each for part in parts.values() for picture in part for each in picture.objects]
    if args.one_based and (early := sum(min(each.bbox[:2]) < 0 for each in objects)):
        notes.append(f"{early:,} boxes begin before pixel 1: is --one-based right for this data?")
    if categories is None:
        names = sorted({each.category for each in objects})
        categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    write_pictures(args.output, parts, categories, notes)


if __name__ == "__main__":
    run_and_exit(main)
