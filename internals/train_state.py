"""The state of a training, and its part of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """The exponential moving average of a model's parameters and buffers.

    PyTorch's `AveragedModel` copies its counter to the device in every step, and waits for it.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average after a step of `model`."""
        if self.n_averaged == 0:
            return super().update_parameters(model)
        by_dtype: dict[torch.dtype, tuple[list, list]] = {}
        for average, tensor in zip(_tensors(self.module), _tensors(model), strict=True):
            averages, tensors = by_dtype.setdefault(tensor.dtype, ([], []))
            averages.append(average)
            tensors.append(tensor)
        for averages, tensors in by_dtype.values():
            self.multi_avg_fn(averages, tensors, None)
        self.n_averaged += 1
        return None


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@dataclass
class TrainState:
    """The state of a training.

    Attributes:
        learning_rate: Returns the learning rate of a step.
        amp_dtype: The dtype of autocast, None for float32.
        epoch: The current epoch, counted from 0; advanced after its evaluation.
        step: The number of completed steps, which is the next step counted from 0.
        evaluated_step: The value of `step` at the last evaluation.
        ddp_model: `model` wrapped for several processes, None in a single one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    amp_dtype: torch.dtype | None = None
    ema: MovingAverage | None = None
    epoch: int = 0
    step: int = 0
    evaluated_step: int | None = None
    best_AP: float | None = None
    evaluations_since_best: int = 0
    ddp_model: nn.Module | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        enabled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and to save for inference: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def set_learning_rate(self) -> float:
        """Set the learning rate of the next step in every parameter group, and return it."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update_best(self, AP: float | None) -> bool:
        """Record the AP of an evaluation; return whether it is the best.

        Without ground truth, when AP is None, the newest is the best.
        """
        self.evaluated_step = self.step
        is_best = self.best_AP is None or (AP is not None and self.best_AP < AP)
        if is_best:
            self.best_AP = AP
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        return is_best

    def is_done(self, end: int) -> bool:
        """Check whether the training has reached step `end`, and was evaluated there."""
        return self.evaluated_step == self.step >= end

    def should_stop_early(self, patience: int | None) -> bool:
        """Check whether AP has not improved for `patience` evaluations (--early-stop-patience)."""
        return patience is not None and self.evaluations_since_best >= patience

    def state_dict(self) -> dict:
        """Return the training's part of a checkpoint."""
        names = ("epoch", "step", "evaluated_step", "best_AP", "evaluations_since_best")
        state = {
            "model": self.eval_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in names},
        }
        if self.ema:
            state["raw_model"] = self.model.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore everything except the weights of `model`, which are loaded when it is built.

        Settings of the optimizer, such as the weight decay, stay those of this run.
        """
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.evaluated_step = state.get("evaluated_step")
        self.best_AP = state["best_AP"]
        self.evaluations_since_best = state.get("evaluations_since_best", 0)
        if self.ema and "raw_model" in state:
            self.ema.module.load_state_dict(state["model"])
            self.ema.n_averaged.fill_(self.step)  # with 0 the next update would copy the model
