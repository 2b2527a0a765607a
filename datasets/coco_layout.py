"""What the scripts of this folder share: pictures and texts in, COCO 2017's layout out, errors.

A data set in that layout is OUTPUT/annotations/instances_{train,val}2017.json with the pictures in
OUTPUT/{train,val}2017/, which `train.py --data-path OUTPUT` takes.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

ROOT = Path(__file__).resolve().parent.parent

# Those of coco_utils.IMAGE_FORMATS, which would take seconds to import for PyTorch's sake.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
# Training refuses such pictures, and a warning would not name the file.
warnings.simplefilter("error", Image.DecompressionBombWarning)


# ------------------------------------------------------------------------------ flags and errors


class UsageError(ValueError):
    """Flags or files that the user can put right; the message names the place and the remedy."""


class Parser(argparse.ArgumentParser):
    """`description`, a script's docstring, is shown as it is written."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            epilog="Exit codes: 0 done; 2 the flags or the data are wrong; 1 anything else.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def add_output(self) -> None:
        self.add_argument("output", type=Path, metavar="OUTPUT", help="a folder to make")

    def add_categories(self) -> None:
        self.add_argument(
            "--categories",
            type=Path,
            metavar="FILE",
            help="take the categories of this COCO annotation file, by name, so that they keep "
            "their ids",
        )


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a script; what the user can put right ends it with one message and exit code 2."""
    try:
        main()
    except UsageError as error:
        _give_up(error, 2)
    except OSError as error:  # a full disk, for example
        _give_up(error, 1)


def _give_up(error: Exception, exit_code: int) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    sys.exit(exit_code)


@contextlib.contextmanager
def at(place: object):
    """Put the place, a file with what leads to the spot, before the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


class Problems:
    """Collects what is wrong with the files of a folder, so that one message can name it all."""

    SHOWN = 20

    def __init__(self):
        self.found = []

    @contextlib.contextmanager
    def collect(self):
        """Keep the UsageError that ends this block, if one does, and go on after the block."""
        try:
            yield
        except UsageError as error:
            self.found.append(str(error))

    def refuse(self) -> None:
        """Raise one UsageError with the first 20 of all that was collected, if anything was."""
        if len(self.found) == 1:
            raise UsageError(self.found[0])
        if self.found:
            lines = [f"{len(self.found):,} things are wrong:", *self.found[: self.SHOWN]]
            if len(self.found) > self.SHOWN:
                lines.append(f"and {len(self.found) - self.SHOWN:,} more")
            raise UsageError("\n  ".join(lines))


# ------------------------------------------------------------------------------------- reading


def read_text(file: Path) -> str:
    """The text of a UTF-8 file; UsageError if there is none."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None


def read_annotations(file: Path) -> dict:
    """The content of a COCO annotation file, which must be an object."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds no JSON object: is it a COCO annotation file?")
    return content


def list_of(content: dict, key: str, fields: dict[str, type], file: Path) -> list[dict]:
    """The list `key` of an annotation file, whose rows have at least `fields`."""
    rows = content.get(key)
    if not isinstance(rows, list):
        raise UsageError(f"{file} has no list {key!r}: is it a COCO annotation file?")
    for number, row in enumerate(rows):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                expected = "a text" if kind is str else "a whole number"
                raise UsageError(f"{file}: {key}[{number}] has no {name!r} that is {expected}")
    return rows


def read_categories(file: Path) -> list[dict]:
    """The `categories` of a COCO annotation file, each with a name of its own."""
    rows = list_of(read_annotations(file), "categories", {"id": int, "name": str}, file)
    for name in ("id", "name"):
        if repeated := repeated_values(row[name] for row in rows):
            raise UsageError(f"{file} has two categories with the {name} {repeated[0]!r}")
    return rows


def some_of(values: list[str]) -> str:
    """The first three as a text, with dots if there are more."""
    return ", ".join(values[:3]) + (", ..." if len(values) > 3 else "")


def repeated_values(values: Iterable) -> list:
    """The values that are there more than once."""
    return [value for value, times in Counter(values).items() if times > 1]


def files_in(folder: Path, suffixes: set[str], notes: list[str]) -> dict[str, Path]:
    """All files below a folder with one of the suffixes, sorted, by their path without the suffix.

    The keys are relative to the folder, with "/". Files with other suffixes are counted in `notes`;
    hidden ones are not. Raises UsageError for a missing folder, and for two files with one key.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing")
    found, others = {}, []
    for file in _walk(folder):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if file.suffix.lower() not in suffixes:
            others.append(file)
            continue
        key = name.with_suffix("").as_posix()
        if key in found:
            raise UsageError(f"{found[key]} and {file} differ in nothing but the end: keep one")
        found[key] = file
    if others:
        ends = ", ".join(sorted({file.suffix or file.name for file in others}))
        notes.append(f"{len(others):,} other files in {folder} are left alone ({ends})")
    return found


def _walk(folder: Path) -> list[Path]:
    walked = os.walk(folder, followlinks=True)
    return sorted(Path(where, name) for where, _, names in walked for name in names)


def picture_sizes(file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of a picture by its header: turned upright as EXIF says, and as stored.

    The first is what annotation tools show; training takes boxes for either of them.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            stored, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UsageError(f"{file} has more pixels than training takes: store it smaller") from None
    except Exception as error:  # a broken file can make a decoder stumble in many ways
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{file} cannot be read as a picture: {reason}") from None
    return (stored[::-1] if orientation in (5, 6, 7, 8) else stored), stored


# ---------------------------------------------------------------------------- pictures to content


class Object(NamedTuple):
    """One box of a picture: the name of its category, and x, y, width, height in pixels."""

    category: str
    bbox: list[float]
    iscrowd: int = 0


class Picture(NamedTuple):
    """A picture of the data set: where it lies, and what its annotations are to say of it."""

    file: Path
    file_name: str  # in the image folder, with "/"
    size: tuple[int, int]  # width, height
    objects: list[Object]


def coco_content(pictures: list[Picture], categories: list[dict]) -> dict:
    """What an annotation file says of the pictures; ids of images and annotations count from 1."""
    category_ids = {row["name"]: row["id"] for row in categories}
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, start=1):
        width, height = picture.size
        images.append(
            {"id": image_id, "file_name": picture.file_name, "width": width, "height": height}
        )
        for category, bbox, iscrowd in picture.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[category],
                    "bbox": bbox,
                    "area": round(bbox[2] * bbox[3], 4),
                    "iscrowd": iscrowd,
                }
            )
    return {"images": images, "annotations": annotations, "categories": categories}


def write_pictures(
    output: Path, parts: dict[str, list[Picture]], categories: list[dict], notes: list[str]
) -> None:
    """Write pictures, by part, as a data set in COCO 2017's layout, and say what there is.

    UsageError for a part without pictures, and for an object that is of none of the categories.
    """
    for part, pictures in parts.items():
        if not pictures:
            raise UsageError(f"there are no pictures for the part {part!r}: add some")
    if not categories:
        raise UsageError(
            "no file has an object, so there are no categories: name some, --categories"
        )
    names = {each.category for part in parts.values() for p in part for each in p.objects}
    if unknown := sorted(names - {row["name"] for row in categories}):
        raise UsageError(
            f"--categories does not know {', '.join(map(repr, unknown))}: add it there"
        )
    contents = {part: coco_content(pictures, categories) for part, pictures in parts.items()}
    files = {part: {p.file_name: p.file for p in pictures} for part, pictures in parts.items()}
    write(output, contents, files, notes)


# ------------------------------------------------------------------------------------- writing


def refuse_existing(output: Path) -> None:
    """UsageError if there is anything at `output` that would be mixed with the new data set."""
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} is there already: remove it, or name another folder")


def write(
    output: Path, contents: dict[str, dict], files: dict[str, dict[str, Path]], notes: list[str]
) -> None:
    """Write annotation files and pictures by part, "train" and perhaps "val"; say what there is.

    `files` has for each part where the picture of a file name lies. The annotation files come
    last, so that a run that was cut leaves nothing that looks whole.
    """
    try:
        (output / "annotations").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made: {error.strerror}") from None
    copied = 0
    for part in contents:
        folder = output / f"{part}2017"
        folder.mkdir()
        for name, source in files[part].items():
            copied += _place(source, folder / name)
    for part, content in contents.items():
        file = output / f"annotations/instances_{part}2017.json"
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    linked = sum(map(len, files.values())) - copied
    places = [f"{linked:,} pictures as hard links, which take no room"] if linked else []
    places += [f"{copied:,} pictures as copies, as no links could be made"] if copied else []
    print(_table(contents))
    for note in notes:
        print(f"note: {note}")
    print(f"{output} has {' and '.join(places)}. Next:\n  {_next(output, contents)}")


def _place(source: Path, target: Path) -> bool:
    """Make the file at `target` the same as `source`; return whether that took a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a link to a link would lead out of the image folder
    try:
        os.link(source, target)
    except FileExistsError:  # a copy would be written into the file that is linked there
        raise
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
        return True
    return False


def _table(contents: dict[str, dict]) -> str:
    """Pictures and boxes of each part, and boxes of each category, with val's share of them."""
    parts = list(contents.values())
    boxes = [Counter(row["category_id"] for row in part["annotations"]) for part in parts]
    rows = [
        ("pictures", [len(part["images"]) for part in parts]),
        ("  without a box", [_without_box(part) for part in parts]),
        ("boxes", [counts.total() for counts in boxes]),
        ("  of crowds", [_crowds(part) for part in parts]),
    ]
    rows = [(name, counts) for name, counts in rows if name[0] != " " or any(counts)]
    for row in parts[0]["categories"]:
        rows.append((f"  {row.get('name', row['id'])}", [counts[row["id"]] for counts in boxes]))
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{name:>10}" for name in contents)]
    lines += [f"{name:<{width}}" + "".join(f"{n:10,}" for n in counts) for name, counts in rows]
    if "val" in contents:
        shares = [f"{counts[1] / (sum(counts) or 1):10.1%}" for _, counts in rows]
        lines = [line + share for line, share in zip(lines, ["    in val", *shares], strict=True)]
    return "\n".join(lines)


def _without_box(part: dict) -> int:
    return len(part["images"]) - len({row["image_id"] for row in part["annotations"]})


def _crowds(part: dict) -> int:
    return sum(bool(row.get("iscrowd")) for row in part["annotations"])


def _next(output: Path, contents: dict[str, dict]) -> str:
    """The command to go on with, to be run from where the user is."""
    script, *arguments = (
        ("train.py", "--data-path", output, "--check-data")
        if "val" in contents
        else (
            "datasets/split.py",
            output / "annotations/instances_train2017.json",
            output / "train2017",
            f"{output}_split",
        )
    )
    return shlex.join(["python", os.path.relpath(ROOT / script), *map(str, arguments)])
