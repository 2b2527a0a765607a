"""Use torchvision's builders of detectors without their download of backbone weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torchvision
from torchvision.models import WeightsEnum


@contextmanager
def without_download(weights: WeightsEnum, state: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Make torchvision's builders load `state` instead of downloading the backbone `weights`.

    This temporarily replaces a method of torchvision. Its builders freeze norms and layers only for
    `weights_backbone=...`, which always downloads; without this the freezing rules of nine
    detectors would have to be copied here. `test_pretrained_structure_matches_torchvision` detects
    changes of torchvision.

    Args:
        weights: The backbone weights that the builder is called with.
        state: Their state_dict; None for random weights, if the whole model is loaded afterwards.
    """

    def get_state_dict(*args, **kwargs) -> dict[str, torch.Tensor]:
        if state is not None:
            return state
        name = type(weights).__name__.removesuffix("_Weights").lower()
        with torch.random.fork_rng(devices=[]):
            return torchvision.models.get_model(name, weights=None).state_dict()

    original, WeightsEnum.get_state_dict = WeightsEnum.get_state_dict, get_state_dict
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = original
