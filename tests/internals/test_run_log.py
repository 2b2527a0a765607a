"""What a run logs."""

import json
import types

import pytest
import torch

import utils
from internals import run_log

LOSSES = ("classifier", "box_reg", "objectness", "rpn_box_reg")


def make_state(step: int, epoch: int = 12) -> types.SimpleNamespace:
    return types.SimpleNamespace(step=step, epoch=epoch, device=torch.device("cpu"), best_AP=0.5)


def test_epoch_has_mean_losses_weighted_by_steps(tmp_path, capsys):
    log = run_log.StepLog(utils.MetricsFile(tmp_path), images_per_step=16)
    progress = utils.Progress(range(3), 3, 0, "epoch 12")
    for step in progress:
        if step == 0:
            continue
        value = 1.0 if step == 1 else 4.0  # means over two steps and one step
        log(make_state(step + 1), progress, {"loss": value, "loss_box_reg": value}, 0, 0.02)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1, 4]
    assert [line["skipped_steps"] for line in lines] == [0, 0]
    output = capsys.readouterr().out
    assert "epoch 12  48 images in 0:00:00" in output
    assert "  loss 2.000: box_reg 2.000\n" in output


def test_lines_fit_80_columns(tmp_path, capsys, monkeypatch):
    """As of COCO on one GPU."""
    monkeypatch.setattr(utils.time, "perf_counter", iter(range(10**9)).__next__)
    log = run_log.StepLog(utils.MetricsFile(tmp_path), images_per_step=2)
    progress = utils.Progress(range(58_633), 58_633, 58_630, "epoch 12")
    for _ in progress:
        losses = {"loss": 12.3456, **{f"loss_{name}": 12.3456 for name in LOSSES}}
        log(make_state(58_633), progress, losses, 0, 2e-5)
        if progress.done == progress.total:
            break
    run_log.log_best(make_state(58_633), 0.37, is_best=True)
    run_log.log_time_left(1_000_000, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 7
    assert max(map(len, lines)) <= 80


def test_decay_and_clipping_are_described():
    names = (
        "momentum",
        "weight_decay",
        "norm_weight_decay",
        "bias_weight_decay",
        "clip_grad_norm",
        "ema",
    )

    def describe(*values) -> str:
        return run_log.describe_decay(
            types.SimpleNamespace(**dict(zip(names, values, strict=True)))
        )

    text = describe(0.9, 1e-4, None, None, None, None)
    assert text == "momentum 0.9, weight decay 0.0001, no gradient clipping"
    text = describe(None, 0.1, 0.0, 0.0, 10.0, None)
    assert text == "weight decay 0.1 (norms 0, biases 0), gradients clipped to norm 10"
    assert "(norms 0.05)" in describe(None, 0.1, 0.05, None, None, None)
    assert describe(None, 0.1, 0.05, None, None, 0.999).endswith(
        "average of weights with decay 0.999"
    )


@pytest.mark.parametrize("is_best", [True, False])
def test_best_ap_is_logged(capsys, is_best):
    run_log.log_best(make_state(8, epoch=1), 0.25, is_best)
    expected = "the best so far" if is_best else "the best is 0.500"
    assert capsys.readouterr().out == f"epoch 1  AP 0.250, {expected}\n"
    run_log.log_best(make_state(8), None, is_best=True)
    assert "no AP, as there is no box to find" in capsys.readouterr().out


def test_commit_is_that_of_the_project():
    commit = run_log.find_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) >= 7


def test_other_precision_of_evaluation_is_logged(capsys):
    args = types.SimpleNamespace(resume="x.pth")
    saved = {"step": 8, "args": {"precision": "bfloat16"}}
    run_log.log_test_checkpoint(args, saved, torch.bfloat16)
    assert capsys.readouterr().out == "checkpoint x.pth, 8 steps\n"
    run_log.log_test_checkpoint(args, saved, None)
    assert "trained in bfloat16: for the same AP add --amp" in capsys.readouterr().out
    run_log.log_test_checkpoint(args, {"step": 8, "args": {}}, torch.bfloat16)
    assert "trained in float32: for the same AP remove --amp" in capsys.readouterr().out
