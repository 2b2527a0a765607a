"""Distributed helpers, seeding, logging, `metrics.jsonl` and progress.

Without torchrun every helper returns the single-process answer, so callers never check whether the
run is distributed.
"""

import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
    """Return the rank of this process over all machines; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes over all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also its CUDA device's number."""
    return int(os.environ.get("LOCAL_RANK", 0))


DistError = dist.DistError
_store = None


def message_store() -> dist.Store | None:
    """Return the store for messages that also works when collectives fail; None if alone."""
    return _store


def init_distributed(
    device: torch.device, init_method: str = "env://", timeout_minutes: float = 10
) -> None:
    """Join the process group, if there are several: NCCL for CUDA tensors, Gloo for CPU ones."""
    global _store
    if world_size() == 1:
        return
    timeout = timedelta(minutes=timeout_minutes)
    _store, _, _ = next(dist.rendezvous(init_method, rank(), world_size(), timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives its processes: after a restart it would still hold the addresses
        # of the dead ones. (On several machines the launcher creates a new store each time.)
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
    """Wait until every process has reached this point."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Run the body in the first process of each machine, then in the others (for downloads)."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def start_max(value: int) -> Callable[[], int]:
    """Start to find the maximum over all processes; return a function that waits for it."""
    if not dist.is_initialized():
        return lambda: value
    tensor = torch.tensor(int(value))
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)

    def wait() -> int:
        work.wait()
        return int(tensor)

    return wait


def gather_numbers(numbers: torch.Tensor) -> list[list[float]]:
    """Return `numbers` `[N]` of every process in the order of ranks; one wait for the device."""
    if not dist.is_initialized():
        return [numbers.tolist()]
    gathered = [torch.empty_like(numbers) for _ in range(world_size())]
    dist.all_gather(gathered, numbers)
    return torch.stack(gathered).tolist()


def gather_objects(value: object) -> list:
    """Return the `value` of every process in the order of ranks, on every process; pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank_0(function: Callable[[], object]) -> object:
    """Call `function` on rank 0; return its result, or raise its exception, on every process."""
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
    """Concatenate the rows `[N, C]` of every process on rank 0; return None on the others."""
    if not dist.is_initialized():
        return rows
    shares = [None] * world_size() if rank() == 0 else None
    dist.gather_object(rows, shares)
    return np.concatenate(shares) if shares else None


def wrap_ddp(model: torch.nn.Module, sync_buffers: bool) -> torch.nn.Module | None:
    """Wrap the model in DistributedDataParallel; return None if there is only one process.

    Args:
        model: A model on the device of this process.
        sync_buffers: Whether to broadcast rank 0's buffers in every step, which trainable norms
            need.
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
    """Return a context in which DDP averages gradients, or, if not `enabled`, only adds them up."""
    return nullcontext() if enabled or world_size() == 1 else model.no_sync()


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Copy rank 0's running statistics of BatchNorm, which differ by process, to every process."""
    # Frozen norms are not written: CUDA graphs that have folded them would have to be made anew.
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if dist.is_initialized():
        for buffer in (buffer for norm in norms for buffer in norm.buffers()):
            dist.broadcast(buffer, src=0)


# ------------------------------------------------------------------------------------ seeding


def draw_seed(seed: int, step: int, image: int) -> int:
    """Derive the seed of what the model draws for an image in a step.

    Args:
        seed: The seed of the run.
        step: The step, counted over the whole training.
        image: The position of the image in the global batch, so that the seed does not depend on
            the number of processes or micro-batches.
    """
    return int(np.random.SeedSequence((seed, step, image)).generate_state(1, np.uint64)[0])


def seed_step(seed: int, step: int, images: int) -> list[int]:
    """Return the `draw_seed` of each image of this process, and seed PyTorch with the first.

    The global generator serves the models that do not use the seeds of images.
    """
    first = rank() * images
    seeds = [draw_seed(seed, step, first + n) for n in range(images)]
    torch.manual_seed(seeds[0])
    return seeds


# ------------------------------------------------------------------------ logging and progress


def log(message: str = "") -> None:
    """Print a line on rank 0, above the progress bar if there is one."""
    if rank() == 0 and sys.stdout is not None:
        try:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # a closed pipe or terminal must not end a training
            sys.stdout = None


def log_everywhere(message: str) -> None:
    """Print a line on any rank, on others than 0 with its number."""
    if rank() == 0:
        log(message)
    elif sys.stdout is not None:
        print(f"rank {rank()}: {message}", flush=True)


def log_field(label: str, text: object) -> None:
    """Log a line of the setup; the texts are aligned."""
    log(f"{label:<11}{text}")


class MetricsFile:
    """Appends to `metrics.jsonl`, on rank 0: one JSON object per line, with "kind" first.

    `listener(kind, values)` is called for each line, too.
    """

    def __init__(self, output_dir: Path, listener: Callable[[str, dict], None] | None = None):
        self.path = output_dir / "metrics.jsonl"
        self.listener = listener
        if rank() == 0 and self.path.exists():
            self._remove_incomplete_line()

    def _remove_incomplete_line(self) -> None:
        with self.path.open("r+b") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                file.truncate(end)
                log(f"{self.path}: removed the last line, which a crash had left incomplete")

    def write(self, kind: str, **values) -> None:
        """Append a line and flush it."""
        if rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
            if self.listener:
                self.listener(kind, values)


class Progress:
    """Iterates over batches with a progress bar (on a terminal), and measures time.

    Attributes:
        batch: The current batch; None while the next one is being loaded.
        done: The number of steps up to the current one, with those before a resume.
        total: The number of steps of the epoch.
        waited: The seconds spent on waiting for data.
    """

    SLOW_STEP = 30.0  # seconds after which a step is reported to be still running
    BAR = "{desc}  {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"

    def __init__(self, batches: Iterable, total: int, done: int, label: str):
        self.batches = batches
        self.label = label
        self.total = total
        self.done = self.first = done
        self.batch = None
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            bar_format=self.BAR,
            dynamic_ncols=True,
            leave=False,
            disable=rank() != 0 or not sys.stderr.isatty(),
        )
        self.start = time.perf_counter()
        self.waited = 0.0
        self._last_lap = (self.start, self.first, self.waited)
        self._ended = threading.Event()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def steps(self) -> int:
        """The number of steps up to the current one, without those before a resume."""
        return self.done - self.first

    def lap(self) -> tuple[int, float, float]:
        """Return the steps, seconds and seconds of waiting since the last call."""
        now = (time.perf_counter(), self.done, self.waited)
        seconds, steps, waited = (a - b for a, b in zip(now, self._last_lap, strict=True))
        self._last_lap = now
        return steps, seconds, waited

    def __iter__(self) -> Iterator:
        iterator = iter(self.batches)
        if rank() == 0:  # after the workers were forked, which threads would not survive
            threading.Thread(target=self._report_slow_steps, daemon=True).start()
        try:
            while True:
                loading_since = time.perf_counter()
                self.batch = None
                self.batch = next(iterator, None)
                if self.batch is None:
                    return
                self.waited += time.perf_counter() - loading_since
                self.done += 1
                yield self.batch
                self.bar.update()
        finally:
            self._ended.set()
            with suppress(OSError):  # the terminal may be closed
                self.bar.close()

    def _report_slow_steps(self) -> None:
        """Log that a step is still running, from `SLOW_STEP` on each time its age has doubled."""
        current = None
        while not self._ended.wait(timeout=self.SLOW_STEP / 10):
            if current != (self.done, self.batch is None):
                current = (self.done, self.batch is None)
                since, limit = time.perf_counter(), self.SLOW_STEP
            elif time.perf_counter() - since >= limit:
                limit *= 2
                age = f"{time.perf_counter() - since:.0f} s"
                if self.batch is None:
                    log(f"{self.label}  {self.position()}  has waited {age} for data")
                else:
                    log(f"{self.label}  {self.position()}  is still running after {age}")

    def position(self) -> str:
        """Return the current step and the number of steps, aligned, such as " 7/97"."""
        return f"{self.done:{len(str(self.total))}}/{self.total}"

    def show(self, text: str) -> None:
        """Show `text` on the bar; without a bar, log it with position and time left."""
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        eta = timedelta(seconds=round(self.seconds / self.steps * (self.total - self.done)))
        log(f"{self.label}  {self.position()}  {text}  eta {eta}")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in MiB: of the CUDA device, or resident on a CPU.

    None if it cannot be measured (Windows without CUDA, Apple GPUs).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if resource is None or device.type == "mps":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak >> 10
