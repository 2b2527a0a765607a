#!/usr/bin/env python3
"""Take a trained detector elsewhere: to ONNX, or to a plain file of weights; both are checked.

For ONNX Runtime and what else reads ONNX, with pictures of any height and width:

    python export.py output/model_best.pth --output model.onnx

The weights alone, for torchvision's own class of the model:

    python export.py output/model_best.pth --output weights.safetensors
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision.ops import box_iou
from tqdm import tqdm

import checkpoint
import coco_utils
import models
import utils
from internals.command_line import ArgumentParser
from internals.errors import DataError, UserError

MOST_PICTURES = 20  # to check on
OPSET = 17  # the newest that torch's TorchScript exporter and older runtimes all know
NAMES = ("boxes", "labels", "scores")
INPUT = (
    "image: float32 [3, height, width], red, green and blue from 0 to 1, of any size; the model "
    "resizes and normalises it"
)
OUTPUT = (
    "boxes: float32 [N, 4], x1, y1, x2, y2 in pixels of the image; labels: int64 [N], see "
    "categories; scores: float32 [N], 0 to 1"
)


class CheckError(RuntimeError):
    """What was exported does not give what the checkpoint gives."""


# --------------------------------------------------------------------------------- arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Export a trained detector to ONNX, or its weights to safetensors.",
        epilog="A file that does not pass its check is not written. Exit codes: 0 done; 2 the "
        "command line, the checkpoint or the pictures are wrong, or a package is missing; 1 "
        "failed, or the check has.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pth file of train.py")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="its ending chooses: .onnx, or .safetensors for the weights alone. A file of that "
        "name is replaced once the check has passed",
    )
    add(
        "--half",
        action="store_true",
        help="ONNX: store the weights as float16, half the size; they are widened when loaded, and "
        "all else stays float32",
    )
    add(
        "--check-images",
        type=Path,
        metavar="FOLDER",
        help=f"ONNX: compare with PyTorch on up to {MOST_PICTURES} pictures of this folder "
        "(default: validation pictures of the training, or made-up ones if they are gone)",
    )
    args = parser.parse_args(argv)
    if args.output.suffix not in WRITERS:
        raise UserError(f"--output {args.output}: end the name with {' or '.join(WRITERS)}")
    if args.output.suffix != ".onnx" and (args.half or args.check_images):
        raise UserError("--half and --check-images are for --output FILE.onnx")
    return args


def need(*names: str) -> list[ModuleType]:
    """Import optional packages; UserError says how to get those that are missing."""
    missing = [name for name in names if not _imports(name)]
    if missing:
        raise UserError(f"a package is missing for this: pip install {' '.join(missing)}")
    return [importlib.import_module(name) for name in names]


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


# -------------------------------------------------------------------------------------- ONNX


class OneImage(nn.Module):
    """A torchvision detector as a function of one image, with its outputs in one order.

    torchvision's classes give theirs in different orders, which is all that ONNX goes by.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.detections(image)
        return tuple(found[name] for name in NAMES)

    def detections(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model([image])[0]


def write_onnx(args: argparse.Namespace, saved: dict, file: Path) -> str:
    """Write the model to `file` and compare; returns lines on it or raises CheckError."""
    onnx, onnxruntime = need("onnx", "onnxruntime")
    model = OneImage(models.from_checkpoint(saved, stock=True)).eval()
    halved = round_to_half(model) if args.half else set()
    pictures, source = check_pictures(args.check_images, saved["args"])
    utils.log(f"exporting {saved['args']['model']}, to be checked on {source}")
    with quiet():
        torch.onnx.export(
            model,
            (made_up_picture(0),),
            str(file),
            dynamo=False,  # its successor does not get through torchvision's detectors
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,  # keeps each weight under its own name
            input_names=["image"],
            output_names=list(NAMES),
            dynamic_axes={"image": {1: "height", 2: "width"}, **{n: {0: "N"} for n in NAMES}},
        )
    graph = onnx.load(str(file))
    resolve_low_scores(graph.graph, onnx)
    store_as_half(graph.graph, halved, onnx)
    onnx.helper.set_model_props(graph, {**facts(saved), "input": INPUT, "output": OUTPUT})
    onnx.save(graph, str(file))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    result = compare(model, session, pictures)
    if result.failed:
        raise CheckError(
            f"it does not agree with PyTorch {result}. If the model has hardly been trained, its "
            "boxes tie and chance decides between them: train on"
        )
    if not args.half:
        return f"agrees with PyTorch {result}"
    change = compare(
        OneImage(models.from_checkpoint(saved, stock=True)).eval(), session, pictures, nudges=0
    )
    return (
        f"agrees with PyTorch, its weights rounded alike, {result}\nrounding the weights to "
        f"float16 has changed: {change.spread()}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter says of its ways to itself, unless it fails."""
    said = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield
    except Exception:
        sys.stderr.write(said.getvalue())
        raise


def resolve_low_scores(graph, onnx: ModuleType) -> None:
    """Compute each sigmoid as 1 / (1 + exp(-x)).

    ONNX Runtime's own rounds to multiples of 3e-8, so proposals with less objectness would come in
    another order than in PyTorch, and non-maximum suppression would keep others of them: seen to
    change one detection in 20 pictures.
    """
    nodes, make = [], onnx.helper.make_node
    for node in graph.node:
        if node.op_type != "Sigmoid":
            nodes.append(node)
            continue
        (x,), (y,) = node.input, node.output
        nodes += [
            make("Neg", [x], [f"{y}.neg"]),
            make("Exp", [f"{y}.neg"], [f"{y}.exp"]),
            make("Add", [f"{y}.exp", "one"], [f"{y}.sum"]),
            make("Reciprocal", [f"{y}.sum"], [y]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), "one"))


def round_to_half(model: nn.Module) -> set[str]:
    """Round the weights of layers to what float16 can hold; returns their names.

    Biases and norms, which are few, stay as they are, and so do numbers that are too large.
    """
    names, largest = set(), torch.finfo(torch.float16).max
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and weights.abs().max() < largest:
            weights.data = weights.data.half().float()
            names.add(name)
    return names


def store_as_half(graph, names: set[str], onnx: ModuleType) -> None:
    """Store these weights as float16, each with a node that widens it again when loaded.

    That halves the file for every runtime. To compute in float16 is another matter: a CPU has few
    operators for it, and boxes would be wrong by a pixel, since it counts in ones above 1024.
    """
    casts, stored = [], []
    for tensor in graph.initializer:
        if tensor.name in names:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            half = f"{tensor.name}.float16"
            stored.append(onnx.numpy_helper.from_array(values, half))
            casts.append(
                onnx.helper.make_node("Cast", [half], [tensor.name], to=onnx.TensorProto.FLOAT)
            )
        else:
            stored.append(tensor)
    assert len(casts) == len(names), "the exporter has renamed weights"
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)


def facts(saved: dict) -> dict[str, str]:
    """What has to be known of a model elsewhere, as texts."""
    args, rows = saved["args"], saved["categories"]
    known = {
        "model": args["model"],
        "num_classes": coco_utils.Categories.from_list(rows).num_classes,
        **{key: args[key] for key in ("min_size", "max_size", "fixed_size", "rpn_score_thresh")},
        "categories": rows,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items() if v}


# --------------------------------------------------------------------------------- the check


BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3  # in pixels of the picture, and of 1
NUDGE = 1e-5  # of a pixel's value: moves boxes about as little as another runtime's rounding does


@dataclass
class Comparison:
    """How two detectors differ in some pictures."""

    pictures: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    boxes: list[float] = field(default_factory=list)  # largest difference of each pair, in pixels
    scores: list[float] = field(default_factory=list)
    alone: int = 0  # detections that only one of them has
    at_cut_off: int = 0  # such, but with a score so near the lowest allowed that either is right
    ties: int = 0  # pictures in which it took a nudge to get the same boxes

    @property
    def failed(self) -> bool:
        too_far = max(self.boxes, default=0) > BOX_TOLERANCE
        return too_far or max(self.scores, default=0) > SCORE_TOLERANCE or self.alone > 0

    def __str__(self) -> str:
        where = f"on {self.pictures} pictures of {len(self.sizes)} sizes"
        if not self.boxes and not self.alone:
            return f"{where}, but nothing was found in them: use --check-images with objects"
        alone = f", and {self.alone:,} are in one alone" if self.alone else ""
        near = f" ({self.at_cut_off:,} more at the lowest score)" if self.at_cut_off else ""
        near += f" ({self.ties} pictures with ties)" if self.ties else ""
        return (
            f"{where}: {len(self.boxes):,} boxes are in both{near}{alone}; they differ by up to "
            f"{max(self.boxes, default=0):.2g} pixels ({BOX_TOLERANCE} allowed) and "
            f"{max(self.scores, default=0):.2g} in score ({SCORE_TOLERANCE} allowed)"
        )

    def spread(self) -> str:
        """The differences where some are expected."""
        if not self.boxes:
            return "nothing, as nothing was found"
        median, most = np.quantile(self.boxes, (0.5, 0.95))
        return (
            f"boxes by {median:.2g} pixels in the median, 95 % of them by less than {most:.2g}, "
            f"scores by less than {np.quantile(self.scores, 0.95):.2g}; {self.alone:,} of "
            f"{len(self.boxes) + self.alone:,} have come or gone"
        )

    def add(self, other: "Comparison") -> None:
        self.sizes |= other.sizes
        for name in ("pictures", "boxes", "scores", "alone", "at_cut_off", "ties"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def compare_one(expected: dict, found: dict, head: nn.Module) -> Comparison:
    """The detections in one picture, `boxes`, `labels` and `scores`, in any order.

    `head` is what leaves out low scores: below a threshold, and when there are too many.
    """
    here, there = partners(expected, found)
    result = Comparison(pictures=1)
    for name, width in (("boxes", 4), ("scores", 1)):
        difference = (expected[name][here] - found[name][there]).abs()
        getattr(result, name).extend(difference.reshape(len(here), width).amax(dim=1).tolist())
    cut_offs = [head.score_thresh]
    for scores in (expected["scores"], found["scores"]):
        if len(scores) == head.detections_per_img:
            cut_offs.append(float(scores.min()))
    for side, paired in ((expected, here), (found, there)):
        left = side["scores"][~torch.isin(torch.arange(len(side["scores"])), paired)]
        distance = (left[:, None] - torch.tensor(cut_offs)).abs().amin(dim=1)
        near = int((distance <= SCORE_TOLERANCE).sum())
        result.at_cut_off += near
        result.alone += len(left) - near
    return result


def partners(expected: dict, found: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of detections that are the same one, int64 `[M]` in each.

    By label and IoU, the best pairs first, not by position: equal scores may come in any order.
    """
    # Grown a little, so that boxes without an area have an overlap as well.
    grow = torch.tensor([-0.5, -0.5, 0.5, 0.5])
    overlap = box_iou(expected["boxes"] + grow, found["boxes"] + grow)
    overlap[expected["labels"][:, None] != found["labels"]] = 0
    pairs = []
    while overlap.numel() and overlap.max() > 0.5:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        pairs.append((i, j))
        overlap[i], overlap[:, j] = 0, 0
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


@torch.inference_mode()
def compare(model: OneImage, session, pictures: list[torch.Tensor], nudges: int = 8) -> Comparison:
    """Both detectors on pictures, float32 `[3, H, W]` from 0 to 1.

    Where two boxes tie, rounding decides which of them suppresses the other, with all that
    follows. So where the two differ, PyTorch gets the picture again, its pixels changed by a few
    millionths: what it then finds itself is not wrong.
    """
    total, head = Comparison(), getattr(model.model, "roi_heads", model.model)
    noise = torch.Generator().manual_seed(0)
    for image in tqdm(pictures, "checking", leave=False, disable=not sys.stderr.isatty()):
        outputs = session.run(list(NAMES), {"image": image.numpy()})
        found = dict(zip(NAMES, map(torch.from_numpy, outputs), strict=True))
        first = result = compare_one(model.detections(image), found, head)
        for _ in range(nudges if first.failed else 0):
            nudged = image + NUDGE * torch.randn(image.shape, generator=noise)
            result = compare_one(model.detections(nudged), found, head)
            if not result.failed:
                result.ties = 1
                break
        else:
            result = first
        result.sizes = {tuple(image.shape[1:])}
        total.add(result)
    return total


def check_pictures(folder: Path | None, args: dict) -> tuple[list[torch.Tensor], str]:
    """Pictures to compare on, float32 `[3, H, W]` from 0 to 1, of two sizes at least, and a text
    on where they are from; `args` are those of the training."""
    if folder is not None:
        pictures, source = read_some(folder), f"pictures of {folder}"
        if not pictures:
            raise UserError(f"--check-images {folder}: there is no picture that can be read")
    else:
        folder = validation_folder(args)
        pictures, source = read_some(folder) if folder else [], f"validation pictures of {folder}"
    if not pictures:
        pictures = [made_up_picture(n) for n in range(6)]
        source = "made-up pictures, as the validation pictures are gone (see --check-images)"
    if len({image.shape for image in pictures}) == 1:  # or other sizes would not be tried
        smaller = interpolate(pictures[0][None], scale_factor=(0.8, 0.6), mode="bilinear")[0]
        pictures.append(smaller)
    return pictures, source


def read_some(folder: Path) -> list[torch.Tensor]:
    """Pictures from all over a folder; those that cannot be read are named and left out."""
    files, pictures = coco_utils.image_files(folder), []
    chosen = sorted({round(x) for x in np.linspace(0, len(files) - 1, MOST_PICTURES)})
    for file in [files[i] for i in chosen] if files else []:
        try:
            image = coco_utils.read_upright(file)
        except DataError as error:
            utils.log(f"left out: {error}")
            continue
        if max(image.shape[1:]) > 50 * min(image.shape[1:]):  # one side might be resized to nothing
            utils.log(f"left out: {file} is too narrow to compare on")
            continue
        pictures.append(image.float() / 255)
    return pictures


def validation_folder(args: dict) -> Path | None:
    """Where the training had its validation pictures, if they are still there."""
    given = [args[key] and Path(args[key]) for key in ("val_annotations", "val_images")]
    try:
        return coco_utils.find_split(Path(args["data_path"]), "val", *given).images
    except DataError:
        return None


def made_up_picture(seed: int) -> torch.Tensor:
    """Bright rectangles on noise, float32 `[3, H, W]` from 0 to 1, of a size that varies."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 240 + 40 * (seed % 3), 320 - 40 * (seed % 2)
    image = 0.3 * torch.rand(3, height, width, generator=generator)
    for _ in range(6):
        y, x, h, w = (torch.rand(4, generator=generator) * 0.5 * height).int().tolist()
        image[:, y : y + h + 20, x : x + w + 20] = torch.rand(3, 1, 1, generator=generator)
    return image


# ------------------------------------------------------------------------------- safetensors


def write_safetensors(args: argparse.Namespace, saved: dict, file: Path) -> str:
    """Write the weights and compare; returns a line on them or raises CheckError."""
    (safetensors,) = need("safetensors.torch")
    weights = {name: tensor.contiguous() for name, tensor in saved["model"].items()}
    # Its own way to write a file makes one that nobody else may read.
    file.write_bytes(safetensors.save(weights, {"format": "pt", **facts(saved)}))
    loaded = safetensors.load_file(str(file))
    model = models.from_checkpoint({**saved, "model": loaded}, stock=True)  # which loads strictly
    same = model.state_dict()
    wrong = [name for name, tensor in weights.items() if not torch.equal(same[name], tensor)]
    if wrong or same.keys() - weights.keys():
        raise CheckError(f"{', '.join(wrong[:3])} differ after loading")
    return f"{len(loaded)} tensors, loaded into torchvision's own class bit for bit"


WRITERS = {".onnx": write_onnx, ".safetensors": write_safetensors}


# ------------------------------------------------------------------------------------ the run


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    need(*{".onnx": ("onnx", "onnxruntime"), ".safetensors": ("safetensors",)}[args.output.suffix])
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
    except CheckError as error:
        raise CheckError(f"{args.output} was not written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    utils.log(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, {checked}")


def run_and_exit() -> None:
    """Run `main`; say in one message why it failed."""
    try:
        main()
    except (UserError, DataError) as error:
        give_up(str(error), 2)
    except CheckError as error:
        give_up(str(error), 1)
    except KeyboardInterrupt:
        give_up("interrupted, nothing was written", 1)
    except Exception as error:
        traceback.print_exc()
        give_up(f"{type(error).__name__}: {error}", 1)


def give_up(message: str, exit_code: int) -> None:
    print(f"export.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    run_and_exit()
