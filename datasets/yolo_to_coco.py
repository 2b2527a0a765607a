#!/usr/bin/env python3
"""Turn a YOLO folder into COCO's layout, which train.py reads.

    python datasets/yolo_to_coco.py my_yolo my_pictures

YOLO_FOLDER has pictures in images/train and images/val, and for each a text of the same name in
labels/train and labels/val with a line for each box: class, centre x, centre y, width and height,
the last four as shares of the picture's width or height. The folders may also be train/images,
train/labels, val/images and so on, and valid for val. Where images and labels have no such folders
in them, all pictures are one part, for datasets/split.py to divide. The classes are named by
classes.txt, a name a line, or by data.yaml.

A picture without a text has no objects. Class 0 becomes category 1, and so on. Boxes get pixels
that are as round as the six decimals of YOLO's files allow: what was in whole pixels, or in
hundredths, is so again. A box of zero size is kept, though it does not train.
"""

import argparse
import re
from pathlib import Path

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
    repeated_values,
    run_and_exit,
    write_pictures,
)

ROUNDING = 0.51e-6  # half a unit of the sixth decimal, and a little for floats
SLACK = 1e-5  # how far a share may be outside of 0 to 1, because of such rounding
# What means something to YAML at the beginning of a text without quotes.
YAML_SIGNS = r"""[\s'"\[\]{}&*!|>%@`,?:-]"""
YAML_REMEDY = (
    "Write the names of the classes into classes.txt, which is read instead, a name a line"
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("yolo_folder", type=Path, metavar="YOLO_FOLDER", help="what to convert")
    parser.add_output()
    parser.add_categories()
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ where things lie


def find_parts(folder: Path, notes: list[str]) -> dict[str, tuple[Path, Path]]:
    """The folders of pictures and of labels, of "train" and, where there is one, of "val"."""
    parts = {}
    for part, names in {"train": ["train"], "val": ["val", "valid"], "test": ["test"]}.items():
        places = [pair for name in names for pair in _places(folder, name)]
        there = [(images, labels) for images, labels in places if images.is_dir()]
        if len(there) > 1:
            raise UsageError(f"{there[0][0]} and {there[1][0]} are both there: keep one of them")
        if there:
            parts[part] = there[0]
    if "test" in parts:
        notes.append(f"{parts.pop('test')[0]} is left out: training reads train and val")
    images, labels = folder / "images", folder / "labels"
    if not parts and images.is_dir() and not any(map(Path.is_dir, images.glob("[!.]*"))):
        return {"train": (images, labels)}
    if "train" not in parts:
        looked = ", ".join(str(images) for images, _ in _places(folder, "train"))
        raise UsageError(f"no pictures to train on; looked for the folders {looked}")
    return parts


def _places(folder: Path, name: str) -> list[tuple[Path, Path]]:
    return [
        (folder / "images" / name, folder / "labels" / name),
        (folder / name / "images", folder / name / "labels"),
    ]


# ---------------------------------------------------------------------------------- class names


def read_names(folder: Path) -> list[str]:
    """The names of the classes from 0 on, by classes.txt or, if there is none, by data.yaml."""
    plain, yaml = folder / "classes.txt", folder / "data.yaml"
    if plain.is_file():
        file, names = plain, [line.strip() for line in read_text(plain).rstrip().splitlines()]
    elif yaml.is_file():
        file, names = yaml, yaml_names(read_text(yaml), yaml)
    else:
        raise UsageError(f"{plain} is missing, and so is {yaml}: one has to name the classes")
    if not names or "" in names:
        raise UsageError(f"{file} has a class without a name, or no class at all")
    if repeated := repeated_values(names):
        raise UsageError(f"{file} has two classes of the name {repeated[0]!r}")
    return names


def yaml_names(text: str, file: Path) -> list[str]:
    """The list `names` of a data.yaml, or its map with keys from 0 on, in brackets or in lines.

    Read is the part of YAML that exporting tools write: texts with or without quotes, comments.
    UsageError with file and line for everything else.
    """
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines()]
    first = next((n for n, line in enumerate(lines, 1) if re.match(r"names\s*:", line)), None)
    if first is None:
        raise UsageError(f"{file} has no 'names:'")
    rest = "\n".join([lines[first - 1].partition(":")[2].strip(), *lines[first:]])
    if brackets := re.match(r"([\[{])(.*?),?\s*[\]}][ \t]*(\n|$)", rest, re.DOTALL):
        parts = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,'"])+""", brackets[2])
        if ",".join(parts) != brackets[2]:  # a quote that is not closed, for example
            raise UsageError(f"{file}:{first}: not understood. {YAML_REMEDY}")
        entries = [(first, part.strip()) for part in parts]
        listed = brackets[1] == "["
    else:
        entries = _entries_in_lines(rest, first)
        listed = all(entry.startswith("- ") for _, entry in entries)
        entries = [(n, entry[2:].strip() if listed else entry) for n, entry in entries]
    names = []
    for number, entry in entries:
        with at(f"{file}:{number}"):
            names.append(_yaml_text(entry if listed else _without_key(entry, len(names))))
    return names


def _entries_in_lines(rest: str, first: int) -> list[tuple[int, str]]:
    """The lines up to the next key of the file, with their numbers, empty ones left out."""
    entries = []
    for number, line in enumerate(rest.split("\n"), first):
        if number > first and re.match(r"[^\s-]|---", line):
            break
        if line.strip():
            entries.append((number, line.strip()))
    return entries


def _without_key(entry: str, expected: int) -> str:
    key, colon, text = entry.partition(":")
    if not colon or key.strip() != str(expected):
        raise UsageError(f"{entry!r} is not the name of class {expected}. {YAML_REMEDY}")
    return text.strip()


def _yaml_text(entry: str) -> str:
    if quoted := re.fullmatch(r"'((?:[^']|'')*)'|\"([^\"\\]*)\"", entry):
        return (quoted[1] or quoted[2] or "").replace("''", "'")
    if re.match(YAML_SIGNS, entry) or re.search(r"[\[\]{}]|:(\s|$)", entry):
        raise UsageError(f"{entry!r} is YAML that is not understood here. {YAML_REMEDY}")
    return entry


# --------------------------------------------------------------------------------------- labels


def read_object(line: str, size: tuple[int, int], names: list[str]) -> Object:
    """A line of a label file for a picture of `size`; UsageError, without the place, if wrong."""
    columns = line.split()
    if len(columns) != 5:
        polygon = ", as a polygon or a turned box has: export upright boxes"
        hint = polygon if len(columns) > 6 else ""
        raise UsageError(f"{len(columns)} columns instead of 5 (class, x, y, width, height){hint}")
    if not re.fullmatch(r"\d+", columns[0], re.ASCII) or int(columns[0]) >= len(names):
        raise UsageError(f"class {columns[0]} has no name: there are 0 to {len(names) - 1}")
    shares = []
    for text in columns[1:]:
        try:
            shares.append(float(text))
        except ValueError:
            raise UsageError(f"{text!r} is not a number") from None
        if not -SLACK <= shares[-1] <= 1 + SLACK:
            raise UsageError(f"{text} is not between 0 and 1: it has to be a share of the side")
    return Object(names[int(columns[0])], pixels(shares, size))


def pixels(shares: list[float], size: tuple[int, int]) -> list[float]:
    """x, y, width, height in pixels, of centre and sides as shares of the picture's sides."""
    (cx, cy, w, h), (width, height) = shares, size
    return [
        # The corner has the rounding of the centre and half of that of the side.
        roundest((cx - w / 2) * width, 1.5 * ROUNDING * width),
        roundest((cy - h / 2) * height, 1.5 * ROUNDING * height),
        roundest(w * width, ROUNDING * width),
        roundest(h * height, ROUNDING * height),
    ]


def roundest(value: float, slack: float) -> float:
    """The number with the fewest decimals that is not further than `slack` from the value."""
    decimals = 0
    while abs(round(value, decimals) - value) > slack:
        decimals += 1
    return round(value, decimals) + 0.0  # never -0.0


def read_pictures(folder: Path, names: list[str], notes: list[str]) -> dict[str, list[Picture]]:
    """All pictures by part, with their objects."""
    problems, parts = Problems(), {}
    for part, (image_folder, label_folder) in find_parts(folder, notes).items():
        pictures = files_in(image_folder, SUFFIXES, notes)
        labels = files_in(label_folder, {".txt"}, notes)
        if "classes" not in pictures:
            labels.pop("classes", None)  # labelImg puts its list of names there
        for key in sorted(labels.keys() - pictures.keys()):
            problems.found.append(f"{labels[key]}: its picture {image_folder / key}.jpg is missing")
        if without := len(pictures.keys() - labels.keys()):
            notes.append(f"{without:,} pictures of {part} have no label file, so no objects")
        parts[part] = []
        for key, file in pictures.items():
            with problems.collect():
                size, objects = picture_sizes(file)[0], []
                lines = read_text(labels[key]).splitlines() if key in labels else []
                for number, line in enumerate(lines, start=1):
                    with problems.collect(), at(f"{labels[key]}:{number}"):
                        if line.strip():
                            objects.append(read_object(line, size, names))
                parts[part].append(Picture(file, key + file.suffix, size, objects))
    problems.refuse()
    return parts


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    refuse_existing(args.output)
    categories = args.categories and read_categories(args.categories)
    names, notes = read_names(args.yolo_folder), []
    parts = read_pictures(args.yolo_folder, names, notes)
    if categories is None:
        categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    write_pictures(args.output, parts, categories, notes)


if __name__ == "__main__":
    run_and_exit(main)
