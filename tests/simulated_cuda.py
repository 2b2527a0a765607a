"""Count where a training step and an evaluation would wait for a CUDA device, without one.

    python tests/simulated_cuda.py fasterrcnn_resnet50_fpn fixed 2 4 16

The way is `fixed`, with tensors of fixed shape as on CUDA, `affine`, the same with trained scale
and bias of frozen norms, or `parts`, with torchvision's parts as on a CPU.

Tensors say that they are on "cuda:0", while their values are on the CPU. So each `device=` and
`.to(device)` does what it does on CUDA, and copies between host and device can be told from other
operators. What waits on CUDA is known from PyTorch's sources: copies that are not `non_blocking`,
operators whose result has a data-dependent shape, and reads of values. The backward pass is left
out, as autograd wants a real device: gradients are zeros.

Prints for each batch size, as JSON, the operators and the places that wait: in a step, in a step
that logs, and in a batch of an evaluation.
"""

import argparse
import collections
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import engine
import models
import utils
from coco_utils import Categories
from internals.batches import Batch
from internals.fast import FastFasterRCNN, plain_kernels, roi_heads, rpn
from internals.train_state import MovingAverage

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda:0"  # simulated_mps.py sets another one
CLASSES = 7
SIZE = 64
# Operators that read a value or have a result of data-dependent shape.
READS = ("_local_scalar_dense", "item", "equal", "is_nonzero")
DYNAMIC = ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "nms")


class OnCuda(torch.Tensor):
    """A tensor that says it is on cuda:0; `inner`, on the CPU, has its values."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        Count.current.add_wait("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_on_cpu(func, args, kwargs or {})


def on_device(device: torch.device | str) -> bool:
    return torch.device(device).type == torch.device(DEVICE).type


def run_on_cpu(func, args: tuple, kwargs: dict):
    """Run an operator on the values; the results are on the device that they would be on."""
    wrappers = {id(x.inner): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnCuda)}
    device = kwargs.get("device")
    is_cuda = on_device(device) if device is not None else bool(wrappers)

    def unwrap(x):
        if isinstance(x, OnCuda):
            return x.inner
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in wrappers:  # an operator in place
            return wrappers[id(x)]
        return OnCuda(x) if is_cuda else x

    args, kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default) and args[2]:
        args = (args[0].float(), args[1], False)  # a CPU cannot convert half precision meanwhile
    return tree_map(wrap, func(*args, **kwargs))


class Count(TorchDispatchMode):
    """Counts operators on the device, and where the host waits for them."""

    current: "Count"

    def __init__(self):
        super().__init__()
        self.reset()
        Count.current = self

    def reset(self) -> None:
        self.operators, self.waits = 0, collections.Counter()

    def pop(self) -> dict:
        """Return the counts since the last call."""
        result = {"operators": self.operators, "waits": dict(self.waits)}
        self.reset()
        return result

    def add_wait(self, what: str) -> None:
        self.waits[f"{what} at {call_site()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        wrapped = [isinstance(x, OnCuda) for x in tensors]
        device = kwargs.get("device")
        to_cuda = device is not None and on_device(device)
        self.operators += any(wrapped) or to_cuda
        name = func.overloadpacket.__name__
        if name == "_to_copy" and device is not None:
            if to_cuda != wrapped[0] and not kwargs.get("non_blocking"):
                self.add_wait("copy")
        elif name == "copy_" and wrapped[0] != wrapped[1]:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.add_wait("copy_")
        elif any(wrapped) and waits(name, args, kwargs, tensors):
            self.add_wait(name)
        return run_on_cpu(func, args, kwargs)


def waits(name: str, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> bool:
    """Check whether an operator on CUDA tensors waits for the device."""
    if name in READS or name in DYNAMIC:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if by_mask and (name == "index" or args[2].dim()):
            return True  # with a number it is a masked_fill
        if by_mask:
            return False
    # A number on the host is copied.
    scalars = [x for x in tensors if not isinstance(x, OnCuda) and x.dim() == 0]
    return bool(scalars) and name in ("where", "index_put", "index_put_", "_index_put_impl_")


def call_site() -> str:
    """Return the two innermost lines of the project or of torchvision."""
    found = []
    for frame in reversed(traceback.extract_stack()[:-1]):
        path = Path(frame.filename)
        ours = ROOT in path.parents and "site-packages" not in path.parts
        if (ours and path.parent != ROOT / "tests") or "torchvision" in path.parts:
            found.append(f"{path.name}:{frame.lineno}")
    return " < ".join(found[:2]) or "torch"


class Event:
    """A CUDA event; the host waits for it."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Count.current.add_wait("event")


def on_values(function):
    """Let a function of CPU tensors run on the values, as one operator: in place of a kernel."""

    def run(*args):
        Count.current.operators += 1
        inner = [x.inner if isinstance(x, OnCuda) else x for x in args]
        return tree_map(OnCuda, function(*inner))

    return run


def simulate_cuda() -> None:
    """Let PyTorch and the project believe that there is a CUDA device."""
    torch.cuda._lazy_init = lambda: None
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.Event = Event
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.Tensor.backward = lambda loss: None
    utils.peak_memory = lambda device: 0
    names = ("match", "nms")
    stand_in = SimpleNamespace(**{n: on_values(getattr(plain_kernels, n)) for n in names})
    rpn.kernels_for = roi_heads.kernels_for = lambda device: stand_in


def move_to_cuda(model: torch.nn.Module) -> None:
    """Move parameters and buffers."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = torch.nn.Parameter(OnCuda(parameter.data), parameter.requires_grad)
                moved.grad = OnCuda(torch.zeros_like(parameter)) if moved.requires_grad else None
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else OnCuda(buffer)


def make_batch(images: int) -> Batch:
    generator = torch.Generator().manual_seed(images)
    pixels, targets = [], []
    for n in range(images):
        pixels.append(torch.randint(0, 256, (3, SIZE, SIZE + 9), dtype=torch.uint8))
        corners = torch.rand(n % 5, 2, generator=generator) * SIZE / 2
        boxes = torch.cat([corners, corners + SIZE / 3], dim=1)
        targets.append({"boxes": boxes, "labels": torch.ones(n % 5).long(), "image_id": n})
    return Batch(pixels, targets)


class Loader(list):
    """Batches with the length of an epoch; at each the counts so far are appended to `counts`."""

    def __init__(self, batches: list[Batch], count: Count):
        super().__init__(batches)
        self.batch_sampler, self.counts, self.count = batches, [], count

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            self.counts.append(self.count.pop())


def count_waits(model_name: str, images: int, affine: bool) -> dict:
    """Count in three training steps and in four batches of an evaluation."""
    torch.manual_seed(0)
    options = {"min_sizes": (SIZE,), "max_size": 2 * SIZE, "train_norm_affine": affine}
    model = models.build_model(model_name, CLASSES, pretrained="detector", **options)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(300)  # for some detections
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 64  # for speed
    average = MovingAverage(model, decay=0.9)
    move_to_cuda(model)
    move_to_cuda(average.module)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)
    optimizer.zero_grad = lambda: None  # keep the gradients of zeros
    state = engine.TrainState(model, optimizer, lambda step: 1e-3, torch.float16, average)
    args = argparse.Namespace(seed=0, accumulate_steps=1, clip_grad_norm=1.0, print_freq=3)
    ids = tuple(range(1, CLASSES))
    categories = Categories(ids=ids, names=tuple(map(str, ids)), labels=ids)
    with Count() as count:
        training = Loader([make_batch(images) for _ in range(4)], count)
        engine.train_one_epoch(
            state,
            training,
            args,
            last_step=4,
            log_step=lambda *_: None,
            on_step_end=lambda step, check: None,
        )
        evaluation = Loader([make_batch(images) for _ in range(4)], count)
        with torch.no_grad():  # instead of inference_mode, which such tensors do not know
            detections, _ = engine.detect.__wrapped__(model, evaluation, categories, torch.float16)
    assert len(detections) > images
    _, step, log_step, *_ = training.counts
    # One batch behind: the third waits for the second.
    return {"step": step, "log step": log_step, "evaluation": evaluation.counts[2]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.random.seed(0)
    simulate_cuda()
    name, way, *sizes = sys.argv[1:]
    FastFasterRCNN.fixed_shapes = way != "parts"
    counts = {size: count_waits(name, int(size), way == "affine") for size in sizes}
    print(json.dumps(counts, indent=1))
