#!/usr/bin/env python3
"""Export a trained detector to ONNX, or its weights to safetensors, and verify the result.

An ONNX model for images of any height and width:

    python export.py output/model_best.pth --output model.onnx

The weights alone, for the model class of torchvision:

    python export.py output/model_best.pth --output weights.safetensors
"""

import argparse
import importlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from tqdm import tqdm

import checkpoint
import coco_utils
import models
import utils
from internals.command_line import ArgumentParser
from internals.errors import DataError, RunError, UserError
from internals.failures import run_command
from internals.images import image_files, narrowness, read_upright
from internals.layouts import find_split

PACKAGES = {".onnx": ("onnx", "onnxruntime"), ".safetensors": ("safetensors",)}
OPSET = 17  # the newest opset of the TorchScript exporter that older runtimes support
OUTPUTS = ("boxes", "labels", "scores")
INTERFACE = {
    "input": "image: float32 [3, height, width], red, green and blue from 0 to 1, of any size; the "
    "model resizes and normalizes it",
    "output": "boxes: float32 [N, 4], x1, y1, x2, y2 in pixels of the image; labels: int64 [N], "
    "see categories; scores: float32 [N], 0 to 1",
}
MAX_CHECK_IMAGES = 20
BOX_TOLERANCE = 0.1  # pixels of the image
SCORE_TOLERANCE = 1e-3
EPILOG = """\
A file that fails its check is not written.

Exit codes: 0 done; 1 failed, or the check failed; 2 error in the command line, the checkpoint or
the images, or a missing package.
"""


# fmt: off

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pth file of train.py")
    add("--output", type=Path, required=True, metavar="FILE",
        help="the output file, required; its suffix is the format: .onnx, or .safetensors for the "
        "weights alone. An existing file is replaced after the check has passed")
    add("--half", action="store_true",
        help="ONNX: store the weights as float16 for half the file size; they are converted back "
        "on loading, and computation stays float32 (default: float32)")
    add("--check-images", type=Path, metavar="FOLDER",
        help=f"ONNX: compare with PyTorch on up to {MAX_CHECK_IMAGES} images of this folder "
        "(default: the validation images of the training, or synthetic images without them)")
    args = parser.parse_args(argv)
    if args.output.suffix not in PACKAGES:
        raise UserError(f"--output {args.output}: the suffix must be {' or '.join(PACKAGES)}")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: name a file")
    if args.output.suffix != ".onnx" and (args.half or args.check_images):
        raise UserError("--half and --check-images are for --output FILE.onnx: remove them")
    return args

# fmt: on


def require_packages(names: tuple[str, ...]) -> None:
    """Import packages, or raise UserError with the command that installs them."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"a package is missing ({error}): pip install {' '.join(names)}") from None


def build_metadata(saved: dict) -> dict[str, str]:
    """Return the metadata of the exported file: model, image size and categories, as strings."""
    args, rows = saved["args"], saved["categories"]
    metadata = {
        "model": args["model"],
        **{key: args.get(key) for key in ("backbone", "anchor_sizes", "anchor_ratios")},
        "num_classes": coco_utils.Categories.from_list(rows).num_classes,
        **{key: args[key] for key in ("min_size", "max_size", "fixed_size", "rpn_score_thresh")},
        "max_detections": args.get("max_detections"),
        "categories": rows,
        "score_thresholds": saved.get("score_thresholds"),
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items() if v}


# ------------------------------------------------------------------------------- safetensors


def write_safetensors(args: argparse.Namespace, saved: dict, file: Path) -> str:
    """Write the weights to `file`, and verify that they load.

    Returns:
        The result of the check, a line for the log.

    Raises:
        RunError: The weights differ after loading.
    """
    import safetensors.torch

    weights = {name: tensor.contiguous() for name, tensor in saved["model"].items()}
    # save_file would create a file that only its owner can read.
    file.write_bytes(safetensors.torch.save(weights, {"format": "pt", **build_metadata(saved)}))
    loaded = safetensors.torch.load_file(str(file))
    model = models.from_checkpoint({**saved, "model": loaded}, stock=True)
    state = model.state_dict()
    changed = [name for name, tensor in weights.items() if not torch.equal(state[name], tensor)]
    if changed:
        raise RunError(f"{', '.join(changed[:3])} differ after loading")
    return f"{len(loaded)} tensors, identical after loading into torchvision's model"


# -------------------------------------------------------------------------------------- ONNX


class SingleImageDetector(nn.Module):
    """A torchvision detector for one image, with outputs in a fixed order.

    ONNX identifies outputs by their order, which differs between torchvision's detectors.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return boxes `[N, 4]`, labels `[N]` and scores `[N]` for an image `[3, H, W]`."""
        (output,) = self.model([image])
        return tuple(output[name] for name in OUTPUTS)


def write_onnx(args: argparse.Namespace, saved: dict, file: Path) -> str:
    """Write the model to `file`, and compare its detections with PyTorch.

    Returns:
        The result of the comparison, lines for the log.

    Raises:
        RunError: The detections differ.
    """
    import onnx
    import onnxruntime

    model = SingleImageDetector(models.from_checkpoint(saved, stock=True)).eval()
    images, source = load_check_images(args.check_images, saved["args"], model.model.transform)
    utils.log(f"exporting {saved['args']['model']}, check on {source}")
    half_names = round_to_half(model) if args.half else set()
    export_graph(model, file)
    exported = onnx.load(str(file))
    store_as_half(exported.graph, half_names)
    onnx.helper.set_model_props(exported, {**build_metadata(saved), **INTERFACE})
    onnx.save(exported, str(file))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    check_black_image(model, session, images[0].shape)
    result = compare(model, session, images)
    summary = describe(result, images)
    if result.unmatched:
        raise RunError(
            f"it does not agree with PyTorch {summary}. In a model with little training many "
            "detections have equal scores, and rounding decides which are kept: train longer, or "
            "use other --check-images"
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
    """Write the ONNX graph of a `SingleImageDetector` for images of any size and content."""
    torch.onnx.register_custom_op_symbolic("aten::sigmoid", _precise_sigmoid, OPSET)
    with warnings.catch_warnings(), adapt_for_tracing(model.model):
        warnings.simplefilter("ignore")  # about the tracing of torchvision's code
        torch.onnx.export(
            model,
            (synthetic_image(0),),
            str(file),
            dynamo=False,  # the dynamo exporter fails on torchvision's detectors
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,  # keeps the names of the weights
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={"image": {1: "height", 2: "width"}, **{n: {0: "N"} for n in OUTPUTS}},
        )


@contextmanager
def adapt_for_tracing(detector: nn.Module) -> Iterator[None]:
    """Change a torchvision detector so that its graph gives PyTorch's results for every image.

    The graph of a Faster R-CNN fails on images without proposals, or on all others if it was traced
    without any. Therefore each image gets one more proposal, of size 0: the head drops its boxes,
    which have no size either.
    """

    def append_proposal(rpn: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
        proposals, losses = outputs
        return [torch.cat([boxes, boxes.new_zeros(1, 4)]) for boxes in proposals], losses

    rpn, transform = getattr(detector, "rpn", None), detector.transform
    hook = rpn.register_forward_hook(append_proposal) if rpn else None
    detector.transform = ExactTransform(transform).eval()
    try:
        yield
    finally:
        detector.transform = transform
        if hook:
            hook.remove()


class ExactTransform(GeneralizedRCNNTransform):
    """torchvision's transform, with the size of the resized image computed in float64.

    Traced by torchvision it is computed in float32, and one in 14 sizes of images is resized to one
    pixel less than in PyTorch.
    """

    def __init__(self, transform: GeneralizedRCNNTransform):
        names = ("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size")
        super().__init__(**{name: getattr(transform, name) for name in names})

    def resize(self, image, target=None):
        """Resize an image `[3, H, W]`."""
        if self.fixed_size:
            return super().resize(image, target)
        # Tensors with a dimension, as the exporter computes with numbers in float32.
        sides = torch.onnx.operators.shape_as_tensor(image)[-2:].double()
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        scale = (limits / torch.stack([sides.min(), sides.max()])).amin(0, keepdim=True)
        height, width = (sides * scale).floor().long()
        return interpolate(image[None], size=(height, width), mode="bilinear")[0], target


def _precise_sigmoid(graph, x):
    """Export a sigmoid as 1 / (1 + exp(-x)).

    The sigmoid of ONNX Runtime rounds to multiples of 3e-8. The many proposals with low scores
    would have another order than in PyTorch, and non-maximum suppression would keep others.
    """
    one = graph.op("Constant", value_t=torch.tensor(1.0))
    return graph.op("Reciprocal", graph.op("Add", graph.op("Exp", graph.op("Neg", x)), one))


def round_to_half(model: nn.Module) -> set[str]:
    """Round the weights of layers to float16 values, and return their names.

    Biases, norms and weights beyond the range of float16 are not rounded.
    """
    names = set()
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and weights.abs().max() < torch.finfo(torch.float16).max:
            weights.data = weights.data.half().float()
            names.add(name)
    return names


def store_as_half(graph, names: set[str]) -> None:
    """Store these weights as float16, each with a node that converts it to float32.

    This halves the file for every runtime. Computation stays float32: CPUs have few float16
    operators, and boxes would be off by a pixel, the resolution of float16 above 1024.
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
    """The agreement of the detections of two models, in one image or in several."""

    matched: int
    unmatched: int  # of both models
    box_difference: float  # the largest of the matched pairs, in pixels
    score_difference: float  # the largest of the matched pairs


@torch.inference_mode()
def compare(
    model: SingleImageDetector,
    session,
    images: list[torch.Tensor],
    tolerances: tuple[float, float] = (BOX_TOLERANCE, SCORE_TOLERANCE),
) -> Agreement:
    """Compare the detections of PyTorch and ONNX Runtime.

    Args:
        model: The detector in PyTorch.
        session: An `onnxruntime.InferenceSession` of the exported detector.
        images: float32 `[3, H, W]` in [0, 1], at least one.
        tolerances: The largest difference of matching boxes, in pixels, and of their scores.
    """
    results, head = [], getattr(model.model, "roi_heads", model.model)
    for image in tqdm(images, "checking", leave=False, disable=None):
        results.append(match_detections(model(image), detect(session, image), head, tolerances))
    matched, unmatched, boxes, scores = zip(*results, strict=True)
    return Agreement(sum(matched), sum(unmatched), max(boxes), max(scores))


def detect(session, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the boxes, labels and scores of ONNX Runtime; RunError if it fails on the image."""
    try:
        outputs = session.run(list(OUTPUTS), {"image": image.numpy()})
    except Exception as error:  # of onnxruntime's own types
        height, width = image.shape[1:]
        reason = str(error).partition("\n")[0]
        raise RunError(f"it fails on an image of {width} x {height} pixels: {reason}") from error
    return tuple(torch.from_numpy(output) for output in outputs)


@torch.inference_mode()
def check_black_image(model: SingleImageDetector, session, shape: tuple[int, ...]) -> None:
    """Check that the exported model runs on a black image, in which most models find nothing.

    What a model does find in it is not compared: its scores are equal all over the image, and
    rounding decides which are kept.

    Raises:
        RunError: It fails, or detects something although PyTorch does not.
    """
    image = torch.zeros(shape)
    highest = max(detect(session, image)[2].tolist(), default=0.0)
    head = getattr(model.model, "roi_heads", model.model)
    if not len(model(image)[2]) and highest > head.score_thresh + SCORE_TOLERANCE:
        raise RunError("it detects something in a black image, but PyTorch does not")


def match_detections(
    expected: tuple[torch.Tensor, ...],
    actual: tuple[torch.Tensor, ...],
    head: nn.Module,
    tolerances: tuple[float, float],
) -> Agreement:
    """Match the detections of two models in one image, in any order.

    Args:
        expected: Boxes `[N, 4]`, labels `[N]` and scores `[N]`; N may be 0.
        actual: The same of the other model, `[M, 4]`, `[M]` and `[M]`.
        head: Drops scores below `score_thresh`, and all but the highest `detections_per_img`. A
            detection close to these limits may be missing from one model, and is not counted.
        tolerances: The largest difference of matching boxes, in pixels, and of their scores.
    """
    (boxes, labels, scores), (other_boxes, other_labels, other_scores) = expected, actual
    box_difference = (boxes[:, None] - other_boxes).abs().amax(dim=2)
    score_difference = (scores[:, None] - other_scores).abs()
    same = (box_difference <= tolerances[0]) & (score_difference <= tolerances[1])
    same &= labels[:, None] == other_labels
    full = [s.min().item() for s in (scores, other_scores) if len(s) == head.detections_per_img]
    lowest = max([head.score_thresh, *full]) + tolerances[1]
    unmatched = torch.cat([scores[~same.any(dim=1)], other_scores[~same.any(dim=0)]])
    return Agreement(
        matched=int(same.any(dim=1).sum()),
        unmatched=int((~(unmatched <= lowest)).sum()),  # counts NaN, too
        box_difference=max(box_difference[same].tolist(), default=0.0),
        score_difference=max(score_difference[same].tolist(), default=0.0),
    )


def describe(result: Agreement, images: list[torch.Tensor]) -> str:
    """Describe the agreement of the detections in these images."""
    where = (
        f"on {len(images)} images of {len({image.shape for image in images})} sizes and a black one"
    )
    if not result.matched and not result.unmatched:
        return f"{where}, but nothing was detected in them: use --check-images with objects"
    return (
        f"{where}: {result.matched:,} detections match, {result.unmatched:,} do not; matching "
        f"boxes differ by up to {result.box_difference:.2g} pixels ({BOX_TOLERANCE} allowed), "
        f"their scores by up to {result.score_difference:.2g} ({SCORE_TOLERANCE} allowed)"
    )


# ------------------------------------------------------------------- images for the comparison


def load_check_images(
    folder: Path | None, args: dict, transform: GeneralizedRCNNTransform
) -> tuple[list[torch.Tensor], str]:
    """Load images for the comparison, of at least two sizes.

    Args:
        folder: Their folder; None for the validation images of the training, or synthetic images
            if those do not exist.
        args: The flags of the training.
        transform: That of the model; images that it cannot resize are skipped.

    Returns:
        Images, float32 `[3, H, W]` in [0, 1], and a description of their source.

    Raises:
        UserError: There is no readable image in `folder`.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--check-images {folder}: no such folder")
        images, source = sample_images(folder, transform), f"images of {folder}"
        if not images:
            raise UserError(f"--check-images {folder}: no usable image in this folder")
    else:
        folder = find_validation_folder(args)
        images = sample_images(folder, transform) if folder else []
        source = f"validation images of {folder}"
    if not images:
        images = [synthetic_image(seed) for seed in range(6)]
        source = "synthetic images, as the validation images are missing (see --check-images)"
    if len({image.shape for image in images}) == 1:  # verify that other sizes work, too
        height, width = images[0].shape[1:]
        size = (max(1, height * 4 // 5), max(1, width * 3 // 5))
        images.append(interpolate(images[0][None], size=size, mode="bilinear")[0])
    return images, source


def sample_images(folder: Path, transform: GeneralizedRCNNTransform) -> list[torch.Tensor]:
    """Read up to 20 images, evenly spaced over a folder; unusable ones are skipped."""
    files, images = image_files(folder), []
    for i in np.unique(np.linspace(0, len(files) - 1, MAX_CHECK_IMAGES).round()) if files else ():
        file = files[int(i)]
        try:
            image = read_upright(file)
        except DataError as error:
            utils.log(f"skipped: {error}")
            continue
        if problem := narrowness(*image.shape[1:], transform):
            utils.log(f"skipped: {file}: {problem}")
            continue
        images.append(image.float() / 255)
    return images


def find_validation_folder(args: dict) -> Path | None:
    """Find the validation images of a training with these flags; None if they do not exist."""
    annotations, images = (
        Path(args[key]) if args[key] else None for key in ("val_annotations", "val_images")
    )
    try:
        return find_split(Path(args["data_path"]), "val", annotations, images).images
    except DataError:
        return None


def synthetic_image(seed: int) -> torch.Tensor:
    """Draw bright rectangles on noise, float32 `[3, H, W]` in [0, 1]; the size varies by seed."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 240 + 40 * (seed % 3), 320 - 40 * (seed % 2)
    image = 0.3 * torch.rand(3, height, width, generator=generator)
    for _ in range(6):
        y, x, h, w = (torch.rand(4, generator=generator) * 0.5 * height).int().tolist()
        image[:, y : y + h + 20, x : x + w + 20] = torch.rand(3, 1, 1, generator=generator)
    return image


# -------------------------------------------------------------------------------- the command

WRITERS = {".onnx": write_onnx, ".safetensors": write_safetensors}


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
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
        result = WRITERS[args.output.suffix](args, saved, partial)
        os.replace(partial, args.output)
    except RunError as error:
        raise RunError(f"{args.output} was not written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    utils.log(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, {result}")


if __name__ == "__main__":
    run_command(main)
