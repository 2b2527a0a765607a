"""Normalising and resizing on the device, without handing it a number in every step."""

from functools import lru_cache

import numpy as np
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class FastTransform(GeneralizedRCNNTransform):
    """torchvision's normalisation and resizing, its numbers kept on the device."""

    def normalize(self, image):
        mean, std = (
            _constant(tuple(numbers), image.dtype, image.device)[:, None, None]
            for numbers in (self.image_mean, self.image_std)
        )
        return (image - mean) / std

    def resize(self, image, target=None):
        before = image.shape[-2:]
        if target is not None and "seed" in target:
            torch.manual_seed(target["seed"])  # a size may be drawn
        image, _ = super().resize(image)
        if target is not None:
            target["boxes"] = _resize_boxes(target["boxes"], before, image.shape[-2:])
        return image, target

    def postprocess(self, result, image_shapes, original_image_sizes):
        for row, before, after in zip(result, image_shapes, original_image_sizes, strict=True):
            row["boxes"] = _resize_boxes(row["boxes"], before, after)
        return result


@lru_cache
def _constant(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def _resize_boxes(boxes: torch.Tensor, before: tuple, after: tuple) -> torch.Tensor:
    # The quotient of float32, which is also torchvision's.
    height, width = (np.float32(after) / np.float32(before)).tolist()
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=1)
