"""The anchors of a padded image, and their ids; cached, as a data set has few padded sizes."""

from typing import NamedTuple

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

MAX_CACHED = 32  # 6 MB each at 800 x 1333 pixels
_cache: dict[tuple, tuple["Anchors", AnchorGenerator]] = {}


class Anchors(NamedTuple):
    """Anchors in torchvision's order: by level, row, column and shape.

    Attributes:
        boxes: float32 `[A, 4]`.
        ids: int64 `[A]`, numbers of (level, row, column, shape), so that the id of an anchor does
            not depend on the padding.
    """

    boxes: torch.Tensor
    ids: torch.Tensor


def find_anchors(
    generator: AnchorGenerator, images: torch.Tensor, features: list[torch.Tensor]
) -> Anchors:
    """Return the anchors of padded images `[B, 3, H, W]` with these feature maps."""
    size = tuple(images.shape[-2:])
    maps = tuple(tuple(feature.shape[-2:]) for feature in features)
    key = (id(generator), size, maps, images.device)
    if key in _cache:
        _cache[key] = _cache.pop(key)  # the last used one comes last
    else:
        if len(_cache) >= MAX_CACHED:
            del _cache[next(iter(_cache))]
        with torch.inference_mode(False), torch.no_grad():  # for training, too
            image = torch.zeros((), device=images.device)
            placeholders = [image.expand(1, 1, *shape) for shape in maps]
            boxes = generator(ImageList(image.expand(1, 3, *size), [size]), placeholders)[0]
            counts = generator.num_anchors_per_location()
            # The generator stays alive: another one could get its id.
            _cache[key] = (Anchors(boxes, _number(maps, counts, images.device)), generator)
    return _cache[key][0]


def cached_anchors() -> list[Anchors]:
    """Return all anchors in the cache, to keep them for as long as a CUDA graph needs them."""
    return [anchors for anchors, _ in _cache.values()]


def _number(maps: tuple, anchors_per_cell: list[int], device: torch.device) -> torch.Tensor:
    levels = []
    for level, ((height, width), count) in enumerate(zip(maps, anchors_per_cell, strict=True)):
        y, x, shape = (torch.arange(n, device=device) for n in (height, width, count))
        rows = (level * 2**16 + y) * 2**16
        levels.append(((rows[:, None] + x) * 2**8)[..., None] + shape)
    return torch.cat([ids.flatten() for ids in levels])
