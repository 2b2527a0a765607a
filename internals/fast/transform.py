"""Normalize and resize on the device, without a transfer of constants in every step."""

from functools import lru_cache

import numpy as np
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class FastTransform(GeneralizedRCNNTransform):
    """torchvision's normalization and resizing, with constants cached on the device."""

    def normalize(self, image):
        """Return a float image `[3, H, W]` minus the mean, divided by the standard deviation."""
        mean, std = (
            _constant(tuple(numbers), image.dtype, image.device)[:, None, None]
            for numbers in (self.image_mean, self.image_std)
        )
        return (image - mean) / std

    def resize(self, image, target=None):
        """Resize an image and its boxes, if any; a `seed` of the target chooses a random size."""
        before = image.shape[-2:]
        if target is not None and "seed" in target and len(self.min_size) > 1:
            torch.manual_seed(target["seed"])
        image, _ = super().resize(image)
        if target is not None and "boxes" in target:
            target["boxes"] = _resize_boxes(target["boxes"], before, image.shape[-2:])
        return image, target

    def batch_images(self, images, size_divisible=32):
        """Pad the images with zeros to one tensor, in the layout of the convolutions."""
        height, width = (
            -(-max(image.shape[axis] for image in images) // size_divisible) * size_divisible
            for axis in (1, 2)
        )
        batch = torch.zeros_like(
            images[0].new_zeros(()).expand(len(images), 3, height, width),
            memory_format=torch.contiguous_format if images[0].is_mps else torch.channels_last,
        )
        for padded, image in zip(batch, images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    def postprocess(self, result, image_shapes, original_image_sizes):
        """Scale the boxes of detections back to the original image sizes, in place."""
        for row, before, after in zip(result, image_shapes, original_image_sizes, strict=True):
            row["boxes"] = _resize_boxes(row["boxes"], before, after)
        return result


@lru_cache
def _constant(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def _resize_boxes(boxes: torch.Tensor, before: tuple, after: tuple) -> torch.Tensor:
    # Divide in float32 for the same result as torchvision.
    height, width = (np.float32(after) / np.float32(before)).tolist()
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=1)
