"""RoIAlign over the levels of an FPN as weighted sums of rows, which is fast on a CPU."""

import torch
from torch.nn.functional import embedding_bag
from torchvision.ops import MultiScaleRoIAlign


class CpuRoIAlign(MultiScaleRoIAlign):
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
