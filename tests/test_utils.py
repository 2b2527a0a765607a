import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import utils


def test_distributed_helpers_without_torchrun():
    assert (utils.rank(), utils.world_size(), utils.local_rank()) == (0, 1, 0)
    rows = np.ones((3, 7))
    assert utils.gather_rows(rows) is rows
    assert utils.gather_objects("a") == ["a"]
    assert utils.start_max(3)() == 3
    assert utils.gather_numbers(torch.tensor([1.0, 2.0])) == [[1.0, 2.0]]
    assert utils.run_on_rank_0(lambda: 5) == 5
    assert utils.wrap_ddp(torch.nn.Linear(1, 1), True) is None
    with utils.first_on_each_machine():
        utils.barrier()


def test_seeds_are_distinct():
    seeds = {utils.draw_seed(*key) for key in np.ndindex(3, 50, 16)}
    assert len(seeds) == 3 * 50 * 16


def test_draw_seed_is_stable():
    """A resumed training must draw the same numbers with a newer version."""
    assert utils.draw_seed(1, 2, 3) == 12997252459554536576


def test_seed_step_covers_global_batch(monkeypatch):
    expected = utils.seed_step(7, 5, 4)
    shares, draws = [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        torch.rand(3)  # earlier draws must not matter
        shares += utils.seed_step(7, 5, 2)
        draws.append(torch.rand(()).item())
    assert shares == expected
    assert draws[0] != draws[1]


def test_metrics_file_has_strict_json_lines(tmp_path):
    metrics = utils.MetricsFile(tmp_path)
    metrics.write("train", step=1, loss=0.5)
    metrics.write("eval", AP=None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0].startswith('{"kind": "train"')
    assert [json.loads(line) for line in lines][1] == {"kind": "eval", "AP": None}
    with pytest.raises(ValueError, match="Out of range"):
        metrics.write("train", loss=float("nan"))


def test_metrics_file_calls_listener(tmp_path):
    lines = []
    utils.MetricsFile(tmp_path, lambda *line: lines.append(line)).write("train", step=1)
    assert lines == [("train", {"step": 1})]


def test_truncated_last_line_is_removed(tmp_path, capsys):
    utils.MetricsFile(tmp_path).write("train", step=1)
    file = tmp_path / "metrics.jsonl"
    content = file.read_text()
    file.write_text(content + '{"kind": "train", "lo')
    utils.MetricsFile(tmp_path).write("train", step=2)
    assert f"{file}: removed the last line" in capsys.readouterr().out
    assert file.read_text() == content + '{"kind": "train", "step": 2}\n'


def test_progress_measures_steps_and_waiting(capsys):
    def slow():
        for n in range(3):
            time.sleep(0.05)
            yield n

    progress, laps = utils.Progress(slow(), 5, 2, "epoch 0"), []
    for _ in progress:
        progress.show("loss 1.0")
        laps.append(progress.lap())
    assert [steps for steps, _, _ in laps] == [1, 1, 1]
    assert all(0 < waited <= seconds for _, seconds, waited in laps)
    assert progress.waited >= 0.15
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 0  3/5  loss 1.0  eta 0:00:0")
    assert lines[-1] == "epoch 0  5/5  loss 1.0  eta 0:00:00"


def test_slow_step_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(utils.Progress, "SLOW_STEP", 0.1)

    def batches():
        yield "fast"
        time.sleep(0.5)
        yield "late"

    for _ in utils.Progress(batches(), 2, 0, "epoch 0"):
        pass
    for _ in utils.Progress(["slow"], 1, 0, "epoch 1"):
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    waiting = [
        line for line in lines if re.fullmatch(r"epoch 0  1/2  has waited \d+ s for data", line)
    ]
    running = [line for line in lines if line.startswith("epoch 1  1/1  is still running after ")]
    assert waiting
    assert running
    assert len(lines) == len(waiting) + len(running) <= 6  # their distance doubles


def test_log_survives_closed_pipe(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    utils.log("nobody reads this")
    assert sys.stdout is None
    utils.log("nor this")


def test_only_rank_0_logs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    utils.log("hello")
    utils.MetricsFile(tmp_path).write("train", step=1)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_peak_memory_matches_proc_status():
    peak = utils.peak_memory(torch.device("cpu"))
    (counted,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak == pytest.approx(int(counted) / 1024, abs=2)
