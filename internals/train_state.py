"""What a training changes as it goes, and what a checkpoint holds of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import utils


@dataclass
class TrainState:
    """A training in progress.

    `learning_rate(step)` is the rate of a step; `amp_dtype` is the type of autocast, None for
    float32; `epoch` and `step` are those to go on with, counted from 0.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    amp_dtype: torch.dtype | None = None
    ema: AveragedModel | None = None
    epoch: int = 0
    step: int = 0
    best_AP: float | None = None
    evaluations_since_best: int = 0
    ddp_model: nn.Module | None = None  # what a step calls where there are several processes
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        enabled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate, and to load elsewhere: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def set_learning_rate(self) -> float:
        """Give the rate of the step to come to every parameter group; return it."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update_best(self, AP: float | None) -> bool:
        """Note what an evaluation found; return whether it is better than every one before."""
        best = AP is not None and (self.best_AP is None or self.best_AP < AP)
        if best:
            self.best_AP = AP
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        return best

    def should_stop_early(self, patience: int | None) -> bool:
        """Whether AP has not risen for `patience` evaluations (--early-stop-patience)."""
        waited = self.evaluations_since_best
        if not patience or waited < patience:
            return False
        utils.log(f"no better AP in {waited} evaluations (--early-stop-patience {patience}): done")
        return True

    def state_dict(self) -> dict:
        names = ("epoch", "step", "best_AP", "evaluations_since_best")
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
        """Restore all but the weights of `model`, which are loaded when it is built."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best_AP = state["epoch"], state["step"], state["best_AP"]
        self.evaluations_since_best = state.get("evaluations_since_best", 0)
        if self.ema and "raw_model" in state:
            self.ema.module.load_state_dict(state["model"])
            self.ema.n_averaged.fill_(self.step)  # 0 would make the next update a plain copy
