import json
import multiprocessing
import sys
import time

import numpy as np
import pytest
import torch

import utils
from internals import preemption


def test_without_torchrun_the_helpers_answer_for_one_process():
    assert (utils.rank(), utils.world_size(), utils.local_rank()) == (0, 1, 0)
    rows = np.ones((3, 7))
    assert utils.gather_rows(rows) is rows
    assert utils.gather_objects("a") == ["a"]
    assert utils.all_reduce(torch.tensor(3)).item() == 3
    with utils.first_on_each_machine():
        utils.barrier()


@pytest.mark.skipif(sys.platform != "linux", reason="others cannot fork safely")
def test_loading_processes_are_forked_whatever_python_would_do():
    before = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("forkserver", force=True)
        preemption.use_forked_workers()
        assert multiprocessing.get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_each_image_of_each_step_has_a_seed_of_its_own():
    seeds = {utils.draw_seed(*key) for key in np.ndindex(3, 50, 16)}
    assert len(seeds) == 3 * 50 * 16
    assert utils.draw_seed(1, 2, 3) == utils.draw_seed(1, 2, 3)


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


def test_peak_memory_is_in_mebibytes():
    assert 50 < utils.peak_memory(torch.device("cpu")) < 100_000


def test_errors_that_only_say_that_another_process_is_gone():
    for text in (
        "[/a/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer",
        "Application timeout caused pair closure",
        "Timed out waiting 6000ms for send operation to complete",
    ):
        assert utils.lost_connection(RuntimeError(text))
    assert not utils.lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not utils.lost_connection(ValueError("timed out"))
