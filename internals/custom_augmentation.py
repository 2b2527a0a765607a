"""An augmentation of the user's own: what a function in a Python file returns."""

import hashlib
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torchvision import tv_tensors

from internals.errors import UserError

FLAG = "--data-augmentation"
TOLERANCE = 1.0  # pixels that a box may reach beyond the image by rounding; they are cut off


def is_custom(name: str | None) -> bool:
    """Return whether a value of --data-augmentation names a function in a file."""
    return name is not None and name.rpartition(":")[0].endswith(".py")


def code_version(name: str | None) -> str | None:
    """Return a hash of the code of a custom augmentation with the file's name, None for presets."""
    if not is_custom(name):
        return None
    file = Path(name.rpartition(":")[0])
    return f"{hashlib.sha256(_read(file, name)).hexdigest()[:12]} of {file.name}"


class CustomAugmentation:
    """The transform that a function in a Python file returns; it is called without arguments.

    The transform is called as torchvision calls those of its detection references: with an image
    and a dict of its `boxes` and `labels`. It may drop boxes with their labels. Whatever it draws,
    by PyTorch, NumPy or Python, depends on the seed of PyTorch alone.

    A spawned loading process gets the code instead of the transform, which may not be picklable.
    """

    def __init__(self, name: str, max_size: int | None = None):
        """Load a file.

        Args:
            name: The path of the file and the name of the function, such as "my_file.py:build".
            max_size: The longer side in pixels that the model may resize to; None without a bound.

        Raises:
            UserError: There is no such file or function, or it fails.
        """
        self.name, self.max_size = name, max_size
        file, _, self.function = name.rpartition(":")
        self.file = Path(file)
        self.source = _read(self.file, name)
        self.transform = self._build()

    def __getstate__(self) -> dict:
        return {**vars(self), "transform": None}

    def _build(self) -> Callable:
        module = ModuleType(f"augmentation_{self.file.stem}")
        module.__file__ = str(self.file)
        sys.modules[module.__name__] = module  # dataclasses look it up
        folder = os.getcwd()
        try:
            exec(compile(self.source, self.file, "exec"), vars(module))
            function = getattr(module, self.function, None)
            if not callable(function):
                raise UserError(f"{FLAG} {self.name}: the file has no function {self.function!r}")
            transform = function()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._describe_error(error) from error
        finally:
            os.chdir(folder)  # which the file may have changed: other paths may be relative
        if not callable(transform):
            raise UserError(
                f"{FLAG} {self.name} returned {transform!r}: return a transform, such as "
                "torchvision.transforms.v2.Compose([...])"
            )
        return transform

    def _describe_error(self, error: BaseException) -> UserError:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self.file)]
        where = f" in line {lines[-1]}" if lines else ""
        return UserError(f"{FLAG} {self.name} raised {type(error).__name__}{where}: {error}")

    def __call__(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes, labels: torch.Tensor
    ) -> tuple[torch.Tensor, tv_tensors.BoundingBoxes, torch.Tensor]:
        """Transform an image uint8 `[3, H, W]`, its boxes `[N, 4]` (x1, y1, x2, y2) and labels.

        Raises:
            UserError: It fails, or the result is no image with its boxes.
        """
        if self.transform is None:
            self.transform = self._build()
        known = set(labels.tolist())
        # Nothing else in the recipe draws from these two, so their state need not be restored.
        random.seed(torch.initial_seed())
        np.random.seed(torch.initial_seed() % 2**32)
        try:
            result = self.transform(image, {"boxes": boxes, "labels": labels})
        except (Exception, SystemExit) as error:
            raise self._describe_error(error) from error
        if problem := _find_problem(result, known, self.max_size):
            raise UserError(f"{FLAG} {self.name}: its transform {problem}")
        image, target = result
        boxes = target["boxes"].detach().float()  # those of an operator such as [:n] are plain
        canvas_size = tuple(image.shape[-2:])
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas_size)
        return image, boxes, target["labels"]


def _read(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{FLAG} {name}: the file cannot be read ({error.strerror}): correct its path, or give "
            "the new one if it was moved"
        ) from None


def _find_problem(result: object, known: set[int], max_size: int | None) -> str | None:
    """Return why the result of a transform is no image with its boxes, None if it is one."""
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[1], dict):
        return f"returned {_describe(result)} instead of an image and a dict of boxes and labels"
    image, target = result
    if problem := _find_image_problem(image, max_size):
        return problem
    boxes, labels = target.get("boxes"), target.get("labels")
    is_tensor = isinstance(boxes, torch.Tensor) and boxes.is_floating_point()
    if not (is_tensor and boxes.dim() == 2 and boxes.shape[1] == 4):
        return f"returned {_describe(boxes)} as boxes instead of float32 [N, 4]"
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        if boxes.format != tv_tensors.BoundingBoxFormat.XYXY:
            return f"returned boxes of format {boxes.format.value} instead of XYXY"
        if tuple(boxes.canvas_size) != tuple(image.shape[-2:]):
            return (
                f"returned boxes of an image of {tuple(boxes.canvas_size)} pixels (height, width) "
                f"with one of {tuple(image.shape[-2:])}: it must transform both"
            )
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        return f"returned {_describe(labels)} as labels instead of int64 [N]"
    if labels.shape != boxes.shape[:1]:
        return f"returned {len(boxes)} boxes with {labels.numel()} labels"
    return _find_bad_box(boxes.as_subclass(torch.Tensor), image.shape[-2:]) or (
        None if known.issuperset(labels.tolist()) else "returned a label that the image has not"
    )


def _find_image_problem(image: object, max_size: int | None) -> str | None:
    is_image = isinstance(image, torch.Tensor) and image.dtype == torch.uint8
    if not (is_image and image.dim() == 3 and len(image) == 3):
        return f"returned {_describe(image)} instead of an image, uint8 [3, H, W]"
    if not image.numel():
        return f"returned {_describe(image)}, an image without pixels"
    if max_size and max(image.shape[1:]) > max_size * min(image.shape[1:]):
        return (
            f"returned {_describe(image)}, an image so narrow that resizing its longer side to "
            f"{max_size} pixels leaves none of the other: let it crop less"
        )
    return None


def _find_bad_box(boxes: torch.Tensor, size: tuple[int, int]) -> str | None:
    # In NumPy: PyTorch's operators take three times as long for a few boxes.
    rows = boxes.detach().float().numpy()
    limits = np.array([size[1], size[0]] * 2) + TOLERANCE
    bad = ~np.isfinite(rows).all(axis=1) | (rows[:, 2:] < rows[:, :2]).any(axis=1)
    bad |= ((rows < -TOLERANCE) | (rows > limits)).any(axis=1)
    if not bad.any():
        return None
    return (
        f"returned the box {rows[bad][0].tolist()} (x1, y1, x2, y2), which is not in its image of "
        f"{size[1]} x {size[0]} pixels: v2.ClampBoundingBoxes() clips boxes"
    )


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__}"
