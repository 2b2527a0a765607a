"""COCO-format data: an annotation file as arrays, category ids as labels, images with targets.

Format: https://cocodataset.org/#format-data. Required are `images[].id, file_name, width, height`,
`annotations[].image_id, category_id, bbox` (x, y, width, height in pixels) and `categories[].id`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

import transforms
from internals.annotations import MAX_EXAMPLES, AnnotationColumns, DataIssue, read_annotations
from internals.errors import DataError
from internals.images import read_image
from internals.packed_images import PackedImages

# The ids of COCO's 80 categories leave gaps between 1 and 90; torchvision's COCO weights have one
# output for each number from 0 (background) to 90.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
# Stands for "no category" where -1 cannot, as it may be the id of one.
NO_CATEGORY = np.iinfo(np.int64).min


# --------------------------------------------------------------------------------- finding files


class Split(NamedTuple):
    """The annotation file of a split, train or val, and the folder of its images."""

    annotations: Path
    images: Path


def find_split(data_path: Path, split: str, annotations: Path | None, images: Path | None) -> Split:
    """Find the files of a split in one of the layouts of the field.

    Args:
        data_path: The folder to look in.
        split: "train" or "val".
        annotations: The annotation file, if the user named it; `images` must then be given, too.
        images: The folder of the images, likewise.

    Raises:
        DataError: Nothing was found; the message lists the paths that were tried.
    """
    if annotations and images:
        candidates = [Split(annotations, images)]
    elif annotations or images:
        raise DataError(
            f"--{split}-annotations and --{split}-images belong together: give both, or neither to "
            f"look in {data_path}"
        )
    else:
        candidates = [
            Split(data_path / f"annotations/instances_{split}2017.json", data_path / f"{split}2017")
        ]
        for name in ("train",) if split == "train" else ("valid", "val"):
            folder = data_path / name
            candidates.append(Split(folder / "_annotations.coco.json", folder))
    for candidate in candidates:
        if candidate.annotations.is_file() and candidate.images.is_dir():
            return candidate
    tried = "\n".join(
        f"  {candidate.annotations} ({_presence(candidate.annotations.is_file())})"
        f" with images in {candidate.images}{os.sep} ({_presence(candidate.images.is_dir())})"
        for candidate in candidates
    )
    name = {"train": "training", "val": "validation"}[split]
    raise DataError(
        f"no {name} data found; looked for\n{tried}\n"
        "To get COCO 2017: bash datasets/download_coco.sh. To try the recipe without it: "
        "bash start_scripts/quickstart.sh. Your own data in COCO format: --data-path FOLDER, or "
        f"--{split}-annotations FILE --{split}-images FOLDER"
    )


def _presence(found: bool) -> str:
    return "found" if found else "missing"


# ------------------------------------------------------------------------------------ categories


@dataclass(frozen=True)
class Categories:
    """The category ids and names of a data set, and the label of each in the model.

    `ids` ascend; `labels[i]` belongs to `ids[i]`; label 0 is the background. A data set with
    exactly COCO's 80 ids keeps them as labels, as torchvision's COCO weights do; any other gets
    labels 1..K.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]

    @classmethod
    def from_names(cls, names: dict[int, str]) -> "Categories":
        """Build from the name of each category id."""
        ids = tuple(sorted(names))
        labels = ids if ids == COCO_CATEGORY_IDS else tuple(range(1, len(ids) + 1))
        return cls(ids, tuple(names[i] for i in ids), labels)

    @classmethod
    def from_list(cls, rows: list[dict]) -> "Categories":
        """Build from what `to_list` gave, for example out of a checkpoint."""
        return cls(*(tuple(row[key] for row in rows) for key in ("id", "name", "label")))

    def to_list(self) -> list[dict]:
        """Convert to plain types, for a checkpoint."""
        rows = zip(self.ids, self.names, self.labels, strict=True)
        return [{"id": i, "name": name, "label": label} for i, name, label in rows]

    @property
    def id_to_name(self) -> dict[int, str]:
        return dict(zip(self.ids, self.names, strict=True))

    @property
    def num_classes(self) -> int:
        """Outputs of the model's classifier: the background and everything up to the last label."""
        return max(self.labels) + 1

    @property
    def is_coco(self) -> bool:
        return self.ids == COCO_CATEGORY_IDS

    def labels_of(self, category_ids: np.ndarray) -> np.ndarray:
        """Look up the int64 labels of category ids, all of which must be known."""
        position = np.searchsorted(self.ids, category_ids)
        return np.asarray(self.labels, dtype=np.int64)[position]

    def ids_of_labels(self) -> np.ndarray:
        """The category id of each label, int64 `[num_classes]`; NO_CATEGORY for unused labels."""
        table = np.full(self.num_classes, NO_CATEGORY, dtype=np.int64)
        table[list(self.labels)] = self.ids
        return table

    def check_contains(self, other: "Categories", file: Path) -> None:
        """Raise DataError unless every category of `other`, read from `file`, is known here."""
        known = self.id_to_name
        for i, name in other.id_to_name.items():
            if known.get(i) != name:
                here = f"category {i} is {known[i]!r}" if i in known else "there is no such id"
                raise DataError(
                    f"{file}: category {i} ({name!r}) does not fit what the model is trained on, "
                    f"where {here}: use annotation files with the same categories"
                )


# ------------------------------------------------------------------------------------- the index


class CocoIndex:
    """An annotation file as NumPy arrays; the boxes of image i are rows `box_range(i)`.

    Per image, in the order of the file: `image_ids` int64 `[I]`, `file_names` (UTF-8 bytes),
    `sizes` int32 `[I, 2]` as width, height. Per annotation, ordered by image: `annotation_ids`
    int64 `[M]` (-1 where the file has none), `boxes` float64 `[M, 4]` as x, y, width, height just
    as in the file, `category_ids` int64, `iscrowd` bool, `areas` float64. `usable` bool `[M]`
    marks what can train: no crowds, no boxes without a size.

    Raises DataError for a file that cannot be read. `issues` are the rows that had to be left out;
    everything else that is wrong with the data is found by `internals.data_checks`.
    """

    def __init__(self, split: Split):
        self.annotation_file, self.image_dir = split
        columns, self.issues = read_annotations(self.annotation_file)
        self.categories = self._make_categories(columns)
        if not len(columns.image_ids):
            raise DataError(
                f"{self.annotation_file} lists no images that can be used{self._issues_so_far()}"
            )
        self.image_ids, self.file_names = columns.image_ids, columns.file_names
        self.sizes = columns.sizes
        self._set_annotations(columns)

    def _make_categories(self, columns: AnnotationColumns) -> Categories:
        rows = columns.categories
        if not rows:
            raise DataError(
                f"{self.annotation_file} has no categories that can be used: name at least one in "
                f"its list 'categories'{self._issues_so_far()}"
            )
        names = {row.id: row.name or f"category {row.id}" for row in rows}
        if len(names) < len(rows):
            raise DataError(
                f"{self.annotation_file} has two categories with the same id: give each its own"
            )
        return Categories.from_names(names)

    def _issues_so_far(self) -> str:
        return ": " + "; ".join(map(str, self.issues)) if self.issues else ""

    def _set_annotations(self, columns: AnnotationColumns) -> None:
        """Order the annotations by image; leave out, and report, those of unknown images."""
        positions = self.positions_of(columns.annotation_image_ids)
        # Stable: the annotations of an image keep the order that they have in the file.
        order = np.argsort(positions, kind="stable")
        unknown = np.count_nonzero(positions < 0)
        if unknown:
            self.issues.append(_unknown_images(columns, order[:unknown]))
        rows = order[unknown:]
        self.offsets = np.searchsorted(positions[rows], np.arange(len(self) + 1))
        self.annotation_ids = columns.annotation_ids[rows]
        self.category_ids = columns.category_ids[rows]
        self.boxes, self.areas = columns.boxes[rows], columns.areas[rows]
        self.iscrowd = columns.iscrowd[rows]
        self.usable = ~self.iscrowd & (self.boxes[:, 2:] > 0).all(axis=1)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        return self.file_names[image].decode()

    def read_image(self, image: int) -> torch.Tensor:
        """Read the image at a position of the index as RGB, uint8 `[3, H, W]`.

        Raises:
            DataError: The file cannot be read, or has not the size that the index says.
        """
        width, height = self.sizes[image].tolist()
        return read_image(self.image_dir / self.file_name(image), width, height)

    def box_range(self, image: int) -> slice:
        """The rows of the annotations of an image."""
        return slice(self.offsets[image], self.offsets[image + 1])

    def image_of_rows(self) -> np.ndarray:
        """The position of the image that each annotation belongs to, int64 `[M]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images_with_boxes(self) -> np.ndarray:
        """The positions of the images that have a box to train on, ascending."""
        return np.flatnonzero(np.bincount(self.image_of_rows()[self.usable], minlength=len(self)))

    def positions_of(self, image_ids: np.ndarray) -> np.ndarray:
        """Where in the index the images with these ids are, int64; -1 for unknown ids."""
        order = np.argsort(self.image_ids, kind="stable")
        places = np.searchsorted(self.image_ids, image_ids, sorter=order)
        found = order[places.clip(max=len(self) - 1)]
        return np.where(self.image_ids[found] == image_ids, found, -1)

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
        """Hash everything that training and evaluation depend on, the pixels aside.

        Checkpoints hold it: another value for the same file would stop every run from resuming.
        """
        digest = hashlib.sha256(repr(self.categories).encode())
        for name in ("image_ids", "file_names", "sizes", "offsets", "boxes", "category_ids"):
            digest.update(getattr(self, name).tobytes())
        digest.update(self.iscrowd.tobytes() + self.areas.tobytes())
        return digest.hexdigest()[:32]


def _unknown_images(columns: AnnotationColumns, rows: np.ndarray) -> DataIssue:
    first = rows[:MAX_EXAMPLES]
    ids, image_ids = columns.annotation_ids[first], columns.annotation_image_ids[first]
    return DataIssue(
        "annotations of images that the file does not list",
        [f"{i} of image {image_id}" for i, image_id in zip(ids, image_ids, strict=True)],
        len(rows),
        "Correct images with other errors first; then correct these, or take them out",
    )


# ---------------------------------------------------------------------------- images and targets


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
        try:
            image = self.index.read_image(i)
        except DataError as error:
            raise DataError(
                f"{error}. Correct it, or take image {self.index.image_ids[i]} out of "
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
        # In NumPy, as these few boxes take PyTorch's operators three times as long.
        xywh = self.index.boxes[rows]
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        boxes = boxes.clip(0, np.tile(self.index.sizes[i], 2)).astype(np.float32)
        # Only now, as float32 may leave a thin box without a size.
        keep = self.index.usable[rows] & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return {
            "boxes": torch.from_numpy(boxes[keep]),
            "labels": torch.from_numpy(self.labels[rows][keep]),
            "image_id": int(self.index.image_ids[i]),
            "area": torch.from_numpy(self.index.areas[rows][keep].astype(np.float32)),
            "iscrowd": torch.zeros(np.count_nonzero(keep), dtype=torch.int64),
        }


def collate(batch: list[tuple[torch.Tensor, dict]]) -> tuple[PackedImages, list[dict]]:
    """Collate samples of `CocoDetection` to a batch `(images, targets)`.

    The images are packed, and the targets hold NumPy arrays instead of tensors: each tensor that
    leaves a loading process costs a file descriptor and a good part of a millisecond.
    """
    images, targets = zip(*batch, strict=True)
    arrays = [
        {
            key: value.numpy() if isinstance(value, torch.Tensor) else value
            for key, value in target.items()
        }
        for target in targets
    ]
    return PackedImages(images), arrays
