"""torchvision's Faster R-CNN, which does not wait for a CUDA device in a step.

On CUDA the parts that select anchors, proposals and detections have outputs of fixed shape
(`rpn.py`, `roi_heads.py`): the host queues the kernels of a step ahead of the device. On a CPU,
where nothing is queued, their padding would only cost time: there torchvision's own parts run, with
faster classes for some. Both ways sample the same anchors and proposals, and have the same losses,
gradients and detections up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

from internals.batches import BatchTargets
from internals.fast import roi_heads, rpn
from internals.fast.anchors import find_anchors
from internals.fast.boxes import GroundTruth
from internals.fast.keys import ANCHORS, FIRST_GT_ID, PROPOSALS, random_keys

BATCH_NORM = nn.modules.batchnorm._BatchNorm


class FastFasterRCNN(FasterRCNN):
    """torchvision's detector without its check for degenerate boxes in every step.

    `coco_utils` has dropped such boxes when reading the data. What is drawn for an image depends
    only on the `seed` of its target, not on the device or the other images of the batch.

    Attributes:
        fixed_shapes: Whether to use tensors of fixed shape; None for on CUDA only.
        graphs: Runs the losses as CUDA graphs, if set.
    """

    fixed_shapes: bool | None = None
    graphs = None

    def forward(self, images, targets=None):
        """Return the losses in training mode, otherwise the detections, as torchvision does.

        Args:
            images: A list of float32 `[3, H, W]`.
            targets: `BatchTargets`, or a list of dicts as for torchvision.
        """
        if self.training and not isinstance(targets, BatchTargets):
            targets = BatchTargets.from_list(targets)
        fixed = images[0].is_cuda if self.fixed_shapes is None else self.fixed_shapes
        if fixed:
            return self._fixed_losses(images, targets) if self.training else self._detect(images)
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets_list = self.transform(images, targets if self.training else None)
        features = self._features(batch.tensors)
        if self.training:
            self._set_sampling_keys(batch.tensors, features, targets)
        proposals, losses = self.rpn(batch, features, targets_list)
        detections, head_losses = self.roi_heads(
            features, proposals, batch.image_sizes, targets_list
        )
        if self.training:
            return {**head_losses, **losses}
        return self.transform.postprocess(detections, batch.image_sizes, sizes)

    def _set_sampling_keys(
        self, images: torch.Tensor, features: dict, targets: BatchTargets
    ) -> None:
        """Let torchvision's parts sample as `losses` does; keys are where the seeds are."""
        anchors = find_anchors(self.rpn.anchor_generator, images, list(features.values()))
        seeds, counts, device = targets.seeds, targets.box_counts, targets.seeds.device
        anchor_keys = random_keys(seeds, anchors.ids.to(device), ANCHORS)
        self.rpn.fg_bg_sampler.set_keys(anchor_keys, anchor_keys[:, :0], [0] * len(counts))
        ranks = torch.arange(self.rpn.post_nms_top_n(), device=device)
        gt_ids = FIRST_GT_ID + torch.arange(targets.boxes.shape[1], device=device)
        self.roi_heads.fg_bg_sampler.set_keys(
            random_keys(seeds, ranks, PROPOSALS), random_keys(seeds, gt_ids, PROPOSALS), counts
        )

    # --------------------------------------------------------------------- with fixed shapes

    def _fixed_losses(self, images: list, targets: BatchTargets) -> dict[str, torch.Tensor]:
        batch, sizes, scales, _ = self._transform(images, targets.image_seeds)
        boxes = targets.boxes * scales[:, None]
        gt = GroundTruth(boxes, targets.labels, targets.counts, targets.seeds)
        if self.graphs and torch.is_grad_enabled():
            return self.graphs.losses(batch, sizes, gt)
        return self.losses(batch, sizes, gt)

    def _transform(self, images: list, seeds: list[int] | None) -> tuple[torch.Tensor, ...]:
        """Normalize, resize and pad images.

        Returns:
            The images, their sizes `[B, 2]` (height and width), and the factors `[B, 4]` from boxes
            before to after resizing, and back.
        """
        before = np.array([image.shape[-2:] for image in images], dtype=np.float32)
        batch, _ = self.transform(images, seeds and [{"seed": seed} for seed in seeds])
        after = np.array(batch.image_sizes, dtype=np.float32)
        # In float32, in which torchvision divides.
        factors = [np.tile(ratio[:, ::-1], 2) for ratio in (after / before, before / after)]
        numbers = torch.from_numpy(np.concatenate([after, *factors], axis=1))
        if batch.tensors.is_cuda:
            numbers = numbers.pin_memory()
        numbers = numbers.to(batch.tensors.device, non_blocking=True)
        return batch.tensors, *numbers.split([2, 4, 4], dim=1)

    def losses(
        self, images: torch.Tensor, sizes: torch.Tensor, gt: GroundTruth
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of a padded batch; the host does not wait, and nothing is random.

        Args:
            images: float32 `[B, 3, H, W]`, normalized and padded.
            sizes: float32 `[B, 2]`, heights and widths without padding.
            gt: The ground truth.
        """
        features = self._features(images)
        predictions = rpn.predict(self.rpn, images, list(features.values()))
        rpn_losses = rpn.rpn_losses(self.rpn, predictions, gt)
        proposals = rpn.select_proposals(self.rpn, predictions, sizes)
        samples = roi_heads.select_samples(self.roi_heads, proposals, gt)
        rows = None
        if any(isinstance(module, BATCH_NORM) for module in self.roi_heads.modules()):
            # Other rows must not count in the statistics: the only wait, for one model.
            rows = samples.is_sample.flatten().nonzero()[:, 0]
        logits, deltas = self._apply_head(features, samples.boxes, rows)
        return {**roi_heads.head_losses(logits, deltas, samples), **rpn_losses}

    def _features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(images)
        self.roi_heads.box_roi_pool.set_scales(features, tuple(images.shape[-2:]))
        return features

    def _apply_head(
        self, features: dict, boxes: torch.Tensor, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `[B * K, C]` and deltas `[B * K, 4 * C]` of boxes `[B, K, 4]`.

        With `rows` the others are 0.
        """
        heads = self.roi_heads
        pooled = heads.box_roi_pool.pool_padded(features, boxes)
        if rows is None:
            return heads.box_predictor(heads.box_head(pooled))
        outputs = heads.box_predictor(heads.box_head(pooled[rows]))
        return tuple(x.new_zeros(len(pooled), x.shape[1]).index_copy(0, rows, x) for x in outputs)

    def _detect(self, images: list) -> "Detections":
        batch, sizes, _, scales = self._transform(images, None)
        features = self._features(batch)
        predictions = rpn.predict(self.rpn, batch, list(features.values()))
        proposals = rpn.select_proposals(self.rpn, predictions, sizes)
        logits, deltas = self._apply_head(features, proposals.boxes)

        def select(**options) -> tuple[torch.Tensor, torch.Tensor]:
            rows, too_few = roi_heads.detect(
                self.roi_heads, logits, deltas, proposals, sizes, **options
            )
            return torch.cat([rows[..., :4] * scales[:, None], rows[..., 4:]], dim=2), too_few

        return Detections(*select(), lambda: select(candidates=None)[0])


class Detections(Sequence):
    """The detections of a batch, as torchvision's list of dicts, on the CPU.

    They are copied while the device goes on; the first access waits for the copy.
    """

    def __init__(
        self, rows: torch.Tensor, incomplete: torch.Tensor, select_all: Callable[[], torch.Tensor]
    ):
        """Start the copy.

        Args:
            rows: `[B, D, 6]`, of `roi_heads.detect`.
            incomplete: bool `[B]`, for which images some detections may be missing.
            select_all: Returns complete `rows`; called if any are incomplete.
        """
        self._images = len(rows)
        incomplete = incomplete[:, None, None].expand(-1, rows.shape[1], 1).to(rows.dtype)
        self._copy = torch.cat([rows, incomplete], dim=2).to("cpu", non_blocking=True)
        self._select_all = select_all
        self._copied = torch.cuda.Event() if rows.is_cuda else None
        if self._copied:
            self._copied.record()
        self._outputs = None

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, image: int) -> dict[str, torch.Tensor]:
        if self._outputs is None:
            self._outputs = list(self._read())
        return self._outputs[image]

    def _read(self) -> Iterator[dict[str, torch.Tensor]]:
        if self._copied:
            self._copied.synchronize()
        rows = self._select_all().cpu() if self._copy[..., 6].any() else self._copy
        self._select_all = None  # frees the tensors that it needs
        for image in rows:
            image = image[image[:, 4] >= 0]
            yield {"boxes": image[:, :4], "labels": image[:, 5].long(), "scores": image[:, 4]}
