"""The two implementations that `step.py` and `gpu.py` compare.

`stock` is torchvision's model in a plain loop like that of its references, `ours` is this project's
model and loop. Both get the same weights and batches.
"""

import argparse
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import common  # noqa: F401, makes the project's modules importable
import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import internals.fast
import models
import utils
from internals.batches import Batch
from internals.devices import choose_device
from internals.mixed_precision import initialize_momentum, resolve_precision
from internals.train_state import TrainState

NAME = "fasterrcnn_resnet50_fpn"
# Optimizations of `ours` that can be disabled one by one, to measure the effect of each.
OPTIMIZATIONS = ("folded norms", "box pool", "channels_last", "fused optimizer", "memory settings")


def disable(optimization: str | None) -> None:
    """Disable an optimization in this process; the caller handles the last two of the list."""
    if optimization == "folded norms":
        internals.fast.fold_frozen_norms = lambda module: None
    elif optimization == "box pool":
        internals.fast.FastRoIAlign.forward = internals.fast.MultiScaleRoIAlign.forward
    elif optimization == "channels_last":
        nn.Module.to = _ignore_memory_format(nn.Module.to)


def _ignore_memory_format(to):
    return lambda self, *args, memory_format=None, **kwargs: to(self, *args, **kwargs)


def build_detector(
    ours: bool, size: int, num_classes: int, frozen: bool, state: dict | None
) -> nn.Module:
    """Build the detector, with frozen or trainable norms.

    Args:
        ours: Whether to build this project's model, else torchvision's.
        size: The shorter side of the images in pixels; the bound of the longer is in proportion.
        num_classes: Number of classes, background included.
        frozen: Whether the norms are frozen.
        state: The state_dict to load, None for random weights.
    """
    model = models.build_model(
        NAME,
        num_classes,
        pretrained="detector" if frozen else None,
        min_sizes=(size,),
        max_size=round(size * 1333 / 800),
        stock=not ours,
    )
    if state is not None:
        model.load_state_dict(state)
    return model


def make_random_weights(size: int, num_classes: int, images: list[torch.Tensor]) -> dict:
    """Make a random state_dict with norms that have the statistics of these images.

    Otherwise, the activations of a random network with frozen norms would double in every block.
    """
    torch.manual_seed(0)
    model = build_detector(False, size, num_classes, frozen=False, state=None).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.backbone(model.transform(images)[0].tensors)
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


class InMemoryLoader:
    """A loader of `engine.train_one_epoch` that holds its batches in memory."""

    def __init__(self, batches: list):
        self.batches = self.batch_sampler = batches

    def __iter__(self):
        return iter(self.batches)


def make_optimizer(model: nn.Module, fused: bool, lr: float) -> torch.optim.Optimizer:
    """Make the SGD of torchvision's references."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, weight_decay=1e-4, fused=True if fused else None
    )
    if fused:
        initialize_momentum(optimizer)
    return optimizer


def train_ours(model, optimizer, device: torch.device, amp_dtype, batches: list) -> None:
    """Train with this project's loop."""
    lr = optimizer.param_groups[0]["lr"]
    state = TrainState(model, optimizer, lambda step: lr, amp_dtype)
    args = argparse.Namespace(seed=0, accumulate_steps=1, clip_grad_norm=None, print_freq=20)
    engine.train_one_epoch(
        state,
        InMemoryLoader(batches),
        args,
        last_step=len(batches),
        log_step=lambda *_: None,
        on_step_end=lambda step, check: None,  # no checkpoints
    )


def train_stock(model, optimizer, device: torch.device, amp_dtype, batches: list) -> None:
    """Train with a plain loop, which reads the losses in every step."""
    model.train()
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    for step, (images, targets) in enumerate(batches):
        utils.seed_step(0, step, len(images))
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            loss_dict = model(images, targets)
            loss = sum(loss_dict.values())
        logged = [value.item() for value in (loss, *loss_dict.values())]
        if not math.isfinite(logged[0]):
            raise SystemExit(f"step {step}: the loss is {logged[0]}")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def collate_ours(batch: tuple[list, list]) -> Batch:
    """Pack uint8 images and their targets as `coco_utils.collate` does."""
    return Batch(*batch)


def collate_stock(batch: tuple[list, list]) -> tuple[list, list]:
    """Convert uint8 images and their targets to the float images and targets of the references."""
    images, targets = batch
    keep = ("boxes", "labels")
    return [image / 255 for image in images], [{k: t[k] for k in keep} for t in targets]


# ------------------------------------------------------------------------------------- counting


class OperatorCounter(TorchDispatchMode):
    """Counts operators, on any device.

    Attributes:
        total: All operators.
        reads: By kind, those with a result that the host reads, also of tensors on the CPU.
        constants: Tensors made from Python numbers; each may be a copy to the device.
    """

    # Scalars, and tensors with a length that depends on the data.
    READS = ("_local_scalar_dense", "nonzero", "nms", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.total = 0
        self.constants = 0
        self.reads = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        name = func.overloadpacket.__name__
        self.constants += name == "lift_fresh"
        if name in self.READS:
            self.reads[name] = self.reads.get(name, 0) + 1
        elif name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.reads["index by mask"] = self.reads.get("index by mask", 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def record_synchronizations(device: torch.device):
    """Yield a list, which gets one warning for each CUDA synchronization at the end."""
    synchronizations = []
    if device.type != "cuda":
        yield synchronizations
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield synchronizations
        finally:
            torch.cuda.set_sync_debug_mode("default")
            synchronizations += [w for w in caught if "synchroniz" in str(w.message)]


def profile(run, device: torch.device, rows: int = 10) -> dict:
    """Profile a call of `run`.

    Returns:
        `profile`: Name, milliseconds and calls of the slowest operators (on CUDA, kernels), as many
            as `rows`. `kernels`: Number of kernels launched on CUDA, None on a CPU.
    """
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(events, key=lambda event: getattr(event, key), reverse=True)
    slowest = [[event.key[:70], getattr(event, key) / 1000, event.count] for event in events[:rows]]
    kernels = sum(event.count for event in events if getattr(event, key)) if cuda else None
    return {"profile": slowest, "kernels": kernels}


def load_weights(file: Path) -> dict:
    """Load a state_dict."""
    return torch.load(file, weights_only=True)


def make_batch(rng: np.random.Generator, count: int, shape: tuple, num_classes: int) -> tuple:
    """Make smooth, slightly noisy images, uint8 `[3, H, W]`, and targets of about seven boxes."""
    height, width = shape
    images, targets = [], []
    for n in range(count):
        coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 15, 20))).float()
        smooth = nn.functional.interpolate(coarse, shape, mode="bicubic")[0]
        pixels = smooth + torch.from_numpy(rng.normal(0, 12, (3, *shape)))
        images.append(pixels.clamp(0, 255).to(torch.uint8))
        boxes = 1 + int(rng.poisson(6))
        sides = np.exp(rng.uniform(np.log(12), np.log(0.8 * min(shape)), (boxes, 2)))
        corner = rng.uniform(0, 1, (boxes, 2)) * (np.array([width, height]) - sides)
        targets.append(
            {
                "boxes": torch.from_numpy(np.hstack([corner, corner + sides])).float(),
                "labels": torch.from_numpy(rng.integers(1, num_classes, boxes)),
                "image_id": n,
            }
        )
    return images, targets


def choose_device_and_dtype(precision: str) -> tuple[torch.device, torch.dtype | None]:
    """Choose the device, and the type of autocast for "amp" or "float32" (None)."""
    device = choose_device(None)
    return device, resolve_precision(device, precision == "amp", None)[0]


def print_result(result: dict) -> None:
    """Print the result of an arm for `common.Arm.run`."""
    print(json.dumps(result))
