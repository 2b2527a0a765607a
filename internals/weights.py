"""Files of weights: read without running code, checked, or downloaded by torchvision."""

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
    """Read any file of `torch.save` that holds a dict of plain types; raises CheckpointError.

    Nothing in the file is executed: it is read with `weights_only=True`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        _verify_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to execute the file
        raise CheckpointError(
            f"{path} cannot be read: it is not a file of torch.save, or it holds more than tensors "
            "and plain types, which is refused because loading it could run code"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damage can make a zip archive fail in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read, it is damaged: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def _verify_checksums(path: Path) -> None:
    """Compare every part of a zip archive with its checksum; older formats of torch have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")


def is_file(weights: str) -> bool:
    """Whether a value of --weights or --weights-backbone is a path rather than a name."""
    return Path(weights).suffix in (".pth", ".pt") or Path(weights).exists()


def find_weights(choices: type[WeightsEnum], name: str) -> WeightsEnum:
    """The member of `choices` called `name`, with or without that of its class.

    Raises:
        UserError: there is none; names those there are.
    """
    try:
        return choices[name.removeprefix(f"{choices.__name__}.")]
    except KeyError:
        raise UserError(
            f"unknown weights {name!r}: choose from {', '.join(choices.__members__)}, "
            "or give the path of a .pth file"
        ) from None


def download(weights: WeightsEnum, hint: str) -> dict[str, torch.Tensor]:
    """A state_dict from torchvision's cache, or over TLS with the hash in the file's name checked.

    Raises:
        UserError: without network; says where to place the file, and `hint`, what else to do.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{weights} cannot be loaded: {error}\n"
            f"Without network, place the file {weights.url}\nat {file}, {hint}"
        ) from error
    if weights in TRAINED_WITH_EPSILON_0:
        _absorb_epsilon(state)
    return state


def _absorb_epsilon(state: dict[str, torch.Tensor]) -> None:
    """Write frozen norms for an epsilon of 1e-5, the one that a stock model divides with.

    Some of COCO's weights were trained with an epsilon of 0, which torchvision's builder sets again
    after loading. Absorbed in the (frozen) scales, they and all that is trained from them give the
    same detections in any stock model, with no need to know where they came from.
    """
    for key in [key for key in state if key.endswith("running_var")]:
        scale, variance = key.replace("running_var", "weight"), state[key].double()
        state[scale] = (state[scale] * ((variance + 1e-5) / variance).sqrt()).to(state[scale].dtype)
