"""Processes (rank, world size, collectives), seeding, and what a run writes down as it goes.

Without torchrun every helper gives the answer of a single process, so callers never ask whether
the run is distributed.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
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


def start_processes(device: torch.device, init_method: str = "env://") -> None:
    """Join the other processes, if there are any: NCCL for CUDA tensors, Gloo for the others."""
    if world_size() == 1:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(minutes=30),
    )


def stop_processes() -> None:
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


def gather_rows(rows: np.ndarray) -> np.ndarray | None:
    """The rows of every process, float64 `[sum of N, C]`, on rank 0; None on the others."""
    if not dist.is_initialized():
        return rows
    lengths = gather_objects(len(rows))
    padded = torch.zeros(max(lengths), rows.shape[1], dtype=torch.float64)
    padded[: len(rows)] = torch.from_numpy(rows)
    gathered = [torch.empty_like(padded) for _ in lengths] if rank() == 0 else None
    dist.gather(padded, gathered)
    if gathered is None:
        return None
    return np.concatenate([part[:n].numpy() for part, n in zip(gathered, lengths, strict=True)])


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process rank 0's buffers: BatchNorm's running statistics differ by process."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


# ------------------------------------------------------------------------------------ seeding


def seed_step(seed: int, step: int) -> None:
    """Make what the model draws in this step a function of (seed, step, rank) and nothing else."""
    state = np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


# ------------------------------------------------------------------- what a run says of itself


def log(message: str = "") -> None:
    """Print a line, on rank 0 only, without tearing a progress bar apart."""
    if rank() == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, "kind" first; written by rank 0, flushed a line."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / "metrics.jsonl"

    def write(self, kind: str, **values) -> None:
        if rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")


class Progress:
    """Iterates over `batches`, with a progress bar on a terminal; keeps the time.

    `total` is the number of steps, `done` how many of them lie behind; `seconds` is the time since
    the beginning, `waited` how much of it went into waiting for the next batch.
    """

    def __init__(self, batches: Iterable, total: int, done: int, label: str):
        self.batches, self.done, self.total, self.label = batches, done, total, label
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
                asked = time.perf_counter()
                batch = next(iterator, None)
                if batch is None:
                    return
                self.waited += time.perf_counter() - asked
                self.done += 1
                yield batch
                self.bar.update()
        finally:
            self.bar.close()

    def show(self, text: str, details: str) -> None:
        """Put `text` on the bar, or print it as a line with position, time left and `details`."""
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        left = self.seconds / (self.done - self.first) * (self.total - self.done)
        width = len(str(self.total))
        position = f"[{self.done:{width}}/{self.total}]"
        log(f"{self.label} {position}  {text}  eta {timedelta(seconds=round(left))}  ({details})")


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
