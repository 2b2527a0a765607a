"""torchvision's detector parts without waiting for the device: same parameters, same numbers.

Each class replaces one of torchvision's in a model that is already built, has the same parameters
under the same names, and gives the same results up to rounding. Each has a test that holds it
equal to what it replaces.
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
    """Give a torchvision detector and its parts the faster classes of this folder, in place.

    All detectors share the transform, the matcher and the norms; only Faster R-CNN has more. The
    classes of a built model are exchanged because torchvision's builders take none of these parts
    as arguments; without it the model still trains, slower (`tests/internals/test_fast.py`).
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
    """torchvision's detector without its check of every step for boxes that have no size.

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
