"""Monitor the training loop without synchronizing it: losses, skipped steps, out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import utils
from internals import failures
from internals.devices import precise_dtype
from internals.errors import RunError


class StepMonitor:
    """Averages losses, finds the first non-finite one, and counts skipped steps, on the device.

    The GradScaler skips a step for infinite float16 gradients. Single skipped steps are normal, as
    it adapts its scale; many in a row are an error. Use the monitor as a context manager, in which
    the steps of `optimizer` are counted. Only `check` and `read` wait for the device, once.
    """

    NEVER = 2.0**52  # larger than any step, and exact, as is a step up to 2**24 in float32
    TOO_MANY = 10

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.dtype = precise_dtype(device)
        self.first_bad = torch.full((1,), self.NEVER, dtype=self.dtype, device=device)
        self.skipped, self.in_a_row, self.most_in_a_row = torch.zeros(3, 1, device=device)
        self.total, self.count, self.image_ids = 0, 0, {}

    def __enter__(self) -> "StepMonitor":
        self._hook = self.optimizer.register_step_pre_hook(self._count_skipped)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()

    def add(self, losses: dict[str, torch.Tensor], step: int, image_ids: list[int]) -> None:
        """Add the losses of a step, or of one of its micro-batches."""
        values = torch.stack([loss.detach().to(self.dtype) for loss in losses.values()])
        finite = torch.isfinite(values.sum().float()).to(self.dtype)
        self.first_bad = self.first_bad.minimum(finite * self.NEVER + step)
        self.image_ids[step] = image_ids
        self.names = [loss_name(name) for name in losses]
        self.total, self.count = self.total + values, self.count + 1
        if values.device.type == "cpu":  # no wait on a CPU: check before the optimizer step
            self.check()

    def _count_skipped(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Set by the GradScaler for fused optimizers, which skip on the device.
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self.skipped += found
            self.in_a_row.add_(1).mul_(found)
            torch.maximum(self.most_in_a_row, self.in_a_row, out=self.most_in_a_row)

    def check(self) -> None:
        """Raise RunError on every process if a loss of any of them was NaN or infinite."""
        self._raise_if_not_finite([first for (first,) in utils.gather_numbers(self.first_bad)])

    def _raise_if_not_finite(self, first_bad: list[float]) -> None:
        first = min(first_bad)
        if first >= self.NEVER:
            return
        at = " and ".join(
            f"images {ids} on rank {rank}"
            for rank, ids in enumerate(utils.gather_objects(self.image_ids.get(first)))
            if first_bad[rank] == first
        )
        raise RunError(
            f"the loss of step {first + 1:.0f} is not finite: {at}. Nothing was saved since the "
            "last checkpoint. Check these images and their boxes, lower --lr, raise "
            "--warmup-steps, or use --clip-grad-norm"
        )

    def read(self, step: int) -> tuple[dict[str, float], int]:
        """Check, and return what happened since the last read.

        Returns:
            The averages of the losses over steps and processes, with "loss", their sum, as the
            first; and the number of skipped steps up to `step`.

        Raises:
            RunError: A loss was not finite, or too many steps in a row were skipped.
        """
        skips = (self.skipped.to(self.dtype), self.most_in_a_row.to(self.dtype))
        counts = [self.first_bad, *skips]
        rows = utils.gather_numbers(torch.cat([*counts, self.total / self.count]))
        self._raise_if_not_finite([first_bad for first_bad, *_ in rows])
        _, skipped, most, *_ = rows[utils.rank()]
        if most >= self.TOO_MANY:
            raise RunError(
                f"the gradients of {most:.0f} steps in a row, up to step {step}, were infinite in "
                "float16: lower --lr, or use --amp-dtype bfloat16, or remove --amp"
            )
        means = [sum(values) / len(rows) for values in list(zip(*rows, strict=True))[3:]]
        losses = dict(zip(self.names, means, strict=True))
        self.skipped.zero_()
        self.total, self.count, self.image_ids = 0, 0, {}
        return {"loss": sum(means), **losses}, int(skipped)


def loss_name(name: str) -> str:
    """Return the name of a loss term with the prefix "loss_", which only Faster R-CNN's have."""
    return f"loss_{name.removeprefix('loss_')}"


@contextmanager
def explain_oom(progress: utils.Progress, batch_flag: str) -> Iterator[None]:
    """Turn an out-of-memory error into a RunError that lists the images of the batch."""
    try:
        yield
    except Exception as error:
        in_worker = failures.RAISED_IN_WORKER in str(error)
        if progress.batch is None or in_worker or not failures.is_out_of_memory(error):
            raise
        batch = progress.batch
        shapes = ", ".join(
            f"{width} x {height} with {boxes} boxes"
            for (height, width), boxes in zip(batch.sizes, batch.box_counts, strict=True)
        )
        raise RunError(
            f"out of memory in {progress.label}, step {progress.done} of {progress.total}, with "
            f"{len(batch)} images, before resizing {shapes}: lower {batch_flag}, or --min-size "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
