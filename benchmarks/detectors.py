"""The two ways to train that the benchmarks compare: torchvision's model in a loop like that of its
references, and this project's model in this project's loop. Weights and batches are the same."""

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

import coco_utils
import engine
import internals.fast
import models
import utils
from internals.devices import choose_device
from internals.mixed_precision import resolve_precision
from internals.train_state import TrainState

NAME = "fasterrcnn_resnet50_fpn"
# What `ours` can be measured without, to see what each brings.
PARTS = ("folded norms", "box pool", "channels_last", "fused optimizer", "memory settings")


def without(part: str | None) -> None:
    """Switch a part of what makes this project fast off, in this process."""
    if part == "folded norms":
        internals.fast.fold_frozen_norms = lambda module: None
    elif part == "box pool":
        internals.fast.CpuRoIAlign.forward = internals.fast.MultiScaleRoIAlign.forward
    elif part == "channels_last":
        nn.Module.to = _ignoring_layout(nn.Module.to)


def _ignoring_layout(to):
    return lambda self, *args, memory_format=None, **kwargs: to(self, *args, **kwargs)


def build(ours: bool, size: int, num_classes: int, frozen: bool, state: dict | None) -> nn.Module:
    """The detector, its norms frozen or not, at torchvision's sizes in proportion to `size`."""
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


def random_weights(size: int, num_classes: int, images: list[torch.Tensor]) -> dict:
    """A state_dict whose norms hold the statistics of these images, as those of a trained one do.

    A random network with frozen norms would otherwise double its numbers in every block.
    """
    torch.manual_seed(0)
    model = build(False, size, num_classes, frozen=False, state=None).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.backbone(model.transform(images)[0].tensors)
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


class Batches:
    """Batches that are made already, as a loader of `engine.train_one_epoch`."""

    def __init__(self, batches: list):
        self.batches = self.batch_sampler = batches

    def __iter__(self):
        return iter(self.batches)


def make_optimizer(model: nn.Module, ours: bool, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4, fused=ours or None)


def run_ours(model, batches, optimizer, device, amp_dtype, seed=0, factor=None, clip=None) -> list:
    """The losses of the steps that are logged, through this project's loop."""
    lr, losses = optimizer.param_groups[0]["lr"], []
    state = TrainState(
        model, optimizer, lambda step: lr * (factor(step) if factor else 1.0), amp_dtype
    )
    args = argparse.Namespace(
        seed=seed, accumulate_steps=1, clip_grad_norm=clip, print_freq=1 if factor else 20
    )
    engine.train_one_epoch(
        state,
        Batches(batches),
        args,
        last_step=len(batches),
        log_step=lambda state, progress, averages, *_: losses.append(averages["loss"]),
        on_step_end=lambda step, check: None,  # nothing to save
    )
    return losses


def run_stock(model, batches, optimizer, device, amp_dtype, seed=0, factor=None, clip=None) -> list:
    """The same in a plain loop: images as float from the start, every loss read in every step."""
    model.train()
    lr, losses = optimizer.param_groups[0]["lr"], []
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    for step, (images, targets) in enumerate(batches):
        utils.seed_step(seed, step, len(images))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor(step) if factor else lr
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            parts = model(images, targets)
            loss = sum(parts.values())
        losses.append(sum(part.item() for part in parts.values()))
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss of step {step} is {loss.item()}")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return losses


def as_ours(batch: tuple[list, list]) -> tuple:
    """uint8 images and targets of tensors as `coco_utils.collate` makes a batch of them."""
    return coco_utils.collate(list(zip(*batch, strict=True)))


def as_stock(batch: tuple[list, list]) -> tuple[list, list]:
    """The same as torchvision's references have them: float images, and targets of tensors."""
    images, targets = batch
    keep = ("boxes", "labels")
    return [image / 255 for image in images], [{k: t[k] for k in keep} for t in targets]


# ------------------------------------------------------------------------------------- counting


class Operators(TorchDispatchMode):
    """Counts operators, and those whose answer the host has to wait for, whatever the device.

    A CPU's own reads, such as drawing a size to resize to, are among them. `constants` counts the
    tensors that are made of Python's numbers, each of which may be a copy to the device.
    """

    # Numbers, and tensors of a length that only the device knows.
    READS = ("_local_scalar_dense", "nonzero", "nms", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.total, self.constants, self.reads = 0, 0, {}

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
def synchronisations(device: torch.device):
    """Yields a list that holds, at the end, one entry for each time CUDA made the host wait."""
    seen = []
    if device.type != "cuda":
        yield seen
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen += [w for w in caught if "synchroniz" in str(w.message)]


def profile(run, device: torch.device) -> dict:
    """Where a step's time goes: the ten operators, or CUDA kernels, that take most of it.

    `profile` has rows of name, milliseconds and calls; `kernels` is how many were launched on
    CUDA, None on a CPU.
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
    rows = [[event.key[:70], getattr(event, key) / 1000, event.count] for event in events[:10]]
    kernels = sum(event.count for event in events if getattr(event, key)) if cuda else None
    return {"profile": rows, "kernels": kernels}


def read_weights(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def picture_batch(rng: np.random.Generator, count: int, shape: tuple, classes: int) -> tuple:
    """Images uint8 `[3, H, W]`, smooth with some grain, and targets with about seven boxes each."""
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
                "labels": torch.from_numpy(rng.integers(1, classes, boxes)),
                "image_id": n,
            }
        )
    return images, targets


def device_and_type(precision: str) -> tuple[torch.device, torch.dtype | None]:
    device = choose_device(None)
    return device, resolve_precision(device, precision == "amp", None)[0]


def say(figures: dict) -> None:
    print(json.dumps(figures))
