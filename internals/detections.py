"""The settings and results of prediction, and an image on its way between them."""

from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_convert

from internals.bit_depth import BIT_DEPTHS
from internals.errors import UserError
from internals.image_notes import ImageNote
from internals.view_merging import Found

BEST, BEST_PER_CATEGORY, DEFAULT_SCORE = "best", "best-per-category", 0.5
MIN_TILE, MAX_OVERLAP = 32, 0.9


@dataclass(frozen=True)
class Settings:
    """How a Detector works; the flags of predict.py of the same names.

    Attributes:
        score_threshold: Lower scores are dropped: a number, `BEST` or `BEST_PER_CATEGORY` for those
            of the checkpoint; None for `DEFAULT_SCORE`.
        max_detections: Keep so many highest scores of an image; None for as many as in training,
            and with tiles for those of all tiles.
        nms_threshold: Of two boxes with a higher IoU the one with the lower score is dropped; None
            for that of the model, 0.5 in a Faster R-CNN.
        class_agnostic_nms: Whether to drop boxes of other categories, too.
        tile: Also detect in tiles of this side in pixels; None for the whole image only.
        tile_overlap: The share of a tile's side by which neighbouring tiles overlap at least.
        batch_size: Run so many images or tiles together; None for 8 on CUDA, 1 elsewhere.
        device: "cuda", "cuda:N", "mps" or "cpu"; None for CUDA if available.
        amp: Whether to use mixed precision.
        bit_depth: The bits that 16-bit gray images hold; None for as in training.
        truncated_images: "refuse", or "use" JPEGs whose end is missing.
    """

    score_threshold: float | str | None = None
    max_detections: int | None = None
    nms_threshold: float | None = None
    class_agnostic_nms: bool = False
    tile: int | None = None
    tile_overlap: float = 0.2
    batch_size: int | None = None
    device: str | None = None
    amp: bool = False
    bit_depth: int | None = None
    truncated_images: str = "refuse"

    def __post_init__(self) -> None:
        """Raise UserError if a setting is out of range."""
        for name, kind, low, high in (
            ("score_threshold", Real, 0, 1),
            ("nms_threshold", Real, 0, 1),
            ("tile", Integral, MIN_TILE, None),
            ("tile_overlap", Real, 0, MAX_OVERLAP),
            ("max_detections", Integral, 1, None),
            ("batch_size", Integral, 1, None),
        ):
            value, names = getattr(self, name), ()
            if name == "score_threshold":
                names = (BEST, BEST_PER_CATEGORY)
            is_default = value is None and name != "tile_overlap"
            if is_default or (isinstance(value, str) and value in names):
                continue
            if not isinstance(value, kind) or value < low or (high is not None and value > high):
                number = "an integer" if kind is Integral else "a number"
                bounds = f"from {low} on" if high is None else f"from {low} to {high}"
                choices = ", ".join(["", *names])
                raise UserError(f"{name} is {value!r}: use {number} {bounds}{choices}")
        for name, choices in (
            ("bit_depth", (None, *BIT_DEPTHS)),
            ("truncated_images", ("refuse", "use")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}: use one of {choices}")


@dataclass
class Detections:
    """The N objects found in an image, the highest score first.

    Attributes:
        boxes: float32 `[N, 4]`: x1, y1, x2, y2 in pixels of the image.
        scores: float32 `[N]`, from 0 to 1.
        category_ids: int64 `[N]`, as in the annotations of the training.
        id_to_name: The names of all categories.
    """

    boxes: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray
    id_to_name: dict[int, str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: slice | np.ndarray) -> "Detections":
        """Return some of the detections: `found[found.scores > 0.9]`."""
        columns = (self.boxes, self.scores, self.category_ids)
        return Detections(*(column[rows] for column in columns), self.id_to_name)

    @property
    def names(self) -> list[str]:
        """The name of the category of each object."""
        return [self.id_to_name[i] for i in self.category_ids.tolist()]

    def to_arrays(self) -> dict:
        """Return plain arrays as `supervision.Detections(**arrays)` takes them."""
        return {
            "xyxy": self.boxes,
            "confidence": self.scores,
            "class_id": self.category_ids,
            "data": {"class_name": np.array(self.names, dtype=str)},
        }

    def to_rows(self, image_id: int) -> np.ndarray:
        """Return rows of `coco_eval.detection_rows`, float64 `[N, 7]`."""
        xywh = box_convert(torch.from_numpy(self.boxes), "xyxy", "xywh").numpy()
        image_ids = np.full(len(self), image_id)
        return np.column_stack([image_ids, xywh, self.scores, self.category_ids]).astype(np.float64)


@dataclass(kw_only=True)
class ImageItem:
    """An image on its way through a Detector.

    Attributes:
        path: Its file; None for an image in memory.
        pixels: uint8 `[3, H, W]`; of an image that is too large to be held in memory, when it is
            finished, the image reduced by `factor`.
        size: Width and height.
        annotated_size: Width and height in an annotation file; other images are not read.
        detections: What was found in it.
        error: Why it cannot be used.
        notes: What is to be known about it.
    """

    path: Path | None = None
    pixels: torch.Tensor | None = None
    factor: int = 1
    size: tuple[int, int] | None = None
    annotated_size: tuple[int, int] | None = None
    detections: Detections | None = None
    error: str | None = None
    notes: list[ImageNote] = field(default_factory=list)
    views: int = 0  # in which it is seen
    found: list[Found] = field(default_factory=list)  # in each finished view


class View(NamedTuple):
    """A tile of an image, or the whole, possibly reduced."""

    item: ImageItem
    pixels: torch.Tensor  # uint8 [3, H, W]
    x: int = 0  # of the left border in the image
    y: int = 0
    factor: int = 1  # by which it is reduced
    core: np.ndarray | None = None  # x1, y1, x2, y2 of the core of a tile
