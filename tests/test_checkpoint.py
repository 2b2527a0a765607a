import pytest
import torch

import checkpoint
from checkpoint import CheckpointError

STATE = {
    "model": {"w": torch.arange(4.0)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    "scaler": {},
    "epoch": 3,
    "step": 12,
    "best_AP": 0.25,
    "categories": [{"id": 1, "name": "a", "label": 1}],
    "args": {"lr": 0.1, "weights": None},
}


def test_what_was_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pth", STATE)
    loaded = checkpoint.load(tmp_path / "checkpoint.pth")
    assert torch.equal(loaded.pop("model")["w"], STATE["model"]["w"])
    assert loaded.pop("format") == checkpoint.FORMAT
    buffer = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, torch.ones(2))
    assert loaded["args"] == STATE["args"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pth"
    checkpoint.save(file, STATE)

    def cut_short(state, stream):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(file, {**STATE, "step": 13})
    assert checkpoint.load(file)["step"] == 12


def test_the_best_stays_when_the_newest_changes(tmp_path):
    checkpoint.save(tmp_path / checkpoint.NEWEST, STATE)
    checkpoint.save_best(tmp_path)
    checkpoint.save(tmp_path / checkpoint.NEWEST, {**STATE, "step": 13})
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 12
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 13


class Harmful:
    def __reduce__(self):
        return (open, ("/tmp/this-file-must-not-appear", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "cannot be read"),
        (b"no checkpoint at all", "cannot be read"),
        ({"w": torch.ones(1)}, "not a checkpoint of this recipe .*--weights instead"),
        ([1, 2], "holds a list"),
        ({**STATE, "format": 99}, "format 99"),
        ({**STATE, "args": Harmful()}, "cannot be read"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, content, message):
    file = tmp_path / "x.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_truncated_checkpoint_is_refused(tmp_path):
    file = tmp_path / "checkpoint.pth"
    checkpoint.save(file, STATE)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth cannot be read"):
        checkpoint.load(file)
