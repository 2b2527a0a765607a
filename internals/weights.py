"""Load weights from files, without running code from them, or from torchvision."""

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision
from torchvision.models import WeightsEnum, detection

from internals.errors import CheckpointError, UserError

TRAINED_WITH_EPSILON_0 = (
    detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)


# Where training loops keep a state_dict in their checkpoints. An average comes first: it is what
# they evaluate.
STATE_DICT_KEYS = (
    *("model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema"),
    *("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network"),
    *("weights", "params"),
)
WEIGHTS_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")


class Ignored:
    """Stands for an object of any class but tensors and plain types in a file of another loop.

    torch.load gets it under the names of these classes, which it neither imports nor calls.
    """

    def __init__(self, *args):
        pass

    def __setstate__(self, state: object) -> None:
        """Drop the content of the object."""


def load_weights_file(path: Path, foreign: bool = False) -> dict:
    """Read a dict of tensors and plain types from a file of `torch.save` or safetensors.

    Code in the file is never executed (`weights_only=True`).

    Args:
        path: The file.
        foreign: Read other objects as `Ignored`, such as the arguments in a checkpoint of
            torchvision's references, instead of rejecting the file.

    Raises:
        CheckpointError: The file is missing, damaged, or has other contents.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not path.stat().st_size:
        raise CheckpointError(f"{path} cannot be read: the file is empty")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        _verify_checksums(path)
        names = _other_globals(path) if foreign else []
        with torch.serialization.safe_globals([(Ignored, name) for name in names]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message suggests weights_only=False
        raise CheckpointError(
            f"{path} cannot be read: it is not a file of torch.save, or it holds more than tensors "
            "and plain types, which is rejected because loading it could run code: save "
            "model.state_dict() alone"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged zip archives raise errors of many types
        raise CheckpointError(f"{path} cannot be read: {_reason(path, error)}") from error
    if isinstance(state, Ignored):
        raise CheckpointError(
            f"{path} holds an object, such as a whole model: save model.state_dict() instead"
        )
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def _reason(path: Path, error: Exception) -> str:
    """Return why torch.load failed."""
    text = str(error).partition("\n")[0] or type(error).__name__
    if "TorchScript" in text:
        return "it is a TorchScript program, save model.state_dict() instead"
    if zipfile.is_zipfile(path):
        return f"it may be damaged: {text}"
    return "it is not a file of torch.save, or it is damaged"


def _other_globals(path: Path) -> list[str]:
    """Return the names of the classes and functions that `weights_only=True` rejects."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, EOFError):  # not a zip archive: an old format, or not a file of torch.save
        return ["argparse.Namespace"]


def find_state_dict(
    content: dict, expected: Iterable[str], path: Path
) -> tuple[dict[str, torch.Tensor], str]:
    """Find the weights of a model in a file of any training loop.

    They are searched in the dicts of a checkpoint, and what wrappers of the model, such as DDP, put
    before its names is removed.

    Args:
        content: Of the file, from `load_weights_file`.
        expected: The names in the state_dict of the model.
        path: The file, for messages.

    Returns:
        The state_dict, and where it was and what was left out, for the log.

    Raises:
        CheckpointError: There is no state_dict.
    """
    found = search_state_dict(content)
    if found is None and {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path} holds the state of an optimizer: use the file of the model")
    if found is None:
        keys = ", ".join(repr(key) for key in list(content)[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no weights under a known name, but {keys}: save model.state_dict() alone"
        )
    keys, state = found
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    prefix = _find_prefix(state, set(expected))
    others = [key for key in state if not key.startswith(prefix)]
    where = f"{path}: {' '.join(map(repr, keys))}" if keys else str(path)
    if others:
        more = f" and {len(others) - 1:,} more" if others[1:] else ""
        where += f" without {others[0]}{more}, not of the model"
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, where


def search_state_dict(content: dict) -> tuple[list[str], dict[str, torch.Tensor]] | None:
    """Return the keys of the first state_dict in a checkpoint, and the state_dict, if any."""
    for key in STATE_DICT_KEYS:
        inner = content.get(key)
        found = search_state_dict(inner) if isinstance(inner, dict) else None
        if found:
            return [key, *found[0]], found[1]
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    return ([], tensors) if any("." in key for key in tensors) else None


def _find_prefix(state: dict[str, torch.Tensor], expected: set[str]) -> str:
    """Find what a wrapper has put before the names of a model, such as "module." of DDP."""
    prefixes = Counter(
        key.removesuffix(name) for key in state for name in _endings(key) if name in expected
    )
    return max(prefixes, key=lambda text: (prefixes[text], -len(text)), default="")


def _endings(key: str) -> Iterator[str]:
    """Yield "a.b.c", "b.c" and "c" for "a.b.c"."""
    parts = key.split(".")
    return (".".join(parts[n:]) for n in range(len(parts)))


def _load_safetensors(path: Path) -> dict:
    """Read the weights, and the categories if export.py wrote them."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path} needs a package: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            content = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            metadata = file.metadata() or {}
        if "categories" in metadata:
            content["categories"] = json.loads(metadata["categories"])
    except Exception as error:  # of safetensors' own type
        raise CheckpointError(f"{path} cannot be read, it may be damaged: {error}") from error
    return content


def describe_misfit(expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> str:
    """Describe how a state_dict differs from that of a model; "" if it does not."""
    missing, unknown = _compare_names(expected, state)
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    rows = (
        (missing, "tensors of the model are missing"),
        (unknown, "are not of the model"),
        (shapes, "have another shape"),
    )
    return "; ".join(f"{len(names):,} {text} (such as {names[0]})" for names, text in rows if names)


def advise_misfit(
    expected: dict, state: dict, detectors: Iterable[str], backbones: Iterable[WeightsEnum]
) -> str:
    """Return what to do about a state_dict that does not fit the one of a detector, `expected`.

    Args:
        expected: Of the model.
        state: Of the file.
        detectors: The names of the detectors that it may be of.
        backbones: The weights of the classifiers that it may be of.
    """
    if _compare_names(expected, state) == ([], []):
        return "Use weights of the same number of categories and the same --model"
    if not any(name in expected for name in state):
        if any(f"backbone.{name}" in expected for name in state):
            return "These are the weights of a backbone alone: --weights needs those of a detector"
        for names in map(classifier_state, backbones):
            if len(_compare_names(names, state)[0]) < len(names) / 10:
                return "These are the weights of a classifier: give them as --weights-backbone FILE"
    for detector in detectors:
        if _compare_names(_state_on_meta(detector, weights_backbone=None), state) == ([], []):
            return f"These are the weights of another detector: set --model {detector}"
    return "Set --model to the model of the weights, which must be one of torchvision"


def classifier_state(weights: WeightsEnum) -> dict[str, torch.Tensor]:
    """Return the state_dict of the classifier with these weights, on the meta device."""
    return _state_on_meta(type(weights).__name__.removesuffix("_Weights").lower())


@cache
def _state_on_meta(name: str, **options) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **options).state_dict()


def _compare_names(expected: Iterable[str], state: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that only a model has, and those that only a state_dict has.

    Counters of batches are optional: frozen norms have none.
    """
    ours, theirs = (
        {name: None for name in names if not name.endswith(".num_batches_tracked")}
        for names in (expected, state)
    )
    return [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]


def _verify_checksums(path: Path) -> None:
    """Verify the checksums of a zip archive; older formats of torch.save have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")


def is_file(weights: str) -> bool:
    """Check whether a value of --weights or --weights-backbone is a path rather than a name."""
    return Path(weights).suffix in WEIGHTS_SUFFIXES or Path(weights).exists()


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
