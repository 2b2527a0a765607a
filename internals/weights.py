"""Load weights from files, without running code from them, or from torchvision."""

import pickle
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import WeightsEnum, detection

from internals.errors import CheckpointError, UserError

TRAINED_WITH_EPSILON_0 = (
    detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)


def load_weights_file(path: Path) -> dict:
    """Read a dict of tensors and plain types from a file of `torch.save`.

    Code in the file is never executed (`weights_only=True`).

    Raises:
        CheckpointError: The file is missing, damaged, or has other contents.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        _verify_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message suggests weights_only=False
        raise CheckpointError(
            f"{path} cannot be read: it is not a file of torch.save, or it holds more than tensors "
            "and plain types, which is rejected because loading it could run code"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged zip archives raise errors of many types
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read, it may be damaged: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def _verify_checksums(path: Path) -> None:
    """Verify the checksums of a zip archive; older formats of torch.save have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")


def is_file(weights: str) -> bool:
    """Check whether a value of --weights or --weights-backbone is a path rather than a name."""
    return Path(weights).suffix in (".pth", ".pt") or Path(weights).exists()


def find_weights(choices: type[WeightsEnum], name: str) -> WeightsEnum:
    """Return the member of `choices` with this name, with or without the name of the enum.

    Raises:
        UserError: There is none; the message lists the choices.
    """
    try:
        return choices[name.removeprefix(f"{choices.__name__}.")]
    except KeyError:
        raise UserError(
            f"unknown weights {name!r}: choose from {', '.join(choices.__members__)}, "
            "or give the path of a .pth file"
        ) from None


def download(weights: WeightsEnum, hint: str) -> dict[str, torch.Tensor]:
    """Load a state_dict from torchvision's cache, or download it and verify its hash.

    Args:
        weights: The weights of a model or backbone.
        hint: An alternative to a download, for the message without network.

    Raises:
        UserError: The download failed; the message has the path to place the file at.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{weights} cannot be loaded: {error}\n"
            f"Without network, download {weights.url} elsewhere,\nplace it at {file}, {hint}"
        ) from error
    if weights in TRAINED_WITH_EPSILON_0:
        _absorb_epsilon(state)
    return state


def _absorb_epsilon(state: dict[str, torch.Tensor]) -> None:
    """Convert frozen norms from an epsilon of 0 to 1e-5, the default of torchvision's models.

    Some COCO weights were trained with an epsilon of 0, which torchvision's builder restores after
    loading. With the difference absorbed in the frozen scales, these weights and all models trained
    from them give the same detections in any stock model.
    """
    for key in [key for key in state if key.endswith("running_var")]:
        scale, variance = key.replace("running_var", "weight"), state[key].double()
        state[scale] = (state[scale] * ((variance + 1e-5) / variance).sqrt()).to(state[scale].dtype)
