"""Run a training step and evaluations on a simulated Apple GPU, and list what would go wrong.

    python tests/simulated_mps.py fasterrcnn_resnet50_fpn retinanet_resnet50_fpn

Tensors say that they are on "mps:0", while their values are on the CPU (see simulated_cuda.py). The
losses must be those on a CPU. The backward pass and the optimizer, which need a real device, run on
the CPU, for their operators.

Prints, as JSON, for each model the problems: float64 tensors on the device, copies that are not
blocking or pinned, feature maps with channels last, views as another type, and operators without a
kernel for the device, which are known from PyTorch's list of operators. "careless" are those of the
first model without what the project does for the device.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import simulated_cuda
import torch
import torchgen
import yaml
from simulated_cuda import CLASSES, SIZE, Count, Loader, OnCuda, call_site, make_batch
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.ops import MultiScaleRoIAlign

import engine
import models
from coco_utils import Categories
from internals import monitoring
from internals.devices import use_contiguous_format
from internals.fast import FastRoIAlign
from internals.train_state import MovingAverage

DEVICE = torch.device("mps:0")
# Of torchvision 0.29: csrc/ops/mps.
TORCHVISION = ("nms", "roi_align", "_roi_align_backward")
# A kernel for one of these runs on every device.
GENERIC = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "MPS")


@cache
def operators_of_mps() -> set[str]:
    """Return the names of PyTorch's operators that run on Apple GPUs."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    rows = {row["func"].split("(")[0]: row for row in yaml.safe_load(file.read_text())}

    def runs(name: str) -> bool:
        row = rows[name]
        if "structured_delegate" in row:
            return runs(row["structured_delegate"])
        kernels = ",".join(row.get("dispatch", {"CompositeImplicitAutograd": ""}))
        return any(kind in kernels for kind in GENERIC)

    return {name for name in rows if runs(name)}


def missing(func) -> str | None:
    """Return the name of an operator that has no kernel for the device, else None."""
    namespace, _, name = func.name().partition("::")
    if name.startswith("_record_function"):  # for profilers
        return None
    known = TORCHVISION if namespace == "torchvision" else operators_of_mps()
    return None if name in known else f"no operator {name}"


class Watch(Count):
    """Collects problems on the simulated device."""

    def __init__(self):
        super().__init__()
        self.problems = set()

    def add(self, problem: str | None) -> None:
        if problem:
            self.problems.add(f"{problem} at {call_site()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, OnCuda)]
        name = func.overloadpacket.__name__
        if outputs or any(isinstance(x, OnCuda) for x in inputs):
            self.add(missing(func))
        if any(x.dtype == torch.float64 for x in outputs):
            self.add("float64")
        if kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)):
            self.add("not blocking")
        if kwargs.get("pin_memory"):
            self.add("pinned")
        if func is torch.ops.aten.view.dtype and outputs:
            self.add("view as another type")
        formats = [suggest_memory_format(x) for x in inputs if x.dim() == 4]  # as the operator does
        if name == "convolution" and torch.channels_last in formats:
            self.add("channels last")
        return result


class Operators(TorchDispatchMode):
    """Collects the operators that have no kernel for the device."""

    def __init__(self):
        super().__init__()
        self.problems = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.problems |= {missing(func)} - {None}
        return func(*args, **(kwargs or {}))


def simulate_mps() -> None:
    """Let PyTorch and the project believe that there is an Apple GPU."""
    simulated_cuda.DEVICE = str(DEVICE)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.Tensor.backward = lambda loss: None
    # These ask for the device itself, which this PyTorch does not have.
    OnCuda.__getitem__ = lambda tensor, index: OnCuda(tensor.inner[values(index)])
    OnCuda.__setitem__ = set_item
    OnCuda.copy_ = copy_
    OnCuda.__float__ = lambda tensor: float(tensor.inner)
    OnCuda.__int__ = lambda tensor: int(tensor.inner)
    OnCuda.__bool__ = lambda tensor: bool(tensor.inner)


def values(index):
    return tree_map(lambda x: x.inner if isinstance(x, OnCuda) else x, index)


def set_item(tensor, index, value) -> None:
    with torch.no_grad():
        tensor.inner[values(index)] = values(value)


def copy_(tensor, source, non_blocking=False):
    if non_blocking:
        Count.current.add("not blocking")
    with torch.no_grad():
        tensor.inner.copy_(values(source))
    return tensor


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {} if "ssd" in name else {"min_sizes": (SIZE,), "max_size": 2 * SIZE}
    return models.build_model(name, CLASSES, pretrained=None, **sizes)


def run_epoch(model, average, batches: list, watch: Count, backward: bool) -> None:
    """Train two steps with everything that reads or writes tensors, and log the second."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)
    if not backward:
        optimizer.step = lambda: None
    state = engine.TrainState(model, optimizer, lambda step: 1e-3, None, average)
    clip = 1.0 if backward else None
    args = argparse.Namespace(seed=0, accumulate_steps=2, clip_grad_norm=clip, print_freq=2)
    engine.train_one_epoch(
        state,
        Loader(batches, watch),
        args,
        last_step=2,
        log_step=lambda *_: None,
        on_step_end=lambda step, check: check(),
    )


def find_problems(name: str, careless: bool = False) -> list[str]:
    """Return what would go wrong in a step, an evaluation and a validation loss.

    With `careless`, the model and sums of losses are as on CUDA.
    """
    batches = [make_batch(2) for _ in range(2)]
    ids = tuple(range(1, CLASSES))
    categories = Categories(ids=ids, names=tuple(map(str, ids)), labels=ids)
    model = build(name)
    if careless:
        engine.precise_dtype = monitoring.precise_dtype = lambda device: torch.float64
    else:
        use_contiguous_format(model)
    average = MovingAverage(model, decay=0.9)
    expected = engine.validation_loss(model, Loader(batches, Count()), amp_dtype=None)
    simulated_cuda.move_to_cuda(model)
    simulated_cuda.move_to_cuda(average.module)
    with Watch() as watch, torch.no_grad():
        found = engine.validation_loss(model, Loader(batches, watch), amp_dtype=None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        run_epoch(model, average, batches, watch, backward=False)
        engine.detect.__wrapped__(model, Loader(batches, watch), categories, None)
    return sorted(watch.problems)


def find_missing_operators(name: str) -> list[str]:
    """Return the operators of steps with the backward pass that the device lacks."""
    FastRoIAlign.forward = MultiScaleRoIAlign.forward  # as on the device
    model = build(name)
    average = MovingAverage(model, decay=0.9)
    with Operators() as operators:
        run_epoch(model, average, [make_batch(2) for _ in range(2)], Count(), backward=True)
    return sorted(operators.problems)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: find_missing_operators(name) for name in sys.argv[1:]}
    simulate_mps()
    results = {name: row + find_problems(name) for name, row in results.items()}
    results["careless"] = find_problems(sys.argv[1], careless=True)
    print(json.dumps(results, indent=1))
