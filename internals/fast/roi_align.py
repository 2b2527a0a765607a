"""RoIAlign over the levels of an FPN: faster on a CPU, and with a fixed number of boxes."""

from functools import reduce

import torch
from torch.nn.functional import embedding_bag
from torchvision.ops import MultiScaleRoIAlign, roi_align

OUTSIDE = -1e6  # a coordinate far from any feature map


class FastRoIAlign(MultiScaleRoIAlign):
    """torchvision's RoIAlign over the levels of an FPN, faster on a CPU.

    torchvision's CPU kernel is scalar, and its gradient uses one core, which took a tenth of a step
    (benchmarks/results/step.md). Here the features of a box are weighted sums of rows of the
    feature map, with all channels at once and on all cores. The results are equal up to rounding.
    Other devices run torchvision's kernel.
    """

    def set_scales(self, x: dict[str, torch.Tensor], size: tuple[int, int]) -> None:
        """Set the scale of each level for images of a height and width with padding.

        Otherwise, torchvision infers it in its first call from the size without padding, which is
        off by a factor of 2 for images of less than 46 pixels.
        """
        if self.scales is None:  # call it without boxes
            placeholders = {k: f.new_zeros(()).expand(f.shape) for k, f in x.items()}
            super().forward(placeholders, [next(iter(x.values())).new_zeros(0, 4)], [size])

    def pool_padded(self, x: dict[str, torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """Pool K boxes of each image `[B, K, 4]`, after `set_scales`: `[B * K, C, *output_size]`.

        Each level pools all boxes: those of other levels are moved to where the kernel reads
        nothing and writes zeros. So the host need not know how many boxes a level has.
        """
        images, count, _ = boxes.shape
        image = torch.arange(images, device=boxes.device, dtype=boxes.dtype)
        rois = torch.cat([image.repeat_interleave(count)[:, None], boxes.flatten(0, 1)], dim=1)
        levels = self.map_levels([boxes.flatten(0, 1)])
        is_coordinate = torch.arange(5, device=boxes.device) > 0

        def pool_level(level: int, feature: torch.Tensor) -> torch.Tensor:
            elsewhere = (levels != level)[:, None] & is_coordinate
            on_level = rois.masked_fill(elsewhere, OUTSIDE)
            scale = self.scales[level]
            pooled = roi_align(feature, on_level, self.output_size, scale, self.sampling_ratio)
            if torch.are_deterministic_algorithms_enabled():
                # torchvision's deterministic version reads a corner instead of nothing.
                pooled = pooled.masked_fill((levels != level)[:, None, None, None], 0.0)
            return pooled

        features = [x[name] for name in self.featmap_names if name in x]
        return reduce(torch.add, (pool_level(*item) for item in enumerate(features)))

    def forward(self, x, boxes, image_shapes):
        """Return the features `[K, C, *output_size]` of K boxes, as torchvision does."""
        features = [x[name] for name in self.featmap_names if name in x]
        if features[0].device.type != "cpu" or torch.jit.is_tracing():
            return super().forward(x, boxes, image_shapes)
        self.set_scales(x, tuple(map(max, zip(*image_shapes, strict=True))))
        cells, weights = self._cells([f.shape for f in features], boxes)
        channels = features[0].shape[1]
        # The kernel accumulates bfloat16 in float32, but has no float16.
        dtype = torch.float32 if features[0].dtype == torch.float16 else features[0].dtype
        rows = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features]).to(dtype)
        sums = _WeightedSum.apply(rows, cells.flatten(0, 1), weights.flatten(0, 1).to(dtype))
        pooled = sums.view(-1, *self.output_size, channels).permute(0, 3, 1, 2)
        return pooled.to(features[0].dtype)

    def _cells(self, shapes: list[torch.Size], boxes: list[torch.Tensor]):
        """Return the rows of the concatenated feature maps for each bin, and their weights."""
        levels, all_boxes = self.map_levels(boxes), torch.cat(boxes)
        image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes]))
        bins, first = self.output_size[0] * self.output_size[1], 0
        cells = torch.empty(len(all_boxes), bins, 4 * self.sampling_ratio**2, dtype=torch.int64)
        weights = all_boxes.new_empty(cells.shape)
        for level, ((count, _, height, width), scale) in enumerate(
            zip(shapes, self.scales, strict=True)
        ):
            on_level = torch.where(levels == level)[0]
            positions, weights[on_level] = roi_align_cells(
                all_boxes[on_level] * scale, (height, width), self.output_size, self.sampling_ratio
            )
            start = first + image[on_level] * height * width
            cells[on_level] = positions + start[:, None, None]
            first += count * height * width
        return cells, weights


class _WeightedSum(torch.autograd.Function):
    """Sums over j of weights[r, j] * rows[cells[r, j]], `[R, C]`; with a gradient for `rows`."""

    @staticmethod
    def forward(ctx, rows, cells, weights):
        ctx.save_for_backward(cells, weights)
        ctx.rows = len(rows)
        return embedding_bag(cells, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        # The transposed sum: after a sort, each row gathers the gradients of its readers.
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
    """Compute the cells of a feature map that RoIAlign reads for each box, and their weights.

    Each bin averages samples x samples points (arXiv 1703.06870, the version without `aligned`),
    each interpolated from 2 x 2 cells.

    Args:
        boxes: float32 `[K, 4]`, xyxy in cells.
        size: Height and width of the feature map.
        bins: Height and width of the output.
        samples: Points per bin and axis.

    Returns:
        Positions in the flattened map, int64, and weights, float32, both `[K, bins, cells]`.
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
    offset = point - first
    position = torch.stack([first, (first + 1).clamp(max=cells - 1)], dim=2)
    weight = torch.stack([1 - offset, offset], dim=2) * inside[:, :, None] / samples
    shape = (len(low), bins, 2 * samples)
    return position.view(shape), weight.view(shape)
