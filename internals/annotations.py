"""Read a COCO annotation file into arrays, and report entries that cannot be read.

Only the fields of `ImageRow`, `AnnotationRow` and `CategoryRow` are decoded; all others, such as
segmentations, are skipped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from internals.errors import DataError

MAX_EXAMPLES = 20
MAX_SHORT_EXAMPLES = 5  # of those that are listed in one line
# Larger integers are not exact in the float64 rows of detections.
MAX_ID = 2**53
# Boxes with a side below this, in pixels of the image, are not used: in float32, after resizing a
# large image, little of it may be left, and a side of 0 has an infinite loss.
MIN_BOX_SIDE = 0.1
# Evaluation uses boxes that reach out of their image by less than this, in pixels, as they are:
# many tools round so, and the metrics are those of other evaluators.
BORDER_TOLERANCE = 0.5


class DataIssue(NamedTuple):
    """One kind of issue in a data set, with its count and its first occurrences."""

    kind: str  # "images without a positive size"
    examples: list[str]  # up to MAX_EXAMPLES, with their ids
    count: int
    remedy: str = "Correct or remove them in the annotation file"
    fatal: bool = True  # False: only logged

    def __str__(self) -> str:
        is_long = len(self.examples) > 1 and max(map(len, self.examples)) >= 80
        examples = self.examples if is_long else self.examples[:MAX_SHORT_EXAMPLES]
        start, separator, end = ("\n    ",) * 3 if is_long else (" ", ", ", ". ")
        rest = self.count - len(examples)
        more = f" and {rest:,} more" if rest else ""
        listed = separator.join(examples)
        return f"{self.kind} ({self.count:,}):{start}{listed}{more}{end}{self.remedy}"


# ---------------------------------------------------------------------------- fields of the file

Integer = Annotated[int, msgspec.Meta(ge=-MAX_ID, le=MAX_ID)]
# Arrays of names have the length of the longest one: a picture as text would fill the memory.
MAX_NAME_LENGTH = 1024
FileName = Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
Box = tuple[float, float, float, float]


# gc=False: rows cannot form cycles, so the garbage collector skips these millions of objects.
class ImageRow(msgspec.Struct, gc=False):
    """An element of the list `images`."""

    id: Integer
    file_name: FileName
    width: Integer
    height: Integer


class AnnotationRow(msgspec.Struct, gc=False):
    """An element of the list `annotations`."""

    image_id: Integer
    category_id: Integer
    bbox: Box
    id: Integer = -1
    area: float | None = None
    iscrowd: Integer = 0


class CategoryRow(msgspec.Struct, gc=False):
    """An element of the list `categories`."""

    id: Integer
    name: str | None = None


class AnnotationFile(msgspec.Struct):
    """The three lists of a COCO annotation file."""

    images: list[ImageRow]
    annotations: list[AnnotationRow]
    categories: list[CategoryRow]


ROW_TYPES = {"images": ImageRow, "annotations": AnnotationRow, "categories": CategoryRow}
FIELDS = {row_type: msgspec.structs.fields(row_type) for row_type in ROW_TYPES.values()}


@dataclass
class AnnotationColumns:
    """An annotation file of `I` images and `M` annotations as arrays, in the order of the file."""

    categories: list[CategoryRow]
    image_ids: np.ndarray  # int64 [I]
    file_names: np.ndarray  # UTF-8 bytes [I]
    sizes: np.ndarray  # int32 [I, 2]: width, height
    annotation_ids: np.ndarray  # int64 [M], -1 where the file has none
    annotation_image_ids: np.ndarray  # int64 [M]
    category_ids: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float64 [M, 4]: x, y, width, height
    areas: np.ndarray  # float64 [M], width * height where the file has none
    iscrowd: np.ndarray  # bool [M]


# --------------------------------------------------------------------------------------- reading


def read_annotations(file: Path) -> tuple[AnnotationColumns, list[DataIssue]]:
    """Read a COCO annotation file.

    Returns:
        The columns, and an issue for each kind of row that was skipped.

    Raises:
        DataError: The file cannot be read, or is not a COCO annotation file.
    """
    data, issues = _decode(file)
    return _to_columns(data), issues


def _decode(file: Path) -> tuple[AnnotationFile, list[DataIssue]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if not content:
        raise DataError(f"{file} is empty: export or copy it again")
    try:
        return msgspec.json.decode(content, type=AnnotationFile), []
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(content, file)


def _to_columns(data: AnnotationFile) -> AnnotationColumns:
    def column(rows: list, name: str, dtype: type = np.int64) -> np.ndarray:
        return np.fromiter(map(attrgetter(name), rows), dtype, len(rows))

    images, annotations = data.images, data.annotations
    sizes = np.stack([column(images, "width"), column(images, "height")], axis=1)
    coordinates = chain.from_iterable(map(attrgetter("bbox"), annotations))
    boxes = np.fromiter(coordinates, np.float64, 4 * len(annotations)).reshape(-1, 4)
    areas = np.array([row.area for row in annotations], dtype=np.float64)  # None becomes NaN
    return AnnotationColumns(
        categories=data.categories,
        image_ids=column(images, "id"),
        file_names=np.array([row.file_name.encode() for row in images], dtype=np.bytes_),
        sizes=sizes.clip(-1, 2**31 - 1).astype(np.int32),
        annotation_ids=column(annotations, "id"),
        annotation_image_ids=column(annotations, "image_id"),
        category_ids=column(annotations, "category_id"),
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        iscrowd=column(annotations, "iscrowd", bool),
    )


def implausible_areas(boxes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return which areas cannot be those of an object in its box, bool `[M]`.

    Those that are not positive, or larger than twice the box (and a pixel around it); all, if half
    of them are below a thousandth of their box, as areas in other units than pixels are.

    Args:
        boxes: `[M, 4]`, x, y, width, height.
        areas: `[M]`.
    """
    width, height = boxes[:, 2:].T
    size = width * height
    ratios = areas[size > 0] / size[size > 0]
    if len(ratios) and 0 < np.median(ratios) < 1e-3:
        return np.ones(len(boxes), dtype=bool)
    return ~(areas > 0) | (areas > 2 * (width + 1) * (height + 1))


# ------------------------------------------------------------------ files that msgspec rejects


def decode_json(content: bytes, file: Path) -> object:
    """Decode JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Programs on Windows write such marks, and UTF-16 where text is redirected to a file.
    """
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}): open it in a text editor, and save it "
            "as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not valid JSON: {error}. Correct it there, or copy it again if it ends"
        ) from error


def _decode_leniently(content: bytes, file: Path) -> tuple[AnnotationFile, list[DataIssue]]:
    """Decode with Python's json, which is slower, but accepts NaN and allows precise messages.

    Numbers of other types are converted if the conversion is exact. Rows that cannot be converted
    are skipped and reported.
    """
    data = decode_json(content, file)
    if not isinstance(data, dict):
        raise DataError(
            f"{file} holds a {type(data).__name__} at its top level: use an annotation file, with "
            "the lists images, annotations and categories, not a file of COCO results"
        )
    lists, rejected = {}, {}
    for key, row_type in ROW_TYPES.items():
        if not isinstance(data.get(key), list):
            raise DataError(f"{file} has no list {key!r}: use a COCO annotation file")
        lists[key] = []
        for number, row in enumerate(data.pop(key)):
            try:
                lists[key].append(_convert_row(row, row_type))
            except ValueError as error:
                has_id = isinstance(row, dict) and row.get("id") is not None
                place = f"id {row['id']}" if has_id else f"{key}[{number}]"
                rejected.setdefault(f"{key} {error}", []).append(place)
    issues = [
        DataIssue(kind, places[:MAX_EXAMPLES], len(places)) for kind, places in rejected.items()
    ]
    return AnnotationFile(**lists), issues


def _convert_row(row: object, row_type: type) -> msgspec.Struct:
    """Convert an element of a list; a ValueError completes a message "images ..."."""
    if not isinstance(row, dict):
        raise ValueError("that are not objects")
    values = {}
    for field in FIELDS[row_type]:
        value = row.get(field.name)
        if value is not None:
            convert, expected = CONVERTERS[field.type]
            try:
                values[field.name] = convert(value)
            except (TypeError, ValueError, OverflowError):
                if (row_type, field.name) == (AnnotationRow, "id"):
                    continue  # only messages contain it
                raise ValueError(f"whose {field.name!r} is not {expected}") from None
        elif field.required:
            raise ValueError(f"without {field.name!r}")
    return row_type(**values)


def to_integer(value: object) -> int:
    """Convert a number or its text; raise ValueError, TypeError or OverflowError if not exact."""
    number = int(value)
    if number != float(value) or abs(number) > MAX_ID:
        raise ValueError
    return number


def to_string(value: object) -> str:
    """Return a string; raise TypeError or ValueError for what is none, or is not Unicode."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # rejects half of a surrogate pair, valid in JSON but not in UTF-8
    return value


def _to_file_name(value: object) -> str:
    if len(to_string(value)) > MAX_NAME_LENGTH:
        raise ValueError
    return value


def _to_box(value: object) -> Box:
    if not isinstance(value, list):  # "1234" would convert to four numbers
        raise TypeError
    x, y, width, height = map(float, value)
    return x, y, width, height


# The conversion of each field type, and its name in messages.
CONVERTERS: dict[type, tuple[Callable, str]] = {
    Integer: (to_integer, "a whole number up to 2**53"),
    Box: (_to_box, "four numbers"),
    float | None: (float, "a number"),
    FileName: (_to_file_name, f"a string of at most {MAX_NAME_LENGTH:,} characters"),
    str | None: (to_string, "a string"),
}
