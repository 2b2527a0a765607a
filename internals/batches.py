"""A batch of images and targets: one buffer for the transfer, padded tensors on the device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

# Boxes are padded to a multiple of this number, so that few different shapes occur.
BOX_MULTIPLE = 16


class Batch:
    """The images and targets of a batch in one buffer, which is copied to the device at once.

    Images stay uint8 until then, a quarter of the bytes of float32.

    Attributes:
        image_ids: The id of each image.
        notes: What is to be known about the images, mostly nothing.
        sizes: Height and width of each image.
        box_counts: The number of boxes of each image.
        buffer: uint8; a seed and a number of boxes for each image, labels and boxes padded to
            `most_boxes` for each image, then the pixels.
    """

    def __init__(self, images: Sequence[torch.Tensor], targets: Sequence[dict] | None = None):
        """Pack images, each uint8 `[3, H, W]`, and targets of `coco_utils.CocoDetection`, if any.

        Of the targets `image_id`, `boxes` and `labels` are packed, and `notes` kept.
        """
        targets = targets or [{"image_id": None, "boxes": (), "labels": ()} for _ in images]
        self.image_ids = [target["image_id"] for target in targets]
        self.notes = [note for target in targets for note in target.get("notes", ())]
        self.sizes = [tuple(image.shape[-2:]) for image in images]
        self.box_counts = [len(target["boxes"]) for target in targets]
        self.most_boxes = _padded_length(self.box_counts)
        # In NumPy: PyTorch's operators take three times as long for a few boxes.
        labels = np.zeros((len(images), self.most_boxes), dtype=np.int64)
        boxes = np.zeros((len(images), self.most_boxes, 4), dtype=np.float32)
        for row, (target, count) in enumerate(zip(targets, self.box_counts, strict=True)):
            if count:
                labels[row, :count], boxes[row, :count] = target["labels"], target["boxes"]
        seeds = np.zeros(len(images), dtype=np.int64)
        arrays = [seeds, np.array(self.box_counts, dtype=np.int64), labels, boxes]
        parts = [torch.from_numpy(array.reshape(-1).view(np.uint8)) for array in arrays]
        self.buffer = torch.cat(parts + [image.permute(1, 2, 0).reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.sizes)

    def pin_memory(self) -> "Batch":
        """Pin the memory; the DataLoader calls this for CUDA devices."""
        self.buffer = self.buffer.pin_memory()
        return self

    def to(
        self, device: torch.device, seeds: Sequence[int] | None = None
    ) -> tuple[list[torch.Tensor], "BatchTargets"]:
        """Copy the batch to a device, in the form of torchvision's detectors.

        Args:
            device: Where to.
            seeds: For each image the seed of what the model draws for it in training, from 0 to
                2**64 - 1; None for 0.

        Returns:
            Images, each float32 `[3, H, W]` in [0, 1], and their targets.
        """
        if device.type == "mps":
            # Blocking copies, of tensors made on the host: see internals.devices. Seeds stay there.
            images, targets = self.to(torch.device("cpu"), seeds)
            return [image.contiguous().to(device) for image in images], targets.to(device)
        count = len(self)
        seeds = [0] * count if seeds is None else list(seeds)
        self.buffer[: 8 * count].view(torch.int64).copy_(_as_int64(seeds))
        lengths = [8 * count, 8 * count, 8 * count * self.most_boxes, 16 * count * self.most_boxes]
        areas = [3 * height * width for height, width in self.sizes]
        on_device = self.buffer.to(device, non_blocking=True)
        numbers, counts, labels, boxes, pixels = on_device.split([*lengths, sum(areas)])
        targets = BatchTargets(
            boxes=boxes.view(torch.float32).view(count, self.most_boxes, 4),
            labels=labels.view(torch.int64).view(count, self.most_boxes),
            counts=counts.view(torch.int64),
            seeds=numbers.view(torch.int64),
            box_counts=self.box_counts,
            image_seeds=seeds,
        )
        images = [
            image.view(height, width, 3).permute(2, 0, 1)
            for image, (height, width) in zip(
                pixels.float().div_(255).split(areas), self.sizes, strict=True
            )
        ]
        return images, targets


class BatchTargets(Sequence):
    """The targets of a batch: padded tensors, and as a sequence torchvision's target of each image.

    A target is a dict of `boxes`, `labels` and `seed`. Slices are targets of fewer images.

    Attributes:
        boxes: float32 `[B, G, 4]`, x1, y1, x2, y2 in pixels of the image before resizing.
        labels: int64 `[B, G]`.
        counts: int64 `[B]`, the number of boxes of each image; the rest is padding.
        seeds: int64 `[B]`, on the device; on the CPU for Apple GPUs.
        box_counts: `counts` on the host.
        image_seeds: `seeds` on the host, from 0 to 2**64 - 1.
    """

    def __init__(
        self,
        *,
        boxes: torch.Tensor,
        labels: torch.Tensor,
        counts: torch.Tensor,
        seeds: torch.Tensor,
        box_counts: list[int],
        image_seeds: list[int],
    ):
        self.boxes, self.labels, self.counts, self.seeds = boxes, labels, counts, seeds
        self.box_counts, self.image_seeds = box_counts, image_seeds

    @classmethod
    def from_list(cls, targets: Sequence[dict]) -> "BatchTargets":
        """Pad the targets of torchvision's detectors; seeds that they lack are drawn at random."""
        boxes, labels = ([target[key] for target in targets] for key in ("boxes", "labels"))
        device, counts = boxes[0].device, [len(rows) for rows in boxes]
        drawn = torch.randint(2**62, (len(targets),)).tolist()
        seeds = [target.get("seed", seed) for target, seed in zip(targets, drawn, strict=True)]
        padding = boxes[0].new_zeros(_padded_length(counts), 4)
        return cls(
            boxes=pad_sequence([*boxes, padding], batch_first=True)[:-1],
            labels=pad_sequence([*labels, padding[:, 0].long()], batch_first=True)[:-1],
            counts=torch.tensor(counts, device=device),
            seeds=_as_int64(seeds).to(device),
            box_counts=counts,
            image_seeds=seeds,
        )

    def to(self, device: torch.device) -> "BatchTargets":
        """Copy the ground truth, but not the seeds, to a device."""
        copied = {name: getattr(self, name).to(device) for name in ("boxes", "labels", "counts")}
        return BatchTargets(**{**vars(self), **copied})

    def __len__(self) -> int:
        return len(self.box_counts)

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return BatchTargets(**{name: value[index] for name, value in vars(self).items()})
        count = self.box_counts[index]
        return {
            "boxes": self.boxes[index, :count],
            "labels": self.labels[index, :count],
            "seed": self.image_seeds[index],
        }


def _padded_length(counts: list[int]) -> int:
    return max(1, -(-max(counts) // BOX_MULTIPLE)) * BOX_MULTIPLE


def _as_int64(seeds: Sequence[int]) -> torch.Tensor:
    """Return the signed integers with the same bits."""
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))
