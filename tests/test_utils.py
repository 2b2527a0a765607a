import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import utils


def test_without_torchrun_the_helpers_answer_for_one_process():
    assert (utils.rank(), utils.world_size(), utils.local_rank()) == (0, 1, 0)
    rows = np.ones((3, 7))
    assert utils.gather_rows(rows) is rows
    assert utils.gather_objects("a") == ["a"]
    assert utils.all_reduce(torch.tensor(3)).item() == 3
    assert utils.run_on_rank_0(lambda: 5) == 5
    assert utils.wrap_ddp(torch.nn.Linear(1, 1), True) is None
    with utils.first_on_each_machine():
        utils.barrier()


def test_each_image_of_each_step_has_a_seed_of_its_own():
    seeds = {utils.draw_seed(*key) for key in np.ndindex(3, 50, 16)}
    assert len(seeds) == 3 * 50 * 16


def test_seeds_stay_the_same_over_versions():
    """Else a resumed training would draw other numbers than the one before."""
    assert utils.draw_seed(1, 2, 3) == 12997252459554536576


def test_processes_seed_their_shares_of_one_global_batch(monkeypatch):
    whole, shares, draws = utils.seed_step(7, 5, 4), [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        torch.rand(3)  # whatever was drawn before
        shares += utils.seed_step(7, 5, 2)
        draws.append(torch.rand(()).item())
    assert shares == whole
    assert draws[0] != draws[1]


def test_metrics_are_lines_of_json_that_others_can_read(tmp_path):
    metrics = utils.MetricsFile(tmp_path)
    metrics.write("train", step=1, loss=0.5)
    metrics.write("eval", AP=None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0].startswith('{"kind": "train"')
    assert [json.loads(line) for line in lines][1] == {"kind": "eval", "AP": None}
    with pytest.raises(ValueError, match="Out of range"):
        metrics.write("train", loss=float("nan"))


def test_metrics_are_told_to_a_listener(tmp_path):
    told = []
    utils.MetricsFile(tmp_path, lambda *line: told.append(line)).write("train", step=1)
    assert told == [("train", {"step": 1})]


def test_last_line_of_the_metrics_that_a_crash_cut_is_left_out(tmp_path, capsys):
    utils.MetricsFile(tmp_path).write("train", step=1)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"kind": "train", "lo')
    utils.MetricsFile(tmp_path).write("train", step=2)
    assert f"{file}: the last line was cut" in capsys.readouterr().out
    assert file.read_text() == whole + '{"kind": "train", "step": 2}\n'


def test_progress_counts_steps_and_tells_waiting_from_working(capsys):
    def slow():
        for n in range(3):
            time.sleep(0.05)
            yield n

    progress, laps = utils.Progress(slow(), 5, 2, "epoch 0"), []
    for _ in progress:
        progress.show("loss 1.0", "a 0.5")
        laps.append(progress.lap())
    assert [steps for steps, _, _ in laps] == [1, 1, 1]
    assert all(0 < waited <= seconds for _, seconds, waited in laps)
    assert progress.waited >= 0.15
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 0 [3/5]  loss 1.0  epoch eta 0:00:0")
    assert lines[-1].startswith("epoch 0 [5/5]")
    assert lines[-1].endswith("(a 0.5)")


def test_only_rank_0_speaks(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    utils.log("hello")
    utils.MetricsFile(tmp_path).write("train", step=1)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_peak_memory_is_what_the_system_counts_in_mebibytes():
    found = utils.peak_memory(torch.device("cpu"))
    (counted,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found == pytest.approx(int(counted) / 1024, abs=2)
