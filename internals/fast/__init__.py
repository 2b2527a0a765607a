"""Faster versions of torchvision's detector parts, without waits for the device.

Each class replaces one of torchvision's in a built model. It has the same parameters under the same
names, and gives the same results up to rounding, as its test verifies.
"""

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

import utils
from internals.fast.cuda_graphs import CudaGraphs
from internals.fast.faster_rcnn import FastFasterRCNN
from internals.fast.frozen_norms import fold_frozen_norms
from internals.fast.matching import FastMatcher
from internals.fast.roi_align import FastRoIAlign
from internals.fast.sampling import KeyedSampler
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
        MultiScaleRoIAlign: FastRoIAlign,
        Matcher: FastMatcher,
        BalancedPositiveNegativeSampler: KeyedSampler,
    }
    for module in model.modules():
        module.__class__ = replacements.get(type(module), type(module))
        for name in ("proposal_matcher", "fg_bg_sampler"):
            part = getattr(module, name, None)
            if type(part) in replacements:
                part.__class__ = replacements[type(part)]
    fold_frozen_norms(model.backbone)


def use_cuda_graphs(model: nn.Module) -> None:
    """Let a Faster R-CNN of `use_fast_modules` train with CUDA graphs."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        # The trial runs before a capture would change their statistics.
        utils.log("--cuda-graphs: training without graphs, as norms of this model are trained")
    else:
        model.graphs = CudaGraphs(model)
