"""Fault injection: make a training fail on purpose. Python imports this file when it starts.

With this folder in PYTHONPATH and FAULT=kind@point:rank:step in the environment, the process of
that rank fails at that point. Kinds: `kill` and `term` (signals to the process itself), `hang`,
`raise`, `full` (disk full), and `nan` and `huge` for losses. Points: `step` and `loss` (forward
pass in training), `evaluation` (forward pass of a batch, counted from 0), `writing`, `flushed` and
`renamed` (a checkpoint is half written, not yet renamed, just renamed; the step is ignored). The
step may be `all`. A process that torchrun has restarted does not fail again.
"""

import errno
import io
import os
import re
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def install(spec: str) -> None:
    """Patch the recipe, which must be importable, so that it fails as `spec` specifies."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return
    kind, point, rank, step = re.split("[@:]", spec)
    if rank != os.environ.get("RANK", "0"):
        return
    if point == "writing":
        _patch_save(kind)
    elif point in ("flushed", "renamed"):
        _patch_replace(kind, point)
    else:
        _patch_model(kind, point, step)


def fail(kind: str) -> None:
    if kind == "raise":
        raise OverflowError("injected fault")
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "hang":
        time.sleep(1e6)
    os.kill(os.getpid(), signal.SIGTERM if kind == "term" else signal.SIGKILL)


def _patch_save(kind: str) -> None:
    import torch

    save = torch.save

    def save_half_and_fail(state, file, **kwargs):
        if not str(getattr(file, "name", "")).endswith(".partial"):  # not a checkpoint
            return save(state, file, **kwargs)
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        return fail(kind)

    torch.save = save_half_and_fail


def _patch_replace(kind: str, point: str) -> None:
    replace = os.replace
    failed = []

    def replace_and_fail(source, target):
        due = re.fullmatch(r"checkpoint_\d+\.pth", Path(target).name) and not failed
        if due:
            failed.append(point)
        if due and point == "flushed":
            fail(kind)
        replace(source, target)
        if due and point == "renamed":
            fail(kind)

    os.replace = replace_and_fail


def _patch_model(kind: str, point: str, step: str) -> None:
    import models
    import utils

    now = {"step": None, "batch": -1}
    seed_step = utils.seed_step
    build_model = models.build_model

    def note_step(seed, step, images):
        now.update(step=step, batch=-1)
        return seed_step(seed, step, images)

    def fail_before_forward(model, args):
        if not model.training:
            now["batch"] += 1
        here = ("step", now["step"]) if model.training else ("evaluation", now["batch"])
        if point == here[0] and step in (str(here[1]), "all"):
            fail(kind)

    def spoil_losses(model, args, output):
        if point == "loss" and model.training and step in (str(now["step"]), "all"):
            factor = {"nan": float("nan"), "huge": 1e37}[kind]
            return {name: loss * factor for name, loss in output.items()}
        return None

    def build_with_hooks(*args, **kwargs):
        model = build_model(*args, **kwargs)
        model.register_forward_pre_hook(fail_before_forward)
        model.register_forward_hook(spoil_losses)
        return model

    utils.seed_step = note_step
    models.build_model = build_with_hooks


if "FAULT" in os.environ and any(Path(a).name == "train.py" for a in sys.orig_argv):
    sys.path.insert(0, str(ROOT))
    try:
        if os.environ["FAULT"]:
            install(os.environ["FAULT"])
    finally:
        sys.path.remove(str(ROOT))
