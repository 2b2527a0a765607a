"""Transfer the images of a batch to the device."""

from collections.abc import Sequence

import torch


class PackedImages:
    """The images of a batch in one uint8 tensor, copied to the device at once.

    uint8 has a quarter of the bytes of float32.
    """

    def __init__(self, images: Sequence[torch.Tensor]):
        """Pack `images`, each uint8 `[3, H, W]`."""
        self.sizes = [tuple(image.shape[-2:]) for image in images]
        self.pixels = torch.cat([image.permute(1, 2, 0).reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.sizes)

    def pin_memory(self) -> "PackedImages":
        """Pin the memory; the DataLoader calls this for CUDA devices."""
        self.pixels = self.pixels.pin_memory()
        return self

    def to(self, device: torch.device) -> list[torch.Tensor]:
        """Copy the images to a device and return them, each float32 `[3, H, W]` in [0, 1]."""
        pixels = self.pixels.to(device, non_blocking=True)
        parts = pixels.split([3 * height * width for height, width in self.sizes])
        return [
            part.view(height, width, 3).permute(2, 0, 1).float().div_(255)
            for part, (height, width) in zip(parts, self.sizes, strict=True)
        ]
