#!/usr/bin/env python3
"""Convert a PASCAL VOC folder to COCO's layout, which train.py reads.

    python datasets/voc_to_coco.py my_voc my_images

VOC_FOLDER has Annotations/*.xml and JPEGImages/ (or annotations/, images/) with images of the same
names. The lists train.txt (or trainval.txt) and val.txt in ImageSets/Main define the splits. It may
also have the annotation files beside the images, in folders train and valid (or val), as Roboflow
writes them, or in VOC_FOLDER itself, as labelImg does. Without splits all images are in train, and
datasets/split.py can split them. Images for testing (test.txt, a folder test) are never used.

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
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import coco_layout as layout
from coco_layout import Box, Errors, LabeledImage

from internals.errors import UserError
from internals.failures import run_command
from internals.images import IMAGE_SUFFIXES

# What tools write for the two, and VOC itself where nobody has decided.
DIFFICULT = {"": 0, "0": 0, "false": 0, "unspecified": 0, "1": 1, "true": 1}
FOLDER_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLIT_OF_FOLDER = {name: split for split, names in FOLDER_NAMES.items() for name in names}
LIST_FOLDERS = ("ImageSets/Main", "ImageSets", ".")


class Source(NamedTuple):
    """A folder of annotation files and one of images, which may be the same."""

    annotations: Path
    images: Path


class Files(NamedTuple):
    """The annotation files and images of a source, by their names without suffix."""

    annotations: dict[str, Path]
    images: dict[str, Path]


def read_voc(
    args: argparse.Namespace, notes: list[str]
) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """Read VOC_FOLDER; return the images by split, and the category names."""
    errors, splits, unannotated = Errors(), {}, set()
    for split, keys, source, files in find_splits(args.voc_folder, notes):
        splits[split] = read_images(keys, source, files, args, notes, errors)
        without = files.images.keys() - files.annotations.keys()
        unannotated.update(files.images[key] for key in without)
    errors.raise_if_any()
    used = {image.file for labeled in splits.values() for image in labeled}
    layout.note_files(notes, "images have no annotation file and are left out", unannotated - used)
    boxes = [box for labeled in splits.values() for image in labeled for box in image.boxes]
    outside = sum(min(box.bbox[:2]) < 0 for box in boxes)
    if args.one_based and outside:
        notes.append(f"{outside:,} boxes start before pixel 1: is --one-based right for this data?")
    return splits, sorted({box.category for box in boxes})


def read_images(
    keys: list[str],
    source: Source,
    files: Files,
    args: argparse.Namespace,
    notes: list[str],
    errors: Errors,
) -> list[LabeledImage]:
    """Read annotation files with their images; their errors are collected."""
    labeled, owners, stale = [], {}, 0
    for key in keys:
        file = files.annotations[key]
        with errors.collect(file):
            root, boxes = parse_xml(file), []
            image_key, is_stale = find_image(key, root, source, files, args.match)
            stale += is_stale
            image = files.images[image_key]
            if owners.setdefault(image_key, file) != file:
                raise UserError(f"its image {image} is also that of {owners[image_key]}")
            for number, element in enumerate(root.findall("object"), start=1):
                name = find_text(element, "name") or "no name"
                with errors.collect(f"{file}: object {number} ({name})"):
                    boxes.append(read_box(element, args.one_based))
            file_name = image_key + image.suffix
            labeled.append(LabeledImage(image, file_name, read_size(root, image), boxes))
    if stale:
        notes.append(
            f"{stale:,} annotation files have a <filename> of another image, which has its own "
            "annotation file: images are matched by the names of the files"
        )
    return labeled


def find_image(
    key: str, root: ElementTree.Element, source: Source, files: Files, match: str | None
) -> tuple[str, bool]:
    """Find the key of the image of an annotation file.

    It has the name of the file, or else that in <filename>, which tools often leave as it was when
    the files are renamed. If both images exist, and the latter has no annotation file of its own,
    only the user can know: `match` is "stem" or "filename".

    Returns:
        The key, and whether <filename> is that of another annotation file's image.
    """
    stated = PurePosixPath(find_text(root, "filename").replace("\\", "/"))
    name = stated.stem if stated.suffix.lower() in IMAGE_SUFFIXES else stated.name
    other = (PurePosixPath(key).parent / name).as_posix() if name else key
    if other == key or other not in files.images:
        other = None
    has_owner = other in files.annotations
    if match == "filename" and other:
        return other, False
    if key in files.images:
        if other and not has_owner and not match:
            raise UserError(
                f"its image may be {files.images[key].name}, by its own name, or "
                f"{files.images[other].name}, by its <filename>: add --match stem or --match "
                "filename"
            )
        return key, bool(other and has_owner)
    if other and not has_owner and match != "stem":
        return other, False
    raise UserError(f"its image {source.images / key}.jpg is missing: add it, or remove this file")


# -------------------------------------------------------------------------------- splits


def find_splits(folder: Path, notes: list[str]) -> list[tuple[str, list[str], Source, Files]]:
    """Find the splits: their names, the keys of their annotation files, and where these are."""
    if folders := find_split_folders(folder, notes):
        found = [(split, source, find_files(source, notes)) for split, source in folders.items()]
        return [(split, list(files.annotations), source, files) for split, source, files in found]
    source = find_source(folder)
    files = find_files(source, notes)
    splits = read_splits(folder, source, files, notes)
    return [(split, keys, source, files) for split, keys in splits.items()]


def find_source(folder: Path) -> Source:
    """Find the annotations and images of a folder: VOC's two folders, or files side by side."""
    annotations = [folder / name for name in ("Annotations", "annotations")]
    images = [folder / name for name in ("JPEGImages", "images", "Images")]
    annotations = [path for path in annotations if path.is_dir()]
    if annotations:
        return Source(annotations[0], next(filter(Path.is_dir, images), images[0]))
    return Source(folder, folder)


def find_split_folders(folder: Path, notes: list[str]) -> dict[str, Source]:
    """Find the folders of train and val, as Roboflow writes them; {} if there are none."""
    if find_source(folder).annotations != folder:
        return {}
    found = {
        split: [folder / name for name in names if any((folder / name).glob("**/*.xml"))]
        for split, names in FOLDER_NAMES.items()
    }
    for places in found.values():
        if len(places) > 1:
            raise UserError(f"{places[0]} and {places[1]} both exist: keep one of them")
    for place in found.pop("test"):
        notes.append(f"{place} is ignored: only train and val are converted")
    sources = {split: find_source(places[0]) for split, places in found.items() if places}
    if sources and "train" not in sources:
        raise UserError(f"{sources['val'].annotations} exists and {folder / 'train'} does not")
    if sources:
        what = "annotation files are in no folder of a split, and left out"
        layout.note_files(notes, what, folder.glob("*.xml"))
    return sources


def find_files(source: Source, notes: list[str]) -> Files:
    """Find the annotation files and images of a source."""
    beside = source.annotations == source.images
    xml = layout.find_files(source.annotations, {".xml"}, notes, IMAGE_SUFFIXES if beside else ())
    if not xml:
        raise UserError(f"{source.annotations} has no .xml files: is it a PASCAL VOC folder?")
    images = layout.find_files(source.images, IMAGE_SUFFIXES, notes, {".xml"} if beside else ())
    return Files(xml, images)


def read_splits(
    folder: Path, source: Source, files: Files, notes: list[str]
) -> dict[str, list[str]]:
    """Read the lists of the splits; return the keys of annotation files by split."""
    lists = find_lists(folder)
    if not lists:
        splits = split_by_folders(files.annotations)
    else:
        splits = read_lists(lists, source, files.annotations)
    if tested := splits.pop("test", []):
        tested = [files.annotations[key] for key in tested if key in files.annotations]
        layout.note_files(notes, "annotation files are for testing, and left out", tested)
    listed = {*tested, *(files.annotations[key] for keys in splits.values() for key in keys)}
    rest = set(files.annotations.values()) - listed
    layout.note_files(notes, "annotation files are in no list", rest)
    return splits


def find_lists(folder: Path) -> dict[str, Path]:
    """Find the lists train.txt, val.txt, trainval.txt and test.txt in the first folder with any."""
    for place in LIST_FOLDERS:
        names = ("train", "val", "trainval", "test")
        files = {name: folder / place / f"{name}.txt" for name in names}
        if lists := {name: file for name, file in files.items() if file.is_file()}:
            return lists
    return {}


def split_by_folders(annotations: dict[str, Path]) -> dict[str, list[str]]:
    """Split by subfolders named train, val and test; without such a train, all others are that."""
    splits = {}
    for key in annotations:
        top, _, below = key.partition("/")
        split = SPLIT_OF_FOLDER.get(top) if below else None
        splits.setdefault(split, []).append(key)
    others = splits.pop(None, [])
    return {"train": others, **splits}


def read_lists(
    lists: dict[str, Path], source: Source, annotations: dict[str, Path]
) -> dict[str, list[str]]:
    """Read lists of names; return the keys of the annotation files by split.

    trainval.txt is only read where train.txt is missing: train then is what val.txt does not have.
    """
    if "val" in lists and not lists.keys() & {"train", "trainval"}:
        val, train = lists["val"], lists["val"].with_name("train.txt")
        raise UserError(
            f"{val} exists and {train} does not: add it, or remove {val} to split later"
        )
    errors, places, splits = Errors(), {}, {}
    for name in ("test", "train", "val", "trainval"):
        if name not in lists or (name == "trainval" and "train" in lists):
            continue
        keys = splits.setdefault("train" if name == "trainval" else name, [])
        for number, line in enumerate(layout.read_text(lists[name]).splitlines(), start=1):
            place, text = f"{lists[name]}:{number}", line.strip()
            key = find_key(text, annotations)
            owner = places.get(key, "")
            if not text or (name == "trainval" and owner.startswith(str(lists.get("val")))):
                continue
            if owner:
                errors.append(f"{place}: {key} is also at {owner}: keep one of them")
            elif key not in annotations and name != "test":  # VOC's test images have none
                errors.append(f"{place}: {source.annotations / text}.xml is missing")
            else:
                places[key] = place
                keys.append(key)
    errors.raise_if_any()
    if "train" not in splits:  # only test.txt exists
        splits["train"] = [key for key in annotations if key not in places]
    return {name: splits[name] for name in ("train", "val", "test") if name in splits}


def find_key(text: str, annotations: dict[str, Path]) -> str:
    """Return the key that a line of a list means, which may be a path with a suffix."""
    for word in (text, *text.split()[:1]):
        path = PurePosixPath(word.replace("\\", "/"))
        for start in range(len(path.parts)):
            key = PurePosixPath(*path.parts[start:])
            if key.as_posix() in annotations:
                return key.as_posix()
            if key.suffix.lower() in (".xml", *IMAGE_SUFFIXES):
                key = key.with_suffix("")
                if key.as_posix() in annotations:
                    return key.as_posix()
    return text


# ----------------------------------------------------------------------------- annotation files


class _TreeBuilder(ElementTree.TreeBuilder):
    def doctype(self, *_):
        # A DOCTYPE can define entities, which may expand without bound or read other files.
        raise ElementTree.ParseError("it has a DOCTYPE, unlike VOC's files: remove it")


def parse_xml(file: Path) -> ElementTree.Element:
    """Parse an annotation file without a DOCTYPE; raise UserError if it is not VOC's."""
    content = b""
    try:
        content = file.read_bytes()
        try:
            root = _parse(content)
        except (ValueError, LookupError):  # an encoding that expat lacks, such as GBK
            root = _parse(_decode(content))
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"cannot be read as XML: {error}{_encoding_hint(content)}") from None
    except (ValueError, LookupError) as error:
        raise UserError(f"its encoding cannot be read ({error}): save it as UTF-8") from None
    if root.tag != "annotation":
        raise UserError(f"the root is <{root.tag}> and not <annotation>: is it PASCAL VOC?")
    return root


def _parse(content: bytes | str) -> ElementTree.Element:
    return ElementTree.fromstring(content, ElementTree.XMLParser(target=_TreeBuilder()))


def _decode(content: bytes) -> str:
    """Decode by the codec that the XML declaration names."""
    name = _declared_encoding(content)
    # What says GB2312 mostly has characters of its extension GBK.
    return content.decode("gb18030" if name in ("gb2312", "gbk") else name)


def _declared_encoding(content: bytes) -> str:
    declared = re.match(rb"""<\?xml[^>]*encoding=["']([\w.:-]+)["']""", content.lstrip())
    return declared[1].decode().lower() if declared else "utf-8"


def _encoding_hint(content: bytes) -> str:
    if _declared_encoding(content) == "utf-8":
        try:
            content.decode()
        except UnicodeDecodeError:
            return (
                ". It is not UTF-8: save it as UTF-8, or write its encoding into its first line: "
                '<?xml version="1.0" encoding="gbk"?>'
            )
    return ""


def find_text(element: ElementTree.Element, path: str) -> str:
    """Return the text at a path, each white space as one blank; "" if there is none."""
    return " ".join((element.findtext(path) or "").split())


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
    name, difficult = find_text(element, "name"), find_text(element, "difficult")
    if not name:
        raise UserError("<name> is missing")
    if element.find("bndbox") is None:
        raise UserError("<bndbox> is missing: export boxes")
    if difficult.lower() not in DIFFICULT:
        raise UserError(f"<difficult> is {difficult!r} and neither 0 nor 1")
    sides = ("xmin", "ymin", "xmax", "ymax")
    xmin, ymin, xmax, ymax = (find_number(element, f"bndbox/{side}") for side in sides)
    first = 1 if one_based else 0
    bbox = [xmin - first, ymin - first, xmax - xmin + first, ymax - ymin + first]
    if min(bbox[2:]) < 0:
        corners = f"{xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}"
        raise UserError(f"xmin, ymin, xmax, ymax are {corners}: the box has a negative size")
    # Rounding removes the error of the subtraction, such as ...0001.
    return Box(name, [round(value, 6) for value in bbox], DIFFICULT[difficult.lower()])


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
    parser.add_argument(
        "--match",
        choices=("stem", "filename"),
        help="find the image of an annotation file by the name of that file or by its <filename>, "
        "where both exist and differ",
    )
    layout.convert(parser, argv, read_voc)


if __name__ == "__main__":
    run_command(main)
