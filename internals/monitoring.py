"""Monitor the training loop without synchronizing it: losses, skipped steps, out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import utils
from internals import failures
from internals.errors import RunError


class LossMeter:
    """Averages the losses over steps and processes, and records the first non-finite one.

    Losses are summed on the device; only `check` and `read` wait for it.
    """

    NEVER = 2**62

    def __init__(self, device: torch.device):
        self.first_bad = torch.full((), self.NEVER, dtype=torch.int64, device=device)
        self.total, self.count, self.image_ids = 0, 0, {}

    def add(self, losses: dict[str, torch.Tensor], step: int, image_ids: list[int]) -> None:
        """Add the losses of a step, or of one of its micro-batches."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        bad = torch.where(torch.isfinite(values.sum()), self.NEVER, step)
        self.first_bad = torch.minimum(self.first_bad, bad)
        self.image_ids[step] = image_ids
        self.names = [loss_name(name) for name in losses]
        self.total, self.count = self.total + values, self.count + 1
        if values.device.type == "cpu":  # no wait on a CPU: check before the optimizer step
            self.check()

    def check(self) -> None:
        """Raise RunError on every process if a loss of any of them was NaN or infinite."""
        mine = int(self.first_bad)
        first = int(utils.all_reduce(self.first_bad, "min"))
        if first < self.NEVER:
            mine = f"images {self.image_ids[first]}" if mine == first else None
            where = [f"{at} on rank {r}" for r, at in enumerate(utils.gather_objects(mine)) if at]
            raise RunError(
                f"the loss of step {first + 1} is not finite: {', '.join(where)}. Nothing was "
                "saved since the last checkpoint. Check these images and their boxes, lower --lr, "
                "raise --warmup-steps, or use --clip-grad-norm"
            )

    def read(self) -> dict[str, float]:
        """Check and return the averages since the last read; "loss", their sum, is the first."""
        self.check()
        mean = utils.all_reduce(self.total) / (self.count * utils.world_size())
        parts = dict(zip(self.names, mean.tolist(), strict=True))
        self.total, self.count, self.image_ids = 0, 0, {}
        return {"loss": sum(parts.values()), **parts}


def loss_name(name: str) -> str:
    """Return the name of a loss term with the prefix "loss_", which only Faster R-CNN's have."""
    return f"loss_{name.removeprefix('loss_')}"


class SkippedSteps:
    """Counts the steps that the GradScaler skips for infinite float16 gradients, on the device.

    Single skipped steps are normal, as the GradScaler adapts its scale; many in a row are an error.
    Use it as a context manager, in which the steps of `optimizer` are counted.
    """

    TOO_MANY = 10

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.total, self.in_a_row, self.most = torch.zeros(3, device=device).unbind()
        self.optimizer = optimizer

    def __enter__(self) -> "SkippedSteps":
        self._hook = self.optimizer.register_step_pre_hook(self._note)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()

    def _note(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Set by the GradScaler for fused optimizers, which skip on the device.
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self.total += found
            self.in_a_row.add_(1).mul_(found)
            torch.maximum(self.most, self.in_a_row, out=self.most)

    def read(self, step: int) -> int:
        """Return the number of steps skipped since the last read; waits for the device.

        Raises:
            RunError: Too many steps in a row were skipped.
        """
        total, most = int(self.total), int(self.most)
        if most >= self.TOO_MANY:
            raise RunError(
                f"the gradients of {most} steps in a row, up to step {step}, were infinite in "
                "float16: lower --lr, or use --amp-dtype bfloat16, or remove --amp"
            )
        self.total.zero_()
        return total


@contextmanager
def explain_oom(progress: utils.Progress, batch_flag: str) -> Iterator[None]:
    """Turn an out-of-memory error into a RunError that lists the images of the batch."""
    try:
        yield
    except Exception as error:
        if progress.batch is None or not failures.is_out_of_memory(error):
            raise
        images, targets = progress.batch
        shapes = ", ".join(
            f"{width} x {height} with {len(target['boxes'])} boxes"
            for (height, width), target in zip(images.sizes, targets, strict=True)
        )
        raise RunError(
            f"out of memory in {progress.label}, step {progress.done} of {progress.total}, with "
            f"{len(images)} images, before resizing {shapes}: lower {batch_flag}, or --min-size "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
