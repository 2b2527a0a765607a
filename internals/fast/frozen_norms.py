"""Fold frozen norms into the convolutions before them, for fewer passes over feature maps."""

from itertools import pairwise

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def fold_frozen_norms(module: nn.Module) -> None:
    """Fold each frozen norm in `module` into the convolution before it, in place."""
    for child, following in pairwise([*module.children(), None]):
        if type(child) is nn.Conv2d and type(following) is FrozenBatchNorm2d:
            assert child.bias is None
            child.__class__, following.__class__ = FoldedConv2d, FoldedNorm
            child.norm = (following,)  # in a tuple, or it would appear twice in the state_dict
        else:
            fold_frozen_norms(child)


def train_affine(module: nn.Module) -> bool:
    """Train scale and bias of the folded norms whose convolution trains; statistics stay frozen.

    The names in the state_dict stay the same. Returns whether there are such norms.
    """
    convolutions = [m for m in module.modules() if isinstance(m, FoldedConv2d)]
    norms = [conv.norm[0] for conv in convolutions if conv.weight.requires_grad]
    for norm in norms:
        for name in ("weight", "bias"):
            value = getattr(norm, name)
            delattr(norm, name)  # a buffer, which cannot become a parameter of the same name
            setattr(norm, name, nn.Parameter(value))
    return bool(norms)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen norm that is applied by the FoldedConv2d before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input unchanged."""
        return x


class FoldedConv2d(nn.Conv2d):
    """A convolution with the frozen norm after it: its scale in the weights, its shift as bias.

    This saves two reads and writes of the feature map in each direction, in float32 under autocast.
    Scale and bias are cached, and so are the scaled weights if they do not train; the cache is
    invalidated when one of its source tensors or the epsilon changes, and by `eval`. Scale and bias
    that train (`train_affine`) are not cached where they need gradients.
    """

    norm: tuple[FrozenBatchNorm2d]
    _folded = (None, None)

    def train(self, mode: bool = True) -> "FoldedConv2d":
        """Set the mode; forget the scaled weights, as a fused optimizer changes them unnoticed."""
        if not (mode and torch.is_grad_enabled()):  # those are cached without gradients only
            self._folded = (None, None)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve with the scaled weights and the bias of the norm."""
        (norm,) = self.norm
        trains_affine = norm.weight.requires_grad and torch.is_grad_enabled()
        if trains_affine or torch.compiler.is_compiling():  # the compiler fuses these operations
            scale, bias = _scale_and_bias(norm)
            return self._conv_forward(x, self.weight * scale, bias)
        buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        sources = buffers if trains else (*buffers, self.weight)
        key = [norm.eps, *((id(tensor), tensor._version) for tensor in sources)]
        if self._folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                scale, bias = _scale_and_bias(norm)
                # Keep `sources` alive, as another tensor could reuse their ids.
                self._folded = key, (scale if trains else self.weight * scale, bias, sources)
        factor, bias, _ = self._folded[1]
        return self._conv_forward(x, self.weight * factor if trains else factor, bias)


def _scale_and_bias(norm: FrozenBatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale `[C, 1, 1, 1]` and the bias `[C]` that a frozen norm applies."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
