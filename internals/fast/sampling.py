"""Sample anchors and proposals by their keys."""

import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1  # kinds of anchors and proposals


def sample(
    kinds: torch.Tensor, keys: torch.Tensor, size: int, positive_fraction: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample up to `size * positive_fraction` positives, and negatives up to `size` in total.

    Args:
        kinds: int8 `[B, N]`, POSITIVE, NEGATIVE or IGNORED.
        keys: int64 `[B, N]`, of `random_keys`.
        size: The number of samples of an image.
        positive_fraction: Upper bound of the share of positives.

    Returns:
        The rows of the positives, int64 `[B, P]`, and whether each of them is a sample, bool
        `[B, P]`; the same of the negatives. The shapes do not depend on the values.
    """
    rows = kinds.shape[1]
    most = min(int(size * positive_fraction), rows)
    key, positives = keys.masked_fill(kinds != POSITIVE, -1).topk(most, dim=1)
    is_positive = key >= 0
    key, negatives = keys.masked_fill(kinds != NEGATIVE, -1).topk(min(size, rows), dim=1)
    left = size - is_positive.sum(dim=1, keepdim=True)
    rank = torch.arange(negatives.shape[1], device=keys.device)
    return positives, is_positive, negatives, (key >= 0) & (rank < left)


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or proposals, which samples by keys instead.

    Attributes:
        keys: int64 `[B, N]`, for the next batch; an image may have fewer anchors or proposals.
        gt_keys: int64 `[B, G]`, the keys of the ground-truth boxes, which follow the proposals.
        gt_counts: Their number for each image, 0 for anchors.
    """

    def set_keys(self, keys: torch.Tensor, gt_keys: torch.Tensor, gt_counts: list[int]) -> None:
        """Set the keys for the next batch."""
        self.keys, self.gt_keys, self.gt_counts = keys, gt_keys, gt_counts

    def __call__(self, matched_idxs):
        """Return masks of the positive and of the negative samples, a list for all images each."""
        masks = [], []
        for image, (labels, count) in enumerate(zip(matched_idxs, self.gt_counts, strict=True)):
            keys = [self.keys[image, : len(labels) - count], self.gt_keys[image, :count]]
            kinds = labels.clamp(IGNORED, POSITIVE).to(self.keys.device, torch.int8)
            places = sample(
                kinds[None],
                torch.cat(keys)[None],
                self.batch_size_per_image,
                self.positive_fraction,
            )
            for mask_list, rows, chosen in zip(masks, places[::2], places[1::2], strict=True):
                mask = torch.zeros_like(kinds, dtype=torch.uint8)
                mask[rows[chosen]] = 1
                mask_list.append(mask.to(labels.device))
        return masks
