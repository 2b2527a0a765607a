"""COCO-format data: an annotation file as compact arrays, category ids as labels, images and boxes.

Format: https://cocodataset.org/#format-data. Required are `images[].id, file_name, width, height`,
`annotations[].image_id, category_id, bbox` (x, y, width, height in pixels) and `categories[].id`.
"""

import contextlib
import hashlib
import json
import mmap
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

import transforms
from internals.errors import DataError

try:
    import msgspec
except ImportError:  # slower and hungrier without, but nothing is missing
    msgspec = None

# The ids of COCO's 80 categories leave gaps between 1 and 90; torchvision's COCO weights have one
# output for each number from 0 (background) to 90.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
# How the names of such files end.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Pillow only warns at its bound for a plausible picture and refuses at twice as much: here the
# bound itself is refused.
MAX_PIXELS, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None


# ---------------------------------------------------------------------------- where the data lies


class Split(NamedTuple):
    """One part of a data set: its annotation file, and the folder of its images."""

    annotations: Path
    images: Path


def find_split(data_path: Path, part: str, annotations: Path | None, images: Path | None) -> Split:
    """The files of `part`, "train" or "val": the two paths if given, else found in `data_path`.

    Raises DataError with everything that was looked for.
    """
    if annotations and images:
        candidates = [Split(annotations, images)]
    elif annotations or images:
        raise DataError(
            f"--{part}-annotations and --{part}-images belong together: give both, or neither to "
            f"look in {data_path}"
        )
    else:
        candidates = [
            Split(data_path / f"annotations/instances_{part}2017.json", data_path / f"{part}2017")
        ]
        for folder in ("train",) if part == "train" else ("valid", "val"):
            home = data_path / folder
            candidates.append(Split(home / "_annotations.coco.json", home))
    for split in candidates:
        if split.annotations.is_file() and split.images.is_dir():
            return split
    looked = "\n".join(
        f"  {split.annotations} ({_presence(split.annotations.is_file())})"
        f" with images in {split.images}{os.sep} ({_presence(split.images.is_dir())})"
        for split in candidates
    )
    name = {"train": "training", "val": "validation"}[part]
    raise DataError(
        f"no {name} data found; looked for\n{looked}\n"
        "To get COCO 2017: bash datasets/download_coco.sh. To try the recipe without it: "
        "bash start_scripts/quickstart.sh. Your own data in COCO format: --data-path FOLDER, or "
        f"--{part}-annotations FILE --{part}-images FOLDER"
    )


def _presence(found: bool) -> str:
    return "found" if found else "missing"


# -------------------------------------------------------------------------------- categories


@dataclass(frozen=True)
class Categories:
    """The data set's category ids and names, and the label of each in the model.

    `ids` ascend; `labels[i]` belongs to `ids[i]`; label 0 is the background. A data set with
    exactly COCO's 80 ids keeps them as labels, as torchvision's COCO weights do; any other gets
    labels 1..K.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]

    @classmethod
    def from_names(cls, names: dict[int, str]) -> "Categories":
        ids = tuple(sorted(names))
        labels = ids if ids == COCO_CATEGORY_IDS else tuple(range(1, len(ids) + 1))
        return cls(ids, tuple(names[i] for i in ids), labels)

    @classmethod
    def from_list(cls, rows: list[dict]) -> "Categories":
        """From what `to_list` gave, for example out of a checkpoint."""
        return cls(*(tuple(row[key] for row in rows) for key in ("id", "name", "label")))

    def to_list(self) -> list[dict]:
        rows = zip(self.ids, self.names, self.labels, strict=True)
        return [{"id": i, "name": name, "label": label} for i, name, label in rows]

    @property
    def num_classes(self) -> int:
        """Outputs of the model's classifier: the background and everything up to the last label."""
        return max(self.labels) + 1

    @property
    def is_coco(self) -> bool:
        return self.ids == COCO_CATEGORY_IDS

    def labels_of(self, category_ids: np.ndarray) -> np.ndarray:
        """int64 labels of category ids, all of which must be known."""
        position = np.searchsorted(self.ids, category_ids)
        return np.asarray(self.labels, dtype=np.int64)[position]

    def ids_of_labels(self) -> np.ndarray:
        """int64 `[num_classes]`: the category id of each label, -1 for labels that mean nothing."""
        table = np.full(self.num_classes, -1, dtype=np.int64)
        table[list(self.labels)] = self.ids
        return table

    def check_contains(self, other: "Categories", file: Path) -> None:
        """Raise DataError unless every category of `other`, read from `file`, is known here."""
        known = dict(zip(self.ids, self.names, strict=True))
        for i, name in zip(other.ids, other.names, strict=True):
            if known.get(i) != name:
                here = f"category {i} is {known[i]!r}" if i in known else "there is no such id"
                raise DataError(
                    f"{file}: category {i} ({name!r}) does not fit what the model is trained on, "
                    f"where {here}: use annotation files with the same categories"
                )


# ------------------------------------------------------------------------------------ the index


class Fault(NamedTuple):
    """One kind of thing that is wrong with a data set, and the first places where it is."""

    kind: str  # "images without a positive size"
    found: list[str]  # at most 20, with their ids
    count: int
    remedy: str = "Correct them in the file, or take them out"
    fatal: bool = True  # else the log counts it and training goes on

    def __str__(self) -> str:
        several = len(self.found) > 1 and max(map(len, self.found)) >= 80
        begin, gap, end = ["\n    "] * 3 if several else (" ", ", ", ". ")
        more = f" and {self.count - len(self.found)} more" if self.count > len(self.found) else ""
        return f"{self.kind} ({self.count:,}):{begin}{gap.join(self.found)}{more}{end}{self.remedy}"


class CocoIndex:
    """An annotation file as NumPy arrays; the boxes of image i are rows `box_range(i)`.

    Per image, in the order of the file: `image_ids` int64 `[I]`, `file_names` (UTF-8 bytes),
    `sizes` int32 `[I, 2]` as width, height. Per annotation, ordered by image: `annotation_ids`
    int64 `[M]` (-1 where the file has none), `boxes` float64 `[M, 4]` as x, y, width, height just
    as in the file, `category_ids` int64, `iscrowd` bool, `areas` float64. `usable` bool `[M]`
    marks what can train: no crowds, no boxes without a size.

    Raises DataError for a file that cannot be read. What else is wrong with it is found by
    `coco_check`; `faults` has what only reading could see: rows that had to be left out.
    """

    def __init__(self, split: Split):
        self.annotation_file, self.image_dir = split
        columns, self.faults = _read_columns(self.annotation_file)
        self.categories = self._keep_categories(columns["categories"])
        self._keep_images(columns["images"])
        self._keep_annotations(columns["annotations"])

    def _keep_categories(self, columns: dict) -> Categories:
        ids = columns["id"].tolist()
        if not ids:
            raise DataError(
                f"{self.annotation_file} has no categories that can be used: name at least one in "
                f"its list 'categories'{self._faults_so_far()}"
            )
        if len(set(ids)) < len(ids):
            raise DataError(
                f"{self.annotation_file} has two categories with the same id: give each its own"
            )
        names = zip(ids, columns["name"], strict=True)
        return Categories.from_names({i: name or f"category {i}" for i, name in names})

    def _faults_so_far(self) -> str:
        return ": " + "; ".join(map(str, self.faults)) if self.faults else ""

    def _keep_images(self, columns: dict) -> None:
        self.image_ids = columns["id"]
        if not len(self.image_ids):
            raise DataError(
                f"{self.annotation_file} lists no images that can be used{self._faults_so_far()}"
            )
        self.file_names = columns["file_name"]
        sizes = np.stack([columns["width"], columns["height"]], axis=1)
        self.sizes = sizes.clip(-1, 2**31 - 1).astype(np.int32)

    def _keep_annotations(self, columns: dict) -> None:
        """Orders the columns by image, in their own memory, as there may be gigabytes of them."""
        rows, starts = self._by_image(columns["image_id"])
        lost, order = starts[0], rows[starts[0] :]
        if lost:
            self.faults.append(_lost(rows[:lost], columns))
        self.offsets = starts - lost
        spare = columns.pop("image_id")
        for name, column in columns.items():
            for values in column.T if column.ndim == 2 else [column]:
                into = spare.view(values.dtype)[: len(order)]
                values[: len(order)] = values.take(order, out=into, mode="clip")
            columns[name] = column[: len(order)]
        self.boxes, self.areas = columns["bbox"], columns["area"]
        unknown = np.flatnonzero(np.isnan(self.areas))
        self.areas[unknown] = self.boxes[unknown, 2] * self.boxes[unknown, 3]
        self.annotation_ids, self.category_ids = columns["id"], columns["category_id"]
        self.iscrowd = columns["iscrowd"]
        self.usable = ~self.iscrowd & (self.boxes[:, 2] > 0) & (self.boxes[:, 3] > 0)

    def without(self, images: Sequence[int]) -> "CocoIndex":
        """The index without the images at these positions, as if the file had never listed them."""
        kept = np.setdiff1d(np.arange(len(self)), images)
        rows = np.isin(self.image_of_rows(), kept)
        less = CocoIndex.__new__(CocoIndex)
        less.__dict__.update(self.__dict__)
        for name in ("image_ids", "file_names", "sizes"):
            setattr(less, name, getattr(self, name)[kept])
        for name in ("annotation_ids", "boxes", "category_ids", "iscrowd", "areas", "usable"):
            setattr(less, name, getattr(self, name)[rows])
        less.offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[kept])])
        return less

    def first_with_boxes(self, count: int) -> "CocoIndex":
        """The index of the first `count` images that have a box to train on."""
        chosen = self.images_with_boxes()[:count]
        return self.without(np.setdiff1d(np.arange(len(self)), chosen))

    def fingerprint(self) -> str:
        """A hash of all that training and evaluation depend on, the pixels aside."""
        digest = hashlib.sha256(repr(self.categories).encode())
        for name in ("image_ids", "file_names", "sizes", "offsets", "boxes", "category_ids"):
            digest.update(getattr(self, name).tobytes())
        digest.update(self.iscrowd.tobytes() + self.areas.tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        return self.file_names[image].decode()

    def read_image(self, i: int) -> torch.Tensor:
        """Image i as `read_image` of its file gives it. Raises DataError."""
        return read_image(self.image_dir / self.file_name(i), *self.sizes[i].tolist())

    def positions_of(self, image_ids: np.ndarray) -> np.ndarray:
        """int32: where in the index the images with these ids are, -1 for ids that it lacks."""
        low, high = self.image_ids.min(), self.image_ids.max()
        if high - low < 16 * len(self) + 2**20:  # a table is ten times as fast as a search
            table = np.full(high - low + 2, -1, dtype=np.int32)
            table[self.image_ids - low] = np.arange(len(self))
            places = image_ids - low
            places[(image_ids < low) | (image_ids > high)] = -1
            return table[places]
        order = np.argsort(self.image_ids, kind="stable")
        ordered = self.image_ids[order]
        found = order[np.searchsorted(ordered, image_ids).clip(max=len(self) - 1)]
        return np.where(self.image_ids[found] == image_ids, found, -1).astype(np.int32)

    def _by_image(self, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64: the rows with these image ids by the position of their image, those of unknown
        images first, and `[I + 1]`: where in this order each image begins, and the end.

        Position and row are sorted as one number: NumPy is much quicker so than to find an order.
        """
        keys = np.arange(len(image_ids), dtype=np.int64)
        for start in range(0, len(keys), 2**18):  # as fresh memory costs more than to look up
            some = slice(start, start + 2**18)
            keys[some] |= self.positions_of(image_ids[some]).astype(np.int64) << 32
        keys.sort()
        starts = np.searchsorted(keys, np.arange(len(self) + 1, dtype=np.int64) << 32)
        keys &= 2**32 - 1
        return keys, starts

    def box_range(self, image: int) -> slice:
        return slice(self.offsets[image], self.offsets[image + 1])

    def image_of_rows(self) -> np.ndarray:
        """int64 `[M]`: the position of the image that each annotation belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images_with_boxes(self) -> np.ndarray:
        """The positions of the images that have a box to train on."""
        return np.flatnonzero(np.bincount(self.image_of_rows()[self.usable], minlength=len(self)))


def _lost(rows: np.ndarray, columns: dict) -> Fault:
    ids = zip(columns["id"][rows[:20]], columns["image_id"][rows[:20]], strict=True)
    found = [f"{i} of image {image}" for i, image in ids]
    kind = "annotations of images that the file does not list"
    remedy = "Mend images with other faults first; then correct these, or take them out"
    return Fault(kind, found, len(rows), remedy)


# ------------------------------------------------------------------------------ reading the file

# What is read of the rows of each list, with its type and, where it may be missing, what then
# stands for it. Everything else in the file is passed over.
FIELDS = {
    "images": (("id", int), ("file_name", str), ("width", int), ("height", int)),
    "annotations": (
        *(("image_id", int), ("category_id", int), ("bbox", tuple[float, float, float, float])),
        *(("id", int, -1), ("area", float | None, None), ("iscrowd", int, 0)),
    ),
    "categories": (("id", int), ("name", str | None, None)),
}
PART = 2**20  # bytes of annotations decoded at a time: their objects stay in the cache


def _read_columns(file: Path) -> tuple[dict[str, dict], list[Fault]]:
    """The fields of each of the file's three lists, as columns, and the rows that had to be left.

    msgspec decodes these fields alone. The rare file that it refuses, or any file where it is not
    installed, is read by Python's decoder, which is slower but can say what is wrong.
    """
    try:
        with file.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise DataError(f"{file} is empty: export or copy it again") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    with content:
        if msgspec is not None:
            try:
                return _decode(content), []
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass
            except EOFError as error:
                raise DataError(
                    f"{file}: a process that read it was killed: is there enough memory?"
                ) from error
        return _read_leniently(content[:], file)


def _columns(rows: list, key: str) -> dict[str, np.ndarray | list]:
    """The rows of the list `key`, objects with its `FIELDS`, as a column for each field."""
    columns = {}
    for name, kind, *_ in FIELDS[key]:
        values = map(attrgetter(name), rows)
        if kind is int:
            kind = bool if name == "iscrowd" else np.int64
            columns[name] = np.fromiter(values, kind, len(rows))
        elif name == "bbox":
            values = np.fromiter(chain.from_iterable(values), np.float64, 4 * len(rows))
            columns[name] = values.reshape(-1, 4)
        elif kind == float | None:
            columns[name] = np.array(list(values), dtype=np.float64)  # None becomes NaN
        elif kind is str:
            columns[name] = np.array([value.encode() for value in values], dtype=np.bytes_)
        else:
            columns[name] = list(values)
    return columns


def _row_type(key: str):
    """A list of objects with the `FIELDS` of the list `key`, as a type for msgspec."""
    # Larger numbers would not survive in the float64 rows of detections.
    whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
    fields = [(name, whole if kind is int else kind, *rest) for name, kind, *rest in FIELDS[key]]
    return list[msgspec.defstruct(key, fields, gc=False)]


def _decode(content: mmap.mmap) -> dict[str, dict]:
    """The file by msgspec: its annotations in parts, on several cores, and the rest meanwhile.

    MsgspecError if it is not what `FIELDS` says, or laid out so that no parts can be told.
    """
    decode = partial(_decode_part, msgspec.json.Decoder(_row_type("annotations")), content)
    for start, stop in _annotation_lists(content):
        spans = _spans(content, start, stop)
        try:
            decode(spans[-1])
        except msgspec.MsgspecError:  # the end of another list, such as licenses
            continue
        with _decoding(decode, spans) as parts:
            try:
                columns = _without(content, start, stop)
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:  # the list does not end here
                continue
            columns["annotations"] = _joined(parts, len(spans))
            return columns
    raise msgspec.DecodeError("no list of annotations was found")


def _joined(parts: Iterable[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """The columns of `count` parts, one after the other, without ever having all parts in memory.

    Room is made for as many rows as the first part promises, and for more where it proves wrong.
    """
    columns, filled, room = {}, 0, 0
    for part in parts:
        end = filled + len(part["image_id"])
        if end > room or not columns:
            room = end + end // 4 if room else int(1.1 * end * count)
            for name, values in part.items():
                larger = np.empty((room, *values.shape[1:]), values.dtype)
                larger[:filled] = columns.get(name, values)[:filled]
                columns[name] = larger
        for name, values in part.items():
            columns[name][filled:end] = values
        filled = end
    return {name: column[:filled] for name, column in columns.items()}


def _decode_part(decoder, content: mmap.mmap, span: tuple[int, int]) -> dict[str, np.ndarray]:
    """The rows in a span of the file, copied nowhere: for a moment the bytes around them, which
    are space or commas, become the brackets of a list (in the memory of this process only).
    """
    start, stop = span
    around = content[start - 1], content[stop]
    content[start - 1], content[stop] = b"[]"
    try:
        with memoryview(content) as view, view[start - 1 : stop + 1] as rows:
            return _columns(decoder.decode(rows), "annotations")
    finally:
        content[start - 1], content[stop] = around


def _annotation_lists(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Where the rows of annotations begin, and where they may end: the last bracket of the file
    first. The other two lists have to be in what is left without them.
    """
    begin = re.search(rb'"annotations"\s*:\s*\[', content)
    others = (b'"images"', b'"categories"')
    stop = len(content)
    for _ in range(1000) if begin else ():
        stop = content.rfind(b"]", begin.end(), stop)
        if stop < 0:
            break
        tail = content[stop:]
        complete = all(k in tail or content.find(k, 0, begin.end()) >= 0 for k in others)
        if complete and re.match(rb'\]\s*(,\s*"|\}\s*$)', tail):
            yield begin.end(), stop


def _without(content: mmap.mmap, start: int, stop: int) -> dict[str, dict]:
    """The columns of the file without the annotations between two bytes: for a moment what comes
    after them stands in their place (in the memory of this process only).

    DecodeError if what is left is not JSON, ValidationError if it is not what `FIELDS` says.
    """
    whole = msgspec.defstruct("File", [(key, _row_type(key)) for key in FIELDS])
    end = start + len(content) - stop
    there = content[start:end]
    content[start:end] = content[stop:]
    try:
        with memoryview(content) as view, view[:end] as rest:
            lists = msgspec.json.decode(rest, type=whole)
    finally:
        content[start:end] = there
    return {key: _columns(getattr(lists, key), key) for key in FIELDS}


def _spans(content: mmap.mmap, start: int, stop: int) -> list[tuple[int, int]]:
    """Parts of the rows between two bytes, cut where one object ends and the next begins.

    A cut elsewhere, in a list of objects inside a row, is noticed: its parts are not JSON.
    """
    between, spans = re.compile(rb"\}\s*,\s*\{"), []
    while start < stop:
        cut = between.search(content, min(start + PART, stop), stop)
        spans.append((start, cut.start() + 1 if cut else stop))
        start = cut.end() - 1 if cut else stop
    return spans or [(stop, stop)]


@contextlib.contextmanager
def _decoding(decode, spans: list) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    """`decode` for each of the spans, in order: begun here, by copies of this process, where that
    is worth their start and copies can be had.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    processes = min(cores, len(spans) // 16, 8)
    if processes < 2 or sys.platform != "linux":
        yield map(decode, spans)
        return
    with _copies(decode, spans, processes) as pipes:
        yield _received(pipes, len(spans))


@contextlib.contextmanager
def _copies(decode, spans: list, processes: int) -> Iterator[list]:
    """Copies of this process, each with its share of the spans and a pipe to send the parts by."""
    context = multiprocessing.get_context("fork")
    copies, pipes = [], []
    try:
        for first in range(processes):
            pipe, end = context.Pipe(duplex=False)
            _widen(end)
            pipes.append(pipe)
            task = (decode, spans[first::processes], end, pipes)
            copy = context.Process(target=_send_parts, args=task, daemon=True)
            copy.start()
            copies.append(copy)
            end.close()
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for copy in copies:
            copy.kill()
            copy.join()


def _received(pipes: list, count: int) -> Iterator[dict[str, np.ndarray]]:
    """The parts that copies send, in order; EOFError when one is killed. (A Pool would wait for it
    for ever, and unpacks in a thread, whose freed memory the main one cannot use.)
    """
    for i in range(count):
        part = _receive(pipes[i % len(pipes)])
        if isinstance(part, Exception):
            raise part
        yield part


def _widen(pipe) -> None:
    """Room for some ten parts, so that nobody waits for whose turn it is."""
    import fcntl  # not on Windows

    with contextlib.suppress(OSError):  # a user's pipes may be as wide as they are allowed to be
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, 2**20)


def _receive(pipe) -> dict[str, np.ndarray] | Exception:
    try:
        return pipe.recv()
    except OSError as error:  # what Python says when the other end closes within a message
        raise EOFError from error


def _send_parts(decode, spans: list, pipe, others: list) -> None:
    """What a copy does; it ends by itself when nobody reads `pipe` any more.

    `others` are the reading ends of the pipes, which it has to close to notice that.
    """
    for other in others:
        other.close()
    try:
        for span in spans:
            try:
                part = decode(span)
            except Exception as error:
                part = error
            pipe.send(part)
    except BrokenPipeError:
        pass


def _read_leniently(content: bytes, file: Path) -> tuple[dict[str, dict], list[Fault]]:
    """With Python's own decoder, which takes NaN, and numbers of other types where they fit."""
    try:
        data = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}. Export or copy it again") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{file} holds a {type(data).__name__} at its top level, not an object with the lists "
            "images, annotations and categories: COCO results are not annotations"
        )
    columns, wrong = {}, {}
    for key, fields in FIELDS.items():
        if not isinstance(data.get(key), list):
            raise DataError(f"{file} has no list {key!r}: is it a COCO annotation file?")
        rows = []
        for number, row in enumerate(data.pop(key)):
            try:
                rows.append(_convert(row, fields))
            except ValueError as error:
                named = isinstance(row, dict) and row.get("id") is not None
                where = f"id {row['id']}" if named else f"{key}[{number}]"
                wrong.setdefault(f"{key} {error}", []).append(where)
        columns[key] = _columns(rows, key)
    return columns, [Fault(kind, where[:20], len(where)) for kind, where in wrong.items()]


def _convert(row: object, fields: tuple) -> SimpleNamespace:
    """A row of a list as an object; ValueError says what is wrong with it, as the end of a text."""
    if not isinstance(row, dict):
        raise ValueError("that are not objects")
    values = {}
    for name, kind, *default in fields:
        value = row.get(name)
        if value is None and default:
            values[name] = default[0]
        elif value is None and kind == (str | None):
            values[name] = None
        else:
            values[name] = _converted(value, name, kind)
    return SimpleNamespace(**values)


def _converted(value: object, name: str, kind: type):
    if value is None:
        raise ValueError(f"without {name!r}")
    if kind in (str, str | None):
        if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
            return value
        # Half of a surrogate pair, which JSON can say and UTF-8 cannot, is none either.
        raise ValueError(f"whose {name!r} is not a text")
    whole = kind is int
    try:
        if name == "bbox":
            x, y, width, height = map(float, value if isinstance(value, list) else ())
            return x, y, width, height
        number = float(value)
        if not whole:
            return number
        if number == int(number) and abs(number) <= 2**53:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    expected = (
        "four numbers" if name == "bbox" else "a whole number up to 2**53" if whole else "a number"
    )
    raise ValueError(f"whose {name!r} is not {expected}")


# ------------------------------------------------------------------------------------- the images


def read_image(path: Path, width: int, height: int) -> torch.Tensor:
    """An image file of any mode as RGB, uint8 `[3, height, width]`.

    16-bit grey is scaled to 8 bits, transparency is dropped. A file with an EXIF orientation is
    turned upright, as annotation tools show it, unless only the unturned picture has the stated
    size. Raises DataError when the file cannot be read or has another size.
    """
    image = _read(path, (width, height))
    if image.shape != (3, height, width):
        raise DataError(
            f"{path} is {image.shape[2]} x {image.shape[1]} pixels, its annotation file says "
            f"{width} x {height}: correct the file's 'width' and 'height', and its boxes",
            kind="image files of another size than their annotation file says",
        )
    return image


def read_upright(path: Path) -> torch.Tensor:
    """An image file of no stated size, as a viewer shows it: RGB, uint8 `[3, H, W]`.

    As `read_image`, but always turned as its EXIF orientation says.
    """
    return _read(path, None)


def _read(path: Path, size: tuple[int, int] | None) -> torch.Tensor:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels is more than the "
                    f"{MAX_PIXELS:,} that a picture may have here: store a smaller one",
                    kind="image files that are too large",
                )
            pixels = _to_rgb(_upright(image, size), path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a broken file can make a decoder stumble in many ways
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be read as an image: {reason}", kind="image files that cannot be read"
        ) from error
    # A view: moving the colours to the front would take as long as half the decoding.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The picture turned as its EXIF orientation says, if it has the stated size when turned."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    upright = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    wanted = size is None or upright == size
    return ImageOps.exif_transpose(image) if orientation != 1 and wanted else image


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode == "F":
        raise DataError(
            f"{path} has floating-point pixels of unknown range: store 8 or 16 bits",
            kind="image files that cannot be read",
        )
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_files(folder: Path) -> list[Path]:
    """The files in a folder and the folders below it whose names end as an image's do, sorted.

    Names that begin with a dot are none: systems hide thumbnails and the like behind them.
    """
    found, seen = [], set()
    for home, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(home)
        # A link may lead back to where the walk has been.
        folders[:] = [] if real in seen else [name for name in folders if name[0] != "."]
        if real not in seen:
            found += [Path(home, name) for name in names if name[0] != "."]
        seen.add(real)
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


class CocoDetection(Dataset):
    """The images of an index with their targets, as torchvision's detectors take them.

    `dataset[key]` gives `(image, target)`: `image` uint8 `[3, H, W]`; `target` a dict of `boxes`
    float32 `[N, 4]` as x1, y1, x2, y2 in pixels of the image, `labels` int64 `[N]`, `image_id` int,
    `area` float32 `[N]`, `iscrowd` int64 `[N]`. Only usable boxes are in it, clipped to the image;
    `N` may be 0. `key` is a position in `images` (by default all), or `(position, seed)`, which
    also applies `augmentation` as a function of the seed.
    """

    def __init__(
        self,
        index: CocoIndex,
        categories: Categories,
        images: np.ndarray | None = None,
        augmentation=None,
    ):
        self.index, self.augmentation = index, augmentation
        self.images = np.arange(len(index)) if images is None else images
        self.labels = categories.labels_of(index.category_ids)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, dict]:
        position, seed = key if isinstance(key, tuple) else (key, None)
        i = self.images[position]
        width, height = self.index.sizes[i].tolist()
        try:
            image = read_image(self.index.image_dir / self.index.file_name(i), width, height)
        except DataError as error:
            raise DataError(
                f"{error}. Mend it, or take image {self.index.image_ids[i]} out of "
                f"{self.index.annotation_file}, or go on without it by --max-bad-images 1. To find "
                "all such images: --check-data"
            ) from None
        target = self.target(i)
        if seed is not None and self.augmentation is not None:
            image, target = transforms.augment(self.augmentation, image, target, seed)
        return image, target

    def target(self, i: int) -> dict:
        """The target of image i of the index, before augmentation."""
        rows = self.index.box_range(i)
        xywh = self.index.boxes[rows]
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        boxes = boxes.clip(0, np.tile(self.index.sizes[i], 2)).astype(np.float32)
        keep = self.index.usable[rows] & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return {
            "boxes": torch.from_numpy(boxes[keep]),
            "labels": torch.from_numpy(self.labels[rows][keep]),
            "image_id": int(self.index.image_ids[i]),
            "area": torch.from_numpy(self.index.areas[rows][keep].astype(np.float32)),
            "iscrowd": torch.zeros(np.count_nonzero(keep), dtype=torch.int64),
        }


class PackedImages:
    """The images of a batch in one uint8 tensor, which goes to the device as one copy.

    Each tensor that leaves a loading process costs a file descriptor and a good part of a
    millisecond, and uint8 is a quarter of the bytes of float32.
    """

    def __init__(self, images: Sequence[torch.Tensor]):
        """Pack `images`, each uint8 `[3, H, W]`."""
        self.sizes = [tuple(image.shape[-2:]) for image in images]
        self.pixels = torch.cat([image.permute(1, 2, 0).reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.sizes)

    def pin_memory(self) -> "PackedImages":
        """Called by the DataLoader where the device is a CUDA one."""
        self.pixels = self.pixels.pin_memory()
        return self

    def to(self, device: torch.device) -> list[torch.Tensor]:
        """The images on the device, each float32 `[3, H, W]` in [0, 1]."""
        pixels = self.pixels.to(device, non_blocking=True)
        parts = pixels.split([3 * height * width for height, width in self.sizes])
        return [
            part.view(height, width, 3).permute(2, 0, 1).float().div_(255)
            for part, (height, width) in zip(parts, self.sizes, strict=True)
        ]


def collate(batch: list[tuple[torch.Tensor, dict]]) -> tuple[PackedImages, list[dict]]:
    """Samples of `CocoDetection` as a batch: `(images, targets)`, quick to hand on.

    The images are packed, and the targets hold NumPy arrays instead of tensors.
    """
    images, targets = zip(*batch, strict=True)
    arrays = [
        {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for target in targets
    ]
    return PackedImages(images), arrays
