#!/usr/bin/env python3
"""Convert a YOLO folder to COCO's layout, which train.py reads.

    python datasets/yolo_to_coco.py my_yolo my_images

The splits are those of data.yaml (`train`, `val`: folders, or .txt lists of images), or else of the
lists train.txt and val.txt, or else of the folders images/train and images/val or train/images and
val/images (also `valid`, `validation`). Without any of these all images are in train, and
datasets/split.py can split them. Images for testing (`test`) are never used. Labels are in a folder
`labels` instead of `images`, or beside the images: a text file of the same name with one line per
box: class, center x, center y, width and height, the last four as fractions of the image's width or
height. The class names come from classes.txt, one per line, or from data.yaml.

An image without a label file has no objects. Class 0 becomes category 1, and so on. Boxes in pixels
are rounded within the precision of YOLO's six decimals, which restores whole pixels and hundredths.
Boxes of zero size are kept, but not trained on.
"""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import coco_layout as layout
import yaml
from coco_layout import Box, Errors, LabeledImage

from internals.errors import UserError
from internals.failures import run_command
from internals.file_names import ABSOLUTE
from internals.images import IMAGE_SUFFIXES

ROUNDING = 0.51e-6  # half a unit of the sixth decimal, with a margin for floats
SLACK = 1e-5  # rounding may put a fraction this far outside of 0 to 1
FOLDER_NAMES = {"train": ["train"], "val": ["val", "valid", "validation"], "test": ["test"]}
YAML = (".yaml", ".yml")


class Sample(NamedTuple):
    """An image, its name in the annotation file, and its label file, if it has one."""

    image: Path
    file_name: str
    label: Path | None


class Config(NamedTuple):
    """The content of a data.yaml; an empty one without a file."""

    file: Path | None
    content: dict


def read_yolo(
    args: argparse.Namespace, notes: list[str]
) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """Read YOLO_FOLDER; return the images by split, and the class names."""
    folder, config = args.yolo_folder, find_config(args.yolo_folder)
    if folder.suffix in YAML and config.file == folder:
        folder = folder.parent
    names = read_class_names(folder, config, args.names)
    errors = Errors()
    samples = find_samples(folder, config, notes, errors)
    splits = {split: [] for split in samples}
    for split, rows in samples.items():
        if unlabeled := sum(row.label is None for row in rows):
            notes.append(f"{unlabeled:,} images of {split} have no label file, so no objects")
        for image, file_name, label in rows:
            with errors.collect():
                size = layout.read_image_sizes(image)[0]
                boxes = read_boxes(label, size, names, args.min_score, errors) if label else []
                splits[split].append(LabeledImage(image, file_name, size, boxes))
    errors.raise_if_any()
    return splits, names


def read_boxes(
    file: Path, size: tuple[int, int], names: list[str], min_score: float | None, errors: Errors
) -> list[Box]:
    """Read a label file; the errors of its lines are collected."""
    boxes = []
    for number, line in enumerate(layout.read_text(file).splitlines(), start=1):
        with errors.collect(f"{file}:{number}"):
            if line.strip() and (box := read_box(line, size, names, min_score)):
                boxes.append(box)
    return boxes


# -------------------------------------------------------------------------------- splits


def find_samples(
    folder: Path, config: Config, notes: list[str], errors: Errors
) -> dict[str, list[Sample]]:
    """Find the images of train and, if it exists, of val; note those that are left out."""
    sources, owners = find_sources(folder, config), {}
    for place in sources.pop("test", ()):
        notes.append(f"{place} is ignored: only train and val are converted")
        owners.update((os.path.realpath(file), "test") for file in images_of(place, folder, config))
    samples = {
        split: collect_samples(places, folder, config, notes, errors)
        for split, places in sources.items()
    }
    if samples.get("val") and samples["val"] == samples["train"]:
        raise UserError(
            f"{config.file or folder}: train and val are the same images: remove val, convert, and "
            "run datasets/split.py on the result"
        )
    for split, rows in samples.items():
        for row in rows:
            owner = owners.setdefault(os.path.realpath(row.image), split)
            if owner != split:
                errors.append(f"{row.image} is in both {owner} and {split}: keep it in one of them")
    rest = (file for file in images_of(folder) if os.path.realpath(file) not in owners)
    layout.note_files(notes, "images are in no split, and left out", rest)
    return samples


def images_of(place: Path, folder: Path | None = None, config: Config | None = None) -> list[Path]:
    """List the images in a folder, or the existing ones of a list of images."""
    if place.is_dir():
        return list(layout.find_files(place, IMAGE_SUFFIXES, [], unique=False).values())
    files = (locate(line, folders) for _, line, folders in read_list(place, folder, config))
    return [file for file in files if file]


def find_sources(folder: Path, config: Config) -> dict[str, list[Path]]:
    """Find the folders and lists of each split: as data.yaml says, or lists, or usual folders."""
    sources = {}
    for split in FOLDER_NAMES:
        stated = config.content.get(split) or []
        for text in [stated] if isinstance(stated, str) else stated:
            place = locate(str(text), search_folders(folder, config))
            if place:
                sources.setdefault(split, []).append(place)
            elif split != "test":
                raise UserError(
                    f"{config.file}: '{split}' is {text!r}, which is not in {folder}: correct it, "
                    "or remove 'train' and 'val' to use the folders images/train and images/val"
                )
    if not sources.keys() & {"train", "val"}:
        sources = {**(find_lists(folder) or find_folders(folder)), **sources}
    if "train" not in sources:
        split, places = next(iter(sources.items()))
        raise UserError(f"{places[0]} is for {split}, and nothing is for train: add the latter")
    return sources


def find_lists(folder: Path) -> dict[str, list[Path]]:
    """Find the lists train.txt, val.txt and test.txt."""
    return {
        split: [folder / f"{name}.txt"]
        for split, names in FOLDER_NAMES.items()
        for name in names
        if (folder / f"{name}.txt").is_file()
    }


def find_folders(folder: Path) -> dict[str, list[Path]]:
    """Find the image folders of each split by their names."""
    sources = {}
    for split, names in FOLDER_NAMES.items():
        places = [folder / p for name in names for p in (f"images/{name}", f"{name}/images")]
        places = [place for place in places if place.is_dir()]
        places = places or [folder / name for name in names if has_images(folder / name)]
        if len(places) > 1:
            raise UserError(f"{places[0]} and {places[1]} both exist: keep one of them")
        if places:
            sources[split] = places
    images = folder / "images"
    if not sources and images.is_dir() and not any(map(Path.is_dir, images.glob("[!.]*"))):
        return {"train": [images]}
    if not sources and has_images(folder):
        return {"train": [folder]}
    if "train" not in sources:
        expected = f"{folder / 'images/train'} or {folder / 'train/images'}"
        raise UserError(f"{folder} has no training images: add the folder {expected}")
    return sources


def has_images(folder: Path) -> bool:
    """Check whether images are in a folder itself."""
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.glob("[!.]*"))


def search_folders(folder: Path, config: Config) -> list[Path]:
    """Return the folders to which paths in data.yaml may be relative."""
    root = config.content.get("path")
    root = locate(root, [folder]) if root and isinstance(root, str) else None
    return [root, folder] if root and root.is_dir() else [folder]


def locate(text: str, folders: list[Path]) -> Path | None:
    """Find the file or folder that a path means, also one of another machine; None if missing.

    Roboflow's paths begin with "../" for a file beside data.yaml.
    """
    path = PurePosixPath(text.strip().replace("\\", "/"))
    is_absolute = bool(ABSOLUTE.match(str(path)))
    literal = [Path(path)] if is_absolute else [folder / path for folder in folders]
    parts = [part for part in path.parts if part not in ("/", "..") and part[1:] != ":"]
    for folder in folders:
        # Of an absolute path of another machine, leading folders may be missing.
        # Darknet's paths begin with the folder "data".
        is_own_name = len(parts) > 1 and parts[0] in (folder.resolve().name, "data")
        count = len(parts) if is_absolute else 1 + is_own_name
        for start in range(count):
            if start == 0 or parts[start:] != ["images"]:  # the images of any split
                literal.append(folder.joinpath(*parts[start:]))
    return next((place for place in literal if os.path.exists(place)), None)


def collect_samples(
    places: list[Path], folder: Path, config: Config, notes: list[str], errors: Errors
) -> list[Sample]:
    """Collect the images of a split from its folders and lists."""
    images = []  # (image, label)
    for place in places:
        if place.is_dir():
            images += pair_folder(place, notes, errors)
            continue
        for number, line, folders in read_list(place, folder, config):
            file = locate(line, folders)
            if file and file.is_file():
                images.append((file, find_label(file)))
            else:
                errors.append(f"{place}:{number}: {line} is missing")
    if not images:
        return []
    if repeated := len(images) - len(set(images)):
        notes.append(f"{repeated:,} repetitions of images in {places[0]} are ignored")
    root = image_folder(places[0]) if len(places) == 1 and places[0].is_dir() else None
    root = root or os.path.commonpath([os.path.abspath(image.parent) for image, _ in images])
    return [
        Sample(image, Path(os.path.relpath(image, root)).as_posix(), label)
        for image, label in dict.fromkeys(images)
    ]


def read_list(place: Path, folder: Path, config: Config) -> Iterator[tuple[int, str, list[Path]]]:
    """Yield number and text of each line of a list, and the folders that it may be relative to."""
    folders = [place.parent, *search_folders(folder, config)]
    for number, line in enumerate(layout.read_text(place).splitlines(), start=1):
        if line.strip():
            yield number, line.strip(), folders


def pair_folder(place: Path, notes: list[str], errors: Errors) -> list[tuple[Path, Path | None]]:
    """Find the images in a folder, each with its label file."""
    place = image_folder(place)
    label_folder = swap_images_for_labels(place)
    if not label_folder or (not label_folder.is_dir() and any(place.glob("**/*.txt"))):
        label_folder = place
    images = layout.find_files(place, IMAGE_SUFFIXES, notes, beside={".txt"})
    others = IMAGE_SUFFIXES if label_folder == place else ()
    labels = layout.find_files(label_folder, {".txt"}, notes, others)
    if "classes" not in images:
        labels.pop("classes", None)  # labelImg writes the class names to the labels
    for key in sorted(labels.keys() - images.keys()):
        errors.append(f"{labels[key]}: its image {place / key}.jpg is missing")
    return [(file, labels.get(key)) for key, file in images.items()]


def image_folder(place: Path) -> Path:
    """Return the subfolder `images` of a split's folder, if there is one."""
    return place / "images" if (place / "images").is_dir() else place


def find_label(image: Path) -> Path | None:
    """Return the label file of an image: in the folder labels instead of images, or beside it."""
    swapped = swap_images_for_labels(image.parent)
    folders = [swapped, image.parent] if swapped else [image.parent]
    files = (folder / f"{image.stem}.txt" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def swap_images_for_labels(folder: Path) -> Path | None:
    """Replace the last component "images" of a path by "labels"; None if there is none."""
    parts = list(folder.parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


# ----------------------------------------------------------------------------- class names


def find_config(folder: Path) -> Config:
    """Read data.yaml, or the only other YAML file of the folder that has class names."""
    if not folder.exists():
        raise UserError(f"{folder} is missing")
    if folder.is_file() and folder.suffix in YAML:
        return Config(folder, read_yaml(folder))
    for name in ("data.yaml", "data.yml"):
        if (folder / name).is_file():
            return Config(folder / name, read_yaml(folder / name))
    files = sorted(file for suffix in YAML for file in folder.glob(f"*{suffix}"))
    configs = []
    for file in files:
        with contextlib.suppress(UserError):  # a file of something else
            configs.append(Config(file, read_yaml(file)))
    configs = [config for config in configs if "names" in config.content]
    if len(configs) > 1:
        raise UserError(
            f"{configs[0].file} and {configs[1].file} both have class names: give the one to use "
            "instead of the folder"
        )
    return configs[0] if configs else Config(None, {})


def read_class_names(folder: Path, config: Config, given: Path | None) -> list[str]:
    """Read the class names in the order of their numbers.

    Args:
        folder: The folder, which may have a classes.txt.
        config: Its data.yaml.
        given: The file to use instead (--names), None to use those, which must agree.
    """
    if given:
        is_yaml = given.suffix in YAML
        return read_yaml_names(Config(given, read_yaml(given))) if is_yaml else read_lines(given)
    file = folder / "classes.txt"
    if not file.is_file() and (folder / "obj.names").is_file():
        file = folder / "obj.names"  # Darknet's and CVAT's
    if not file.is_file():
        if not config.file:
            raise UserError(f"{file} and {folder}/data.yaml are missing: add one of them")
        return read_yaml_names(config)
    names = read_lines(file)
    if "names" in config.content and (others := read_yaml_names(config)) != names:
        raise UserError(
            f"{file} ({', '.join(names)}) and {config.file} ({', '.join(others)}) differ in their "
            "class names: add --names with the one by which the labels are numbered"
        )
    return names


def read_lines(file: Path) -> list[str]:
    """Read class names, one per line."""
    names = [line.strip() for line in layout.read_text(file).rstrip().splitlines()]
    return check_names(names, file)


def check_names(names: list[str], file: Path) -> list[str]:
    """Return class names; raise UserError for repeated and missing ones."""
    if not names or "" in names:
        raise UserError(f"{file} has a class without a name, or no classes")
    if repeated := layout.repeated_values(names):
        raise UserError(f"{file} has two classes with the name {repeated[0]!r}")
    return names


def yaml_remedy(file: Path) -> str:
    """Return what to do about a YAML file that is not as expected."""
    return f"correct it, or write the names to {file.parent}/classes.txt, one per line"


def read_yaml(file: Path) -> dict:
    """Read a YAML file; {} if it is not a mapping."""
    try:
        # BaseLoader reads text only: class names such as 1, 007, no and on are not converted.
        content = yaml.load(layout.read_text(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place} is not valid YAML ({problem}): correct it") from None
    return content if isinstance(content, dict) else {}


def read_yaml_names(config: Config) -> list[str]:
    """Read `names` of a data.yaml: a list, or a mapping from class numbers to names."""
    file, names = config.file, config.content.get("names")
    if isinstance(names, dict):
        for number in range(len(names)):
            if str(number) not in names:
                raise UserError(f"{file}: 'names' has no class {number}: {yaml_remedy(file)}")
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} has no list 'names' of strings: {yaml_remedy(file)}")
    return check_names(names, file)


# --------------------------------------------------------------------------------- boxes


def read_box(
    line: str, size: tuple[int, int], names: list[str], min_score: float | None
) -> Box | None:
    """Read a line of a label file; None if its score is below `min_score`.

    Args:
        line: The line.
        size: Width and height of the image.
        names: The class names.
        min_score: For lines with a score, as a detector writes them; None to reject them.
    """
    label, *numbers = line.split()
    if len(numbers) == 5 and min_score is None:
        raise UserError(
            "6 columns instead of 5 (class, x, y, width, height): if the last is the score of a "
            "detection, --min-score 0.5 uses those with at least this score"
        )
    score = numbers.pop() if len(numbers) == 5 else None
    if len(numbers) != 4:
        message = f"{len(numbers) + 1} columns instead of 5 (class, x, y, width, height)"
        if len(numbers) > 5:
            message += ", as for a polygon or a rotated box: export upright boxes"
        raise UserError(message)
    # NumPy and others write the class as 0.000000.
    if not re.fullmatch(r"\d{1,9}(\.0*)?", label, re.ASCII) or int(float(label)) >= len(names):
        raise UserError(f"class {label} has no name: the classes are 0 to {len(names) - 1}")
    try:
        fractions = [float(number) for number in numbers]
        is_used = score is None or float(score) >= min_score
    except ValueError as error:
        raise UserError(str(error)) from None
    for number, fraction in zip(numbers, fractions, strict=True):
        if not -SLACK <= fraction <= 1 + SLACK:
            raise UserError(f"{number} is not between 0 and 1: use fractions of the image size")
    return Box(names[int(float(label))], to_pixels(fractions, size)) if is_used else None


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
    parser = layout.build_parser(__doc__, yolo_folder="folder to convert, or its data.yaml")
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="class names: a text file with one per line, or a data.yaml",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="SCORE",
        help="accept labels with a score in the sixth column, and use those with at least SCORE",
    )
    layout.convert(parser, argv, read_yolo)


if __name__ == "__main__":
    run_command(main)
