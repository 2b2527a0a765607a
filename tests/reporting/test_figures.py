import re

import matplotlib
import numpy as np
import pytest
from helpers import rewrite, split_of
from report_helpers import results_in, train_line, two_epochs, write_output

from reporting import figures
from reporting.analysis import RunHistory


def test_smoothing():
    assert figures.smooth(np.arange(3.0)).tolist() == [0, 1, 2]  # too few
    smooth = figures.smooth(np.array([0.0, 0, 0, 0, 9, 0, 0, 0, 0]))
    assert smooth == pytest.approx([0, 0, 0, 3, 3, 3, 0, 0, 0])


def test_figures_of_long_run_are_small_and_keep_peaks():
    steps = [train_line(step, lr=0.02 + 0.01 * (step == 12_345)) for step in range(1, 20_001)]
    svgs = figures.draw_figures(RunHistory(train=steps), None)
    assert max(map(len, svgs.values())) < 50_000
    assert "(logarithmic)" in svgs["loss"]
    line = re.search(r'<path d="([^"]+)"[^>]*stroke: var\(--c0\)', svgs["lr"])[1]
    assert (
        len(set(re.findall(r"[ML] \S+ (\S+)", line))) == 2
    )  # two heights: the constant rate and the peak


def test_null_values_are_skipped():
    empty = dict.fromkeys(("loss", "lr", "loss_classifier", "loss_box_reg"))
    evals = [{"epoch": None, "step": None, "AP": 0.5, "AP50": None}]
    history = RunHistory(train=[train_line(1, **empty), train_line(2, loss=None)], evals=evals)
    assert figures.draw_figures(history, None).keys() == {"loss_terms", "lr"}
    assert figures.draw_figures(RunHistory(train=[train_line(1, **empty)]), None) == {}


def test_names_in_legends_are_one_line(tiny, tmp_path):
    rewrite(split_of(tiny, "val"), lambda data: data["categories"][1].update(name="a\nb\x08"))
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    figure = figures.draw_figures(RunHistory(), results)["precision50"]
    assert re.search(r">\d\.\d\d a b</text>", figure)


def test_validation_loss_is_drawn():
    evals = [{"step": 4, "epoch": 0, "val_loss": {"loss": 0.7, "loss_classifier": 0.2}}]
    history = RunHistory(train=[train_line(step) for step in range(1, 5)], evals=evals)
    assert ">validation</text>" in figures.draw_figures(history, None)["loss"]
    history.evals = [{"step": 4, "epoch": 0}]
    assert ">validation</text>" not in figures.draw_figures(history, None)["loss"]


def test_matplotlib_settings_are_restored():
    before = dict(matplotlib.rcParams)
    figures.draw_figures(RunHistory(train=[train_line(1)]), None)
    assert dict(matplotlib.rcParams) == before
