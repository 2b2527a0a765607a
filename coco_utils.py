"""COCO-format data: an annotation file as compact arrays, category ids as labels, images and boxes.

Format: https://cocodataset.org/#format-data. Required are `images[].id, file_name, width, height`,
`annotations[].image_id, category_id, bbox` (x, y, width, height in pixels) and `categories[].id`.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

import transforms

# The ids of COCO's 80 categories leave gaps between 1 and 90; torchvision's COCO weights have one
# output for each number from 0 (background) to 90.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
# Pillow only warns at its bound for a plausible picture and refuses at twice as much: here the
# bound itself is refused.
MAX_PIXELS, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None


class DataError(ValueError):
    """Something wrong with the data; the message names the file and the id and says what to do."""

    def __init__(self, message: str):
        # A DataLoader worker's error arrives as a text with its traceback: keep what was said.
        super().__init__(message.rpartition("DataError: ")[2].strip())


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


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int = -1
    area: float | None = None
    iscrowd: int = 0


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str | None = None


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


CORRECT = "Correct them in the file, or take them out"


class CocoIndex:
    """An annotation file as NumPy arrays; the boxes of image i are rows `box_range(i)`.

    Per image, in the order of the file: `image_ids` int64 `[I]`, `file_names` (UTF-8 bytes),
    `sizes` int32 `[I, 2]` as width, height. Per annotation, ordered by image: `annotation_ids`
    int64 `[M]` (-1 where the file has none), `boxes` float64 `[M, 4]` as x, y, width, height just
    as in the file, `category_ids` int64, `iscrowd` bool, `areas` float64. `usable` bool `[M]`
    marks what can train: no crowds, no boxes without a size.

    Raises DataError for a file that cannot be used, naming it and the first ids that are wrong.
    """

    def __init__(self, split: Split):
        self.annotation_file, self.image_dir = split
        data = _read_json(self.annotation_file)
        self.categories = _categories(data.categories, self.annotation_file)
        self._keep_images(data.images)
        self._keep_annotations(data.annotations)
        del data
        self._check_annotations()

    def _keep_images(self, images: list[_Image]) -> None:
        if not images:
            raise DataError(f"{self.annotation_file} lists no images")
        self.image_ids = np.array([image.id for image in images], dtype=np.int64)
        self.file_names = np.array([image.file_name.encode() for image in images])
        self.sizes = np.array([(image.width, image.height) for image in images], dtype=np.int32)
        self._check_images()

    def _keep_annotations(self, annotations: list[_Annotation]) -> None:
        image_of = {image_id: i for i, image_id in enumerate(self.image_ids.tolist())}
        images = np.array([image_of.get(a.image_id, -1) for a in annotations], dtype=np.int64)
        if (images < 0).any():
            rows = np.flatnonzero(images < 0)
            found = [
                f"{annotations[row].id} of image {annotations[row].image_id}" for row in rows[:20]
            ]
            self._fail("annotations of images that the file does not list", found, len(rows))
        order = np.argsort(images, kind="stable")
        counts = np.bincount(images, minlength=len(self.image_ids))
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        boxes = np.array([a.bbox for a in annotations], dtype=np.float64).reshape(-1, 4)[order]
        areas = np.array([math.nan if a.area is None else a.area for a in annotations])[order]
        self.boxes = boxes
        self.areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
        self.annotation_ids = np.array([a.id for a in annotations], dtype=np.int64)[order]
        self.category_ids = np.array([a.category_id for a in annotations], dtype=np.int64)[order]
        self.iscrowd = np.array([a.iscrowd for a in annotations], dtype=bool)[order]
        self.usable = ~self.iscrowd & (boxes[:, 2:] > 0).all(axis=1)

    def _check_images(self) -> None:
        values, counts = np.unique(self.image_ids, return_counts=True)
        self._fail_at("image ids that stand twice", values[counts > 1])
        self._fail_at(
            "images without a positive size", self.image_ids[(self.sizes <= 0).any(axis=1)]
        )
        outside = [
            name for name in map(self.file_name, range(len(self))) if not _stays_inside(name)
        ]
        self._fail_at("file names that lead out of the image folder", outside)
        missing = f"image files missing in {self.image_dir}"
        self._fail_at(
            missing, self._missing_files(), "Put them there, or take them out of the file"
        )

    def _missing_files(self) -> list[str]:
        """By one listing of each folder, which costs less than asking for every file."""
        names = [self.file_name(i) for i in range(len(self))]
        present = {}
        for folder in {os.path.dirname(name) for name in names}:
            path = self.image_dir / folder
            present[folder] = set(os.listdir(path)) if path.is_dir() else set()
        return [n for n in names if os.path.basename(n) not in present[os.path.dirname(n)]]

    def _check_annotations(self) -> None:
        named = self.annotation_ids[self.annotation_ids >= 0]
        values, counts = np.unique(named, return_counts=True)
        self._fail_at("annotation ids that stand twice", values[counts > 1])
        unknown = ~np.isin(self.category_ids, self.categories.ids)
        what = "annotations whose category_id the file does not define"
        self._fail_rows(what, unknown)
        broken = ~np.isfinite(self.boxes).all(axis=1)
        self._fail_rows("annotations with NaN or infinity in their bbox", broken)
        per_box = self.sizes[self.image_of_rows()]
        beyond = (self.boxes[:, :2] >= per_box) | (self.boxes[:, :2] + self.boxes[:, 2:] <= 0)
        self._fail_rows("boxes wholly outside their image", beyond.any(axis=1) & self.usable)

    def _fail_rows(self, kind: str, wrong: np.ndarray) -> None:
        rows = np.flatnonzero(wrong)
        image_ids = self.image_ids[self.image_of_rows()[rows[:20]]]
        found = [
            f"{annotation_id} of image {image_id}"
            for annotation_id, image_id in zip(
                self.annotation_ids[rows[:20]], image_ids, strict=True
            )
        ]
        if found:
            self._fail(kind, found, len(rows))

    def _fail_at(self, kind: str, values: Iterable, remedy: str = CORRECT) -> None:
        values = list(values)
        if values:
            self._fail(kind, [str(value) for value in values[:20]], len(values), remedy)

    def _fail(self, kind: str, found: list[str], count: int, remedy: str = CORRECT) -> None:
        more = f" and {count - len(found)} more" if count > len(found) else ""
        raise DataError(
            f"{self.annotation_file}: {count} {kind}: {', '.join(found)}{more}. {remedy}"
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        return self.file_names[image].decode()

    def box_range(self, image: int) -> slice:
        return slice(self.offsets[image], self.offsets[image + 1])

    def image_of_rows(self) -> np.ndarray:
        """int64 `[M]`: the position of the image that each annotation belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images_with_boxes(self) -> np.ndarray:
        """The positions of the images that have a box to train on."""
        return np.unique(self.image_of_rows()[self.usable])

    def summary(self) -> str:
        """One line for the log: what there is, and what of it does not train."""
        sizeless = np.count_nonzero(~self.usable & ~self.iscrowd)
        parts = [
            f"{len(self):,} images",
            f"{len(self.boxes):,} boxes in {len(self.categories.ids)} categories",
            f"{len(self) - len(self.images_with_boxes()):,} images without a usable box",
            f"{np.count_nonzero(self.iscrowd):,} crowd boxes",
            f"{sizeless:,} boxes without a size",
        ]
        return ", ".join(parts[:2] + [part for part in parts[2:] if not part.startswith("0 ")])


def _stays_inside(file_name: str) -> bool:
    path = os.path.normpath(file_name)
    return not (os.path.isabs(path) or path == ".." or path.startswith(".." + os.sep))


def _categories(rows: list[_Category], file: Path) -> Categories:
    if not rows:
        raise DataError(f"{file} has no categories: name at least one in its list 'categories'")
    names = {row.id: row.name or f"category {row.id}" for row in rows}
    if len(names) < len(rows):
        raise DataError(f"{file} has two categories with the same id: give each its own")
    return Categories.from_names(names)


def _read_json(file: Path) -> _File:
    """Decode the needed fields; the rare file that this refuses is read again to say why."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(content, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _read_leniently(content, file)


def _read_leniently(content: bytes, file: Path) -> _File:
    """With Python's own decoder, which takes NaN, and numbers of other types where they fit."""
    try:
        data = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{file} holds a {type(data).__name__} at its top level, not an object with the lists "
            "images, annotations and categories: COCO results are not annotations"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise DataError(f"{file} has no list {key!r}: is it a COCO annotation file?")
    rows = {
        key: [_convert(row, kind, f"{file}: {key}[{i}]") for i, row in enumerate(data[key])]
        for key, kind in (
            ("images", _Image),
            ("annotations", _Annotation),
            ("categories", _Category),
        )
    }
    return _File(**rows)


def _convert(row: object, kind: type, where: str) -> msgspec.Struct:
    if isinstance(row, dict) and row.get("id") is not None:
        where += f" (id {row['id']})"
    if isinstance(row, dict) and row.get("iscrowd", 0) is None:
        row = {**row, "iscrowd": 0}
    try:
        return msgspec.convert(row, kind, strict=False)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}".replace("`", "'").replace("$.", "")) from error


# ------------------------------------------------------------------------------------- the images


def read_image(path: Path, width: int, height: int) -> torch.Tensor:
    """An image file of any mode as RGB, uint8 `[3, height, width]`.

    16-bit grey is scaled to 8 bits, transparency is dropped. A file with an EXIF orientation is
    turned upright, as annotation tools show it, unless only the unturned picture has the stated
    size. Raises DataError when the file cannot be read or has another size.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels is more than the "
                    f"{MAX_PIXELS:,} that a picture may have here: store a smaller one"
                )
            pixels = _to_rgb(_upright(image, (width, height)), path)
    except (OSError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as an image: {reason}") from error
    if pixels.shape != (height, width, 3):
        raise DataError(
            f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its annotation file says "
            f"{width} x {height}: correct the file's 'width' and 'height', and its boxes"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _upright(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture turned as its EXIF orientation says, if it has the stated size when turned."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    upright = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    return ImageOps.exif_transpose(image) if orientation != 1 and upright == size else image


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode == "F":
        raise DataError(f"{path} has floating-point pixels of unknown range: store 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


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
        image = read_image(self.index.image_dir / self.index.file_name(i), width, height)
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


def collate(batch: list[tuple[torch.Tensor, dict]]) -> tuple[list[torch.Tensor], list[dict]]:
    """A batch of images of different sizes: a list of images and a list of targets."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
