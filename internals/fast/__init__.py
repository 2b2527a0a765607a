"""Faster versions of torchvision's detector parts, without waits for the device.

Each class replaces one of torchvision's in a built model. It has the same parameters under the same
names, and gives the same results up to rounding, as its test verifies.
"""

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from internals.fast.frozen_norms import fold_frozen_norms
from internals.fast.roi_align import CpuRoIAlign
from internals.fast.sampling import FastMatcher, SeededSampler
from internals.fast.transform import FastTransform


def use_fast_modules(model: nn.Module) -> None:
    """Replace the classes of a torchvision detector and its parts by faster ones, in place.

    All detectors share the transform, the matcher and the norms; only Faster R-CNN has more parts.
    They are replaced in the built model because torchvision's builders do not take them as
    arguments. The replacement is optional: without it the model trains more slowly.
    """
    replacements = {
        FasterRCNN: FastFasterRCNN,
        GeneralizedRCNNTransform: FastTransform,
        MultiScaleRoIAlign: CpuRoIAlign,
        Matcher: FastMatcher,
        BalancedPositiveNegativeSampler: SeededSampler,
    }
    for module in model.modules():
        module.__class__ = replacements.get(type(module), type(module))
        for name in ("proposal_matcher", "fg_bg_sampler"):
            part = getattr(module, name, None)
            if type(part) in replacements:
                part.__class__ = replacements[type(part)]
    fold_frozen_norms(model.backbone)


class FastFasterRCNN(FasterRCNN):
    """torchvision's detector without its check for degenerate boxes in every step.

    `coco_utils` has dropped such boxes when reading the data. If targets have a `seed`, the random
    samples of an image depend only on it, not on the other images of the batch.
    """

    def forward(self, images, targets=None):
        """Return the losses in training mode, otherwise the detections, as torchvision does."""
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
