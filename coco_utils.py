"""COCO-format data: index its annotations, and load images with their targets.

Format: https://cocodataset.org/#format-data. Required are `images[].id, file_name, width, height`,
`annotations[].image_id, category_id, bbox` (x, y, width, height in pixels) and `categories[].id`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

import transforms
from internals import file_names
from internals.annotations import (
    BORDER_TOLERANCE,
    MAX_EXAMPLES,
    MIN_BOX_SIDE,
    AnnotationColumns,
    DataIssue,
    implausible_areas,
    read_annotations,
)
from internals.batches import Batch
from internals.data_checks import find_more_bad_images
from internals.errors import DataError
from internals.failures import image_error
from internals.image_notes import ImageNote
from internals.images import DEFAULT_RULES, read_image
from internals.layouts import Split

# COCO's 80 category ids are not contiguous; torchvision's COCO weights have an output for each
# number from 0 (background) to 90.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
# Not -1, which may be the id of a category.
NO_CATEGORY = np.iinfo(np.int64).min


# ------------------------------------------------------------------------------------ categories


@dataclass(frozen=True)
class Categories:
    """The categories of a data set, and their labels in the model.

    The labels of a data set with exactly COCO's 80 ids are these ids, as in torchvision's COCO
    weights; those of others are 1..K. Label 0 is the background.

    Attributes:
        ids: Category ids, ascending.
        names: The name of each id.
        labels: The label of each id.
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
        """Build from the rows of `to_list`, for example from a checkpoint."""
        return cls(*(tuple(row[key] for row in rows) for key in ("id", "name", "label")))

    @cached_property
    def display_names(self) -> tuple[str, ...]:
        """The name of each id without control characters; of several ids, with the id."""
        names = [re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", name) for name in self.names]
        counts = Counter(names)
        return tuple(
            f"{name} (id {i})" if counts[name] > 1 else name
            for i, name in zip(self.ids, names, strict=True)
        )

    def to_list(self) -> list[dict]:
        """Convert to plain types, for a checkpoint."""
        rows = zip(self.ids, self.names, self.labels, strict=True)
        return [{"id": i, "name": name, "label": label} for i, name, label in rows]

    @property
    def id_to_name(self) -> dict[int, str]:
        """The name of each category by its id."""
        return dict(zip(self.ids, self.names, strict=True))

    @property
    def num_classes(self) -> int:
        """The number of outputs of the classifier: the largest label and the background."""
        return max(self.labels) + 1

    @property
    def is_coco(self) -> bool:
        """Whether the ids are COCO's 80."""
        return self.ids == COCO_CATEGORY_IDS

    def labels_of(self, category_ids: np.ndarray) -> np.ndarray:
        """Return the labels of category ids, all of which must be known; int64, of their shape."""
        position = np.searchsorted(self.ids, category_ids)
        return np.asarray(self.labels, dtype=np.int64)[position]

    def ids_of_labels(self) -> np.ndarray:
        """Return the category id of each label, int64 `[num_classes]`; NO_CATEGORY if unused."""
        table = np.full(self.num_classes, NO_CATEGORY, dtype=np.int64)
        table[list(self.labels)] = self.ids
        return table

    def check_contains(self, other: "Categories", file: Path) -> None:
        """Raise DataError unless every category of `other`, read from `file`, is one of these."""
        known = self.id_to_name
        for i, name in other.id_to_name.items():
            if known.get(i) != name:
                here = f"category {i} is {known[i]!r}" if i in known else "there is no such id"
                raise DataError(
                    f"{file}: category {i} ({name!r}) does not fit those of the training, where "
                    f"{here}: correct it in one of the annotation files"
                )


# ------------------------------------------------------------------------------------- the index


class GroundTruth(NamedTuple):
    """What evaluation takes for true: `N` of the rows of an index.

    Attributes:
        rows: The rows of the index, int64 `[N]`, ascending.
        boxes: float64 `[N, 4]`, x, y, width, height.
        areas: float64 `[N]`, for the metrics of small, medium and large objects.
        changed: How many were clipped, or have another area than in the file.
    """

    rows: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    changed: int


class CocoIndex:
    """An annotation file as NumPy arrays; the boxes of image i are rows `box_range(i)`.

    Raises DataError for a file that cannot be read. Other errors in the data are found by
    `internals.data_checks`.

    Attributes:
        image_ids: int64 `[I]`, in the order of the file.
        file_names: UTF-8 bytes `[I]`, relative to the image folder; as in the file where they name
            no file below the folder.
        file_problems: uint8 `[I]`, positions in `file_names.PROBLEMS`: 0 for a name with a file.
        sizes: int32 `[I, 2]`, width and height.
        annotation_ids: int64 `[M]`, ordered by image; -1 where the file has none.
        boxes: float64 `[M, 4]`, x, y, width and height as in the file.
        category_ids: int64 `[M]`.
        iscrowd: bool `[M]`.
        areas: float64 `[M]`, as in the file; width * height where it has none.
        usable: bool `[M]`; crowds, and boxes of which no `MIN_BOX_SIDE` is in their image, are not
            used for training.
        offsets: int64 `[I + 1]`, the first row of each image.
        issues: The rows of the file that had to be skipped, and a note on names that were resolved.
        as_annotated: Whether evaluation takes boxes and areas as they are in the file.
        rules: How the images are read.
    """

    as_annotated = False
    rules = DEFAULT_RULES

    def __init__(self, split: Split, resolve_names: bool = True):
        """Read the annotation file; `resolve_names` if its images are in the folder of `split`."""
        self.annotation_file, self.image_dir = split
        columns, self.issues = read_annotations(self.annotation_file)
        self.categories = self._make_categories(columns)
        if not len(columns.image_ids):
            raise DataError(f"{self.annotation_file} lists no usable images{self._issues_so_far()}")
        self.image_ids, self.sizes = columns.image_ids, columns.sizes
        self.file_names = columns.file_names
        self.file_problems = np.zeros(len(self), dtype=np.uint8)
        if resolve_names:
            self.file_names, self.file_problems, notes = file_names.resolve_names(
                self.file_names, self.image_dir
            )
            self.issues += notes
        self._set_annotations(columns)

    def _make_categories(self, columns: AnnotationColumns) -> Categories:
        rows = columns.categories
        if not rows:
            raise DataError(
                f"{self.annotation_file} has no usable categories: add one to its list "
                f"'categories'{self._issues_so_far()}"
            )
        names = {row.id: row.name or f"category {row.id}" for row in rows}
        if len(names) < len(rows):
            raise DataError(
                f"{self.annotation_file} has two categories with the same id: make them unique"
            )
        return Categories.from_names(names)

    def _issues_so_far(self) -> str:
        return ": " + "; ".join(map(str, self.issues)) if self.issues else ""

    def _set_annotations(self, columns: AnnotationColumns) -> None:
        """Order the annotations by image; skip those of unknown images, with an issue."""
        positions = self.positions_of(columns.annotation_image_ids)
        # Stable, so that the annotations of an image keep their order.
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
        sides = self.clipped_boxes()[:, 2:]
        self.usable = ~self.iscrowd & (sides >= MIN_BOX_SIDE).all(axis=1)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        """Return the file name of the image at a position of the index."""
        return self.file_names[image].decode()

    def path(self, image: int) -> Path:
        """Return the file of the image at a position of the index."""
        return self.image_dir / self.file_name(image)

    def read_image(self, image: int, notes: list[ImageNote] | None = None) -> torch.Tensor:
        """Read the image at a position of the index as RGB, uint8 `[3, H, W]`.

        Args:
            image: The position.
            notes: What is to be known about the image is appended.

        Raises:
            DataError: There is no such file below the image folder, it cannot be read, or has
                another size than in the index.
        """
        if problem := file_names.PROBLEMS[self.file_problems[image]]:
            message = f"{self.file_name(image)} is missing in {self.image_dir}"
            raise DataError(message, problem.kind)
        width, height = self.sizes[image].tolist()
        return read_image(self.path(image), width, height, self.rules, notes)

    def box_range(self, image: int) -> slice:
        """Return the rows of the annotations of an image."""
        return slice(self.offsets[image], self.offsets[image + 1])

    def image_of_rows(self) -> np.ndarray:
        """Return the position of the image of each annotation, int64 `[M]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def clipped_boxes(self) -> np.ndarray:
        """Return the boxes clipped to their images, float64 `[M, 4]` of x, y, width, height."""
        x, y, width, height = self.boxes.T
        image_width, image_height = self.sizes[self.image_of_rows()].T
        x1, x2 = np.clip([x, x + width], 0, image_width)
        y1, y2 = np.clip([y, y + height], 0, image_height)
        return np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)

    def true_boxes(self) -> np.ndarray:
        """Return the boxes of evaluation, float64 `[M, 4]`: those that reach out are clipped."""
        if self.as_annotated:
            return self.boxes
        clipped = self.clipped_boxes()
        beyond = np.abs(self.boxes[:, :2] - clipped[:, :2])  # left and top
        beyond = np.maximum(beyond, (self.boxes - clipped)[:, 2:] - beyond)  # right and bottom
        reaches_out = self.usable & (beyond >= BORDER_TOLERANCE).any(axis=1)
        return np.where(reaches_out[:, None], clipped, self.boxes)

    def ground_truth(self) -> GroundTruth:
        """Return what evaluation takes for true: what training is shown, and crowds as they are.

        With `as_annotated` it is everything in the file.
        """
        boxes, areas = self.true_boxes(), self.areas
        if self.as_annotated:
            return GroundTruth(np.arange(len(boxes)), boxes, areas, changed=0)
        size = boxes[:, 2] * boxes[:, 3]
        clipped = (boxes != self.boxes).any(axis=1)
        replaced = implausible_areas(self.boxes, self.areas)
        areas = np.where(clipped, np.minimum(areas, size), areas)
        areas = np.where(replaced, size, areas)
        rows = np.flatnonzero(self.usable | self.iscrowd)
        changed = int(np.count_nonzero((clipped | replaced)[rows]))
        return GroundTruth(rows, boxes[rows], areas[rows], changed)

    def images_with_boxes(self) -> np.ndarray:
        """Return the positions of the images with a usable box, ascending."""
        return np.flatnonzero(np.bincount(self.image_of_rows()[self.usable], minlength=len(self)))

    def positions_of(self, image_ids: np.ndarray) -> np.ndarray:
        """Return the positions of the images with these ids, int64; -1 for unknown ids."""
        order = np.argsort(self.image_ids, kind="stable")
        ranks = np.searchsorted(self.image_ids, image_ids, sorter=order)
        positions = order[ranks.clip(max=len(self) - 1)]
        return np.where(self.image_ids[positions] == image_ids, positions, -1)

    def without(self, images: Sequence[int]) -> "CocoIndex":
        """Return a copy without the images at these positions and their annotations."""
        kept = np.setdiff1d(np.arange(len(self)), images)
        rows = np.isin(self.image_of_rows(), kept)
        copy = CocoIndex.__new__(CocoIndex)
        copy.__dict__.update(self.__dict__)
        for name in ("image_ids", "file_names", "file_problems", "sizes"):
            setattr(copy, name, getattr(self, name)[kept])
        for name in ("annotation_ids", "boxes", "category_ids", "iscrowd", "areas", "usable"):
            setattr(copy, name, getattr(self, name)[rows])
        copy.offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[kept])])
        return copy

    def first_with_boxes(self, count: int) -> "CocoIndex":
        """Return a copy with the first `count` images that have a usable box."""
        kept = self.images_with_boxes()[:count]
        return self.without(np.setdiff1d(np.arange(len(self)), kept))

    def fingerprint(self) -> str:
        """Hash everything that training and evaluation depend on, except for the pixels.

        Checkpoints contain it: a change of this function would make every run fail to resume.
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
        [f"annotation {i} of image {image_id}" for i, image_id in zip(ids, image_ids, strict=True)],
        len(rows),
        "Correct images with other errors first, then correct or remove these",
    )


# ---------------------------------------------------------------------------- images and targets


class CocoDetection(Dataset):
    """The images of an index with their targets, in the form of torchvision's detectors.

    `dataset[key]` returns `(image, target)`: `image` uint8 `[3, H, W]`; `target` a dict of `boxes`
    float32 `[N, 4]` as x1, y1, x2, y2 in pixels of the image, `labels` int64 `[N]`, `image_id` int,
    `area` float32 `[N]`, `iscrowd` int64 `[N]`. It has the usable boxes, clipped to the image; `N`
    may be 0. `key` is a position in `images` (by default all), or `(position, seed)` to apply
    `augmentation` with this seed.
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
        i, notes = self.images[position], []
        try:
            image, target = self._read(i, notes), self.target(i)
            if seed is not None and self.augmentation is not None:
                image, target = transforms.augment(self.augmentation, image, target, seed)
        except DataError:
            raise
        except Exception as error:
            name = f"{self.index.path(i)} (id {self.index.image_ids[i]})"
            raise image_error(name, error) from error
        if notes:
            target["notes"] = notes
        return image, target

    def _read(self, i: int, notes: list[ImageNote]) -> torch.Tensor:
        try:
            return self.index.read_image(i, notes)
        except DataError as error:
            more, also_bad = find_more_bad_images(self.index, i)
            raise DataError(
                f"{error}. Correct it, or remove image {self.index.image_ids[i]} from "
                f"{self.index.annotation_file}, or skip it with --max-bad-images {1 + more}; "
                f"--check-data finds all such images{also_bad}"
            ) from None

    def target(self, i: int) -> dict:
        """Return the target of image i of the index, before augmentation."""
        rows = self.index.box_range(i)
        # In NumPy: PyTorch's operators take three times as long for a few boxes.
        xywh = self.index.boxes[rows]
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        boxes = boxes.clip(0, np.tile(self.index.sizes[i], 2)).astype(np.float32)
        keep = self.index.usable[rows]
        return {
            "boxes": torch.from_numpy(boxes[keep]),
            "labels": torch.from_numpy(self.labels[rows][keep]),
            "image_id": int(self.index.image_ids[i]),
            "area": torch.from_numpy(self.index.areas[rows][keep].astype(np.float32)),
            "iscrowd": torch.zeros(np.count_nonzero(keep), dtype=torch.int64),
        }


def collate(samples: list[tuple[torch.Tensor, dict]]) -> Batch:
    """Collate samples of `CocoDetection` to a batch."""
    images, targets = zip(*samples, strict=True)
    return Batch(images, targets)
