"""Processes (rank, world size, collectives), seeding, and what a run writes down as it goes.

Without torchrun every helper gives the answer of a single process, so callers never ask whether
the run is distributed.
"""

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

# ---------------------------------------------------------------------------------- processes


def rank() -> int:
    """This process's number over all machines, from torchrun's environment; 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes over all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its own machine, which is also the number of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0))


DistError = dist.DistError
_store = None


def message_store() -> dist.Store | None:
    """Where processes leave messages for each other, even when collectives fail; None if alone."""
    return _store


def init_distributed(
    device: torch.device, init_method: str = "env://", timeout_minutes: float = 10
) -> None:
    """Join the other processes, if there are any: NCCL for CUDA tensors, Gloo for the others."""
    global _store
    if world_size() == 1:
        return
    timeout = timedelta(minutes=timeout_minutes)
    _store, _, _ = next(dist.rendezvous(init_method, rank(), world_size(), timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's own store outlives its processes: one that is started again must not find the
        # addresses of the dead. (On several machines the launcher makes it a new store each time.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = dist.PrefixStore(f"attempt {attempt}", _store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=_store, rank=rank(), world_size=world_size(), timeout=timeout
    )


def cleanup_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Run the body in the first process of each machine, then in its others (for downloads)."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """`tensor` reduced in place over all processes by "sum", "min" or "max"."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()))
    return tensor


def gather_objects(value: object) -> list:
    """The `value` of every process in the order of ranks, on every process. For small things."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank_0(function: Callable[[], object]) -> object:
    """What `function` returns in rank 0, in every process; what it raises is raised in all."""
    result = error = None
    if rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    if dist.is_initialized():
        box = [result, error]
        dist.broadcast_object_list(box, src=0)
        if rank() != 0:
            result, error = box
    if error is not None:
        raise error
    return result


def gather_rows(rows: np.ndarray) -> np.ndarray | None:
    """The rows of every process, `[sum of N, C]`, on rank 0; None on the others."""
    if not dist.is_initialized():
        return rows
    parts = [None] * world_size() if rank() == 0 else None
    dist.gather_object(rows, parts)
    return np.concatenate(parts) if parts else None


def wrap_ddp(model: torch.nn.Module, sync_buffers: bool) -> torch.nn.Module | None:
    """The model wrapped for DDP, None where there is only one process.

    `sync_buffers` sends rank 0's buffers to the others in every step, which norms need that train.
    """
    if world_size() == 1:
        return None
    device = next(model.parameters()).device
    # The option has another name since torch 2.13.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{name: sync_buffers},
    )


def ddp_sync(model: torch.nn.Module, enabled: bool):
    """A context in which DDP averages gradients over the processes; if not, they add up in each."""
    return nullcontext() if enabled or world_size() == 1 else model.no_sync()


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every process rank 0's buffers: BatchNorm's running statistics differ by process."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


# ------------------------------------------------------------------------------------ seeding


def draw_seed(seed: int, step: int, image: int) -> int:
    """What the model draws for an image in a step is a function of these three and nothing else.

    `image` is its position in the global batch, so that neither the number of processes nor
    the size of what goes through the model at once matters.
    """
    return int(np.random.SeedSequence((seed, step, image)).generate_state(1, np.uint64)[0])


def seed_step(seed: int, step: int, images: int) -> list[int]:
    """The `draw_seed` of each of this process's images in a step.

    What a model draws by other means comes from the first of them.
    """
    first = rank() * images
    seeds = [draw_seed(seed, step, first + n) for n in range(images)]
    torch.manual_seed(seeds[0])
    return seeds


# ------------------------------------------------------------------- what a run says of itself


def log(message: str = "") -> None:
    """Print a line, on rank 0 only, without tearing a progress bar apart."""
    if rank() == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, "kind" first; written by rank 0, flushed a line.

    `listener(kind, values)` is told the same, there.
    """

    def __init__(self, output_dir: Path, listener: Callable[[str, dict], None] | None = None):
        self.path, self.listener = output_dir / "metrics.jsonl", listener
        if rank() == 0 and self.path.exists():
            self._mend()

    def _mend(self) -> None:
        """Cut off a last line that a crash left unfinished."""
        with self.path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
                log(f"{self.path}: the last line was cut by a crash and is left out")

    def write(self, kind: str, **values) -> None:
        if rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
            if self.listener:
                self.listener(kind, values)


class Progress:
    """Iterates over `batches`, with a progress bar on a terminal; keeps the time.

    `total` is the number of steps, `done` how many of them lie behind; `batch` is the current one;
    `seconds` is the time since the beginning, `waited` how much of it went into waiting for data.
    """

    def __init__(self, batches: Iterable, total: int, done: int, label: str):
        self.batches, self.done, self.total, self.label = batches, done, total, label
        self.batch = None
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=rank() != 0 or not sys.stderr.isatty(),
        )
        self.begin, self.first, self.waited = time.perf_counter(), done, 0.0
        self._lap = (self.begin, self.first, self.waited)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def steps(self) -> int:
        """Those taken here, without those that were done before."""
        return self.done - self.first

    def lap(self) -> tuple[int, float, float]:
        """Steps, seconds, and seconds of waiting since the last lap."""
        now = (time.perf_counter(), self.done, self.waited)
        seconds, steps, waited = (a - b for a, b in zip(now, self._lap, strict=True))
        self._lap = now
        return steps, seconds, waited

    def __iter__(self) -> Iterator:
        iterator = iter(self.batches)
        try:
            while True:
                asked, self.batch = time.perf_counter(), None
                self.batch = next(iterator, None)
                if self.batch is None:
                    return
                self.waited += time.perf_counter() - asked
                self.done += 1
                yield self.batch
                self.bar.update()
        finally:
            self.bar.close()

    def show(self, text: str, details: str) -> None:
        """Put `text` on the bar, or print it as a line with position, time left and `details`."""
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        left = self.seconds / self.steps * (self.total - self.done)
        width = len(str(self.total))
        position = f"[{self.done:{width}}/{self.total}]"
        eta = timedelta(seconds=round(left))
        log(f"{self.label} {position}  {text}  epoch eta {eta}  ({details})")


def peak_memory(device: torch.device) -> int | None:
    """The most memory this process has held, in MiB: on the CUDA device, or resident on a CPU.

    None where the system does not tell (Windows without CUDA).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak >> 10
