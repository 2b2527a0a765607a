"""Matching and sampling of anchors and proposals, without waiting for the device."""

from collections.abc import Sequence

import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher


class FastMatcher(Matcher):
    """torchvision's matcher of anchors and true boxes, without lists whose length is unknown."""

    def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


class SeededSampler(BalancedPositiveNegativeSampler):
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
