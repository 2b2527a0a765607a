"""Measure how fast images are read, run through a model, and drawn."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from detector import Detector
from internals.errors import UserError
from reporting import drawing
from reporting.annotation_files import NamedImage


def write_picture(
    item: NamedImage, draw: Callable[[NamedImage], torch.Tensor], folder: Path | None
) -> NamedImage:
    """Write an image with boxes into a folder, if there is one; free its pixels."""
    if folder and item.pixels is None and not item.error:
        utils.log(f"no picture of {item.path}: the whole image is too narrow for the model")
    elif folder and not item.error:
        drawing.save(draw(item), folder / f"{item.stem}.jpg", quality=90)
    item.pixels = None
    return item


def measure_speeds(
    detector: Detector,
    images: list[NamedImage],
    draw: Callable[[NamedImage], torch.Tensor],
    min_images: int = 50,
) -> dict[str, dict[str, float]]:
    """Time reading, model and drawing one after the other, and all together as predict.py runs.

    The images are repeated to at least `min_images`; a first batch is not counted.

    Returns:
        For each stage `median_ms` and `high_ms`, the 95th percentile, of an image, for the model
        of a batch, from pixels to boxes; and `images_per_s`, the only one for "all, overlapping".

    Raises:
        UserError: An image cannot be used: times would be too short.
    """
    size = detector.batch_size
    count = max(len(images), min_images, size)
    repeated = [_copy(image) for image in islice(cycle(images), size + count)]
    seconds = {"reading": [], f"model, batch of {size}": [], "drawing": []}
    with tempfile.TemporaryDirectory() as folder:
        finish = partial(write_picture, draw=draw, folder=Path(folder))
        stages = (
            lambda batch: [_time(detector.read, item) for item in batch],
            lambda batch: [_time(list, detector.stream(batch))],
            lambda batch: [_time(finish, item) for item in batch],
        )
        starts = range(0, size + count, size)
        for start in tqdm(starts, "one after the other", leave=False, disable=None):
            batch = repeated[start : start + size]
            for name, stage in zip(seconds, stages, strict=True):
                times = stage(batch)
                seconds[name] += times if start else []
            _raise_if_unusable(batch)
        copies = tqdm(repeated[size:], "overlapping", leave=False, disable=None)
        total = _time(list, detector.pipeline(map(_copy, copies), finish))
    speeds = {}
    for name, times in seconds.items():
        median, high = (1000 * np.quantile(times, [0.5, 0.95])).tolist()
        speeds[name] = {"median_ms": median, "high_ms": high, "images_per_s": count / sum(times)}
    return {**speeds, "all, overlapping": {"images_per_s": count / total}}


def print_speeds(speeds: dict[str, dict[str, float]]) -> None:
    """Print the result of `measure_speeds` as a table."""
    utils.log(f"{'':<22}{'median':>12}{'95 %':>12}{'images/s':>12}")
    for name, row in speeds.items():
        times = [row.get(key) for key in ("median_ms", "high_ms")]
        cells = [f"{'':>12}" if ms is None else f"{ms:>9.1f} ms" for ms in times]
        utils.log(f"{name:<22}{''.join(cells)}{row['images_per_s']:>12.2f}")


def _copy(image: NamedImage) -> NamedImage:
    """Return an image that was not read yet."""
    names = {"file_name": image.file_name, "stem": image.stem, "image_id": image.image_id}
    return NamedImage(path=image.path, annotated_size=image.annotated_size, row=image.row, **names)


def _time(function: Callable, argument: object) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def _raise_if_unusable(images: list[NamedImage]) -> None:
    for image in images:
        if image.error:
            raise UserError(f"{image.error}. Remove it: --benchmark needs images without errors")
