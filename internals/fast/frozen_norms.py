"""Frozen norms folded into the convolutions before them: the same numbers, fewer passes."""

from itertools import pairwise

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


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
