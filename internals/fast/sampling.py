"""Match and sample anchors and proposals without waiting for the device."""

from collections.abc import Sequence

import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher


class FastMatcher(Matcher):
    """torchvision's matcher of anchors and ground-truth boxes, without data-dependent shapes."""

    def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
        """Restore the matches of anchors with the highest IoU of a ground-truth box."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or proposals, with a seed for each image."""

    seeds: Sequence[int] = ()  # of the next batch; empty: use the global generator

    def __call__(self, matched_idxs):
        """Return masks of the positive and of the negative samples, a list for all images each."""
        if not self.seeds:
            return super().__call__(matched_idxs)
        samples = []
        for labels, seed in zip(matched_idxs, self.seeds, strict=True):
            torch.manual_seed(seed)
            samples.append(super().__call__([labels]))
        return tuple([mask for (mask,) in masks] for masks in zip(*samples, strict=True))
