import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import checkpoint
from internals.errors import CheckpointError, RunError

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


def save(folder: Path, step: int, **kwargs) -> Path:
    return checkpoint.save(folder, {**STATE, "step": step}, **kwargs)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_saved_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path, STATE)
    assert path.name == "checkpoint_00000012.pth"
    for name in (path, tmp_path / "checkpoint.pth"):
        loaded = checkpoint.load(name)
        assert torch.equal(loaded.pop("model")["w"], STATE["model"]["w"])
        assert loaded.pop("format") == checkpoint.FORMAT
        buffer = loaded["optimizer"]["state"][0]["momentum_buffer"]
        assert torch.equal(buffer, torch.ones(2))
        assert loaded["args"] == STATE["args"]
    assert names(tmp_path) == {"checkpoint_00000012.pth", "checkpoint.pth"}


def test_the_newest_are_kept_and_the_best(tmp_path):
    for step in range(1, 9):
        path = save(tmp_path, step, keep=3)
        if step == 2:
            checkpoint.save_best(path)
    assert [path.name[-5] for path in checkpoint.numbered(tmp_path)] == ["8", "7", "6"]
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 2
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 8
    # the names of one file do not take room twice
    assert (tmp_path / checkpoint.NEWEST).samefile(checkpoint.numbered(tmp_path)[0])


def test_a_run_that_begins_an_epoch_anew_keeps_its_own(tmp_path):
    for step in (7, 8, 9, 5, 6):
        path = save(tmp_path, step)
        assert checkpoint.newest(tmp_path)[0] == path
    assert [p.name[-5] for p in checkpoint.numbered(tmp_path)] == ["6", "5"]


def test_what_an_evaluation_adds_leaves_the_weights_as_they_were_saved(tmp_path):
    weights = torch.arange(4.0)
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.begin({**STATE, "model": {"w": weights}})
    writer.amend({"best_AP": 0.5, "epoch": 4}, best=True)
    weights.zero_()  # training goes on
    writer.finish()
    assert writer.waited > 0
    for name in (checkpoint.NEWEST, checkpoint.BEST, "checkpoint_00000012.pth"):
        loaded = checkpoint.load(tmp_path / name)
        assert (loaded["best_AP"], loaded["epoch"], loaded["step"]) == (0.5, 4, 12)
        assert loaded["model"]["w"].tolist() == [0, 1, 2, 3]
    writer.begin({**STATE, "step": 13})
    writer.amend({"best_AP": 0.6}, best=False)
    writer.begin({**STATE, "step": 14})  # waits for it
    writer.finish()
    assert checkpoint.load(tmp_path / "checkpoint_00000013.pth")["best_AP"] == 0.6
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 12


def test_what_could_not_be_added_is_told_by_the_next_save(tmp_path, monkeypatch):
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.begin(STATE)
    writer.finish()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    writer.amend({"best_AP": 0.5}, best=True)
    with pytest.raises(RunError, match="No space left"):
        writer.begin({**STATE, "step": 13})
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path)[1]["best_AP"] == 0.25


def test_without_hard_links_the_names_are_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save_best(save(tmp_path, 1))
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 1
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 2


DIES = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch, checkpoint, utils
folder, point = Path(sys.argv[1]), sys.argv[2]
if point == "writing":
    def half(state, file):
        file.write(b"PK half of it" * 1000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half
else:
    os.environ["FAULT"] = f"kill@{{point}}:0:0"
test_checkpoint.save(folder, 3)
"""


@pytest.mark.parametrize(("point", "step"), [("writing", 2), ("flushed", 2), ("renamed", 3)])
def test_killed_at_any_point_of_a_save_the_newest_whole_one_loads(tmp_path, point, step):
    for before in (1, 2):
        save(tmp_path, before)
    code = DIES.format(root=str(ROOT), tests=str(ROOT / "tests"))
    died = subprocess.run([sys.executable, "-c", code, tmp_path, point], check=False)
    assert died.returncode == -signal.SIGKILL
    path, state, passed_over = checkpoint.newest(tmp_path)
    assert state["step"] == step
    assert path == checkpoint.numbered(tmp_path)[0]
    assert not passed_over
    assert len(checkpoint.numbered(tmp_path)) == (3 if point == "renamed" else 2)
    save(tmp_path, 4)  # and what was left over is gone
    assert names(tmp_path) == {
        "checkpoint.pth",
        *(f"checkpoint_0000000{s}.pth" for s in (4, step)),
    }


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_a_cut_checkpoint_is_passed_over(tmp_path, share):
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint.numbered(tmp_path)[0]
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    path, state, (message,) = checkpoint.newest(tmp_path)
    assert state["step"] == 1
    assert path.name == "checkpoint_00000001.pth"
    assert message.startswith(f"{newest} ")
    # it is out of the way, but not gone
    assert newest.with_name(newest.name + ".damaged").exists()
    assert checkpoint.numbered(tmp_path) == [path]


def test_a_flipped_byte_of_a_tensor_is_noticed_by_its_checksum(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint.numbered(tmp_path)[0]
    with zipfile.ZipFile(newest) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
    content = bytearray(newest.read_bytes())
    content[content.index(STATE["model"]["w"].numpy().tobytes()) + 6] ^= 1
    newest.write_bytes(bytes(content))
    assert torch.load(newest, weights_only=True)["step"] == 2  # torch does not notice
    _, state, (message,) = checkpoint.newest(tmp_path)
    assert state["step"] == 1
    assert f"the checksum of {tensors[0].filename} does not match" in message


def test_no_flipped_byte_changes_what_is_loaded(tmp_path):
    path = save(tmp_path, 1)
    content, refused = path.read_bytes(), 0
    for at in range(0, len(content), 13):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            state = checkpoint.load(path)
        except CheckpointError:
            refused += 1
        else:  # it was padding
            assert torch.equal(state["model"]["w"], STATE["model"]["w"])
            assert state["args"] == STATE["args"]
    assert refused > 20


def test_damaged_checkpoints_alone_are_not_a_new_beginning(tmp_path):
    for step in (1, 2):
        save(tmp_path, step).write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match="none of the checkpoints") as caught:
        checkpoint.newest(tmp_path)
    for step in (1, 2):
        assert f"checkpoint_0000000{step}.pth " in str(caught.value)
    assert len(checkpoint.numbered(tmp_path)) == 2
    assert checkpoint.newest(tmp_path / "empty") is None


def test_a_copy_of_the_newest_alone_is_enough(tmp_path):
    content = (save(tmp_path, 7).parent / checkpoint.NEWEST).read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoint.pth").write_bytes(content)
    path, state, _ = checkpoint.newest(tmp_path / "other")
    assert (path.name, state["step"]) == ("checkpoint.pth", 7)


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_on_a_full_disk_the_ones_before_stay(tmp_path):
    save(tmp_path, 1)
    code = f"""
import resource, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import checkpoint, test_checkpoint, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
state = {{**test_checkpoint.STATE, "model": {{"w": torch.ones(10000)}}, "step": 2}}
try:
    checkpoint.save(Path(sys.argv[1]), state)
except RunError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"checkpoint not saved: {tmp_path}")
    assert checkpoint.newest(tmp_path)[1]["step"] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(RunError, match="No such file or directory"):
        save(tmp_path / "gone", 1)


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
    assert not Path("/tmp/this-file-must-not-appear").exists()
