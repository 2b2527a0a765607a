#!/usr/bin/env python3
"""Export a trained detector to ONNX, or its weights to safetensors, and check the result.

For ONNX Runtime and everything else that reads ONNX, with images of any height and width:

    python export.py output/model_best.pth --output model.onnx

The weights alone, for torchvision's own class of the model:

    python export.py output/model_best.pth --output weights.safetensors
"""

import argparse
import importlib
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate
from tqdm import tqdm

import checkpoint
import coco_utils
import models
import utils
from internals.command_line import ArgumentParser
from internals.errors import DataError, RunError, UserError
from internals.failures import run_command
from internals.images import image_files, read_upright

PACKAGES = {".onnx": ("onnx", "onnxruntime"), ".safetensors": ("safetensors",)}
OPSET = 17  # the newest that torch's TorchScript exporter and older runtimes all know
OUTPUTS = ("boxes", "labels", "scores")
INTERFACE = {
    "input": "image: float32 [3, height, width], red, green and blue from 0 to 1, of any size; the "
    "model resizes and normalises it",
    "output": "boxes: float32 [N, 4], x1, y1, x2, y2 in pixels of the image; labels: int64 [N], "
    "see categories; scores: float32 [N], 0 to 1",
}
CHECK_IMAGES = 20  # at most
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3  # in pixels of the image, and of a score up to 1


# fmt: off

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Export a trained detector to ONNX, or its weights to safetensors.",
        epilog="A file that does not pass its check is not written. Exit codes: 0 done; 2 the "
        "command line, the checkpoint or the images are wrong, or a package is missing; 1 failed, "
        "or the check has.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pth file of train.py")
    add("--output", type=Path, required=True, metavar="FILE",
        help="its suffix is the format: .onnx, or .safetensors for the weights alone. A file of "
        "that name is replaced once the check has passed")
    add("--half", action="store_true",
        help="ONNX: store the weights as float16, half the size; they are converted back when the "
        "file is loaded, and everything is computed in float32")
    add("--check-images", type=Path, metavar="FOLDER",
        help=f"ONNX: compare with PyTorch on up to {CHECK_IMAGES} images of this folder (default: "
        "validation images of the training, or synthetic ones if they are gone)")
    args = parser.parse_args(argv)
    if args.output.suffix not in PACKAGES:
        raise UserError(f"--output {args.output}: end the name with {' or '.join(PACKAGES)}")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: name a file")
    if args.output.suffix != ".onnx" and (args.half or args.check_images):
        raise UserError("--half and --check-images are for --output FILE.onnx")
    return args

# fmt: on


def require_packages(names: tuple[str, ...]) -> None:
    """Raise UserError, with the command that installs them, unless all `names` can be imported."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"a package is missing for this ({error}): pip install {' '.join(names)}"
        ) from None


def build_metadata(saved: dict) -> dict[str, str]:
    """Return what has to be known of the model of a checkpoint elsewhere, as strings."""
    args, rows = saved["args"], saved["categories"]
    known = {
        "model": args["model"],
        "num_classes": coco_utils.Categories.from_list(rows).num_classes,
        **{key: args[key] for key in ("min_size", "max_size", "fixed_size", "rpn_score_thresh")},
        "categories": rows,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items() if v}


# ------------------------------------------------------------------------------- safetensors


def write_safetensors(args: argparse.Namespace, saved: dict, file: Path) -> str:
    """Write the weights to `file`, and check that they load: returns a line about it.

    Raises:
        RunError: the weights differ after loading.
    """
    import safetensors.torch

    weights = {name: tensor.contiguous() for name, tensor in saved["model"].items()}
    # Not by save_file, whose files only their owner may read.
    file.write_bytes(safetensors.torch.save(weights, {"format": "pt", **build_metadata(saved)}))
    loaded = safetensors.torch.load_file(str(file))
    model = models.from_checkpoint({**saved, "model": loaded}, stock=True)
    state = model.state_dict()
    wrong = [name for name, tensor in weights.items() if not torch.equal(state[name], tensor)]
    if wrong:
        raise RunError(f"{', '.join(wrong[:3])} differ after loading")
    return f"{len(loaded)} tensors, loaded into torchvision's own class bit for bit"


# -------------------------------------------------------------------------------------- ONNX


class SingleImageDetector(nn.Module):
    """A torchvision detector as a function of one image.

    ONNX knows outputs by their order only, which differs between torchvision's detectors.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return boxes `[N, 4]`, labels `[N]` and scores `[N]` for an image `[3, H, W]`."""
        (output,) = self.model([image])
        return tuple(output[name] for name in OUTPUTS)


def write_onnx(args: argparse.Namespace, saved: dict, file: Path) -> str:
    """Write the model to `file`, and compare its detections with PyTorch's: returns lines about it.

    Raises:
        RunError: the detections differ.
    """
    import onnx
    import onnxruntime

    model = SingleImageDetector(models.from_checkpoint(saved, stock=True)).eval()
    images, source = load_check_images(args.check_images, saved["args"])
    utils.log(f"exporting {saved['args']['model']}, to be checked on {source}")
    half_names = round_to_half(model) if args.half else set()
    export_graph(model, file)
    exported = onnx.load(str(file))
    store_as_half(exported.graph, half_names)
    onnx.helper.set_model_props(exported, {**build_metadata(saved), **INTERFACE})
    onnx.save(exported, str(file))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    result = compare(model, session, images)
    summary = describe(result, images)
    if result.unmatched:
        raise RunError(
            f"it does not agree with PyTorch {summary}. If the model has hardly been trained, many "
            "detections have equal scores, and rounding decides which are kept: train on, or try "
            "other --check-images"
        )
    if not args.half:
        return f"agrees with PyTorch {summary}"
    unrounded = SingleImageDetector(models.from_checkpoint(saved, stock=True)).eval()
    change = compare(unrounded, session, images, tolerances=(1.0, 0.01))
    return (
        f"agrees with PyTorch with the same rounded weights {summary}\ncompared to the weights "
        f"before rounding, {change.matched:,} detections match within 1 pixel and 0.01 in score, "
        f"{change.unmatched:,} do not"
    )


def export_graph(model: nn.Module, file: Path) -> None:
    """Write the ONNX graph of a `SingleImageDetector` for images of any size."""
    torch.onnx.register_custom_op_symbolic("aten::sigmoid", _precise_sigmoid, OPSET)
    with warnings.catch_warnings():  # of the exporter about its own ways
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (synthetic_image(0),),
            str(file),
            dynamo=False,  # its successor does not get through torchvision's detectors
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,  # keeps each weight under its own name
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={"image": {1: "height", 2: "width"}, **{n: {0: "N"} for n in OUTPUTS}},
        )


def _precise_sigmoid(graph, x):
    """Export a sigmoid as 1 / (1 + exp(-x)).

    ONNX Runtime's own rounds to multiples of 3e-8. Proposals of low scores, as most are, would come
    in another order than in PyTorch, and non-maximum suppression would keep others of them.
    """
    one = graph.op("Constant", value_t=torch.tensor(1.0))
    return graph.op("Reciprocal", graph.op("Add", graph.op("Exp", graph.op("Neg", x)), one))


def round_to_half(model: nn.Module) -> set[str]:
    """Round the weights of layers to values that float16 can hold, and return their names.

    Biases and norms, which are few, stay as they are, and so do weights with larger numbers than
    float16 has.
    """
    names = set()
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and weights.abs().max() < torch.finfo(torch.float16).max:
            weights.data = weights.data.half().float()
            names.add(name)
    return names


def store_as_half(graph, names: set[str]) -> None:
    """Store the weights of these names as float16, each with a node that converts it to float32.

    This halves the file for every runtime. Computing in float16 is another matter: CPUs have few
    operators for it, and boxes would be wrong by a pixel, since float16 counts in ones above 1024.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = [tensor for tensor in graph.initializer if tensor.name in names]
    assert len(weights) == len(names), "the exporter has renamed weights"
    for tensor in weights:
        name, values = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(values, f"{name}.float16"))
        graph.node.insert(0, helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))


# ------------------------------------------------------------------------------ the comparison


class Agreement(NamedTuple):
    """How well the detections of two models match, in one image or in several."""

    matched: int
    unmatched: int  # of either model
    box_difference: float  # the largest of a matched pair, in pixels
    score_difference: float


@torch.inference_mode()
def compare(
    model: SingleImageDetector,
    session,
    images: list[torch.Tensor],
    tolerances: tuple[float, float] = (BOX_TOLERANCE, SCORE_TOLERANCE),
) -> Agreement:
    """Compare the detections of PyTorch and ONNX Runtime.

    Args:
        model: the detector in PyTorch.
        session: the `onnxruntime.InferenceSession` of the exported one.
        images: float32 `[3, H, W]` in [0, 1], at least one.
        tolerances: up to which boxes (in pixels) and scores count as equal.
    """
    results, head = [], getattr(model.model, "roi_heads", model.model)
    for image in tqdm(images, "checking", leave=False, disable=None):
        outputs = session.run(list(OUTPUTS), {"image": image.numpy()})
        actual = tuple(torch.from_numpy(output) for output in outputs)
        results.append(match_detections(model(image), actual, head, tolerances))
    matched, unmatched, boxes, scores = zip(*results, strict=True)
    return Agreement(sum(matched), sum(unmatched), max(boxes), max(scores))


def match_detections(
    expected: tuple[torch.Tensor, ...],
    actual: tuple[torch.Tensor, ...],
    head: nn.Module,
    tolerances: tuple[float, float],
) -> Agreement:
    """Match the detections of two models in one image, in any order.

    Args:
        expected: boxes `[N, 4]`, labels `[N]` and scores `[N]`; N may be 0.
        actual: the same of the other model, `[M, 4]`, `[M]` and `[M]`.
        head: what drops low scores, below `score_thresh` and beyond `detections_per_img`. A
            detection so near to where it drops them may be in one of the two alone.
        tolerances: up to which boxes (in pixels) and scores count as equal.
    """
    (boxes, labels, scores), (other_boxes, other_labels, other_scores) = expected, actual
    box_difference = (boxes[:, None] - other_boxes).abs().amax(dim=2)
    score_difference = (scores[:, None] - other_scores).abs()
    same = (box_difference <= tolerances[0]) & (score_difference <= tolerances[1])
    same &= labels[:, None] == other_labels
    full = [s.min().item() for s in (scores, other_scores) if len(s) == head.detections_per_img]
    lowest = max([head.score_thresh, *full]) + tolerances[1]
    alone = torch.cat([scores[~same.any(dim=1)], other_scores[~same.any(dim=0)]])
    return Agreement(
        matched=int(same.any(dim=1).sum()),
        unmatched=int((~(alone <= lowest)).sum()),  # NaN is one
        box_difference=max(box_difference[same].tolist(), default=0.0),
        score_difference=max(score_difference[same].tolist(), default=0.0),
    )


def describe(result: Agreement, images: list[torch.Tensor]) -> str:
    """Say how well the detections in these images match."""
    where = f"on {len(images)} images of {len({image.shape for image in images})} sizes"
    if not result.matched and not result.unmatched:
        return f"{where}, but nothing was detected in them: use --check-images with objects"
    return (
        f"{where}: {result.matched:,} detections match, {result.unmatched:,} do not; matching "
        f"boxes differ by up to {result.box_difference:.2g} pixels ({BOX_TOLERANCE} allowed), "
        f"their scores by up to {result.score_difference:.2g} ({SCORE_TOLERANCE} allowed)"
    )


# ---------------------------------------------------------------------- images to compare on


def load_check_images(folder: Path | None, args: dict) -> tuple[list[torch.Tensor], str]:
    """Load images to compare on, of two sizes at least.

    Args:
        folder: where to take them from; None for the validation images of the training, or
            synthetic ones if they are gone.
        args: those of the training.

    Returns:
        Images, float32 `[3, H, W]` in [0, 1], and a text on their source.

    Raises:
        UserError: there is no readable image in `folder`.
    """
    if folder is not None:
        images, source = sample_images(folder), f"images of {folder}"
        if not images:
            raise UserError(f"--check-images {folder}: there is no image that can be read")
    else:
        folder = find_validation_folder(args)
        images, source = sample_images(folder) if folder else [], f"validation images of {folder}"
    if not images:
        images = [synthetic_image(seed) for seed in range(6)]
        source = "synthetic images, as the validation images are gone (see --check-images)"
    if len({image.shape for image in images}) == 1:  # whether other sizes work is to be seen, too
        images.append(interpolate(images[0][None], scale_factor=(0.8, 0.6), mode="bilinear")[0])
    return images, source


def sample_images(folder: Path) -> list[torch.Tensor]:
    """Read up to 20 images from all over a folder, without those that cannot be used."""
    files, images = image_files(folder), []
    for i in np.unique(np.linspace(0, len(files) - 1, CHECK_IMAGES).round()) if files else ():
        file = files[int(i)]
        try:
            image = read_upright(file)
        except DataError as error:
            utils.log(f"skipped: {error}")
            continue
        if max(image.shape[1:]) > 50 * min(image.shape[1:]):  # a side may be resized to nothing
            utils.log(f"skipped: {file} is too narrow to compare on")
            continue
        images.append(image.float() / 255)
    return images


def find_validation_folder(args: dict) -> Path | None:
    """Find the validation images of the training with these arguments, if they are still there."""
    given = [args[key] and Path(args[key]) for key in ("val_annotations", "val_images")]
    try:
        return coco_utils.find_split(Path(args["data_path"]), "val", *given).images
    except DataError:
        return None


def synthetic_image(seed: int) -> torch.Tensor:
    """Draw bright rectangles on noise: float32 `[3, H, W]` in [0, 1], its size varies by seed."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 240 + 40 * (seed % 3), 320 - 40 * (seed % 2)
    image = 0.3 * torch.rand(3, height, width, generator=generator)
    for _ in range(6):
        y, x, h, w = (torch.rand(4, generator=generator) * 0.5 * height).int().tolist()
        image[:, y : y + h + 20, x : x + w + 20] = torch.rand(3, 1, 1, generator=generator)
    return image


# ------------------------------------------------------------------------------------ the run

WRITERS = {".onnx": write_onnx, ".safetensors": write_safetensors}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    require_packages(PACKAGES[args.output.suffix])
    saved = checkpoint.load(args.checkpoint)
    partial = args.output.with_name(args.output.name + ".partial")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error.strerror}") from None
    try:
        checked = WRITERS[args.output.suffix](args, saved, partial)
        os.replace(partial, args.output)
    except RunError as error:
        raise RunError(f"{args.output} was not written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    utils.log(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, {checked}")


if __name__ == "__main__":
    run_command(main)
