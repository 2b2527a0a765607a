"""What makes torchvision's detectors fast without changing their numbers.

Everything here takes the place of a class of torchvision's in a model that is already built: it has
the same parameters under the same names, and gives the same results up to rounding. Each has a test
that holds it equal to what it replaces.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign


def make_fast(model: nn.Module) -> None:
    """Give a torchvision detector and its parts the faster classes of this file, in place.

    All detectors share the transform, the matcher and the norms; only Faster R-CNN has more.
    """
    faster = {
        FasterRCNN: Detector,
        GeneralizedRCNNTransform: Transform,
        MultiScaleRoIAlign: BoxPool,
        Matcher: BoxMatcher,
        BalancedPositiveNegativeSampler: BoxSampler,
    }
    for module in model.modules():
        module.__class__ = faster.get(type(module), type(module))
        for name in ("proposal_matcher", "fg_bg_sampler"):
            part = getattr(module, name, None)
            if type(part) in faster:
                part.__class__ = faster[type(part)]
    fold_frozen_norms(model.backbone)


# ---------------------------------------------------------------------- without asking the device
#
# On a GPU the host runs ahead of the device until it asks for a number or hands over a small one.


class Detector(FasterRCNN):
    """torchvision's detector without its look, in every step, for boxes that have no size.

    `coco_utils` has dropped those when it read the data. Where targets have a `seed`, it decides
    what is drawn for that image, whichever images are in its batch.
    """

    def forward(self, images, targets=None):
        for part in (self.rpn, self.roi_heads):
            part.fg_bg_sampler.seeds = [t["seed"] for t in targets or () if "seed" in t]
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, losses = self.rpn(batch, features, targets)
        detections, head_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return {**head_losses, **losses}
        return self.transform.postprocess(detections, batch.image_sizes, sizes)


class Transform(GeneralizedRCNNTransform):
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


class BoxMatcher(Matcher):
    """torchvision's matcher of anchors and true boxes, without lists whose length is unknown."""

    def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


class BoxSampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or proposals to train on, from each image's own seed."""

    seeds: Sequence[int] = ()  # of the images of the next batch; none: the global generator's state

    def __call__(self, matched_idxs):
        if not self.seeds:
            return super().__call__(matched_idxs)
        chosen = []
        for labels, seed in zip(matched_idxs, self.seeds, strict=True):
            torch.manual_seed(seed)
            chosen.append(super().__call__([labels]))
        return tuple([part[0] for part in parts] for parts in zip(*chosen, strict=True))


# ------------------------------------------------------------------------------ frozen norms


def fold_frozen_norms(module: nn.Module) -> None:
    """Let each convolution below `module` do the work of the frozen norm that comes after it."""
    for child, following in pairwise([*module.children(), None]):
        if type(child) is nn.Conv2d and type(following) is FrozenBatchNorm2d:
            assert child.bias is None
            child.__class__, following.__class__ = FoldedConv2d, FoldedNorm
            child.norm = (following,)  # in a tuple, so that it is no second place in the state_dict
        else:
            fold_frozen_norms(child)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen norm whose buffers a FoldedConv2d applies; does nothing itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class FoldedConv2d(nn.Conv2d):
    """A convolution with the frozen norm after it: its scale in the weights, its shift as bias.

    Saves reading and writing the feature map twice in each direction, in float32 under autocast.
    What does not change is computed once: scale and bias, and the product where weights do not
    train. It is computed again when a tensor or the epsilon it comes from has changed.
    """

    norm: tuple[FrozenBatchNorm2d]
    _folded = (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (norm,) = self.norm
        if torch.compiler.is_compiling():  # which makes one kernel of all this
            scale, bias = _scale_and_bias(norm)
            return self._conv_forward(x, self.weight * scale, bias)
        buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        sources = buffers if trains else (*buffers, self.weight)
        key = [norm.eps, *((id(tensor), tensor._version) for tensor in sources)]
        if self._folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                scale, bias = _scale_and_bias(norm)
                # `sources` are kept, so that no other tensor can have their ids.
                self._folded = key, (scale if trains else self.weight * scale, bias, sources)
        factor, bias, _ = self._folded[1]
        return self._conv_forward(x, self.weight * factor if trains else factor, bias)


def _scale_and_bias(norm: FrozenBatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What a frozen norm multiplies each channel with, `[C, 1, 1, 1]`, and adds to it, `[C]`."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


# ---------------------------------------------------------------------------------- RoIAlign


class BoxPool(MultiScaleRoIAlign):
    """torchvision's RoIAlign over the levels of an FPN, in a form that is fast on a CPU.

    torchvision's kernel reads one number at a time, and its gradient does so on one core, which
    took a tenth of a step (benchmarks/results/step.md). Here a box's features are a weighted sum of
    rows of the feature map, all channels at once, on all cores. The results differ by rounding.
    Other devices run torchvision's kernel.
    """

    def forward(self, x, boxes, image_shapes):
        features = [x[name] for name in self.featmap_names if name in x]
        if features[0].device.type != "cpu" or torch.jit.is_tracing():
            return super().forward(x, boxes, image_shapes)
        if self.scales is None:  # torchvision finds them out in its first call
            alike = {k: boxes[0].new_zeros(()).expand(f.shape) for k, f in x.items()}
            super().forward(alike, [b[:0] for b in boxes], image_shapes)
        cells, weights = self._cells([f.shape for f in features], boxes)
        channels = features[0].shape[1]
        # In bfloat16 sums are kept in float32 until they are written; float16 has no such kernel.
        dtype = torch.float32 if features[0].dtype == torch.float16 else features[0].dtype
        rows = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features]).to(dtype)
        sums = _WeightedSum.apply(rows, cells.flatten(0, 1), weights.flatten(0, 1).to(dtype))
        pooled = sums.view(-1, *self.output_size, channels).permute(0, 3, 1, 2)
        return pooled.to(features[0].dtype)

    def _cells(self, shapes: list[torch.Size], boxes: list[torch.Tensor]):
        """Rows of the maps, one level behind the other, that each bin reads, and their weights."""
        levels, all_boxes = self.map_levels(boxes), torch.cat(boxes)
        image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes]))
        bins, first = self.output_size[0] * self.output_size[1], 0
        cells = torch.empty(len(all_boxes), bins, 4 * self.sampling_ratio**2, dtype=torch.int64)
        weights = all_boxes.new_empty(cells.shape)
        for level, ((count, _, height, width), scale) in enumerate(
            zip(shapes, self.scales, strict=True)
        ):
            here = torch.where(levels == level)[0]
            near, weights[here] = roi_align_cells(
                all_boxes[here] * scale, (height, width), self.output_size, self.sampling_ratio
            )
            cells[here] = near + (first + image[here] * height * width)[:, None, None]
            first += count * height * width
        return cells, weights


class _WeightedSum(torch.autograd.Function):
    """`[R, C]`: sums over j of weights[r, j] * rows[cells[r, j]]; the gradient is for `rows`."""

    @staticmethod
    def forward(ctx, rows, cells, weights):
        ctx.save_for_backward(cells, weights)
        ctx.rows = len(rows)
        return embedding_bag(cells, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        # The same sum the other way round: sorted, each row gathers what its readers send back.
        cells, weights = ctx.saved_tensors
        counts = torch.bincount(cells.flatten(), minlength=ctx.rows)
        readers = cells.flatten().argsort(stable=True)
        gradient = embedding_bag(
            readers // cells.shape[1],
            grad.contiguous(),
            counts.cumsum(0) - counts,
            per_sample_weights=weights.flatten()[readers],
            mode="sum",
        )
        return gradient, None, None


def roi_align_cells(
    boxes: torch.Tensor, size: tuple[int, int], bins: tuple[int, int], samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cells of a feature map RoIAlign (unaligned) reads for each box, and with what weight.

    `boxes` float32 `[K, 4]` xyxy in cells of a map of `size` (height, width). Returns positions in
    the flattened map, int64, and weights, float32, both `[K, bins, cells]`: each bin averages
    samples x samples points (arXiv 1703.06870), each interpolated from 2 x 2 cells.
    """
    (y, y_weight), (x, x_weight) = (
        _axis_cells(boxes[:, axis], boxes[:, axis + 2], size[1 - axis], bins[1 - axis], samples)
        for axis in (1, 0)
    )
    cells = y[:, :, None, :, None] * size[1] + x[:, None, :, None, :]
    weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    return cells.flatten(3).flatten(1, 2), weights.flatten(3).flatten(1, 2)


def _axis_cells(
    low: torch.Tensor, high: torch.Tensor, cells: int, bins: int, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    step = (high - low).clamp(min=1) / bins
    point = low[:, None] + (torch.arange(bins * samples) + 0.5) / samples * step[:, None]
    inside = (point >= -1) & (point <= cells)
    point = point.clamp(0, cells - 1)
    first = point.floor().long()
    part = point - first
    position = torch.stack([first, (first + 1).clamp(max=cells - 1)], dim=2)
    weight = torch.stack([1 - part, part], dim=2) * inside[:, :, None] / samples
    shape = (len(low), bins, 2 * samples)
    return position.view(shape), weight.view(shape)
