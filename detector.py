"""Detect objects in images with a trained model.

    from predict import Detector

    detector = Detector.load("output/model_best.pth")
    found = detector("image.jpg")
    print(found.boxes, found.scores, found.names)

`stream` is its core: images become views (tiles, or the whole), views batches, and the boxes that
the model finds in the views of an image are merged.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import nms

import checkpoint
import models
from coco_utils import NO_CATEGORY, Categories
from internals.batches import Batch
from internals.bit_depth import EARLIER_DEPTH
from internals.detections import (
    BEST,
    BEST_PER_CATEGORY,
    DEFAULT_SCORE,
    Detections,
    ImageItem,
    Settings,
    View,
)
from internals.devices import choose_device, move_model
from internals.errors import DataError, UserError
from internals.image_rows import ArrayRows, open_rows, read_size
from internals.images import TOO_LARGE, ImageRules, narrowness, read_image, read_upright
from internals.mixed_precision import autocast, resolve_precision
from internals.pipeline import batch_by_key, prefetch_map
from internals.tiles import core_bounds, cut_tiles, tile_starts
from internals.video import is_video
from internals.view_merging import Found, merge_views

CORE_SLACK = 0.01  # of a tile: neighbours may see the middle of an object in other places
PICTURE_SIDE = 4000  # pixels: of images that are too large for memory
OUTPUT_NAMES = ("boxes", "scores", "labels")  # of torchvision's detectors
THREADS = min(4, os.cpu_count() or 1)  # to read and draw images


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and what is known about it.

    Attributes:
        model: On the CPU.
        categories: Those it detects.
        bit_depth: The bits of the 16-bit images that it was trained on, if any.
        thresholds: Of `coco_eval.chosen_thresholds`, if any.
    """

    model: nn.Module
    categories: Categories
    bit_depth: int | None = None
    thresholds: dict | None = None


def load_model(weights: str | Path, name: str | None = None) -> LoadedModel:
    """Load a model from a checkpoint, or one of torchvision by `name`."""
    path = Path(weights)
    if name:
        if path.exists():
            raise UserError(f"--model is for torchvision's weights: remove it, {path} is a file")
        return LoadedModel(*models.torchvision_detector(name, str(weights)))
    if path.is_dir():
        raise UserError(f"{path} is a folder: use a checkpoint in it, {path / checkpoint.BEST}")
    if not path.exists():
        raise UserError(f"{path}: no such file. For torchvision's weights add --model NAME")
    saved = checkpoint.load(path)
    return LoadedModel(
        model=models.from_checkpoint(saved),
        categories=Categories.from_list(saved["categories"]),
        bit_depth=saved["args"].get("bit_depth", EARLIER_DEPTH),
        thresholds=saved.get("score_thresholds"),
    )


class Detector:
    """A model in evaluation mode on its device; call it with images.

    Attributes:
        model: The model.
        categories: Those it detects.
        settings: How it works.
        rules: How image files are read.
        precision: Description of the numbers it computes with.
        highest_score: Of all detections so far, also of those below the thresholds.
        lowest_threshold: That of the category with the lowest.
        on_batch: Called with the number of images or tiles of each finished batch.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, thresholds: dict[int, float]):
        """Prepare a model.

        Args:
            loaded: The model.
            settings: How to use it.
            thresholds: The lowest score of each category id.
        """
        self.categories, self.settings = loaded.categories, settings
        self.device = choose_device(settings.device)
        self.amp_dtype, self.precision = resolve_precision(self.device, settings.amp)
        self.batch_size = settings.batch_size or (8 if self.device.type == "cuda" else 1)
        if settings.max_detections:
            models.limit_detections(loaded.model, settings.max_detections)
        if settings.nms_threshold is not None:
            models.set_nms_threshold(loaded.model, settings.nms_threshold)
        self.nms_threshold = models.nms_threshold(loaded.model)
        self.model = move_model(loaded.model, self.device)
        self.rules = ImageRules(
            settings.bit_depth or loaded.bit_depth, settings.truncated_images == "use"
        )
        self.on_batch = lambda views: None
        self.highest_score, self.lowest_threshold = 0.0, min(thresholds.values())
        self._id_of_label = self.categories.ids_of_labels()
        self._lowest = np.array([thresholds.get(i, np.inf) for i in self._id_of_label.tolist()])

    @classmethod
    def load(cls, weights: str | Path, model: str | None = None, **settings) -> "Detector":
        """Load a model.

        Args:
            weights: A checkpoint of train.py; with `model` the name of torchvision's weights, such
                as COCO_V1.
            model: One of `models.MODELS`, for torchvision's weights.
            **settings: Of `Settings`.

        Raises:
            UserError: The weights cannot be loaded, or a setting does not fit.
        """
        loaded, chosen = load_model(weights, model), Settings(**settings)
        thresholds, _ = choose_thresholds(chosen.score_threshold, loaded, weights)
        return cls(loaded, chosen, thresholds)

    def __call__(self, images) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            images: One or several of: a path; a PIL image; a uint8 array, `[H, W, 3]` in RGB or
                `[H, W]`. Files are turned by their EXIF orientation, others are used as they are.

        Returns:
            The detections of the image, or a list of those of each.

        Raises:
            UserError: An image cannot be used; a ValueError.
        """
        is_single = not isinstance(images, Iterable) or isinstance(images, bytes | dict)
        if is_single or isinstance(images, str | Path | Image.Image | np.ndarray | torch.Tensor):
            return self([images])[0]
        items = []

        def add(image) -> ImageItem:
            items.append(_to_item(image, len(items)))
            return items[-1]

        for item in self.pipeline(map(add, images)):
            if item.error:
                raise UserError(item.error)
            item.pixels = None
        return [item.detections for item in items]

    def read(self, item: ImageItem) -> ImageItem:
        """Set pixels and size of an image, or its error; several threads may read.

        Without pixels but a size it is too large to be held in memory, and is read in parts.
        """
        try:
            if item.pixels is None:
                item.pixels = self._decode(item)
        except DataError as error:
            item.error = str(error)
            if error.kind == TOO_LARGE:
                item.size = item.annotated_size or read_size(item.path)
                if self.settings.tile and item.size and self.settings.tile < max(item.size):
                    item.error = None
                else:
                    limit, _, _ = item.error.rpartition(": ")
                    item.error = f"{limit}: use --tile with a smaller SIZE, or downscale it"
        if item.pixels is not None:
            item.size = (item.pixels.shape[2], item.pixels.shape[1])
        if not item.error:
            sides = [min(side, self.settings.tile or side) for side in item.size[::-1]]
            if problem := narrowness(*sides, self.model.transform):
                item.error, item.pixels = f"{item.path}: {problem}", None
        return item

    def _decode(self, item: ImageItem) -> torch.Tensor:
        if item.annotated_size:
            return read_image(item.path, *item.annotated_size, self.rules, item.notes)
        return read_upright(item.path, self.rules, item.notes)

    def pipeline(
        self, items: Iterable[ImageItem], finish: Callable[[ImageItem], object] | None = None
    ) -> Iterator:
        """Read images, detect objects, and yield what `finish` returns of each finished one.

        Threads read and finish images while the model runs on others. Images of other sizes may
        overtake.
        """
        ahead = THREADS + (0 if self.settings.tile else self.batch_size)
        detected = self.stream(prefetch_map(self.read, items, THREADS, ahead))
        return prefetch_map(finish, detected, THREADS, 2 * THREADS) if finish else detected

    def stream(self, items: Iterable[ImageItem]) -> Iterator[ImageItem]:
        """Detect objects in images that were read, and yield each when it is finished.

        On CUDA the results of a batch are read while the next one is computed.
        """
        failed, started = [], deque()
        views = self._views(items, failed)
        for batch in batch_by_key(views, self._input_size, self.batch_size):
            started.append((batch, self._start(batch)))
            if len(started) > 1:
                yield from self._finish(*started.popleft())
            while failed:
                yield failed.pop(0)
        for batch in started:
            yield from self._finish(*batch)
        yield from failed

    def _views(self, items: Iterable[ImageItem], failed: list[ImageItem]) -> Iterator[View]:
        """Yield the views of all images; images with an error go to `failed`."""
        for item in items:
            try:
                if not item.error:
                    yield from self._views_of(item)
            except UserError as error:  # found while reading a large image
                item.error = str(error)
            if item.error:
                failed.append(item)

    def _views_of(self, item: ImageItem) -> Iterator[View]:
        tile, overlap = self.settings.tile, self.settings.tile_overlap
        if not tile or max(item.size) <= tile:
            item.views = 1
            yield View(item, item.pixels)
            return
        factor, in_memory = self._whole_factor(*item.size), item.pixels is not None
        first_factor = factor
        if factor and not in_memory:  # the image is reduced to a picture, which is reduced further
            first_factor = max(1, min(factor, max(item.size) // PICTURE_SIDE))
        starts = [tile_starts(side, tile, overlap) for side in item.size]
        columns, rows = (core_bounds(starts_of_side, tile) for starts_of_side in starts)
        item.views = len(columns) * len(rows) + (factor is not None)
        source = (
            nullcontext(ArrayRows(item.pixels.permute(1, 2, 0).numpy()))
            if in_memory
            else open_rows(item.path, self.rules, item.notes, item.annotated_size)
        )
        with source as pixels:
            parts = cut_tiles(pixels, tile, overlap, first_factor)
            for number, part in enumerate(parts, start=1):
                part_pixels = torch.from_numpy(part.pixels).permute(2, 0, 1)
                view = View(item, part_pixels, part.x, part.y, part.factor)
                if number <= len(columns) * len(rows):
                    core = np.array([columns[part.x], rows[part.y]]).T.flatten()
                    view = view._replace(core=core)
                elif not in_memory:
                    item.pixels, item.factor = part_pixels, part.factor
                    view = _reduce(view, factor // first_factor)
                yield view

    def _whole_factor(self, width: int, height: int) -> int | None:
        """Return by which factor to reduce a whole image before the model resizes it.

        None: it is too narrow for the model.
        """
        transform = self.model.transform
        if narrowness(height, width, transform):
            return None
        resized = _resized(height, width, transform)
        return max(1, int(min(height / resized[0], width / resized[1])))

    def _input_size(self, view: View) -> tuple[int, int]:
        """Return the height and width of a view after resizing and padding.

        Only views that are alike in this are in a batch: more padding would change detections near
        borders.
        """
        resized = _resized(*view.pixels.shape[1:], self.model.transform)
        multiple = self.model.transform.size_divisible
        return tuple(-(-side // multiple) for side in resized)

    @torch.inference_mode()
    def _start(self, batch: list[View]):
        """Queue the model on a batch; on CUDA it is not finished on return."""
        packed = Batch([view.pixels for view in batch])
        if self.device.type == "cuda":
            packed.pin_memory()
        with autocast(self.device, self.amp_dtype):
            images, _ = packed.to(self.device)
            return self.model(images)

    def _finish(self, batch: list[View], outputs) -> Iterator[ImageItem]:
        """Read the outputs of a batch, and yield the images that are finished with it."""
        self.on_batch(len(batch))
        for view, found in zip(batch, self._read_outputs(outputs), strict=True):
            item = view.item
            item.found.append(found if item.views == 1 else self._to_image(found, view))
            if len(item.found) == item.views and not item.error:
                item.detections = self._merge(item)
                item.found.clear()
                yield item

    def _read_outputs(self, outputs) -> Iterator[Found]:
        """Read the boxes above the score thresholds of each image of a batch."""
        columns = (torch.cat([output[name] for output in outputs]) for name in OUTPUT_NAMES)
        boxes, scores, labels = columns
        # A single copy from the device.
        numbers = torch.cat([boxes, scores[:, None], labels[:, None].float()], dim=1).cpu().numpy()
        ends = np.cumsum([len(output["labels"]) for output in outputs])[:-1]
        for rows in np.split(numbers, ends):
            labels = rows[:, 5].astype(np.int64)
            rows, labels = (x[self._id_of_label[labels] != NO_CATEGORY] for x in (rows, labels))
            self.highest_score = max(self.highest_score, float(rows[:, 4].max(initial=0)))
            above = rows[:, 4] >= self._lowest[labels]
            rows, groups = rows[above], self._id_of_label[labels[above]]
            yield Found(rows[:, :4], rows[:, 4], groups, np.empty((len(rows), 4), np.float32))

    def _to_image(self, found: Found, view: View) -> Found:
        """Return boxes in pixels of the image, with their view; those that others see better go."""
        size, corner = np.array(view.item.size), np.array((view.x, view.y))
        end = np.minimum(corner + view.factor * np.array(view.pixels.shape[:0:-1]), size)
        boxes = (found.boxes * view.factor + np.tile(corner, 2)).clip(max=np.tile(size, 2))
        rectangle = np.concatenate([corner, end]).astype(np.float32)
        found = found._replace(
            boxes=boxes.astype(np.float32), views=np.broadcast_to(rectangle, boxes.shape)
        )
        low, high = boxes[:, :2], boxes[:, 2:]
        if view.core is None:  # the whole image: tiles see what they can hold better
            return found.take((high - low).max(axis=1) > self.settings.tile)
        slack = CORE_SLACK * self.settings.tile
        middles = (low + high) / 2
        in_core = (middles >= view.core[:2] - slack) & (middles <= view.core[2:] + slack)
        return found.take(in_core.all(axis=1))

    def _merge(self, item: ImageItem) -> Detections:
        """Merge what was found in the views of an image."""
        found = Found(*map(np.concatenate, zip(*item.found, strict=True)))
        boxes, scores, category_ids, _ = found
        if self.settings.class_agnostic_nms:
            found = found._replace(groups=np.zeros_like(found.groups))
        rows = slice(None)
        if item.views > 1:
            boxes, rows = merge_views(found, item.size, self.nms_threshold)
        elif self.settings.class_agnostic_nms:
            tensors = (torch.from_numpy(column) for column in found[:2])
            rows = nms(*tensors, self.nms_threshold).numpy()
            boxes = boxes[rows]
        names = self.categories.id_to_name
        detections = Detections(boxes, scores[rows], category_ids[rows], names)
        return detections[: self.settings.max_detections]


def _to_item(image, number: int) -> ImageItem:
    """Return the `number`-th image given to a Detector, in the form in which it goes through."""
    if isinstance(image, str | Path):
        if is_video(str(image)):
            raise UserError(f"{image} is a video: use predict.py")
        return ImageItem(path=Path(image))
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise UserError(f"a PIL image of mode {image.mode} has no range: give its path instead")
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        is_array = isinstance(image, np.ndarray)
        kind = f"an array of {image.dtype}" if is_array else type(image).__name__
        raise UserError(f"an image is a path, a PIL image or a uint8 array, not {kind}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an array of shape {image.shape} is no image: use [H, W, 3] or [H, W]")
    # A copy, as the caller may use the array for the next image.
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    return ImageItem(path=Path(f"image {number}"), pixels=pixels)


def _reduce(view: View, factor: int) -> View:
    """Reduce a view further."""
    picture = Image.fromarray(view.pixels.permute(1, 2, 0).numpy()).reduce(factor)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return view._replace(pixels=pixels, factor=factor * view.factor)


def _resized(height: int, width: int, transform: GeneralizedRCNNTransform) -> tuple[int, int]:
    """Return the height and width to which a model resizes an image."""
    if transform.fixed_size:
        return transform.fixed_size[::-1]
    shorter, longer = sorted((height, width))
    scale = min(transform.min_size[-1] / shorter, transform.max_size / longer)
    return int(height * scale), int(width * scale)


def choose_thresholds(
    chosen: float | str | None, loaded: LoadedModel, weights: str | Path
) -> tuple[dict[int, float], str | None]:
    """Return the score threshold of each category id, and what to tell about it.

    Args:
        chosen: The setting `score_threshold`.
        loaded: The model.
        weights: From where, for errors.

    Raises:
        UserError: Those of the checkpoint are chosen, and it has none.
    """
    ids, points = loaded.categories.ids, loaded.thresholds
    if chosen not in (BEST, BEST_PER_CATEGORY):
        text = None
        if chosen is None and points:
            text = (
                f"score threshold: {DEFAULT_SCORE}; the best F1 on the validation images is at "
                f"{points['overall']:.3f} (--score-threshold best)"
            )
        return dict.fromkeys(ids, DEFAULT_SCORE if chosen is None else chosen), text
    if points is None:
        raise UserError(
            f"score threshold {chosen}: {weights} has no threshold. It was saved within an epoch "
            "or by an earlier version, nothing was found in its evaluation, or it is not from "
            "train.py: give a number. train.py --test-only prints the one with the best F1"
        )
    overall, own = points["overall"], points["per_category"]
    if chosen == BEST:
        text = f"score threshold: {overall:.3f}, with the best F1 on the validation images"
        return dict.fromkeys(ids, overall), text
    names = loaded.categories.id_to_name
    listed = ", ".join(f"{' '.join(names[i].split())} {own[i]:.3f}" for i in own)
    text = (
        f"score thresholds, with the best F1 on the validation images: {listed}; others "
        f"{overall:.3f}"
    )
    return dict.fromkeys(ids, overall) | own, text
