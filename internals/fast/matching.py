"""torchvision's matcher, for the detectors and devices that run torchvision's own parts."""

import torch
from torchvision.models.detection._utils import Matcher


class FastMatcher(Matcher):
    """torchvision's matcher of anchors and ground-truth boxes, without data-dependent shapes."""

    def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
        """Restore the matches of anchors with the highest IoU of a ground-truth box."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))
