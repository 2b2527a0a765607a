"""Shared by the converters: read folders of images and labels, write COCO 2017's layout.

The layout is OUTPUT/annotations/instances_{train,val}2017.json with the images in
OUTPUT/{train,val}2017/, as `train.py --data-path OUTPUT` expects it.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

# `python datasets/split.py` puts only this folder on the module path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internals.annotations import decode_json, to_integer, to_string
from internals.command_line import ArgumentParser
from internals.errors import UserError
from internals.file_names import walk_files
from internals.images import IMAGE_FORMATS, MAX_PIXELS, read_sizes

ROOT = Path(__file__).resolve().parent.parent
_ENTRIES = {"annotations", "train2017", "val2017"}  # of an output folder


class Box(NamedTuple):
    """A box: the name of its category, and x, y, width, height in pixels."""

    category: str
    bbox: list[float]
    iscrowd: int = 0


class LabeledImage(NamedTuple):
    """An image file and its entries in the annotation file."""

    file: Path
    file_name: str  # relative to the image folder, with "/"
    size: tuple[int, int]  # width, height
    boxes: list[Box]


class Errors(list):
    """Messages of UserErrors, collected to report all of them in one UserError."""

    @contextlib.contextmanager
    def collect(self, place: object = ""):
        """Collect a UserError that the block raises, with `place`, its file or line."""
        try:
            yield
        except UserError as error:
            self.append(f"{place}: {error}" if place else str(error))

    def raise_if_any(self) -> None:
        """Raise one UserError with the first 20 messages."""
        if len(self) > 1:
            more = [f"and {len(self) - 20:,} more"] if len(self) > 20 else []
            raise UserError("\n  ".join([f"{len(self):,} errors:", *self[:20], *more]))
        if self:
            raise UserError(self[0])


def build_parser(description: str, **inputs: str) -> ArgumentParser:
    """Build the parser of a script.

    Args:
        description: The docstring of the script, displayed without reformatting.
        **inputs: Names and help texts of the input files or folders; OUTPUT is added.
    """
    parser = ArgumentParser(
        description,
        epilog="Exit codes: 0 done; 1 failed; 2 a flag or the data is wrong.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in {**inputs, "output": "folder to create"}.items():
        parser.add_argument(name, type=Path, metavar=name.upper(), help=text)
    return parser


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def read_annotations(file: Path, required: dict[str, dict[str, type]]) -> dict:
    """Read a COCO annotation file; ids that are integers as text or float are converted.

    Args:
        file: The annotation file.
        required: The lists that it must have, with names and types of their rows' fields.

    Raises:
        UserError: The file cannot be read, or a list or a field is missing.
    """
    try:
        content = decode_json(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    for key, fields in required.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{file} has no list {key!r}: is it a COCO annotation file?")
        for number, row in enumerate(rows):
            for name, kind in fields.items():
                value = row.get(name) if isinstance(row, dict) else None
                converted = convert_or_none(value, to_string if kind is str else to_integer)
                if converted is None:
                    expected = "a string" if kind is str else "an integer"
                    raise UserError(f"{file}: {key}[{number}] has no {name!r} that is {expected}")
                row[name] = converted
    return content


def convert_or_none(value: object, convert: Callable) -> int | str | None:
    """Return `convert(value)`, None if it raises an error."""
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        return None


def repeated_values(values: Iterable) -> list:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def find_files(
    folder: Path,
    suffixes: Iterable[str],
    notes: list[str],
    beside: Iterable[str] = (),
    unique: bool = True,
) -> dict[str, Path]:
    """Find all files below a folder with one of the suffixes; hidden files are skipped.

    Args:
        folder: The folder.
        suffixes: Suffixes in lower case, with the dot.
        notes: Gets a note with the number of files with other suffixes.
        beside: Suffixes of other files that belong to the data, which are not noted.
        unique: Whether files that differ in their suffix only are an error.

    Returns:
        The files by key, sorted. The key is the path relative to the folder, with "/" and without
        the suffix; an image and its label file have the same key.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing")
    files, ignored = {}, []
    for file in sorted(walk_files(folder)):
        name = file.relative_to(folder)
        key = name.with_suffix("").as_posix()
        if any(part.startswith(".") for part in name.parts):
            continue
        if file.suffix.lower() not in suffixes:
            ignored += [] if file.suffix.lower() in beside else [file.suffix or file.name]
        elif not unique:
            files[name.as_posix()] = file
        elif key in files:
            raise UserError(f"{files[key]} and {file} differ only in their suffix: keep one")
        else:
            files[key] = file
    if ignored:
        kinds = ", ".join(sorted(set(ignored)))
        notes.append(f"{len(ignored):,} other files in {folder} are ignored ({kinds})")
    return files


def note_files(notes: list[str], what: str, files: Iterable[Path]) -> None:
    """Add a note on skipped files: their number, `what`, and the first three."""
    files = sorted(files)
    if files:
        first = ", ".join(map(str, files[:3]))
        notes.append(f"{len(files):,} {what}: {first}{', ...' if len(files) > 3 else ''}")


def read_image_sizes(file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Read (width, height) from an image's header: after EXIF rotation, and as stored.

    Annotation tools display the rotated image; training accepts boxes for both.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            upright, stored, _ = read_sizes(image)
    except Exception as error:  # a broken file can make a decoder fail in many ways
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read as an image: {reason}") from None
    if stored[0] * stored[1] > MAX_PIXELS:
        raise UserError(f"{file} has more than {MAX_PIXELS:,} pixels: reduce its size")
    return upright, stored


def convert(parser: ArgumentParser, argv: list[str] | None, read: Callable) -> None:
    """Run a converter.

    Args:
        parser: From `build_parser`; --categories is added here.
        argv: The command line, None for that of this process.
        read: Gets the parsed arguments and a list of notes, to which it may add messages for the
            user. Returns the LabeledImages by split, and the category names for ids from 1.
    """
    parser.add_argument(
        "--categories",
        type=Path,
        metavar="FILE",
        help="use the categories of this COCO annotation file, matched by name, with their ids",
    )
    args = parser.parse_args(argv)
    check_output(args.output)
    categories = read_categories(args.categories) if args.categories else None
    notes = []
    splits, names = read(args, notes)
    if categories is None:
        categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    for split, images in splits.items():
        if not images:
            raise UserError(f"the split {split!r} has no images: add some")
    if not categories:
        raise UserError("the data has no objects, so no categories: name them with --categories")
    used = {box.category for images in splits.values() for image in images for box in image.boxes}
    if unknown := sorted(used - {row["name"] for row in categories}):
        unknown = ", ".join(map(repr, unknown))
        raise UserError(f"--categories has no category {unknown}: add it to {args.categories}")
    contents = {split: _coco_content(images, categories) for split, images in splits.items()}
    files = {split: {i.file_name: i.file for i in images} for split, images in splits.items()}
    write_dataset(args.output, contents, files, notes)


def read_categories(file: Path) -> list[dict]:
    """Read the `categories` of a COCO annotation file, with unique ids and names."""
    rows = read_annotations(file, {"categories": {"id": int, "name": str}})["categories"]
    for key in ("id", "name"):
        if repeated := repeated_values(row[key] for row in rows):
            raise UserError(f"{file} has two categories with the {key} {repeated[0]!r}: keep one")
    return rows


def _coco_content(labeled: list[LabeledImage], categories: list[dict]) -> dict:
    category_ids = {row["name"]: row["id"] for row in categories}
    images, annotations = [], []
    for image_id, (_, file_name, (width, height), boxes) in enumerate(labeled, start=1):
        size = {"width": width, "height": height}
        images.append({"id": image_id, "file_name": file_name, **size})
        for category, bbox, iscrowd in boxes:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            ids["category_id"] = category_ids[category]
            area = round(bbox[2] * bbox[3], 4)
            annotations.append({**ids, "bbox": bbox, "area": area, "iscrowd": iscrowd})
    return {"images": images, "annotations": annotations, "categories": categories}


def check_output(output: Path) -> None:
    """Raise UserError unless `output` is missing or an empty folder."""
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists: remove it, or name another folder")


def check_split_output(output: Path, split: str) -> None:
    """Raise UserError unless `output` is missing, or holds at most the other split."""
    entries = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if (os.path.lexists(output) and not output.is_dir()) or entries - _ENTRIES:
        raise UserError(f"{output} exists, and is no data set of this script: name another folder")
    for path in (annotation_file(output, split), output / f"{split}2017"):
        if os.path.lexists(path):
            raise UserError(f"{path} exists: remove it, or name another folder")


def write_dataset(
    output: Path, contents: dict[str, dict], files: dict[str, dict[str, Path]], notes: list[str]
) -> None:
    """Write a data set in COCO 2017's layout; print its numbers, the notes and the next command.

    Args:
        output: Folder, empty or to be created.
        contents: Contents of the annotation files of "train" and, optionally, "val".
        files: For each split, the image file of each file name.
        notes: Messages for the user.
    """
    linked = write_files(output, contents, files)
    print_summary(output, contents, notes, describe_links(linked), next_command(output, contents))


def write_files(
    output: Path, contents: dict[str, dict], files: dict[str, dict[str, Path]]
) -> list[bool]:
    """Write the files of `write_dataset`; return of each image whether it is a hard link."""
    create_folders(output)
    linked = [
        _link_or_copy(source, output / f"{split}2017" / name)
        for split in contents
        for name, source in files[split].items()
    ]
    # Written last, so that the output of an interrupted run does not look complete.
    for split, content in contents.items():
        write_annotations(output, split, content)
    return linked


def annotation_file(output: Path, split: str) -> Path:
    """Return the path of the annotation file of a split."""
    return output / f"annotations/instances_{split}2017.json"


def create_folders(output: Path) -> None:
    """Create the output folder, and that of its annotation files."""
    try:
        (output / "annotations").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be created: {error.strerror}") from None


def write_annotations(output: Path, split: str, content: dict) -> None:
    """Write the annotation file of a split."""
    annotation_file(output, split).write_text(json.dumps(content), encoding="utf-8")


def describe_links(linked: list[bool]) -> str:
    """Return how many images are hard links, and how many copies."""
    kinds = {True: "hard links, which take no space", False: "copies, as links are not possible"}
    counts = Counter(linked).items()
    return " and ".join(f"{n:,} images as {kinds[is_link]}" for is_link, n in counts)


def print_summary(
    output: Path, contents: dict[str, dict], notes: list[str], written: str, command: str
) -> None:
    """Print the numbers of each split, the notes, what was written, and what is next."""
    print(_table(contents))
    for note in notes:
        print(f"note: {note}")
    print(f"{output}: {written}\nNext:\n  {command}")


def _link_or_copy(source: Path, target: Path) -> bool:
    """Create `target` as a hard link, or else as a copy; return whether it is a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a hard link to a symbolic link would be a symbolic link
    try:
        os.link(source, target)
    except FileExistsError:  # a copy would overwrite the original of that link
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        return False
    return True


def _table(contents: dict[str, dict]) -> str:
    """Format the numbers of each split as columns, and val's share of them."""
    columns = [_counts(content) for content in contents.values()]
    width = max(len(name) for name, _ in columns[0])
    lines = [" " * width + "".join(f"{split:>10}" for split in contents)]
    has_share = "val" in contents and len(contents) > 1
    lines[0] += "    in val" if has_share else ""
    for cells in zip(*columns, strict=True):
        counts = [count for _, count in cells]
        line = f"{cells[0][0]:<{width}}" + "".join(f"{count:10,}" for count in counts)
        share = f"{counts[-1] / (sum(counts) or 1):10.1%}" if has_share else ""
        lines.append(line + share)
    return "\n".join(lines)


def _counts(content: dict) -> list[tuple[str, int]]:
    images, annotations = content["images"], content["annotations"]
    boxes = Counter(row["category_id"] for row in annotations)
    return [
        ("images", len(images)),
        ("  without a box", len(images) - len({row["image_id"] for row in annotations})),
        ("boxes", len(annotations)),
        ("  crowds", sum(bool(row.get("iscrowd")) for row in annotations)),
        *((f"  {row.get('name', row['id'])}", boxes[row["id"]]) for row in content["categories"]),
    ]


def next_command(output: Path, contents: dict[str, dict]) -> str:
    """Return the next command to run, relative to the current folder."""
    if "val" in contents:
        return command_line("train.py", "--data-path", output, "--check-data")
    file = annotation_file(output, "train")
    return command_line("datasets/split.py", file, output / "train2017", f"{output}_split")


def command_line(script: str, *arguments: object) -> str:
    """Return the command that runs a script of this repository from the current folder."""
    return shlex.join(["python", os.path.relpath(ROOT / script), *map(str, arguments)])
