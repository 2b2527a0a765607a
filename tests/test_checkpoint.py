"""Atomic checkpoints, damaged checkpoints and resuming."""

import argparse
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_forked

import checkpoint
import engine
import models
import samplers
from internals.errors import CheckpointError, RunError, UserError

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


POSIX = pytest.mark.skipif(os.name != "posix", reason="forks, signals and limits of POSIX")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def steps_in(folder: Path) -> list[int]:
    return [int(path.stem.split("_")[1]) for path in checkpoint.list_numbered(folder)]


# ------------------------------------------------------------------------------------ writing


def test_save_and_load(tmp_path):
    path = checkpoint.save(tmp_path, STATE)
    assert path.name == "checkpoint_00000012.pth"
    for name in (path, tmp_path / "checkpoint.pth"):
        loaded = checkpoint.load(name)
        assert torch.equal(loaded.pop("model")["w"], STATE["model"]["w"])
        assert loaded.pop("format") == checkpoint.FORMAT
        buffer = loaded.pop("optimizer")["state"][0]["momentum_buffer"]
        assert torch.equal(buffer, torch.ones(2))
        assert loaded == {key: STATE[key] for key in loaded}
    assert names(tmp_path) == {"checkpoint_00000012.pth", "checkpoint.pth"}


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep=3, best=step == 2)
    assert steps_in(tmp_path) == [8, 7, 6]
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 2
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 8
    # a hard link, which takes no space
    assert (tmp_path / checkpoint.NEWEST).samefile(checkpoint.list_numbered(tmp_path)[0])


def test_saving_same_step_replaces_checkpoint(tmp_path):
    save(tmp_path, 4)
    checkpoint.save(tmp_path, {**STATE, "step": 4, "best_AP": 0.5}, best=True)
    for name in (checkpoint.NEWEST, checkpoint.BEST, "checkpoint_00000004.pth"):
        assert checkpoint.load(tmp_path / name)["best_AP"] == 0.5
    assert steps_in(tmp_path) == [4]


def test_restarted_epoch_prunes_discarded_steps(tmp_path):
    for step in (7, 8, 9, 5, 6):
        path = save(tmp_path, step)
        assert checkpoint.load_newest(tmp_path)[0] == path
    assert steps_in(tmp_path) == [6, 5]


def test_names_are_copies_without_hard_links(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", fail)
    save(tmp_path, 1, best=True)
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 1
    assert checkpoint.load(tmp_path / checkpoint.NEWEST)["step"] == 2


@POSIX
@pytest.mark.parametrize(("point", "step"), [("writing", 2), ("flushed", 2), ("renamed", 3)])
def test_kill_during_save(tmp_path, point, step):
    for saved in (1, 2):
        save(tmp_path, saved)
    killed = run_forked(save, tmp_path, 3, FAULT=f"kill@{point}:0:0")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert bool(list(tmp_path.glob("*.partial"))) == (point != "renamed")
    path, state, skipped = checkpoint.load_newest(tmp_path)
    assert state["step"] == step
    assert path == checkpoint.list_numbered(tmp_path)[0]
    assert not skipped
    assert steps_in(tmp_path) == ([3, 2, 1] if point == "renamed" else [2, 1])
    save(tmp_path, 4)  # also removes the partial file
    assert names(tmp_path) == {
        "checkpoint.pth",
        *(f"checkpoint_0000000{s}.pth" for s in (4, step)),
    }


def save_with_file_size_limit(folder: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        checkpoint.save(folder, {**STATE, "model": {"w": torch.ones(10_000)}, "step": 2})
    except RunError as error:
        print(error)


@POSIX
def test_full_disk_keeps_previous_checkpoints(tmp_path):
    save(tmp_path, 1)
    done = run_forked(save_with_file_size_limit, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/checkpoint_00000002.pth: checkpoint not saved: ")
    assert "continue with --resume auto" in done.stdout
    assert checkpoint.load_newest(tmp_path)[1]["step"] == 1
    assert names(tmp_path) == {"checkpoint_00000001.pth", "checkpoint.pth"}


def test_missing_folder_is_reported(tmp_path):
    with pytest.raises(
        RunError,
        match=r"missing/checkpoint_00000001.pth: checkpoint not saved: No such file or directory",
    ):
        save(tmp_path / "missing", 1)


# ------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_truncated_checkpoint_is_skipped(tmp_path, share):
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint.list_numbered(tmp_path)[0]
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    path, state, (message,) = checkpoint.load_newest(tmp_path)
    assert state["step"] == 1
    assert path.name == "checkpoint_00000001.pth"
    assert message.startswith(f"{newest} ")
    # renamed, not deleted
    assert newest.with_name(newest.name + ".damaged").exists()
    assert checkpoint.list_numbered(tmp_path) == [path]


def test_flipped_tensor_byte_fails_checksum(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint.list_numbered(tmp_path)[0]
    with zipfile.ZipFile(newest) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
    content = bytearray(newest.read_bytes())
    content[content.index(STATE["model"]["w"].numpy().tobytes()) + 6] ^= 1
    newest.write_bytes(bytes(content))
    assert torch.load(newest, weights_only=True)["step"] == 2  # torch does not notice
    _, state, (message,) = checkpoint.load_newest(tmp_path)
    assert state["step"] == 1
    assert f"the checksum of {tensors[0].filename} does not match" in message


def test_flipped_byte_never_changes_loaded_state(tmp_path):
    path = save(tmp_path, 1)
    content = path.read_bytes()
    rejected = 0
    for offset in range(0, len(content), 13):
        flipped = bytes([content[offset] ^ 0x10])
        path.write_bytes(content[:offset] + flipped + content[offset + 1 :])
        try:
            state = checkpoint.load(path)
        except CheckpointError:
            rejected += 1
        else:  # the byte was padding
            assert torch.equal(state["model"]["w"], STATE["model"]["w"])
            assert state["args"] == STATE["args"]
    assert rejected > 20


def test_only_damaged_checkpoints_is_an_error(tmp_path):
    for step in (1, 2):
        save(tmp_path, step).write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match="none of the checkpoints") as caught:
        checkpoint.load_newest(tmp_path)
    for step in (1, 2):
        assert f"checkpoint_0000000{step}.pth " in str(caught.value)
    assert steps_in(tmp_path) == [2, 1]
    assert checkpoint.load_newest(tmp_path / "empty") is None


def test_checkpoint_pth_alone_is_found(tmp_path):
    content = (save(tmp_path, 7).parent / checkpoint.NEWEST).read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoint.pth").write_bytes(content)
    path, state, _ = checkpoint.load_newest(tmp_path / "other")
    assert (path.name, state["step"]) == ("checkpoint.pth", 7)


class RunsCode:
    """An object whose unpickling would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "cannot be read"),
        (b"no checkpoint at all", "cannot be read: it is not a file of torch.save"),
        (b"hello", "cannot be read: it is not a file of torch.save"),
        ({"w.x": torch.ones(1)}, "not a checkpoint of this recipe .*use train.py --weights"),
        ({"model": {"w.x": torch.ones(1)}}, r"it has no args, .*use train.py --weights"),
        (
            {"model": {"w.x": torch.ones(1)}, "args": argparse.Namespace(lr=1)},
            "use train.py --weights",
        ),
        ({"state": {}, "param_groups": []}, "use a file that train.py saved in --output-dir"),
        ([1, 2], "holds a list"),
        ({**STATE, "format": 99}, "format 99"),
        ("runs code", "cannot be read"),
    ],
)
def test_other_files_are_rejected(tmp_path, content, message):
    file, created = tmp_path / "x.pth", tmp_path / "created"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "runs code":
        torch.save({**STATE, "args": RunsCode(created)}, file)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not created.exists()


# ----------------------------------------------------------------------------------- resuming


def resolve(folder: Path, resume: object = None, test_only: bool = False) -> int | None:
    """Return the step from which a run resumes, None for a new training."""
    flag = None if resume is None else str(resume)
    path, saved = checkpoint.resolve_resume(folder, flag, test_only)
    assert (path is None) == (saved is None)
    return None if saved is None else saved["step"]


def test_new_training_does_not_overwrite_checkpoints(tmp_path):
    assert resolve(tmp_path) is None
    save(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"checkpoint_00000003.pth belongs to another .*--resume auto"
    ):
        resolve(tmp_path)


def test_resume_auto_loads_newest_intact_checkpoint(tmp_path, capsys):
    assert resolve(tmp_path, "auto") is None
    assert f"no checkpoint in {tmp_path} yet, new training" in capsys.readouterr().out
    for step in (1, 2):
        path = save(tmp_path, step)
    assert resolve(tmp_path, "auto") == 2
    path.write_bytes(b"")
    assert resolve(tmp_path, "auto") == 1
    assert f"skipped a damaged checkpoint: {path} cannot be read" in capsys.readouterr().out
    for path in tmp_path.glob("checkpoint*.pth"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        resolve(tmp_path, "auto")


def test_resume_from_file(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    assert resolve(tmp_path, tmp_path / "checkpoint.pth") == 2
    assert resolve(tmp_path / "other", tmp_path / "checkpoint_00000001.pth") == 1
    older = tmp_path / "checkpoint_00000001.pth"
    with pytest.raises(
        UserError, match=r"has 1 steps, and .* would prune .*checkpoint_00000002.pth"
    ):
        resolve(tmp_path, older)
    with pytest.raises(CheckpointError, match=r"--resume .*missing.pth: no such file"):
        resolve(tmp_path, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"is a folder: use .*checkpoint.pth"):
        resolve(tmp_path, tmp_path)


def test_resume_from_file_does_not_overwrite_other_training(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    save(tmp_path / "a", 1)
    path = save(tmp_path / "b", 2)
    with pytest.raises(UserError, match=r"a/checkpoint_00000001.pth belongs to another training"):
        resolve(tmp_path / "a", path)


def test_torchrun_restart_resumes_without_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resolve(tmp_path) is None
    save(tmp_path, 3)
    assert resolve(tmp_path) == 3


def test_evaluation_does_not_overwrite_other_training(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, 3)
    assert resolve(tmp_path / "a", tmp_path / "a/checkpoint.pth", test_only=True) == 3
    assert resolve(tmp_path / "a", "auto", test_only=True) == 3
    assert resolve(tmp_path / "c", tmp_path / "b/checkpoint.pth", test_only=True) == 3
    for resume in (tmp_path / "b/checkpoint.pth", None):
        with pytest.raises(UserError, match=r"a/checkpoint_00000003.pth belongs to another"):
            resolve(tmp_path / "a", resume, test_only=True)
    with pytest.raises(UserError, match=r"no checkpoint in .*c to evaluate"):
        resolve(tmp_path / "c", "auto", test_only=True)


ARGS = {
    **dict.fromkeys(checkpoint.RESUME_INVARIANTS),
    **{"lr": 0.1, "steps_per_epoch": 10, "world_size": 1, "seed": 0, "global_batch": 4},
}


def test_optimizer_of_other_parameters_is_rejected():
    states = []
    for decays in ((0.1, None), (0.1, None, 0.0)):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(models.parameter_groups(model, *decays), lr=0.1)
        states.append(engine.TrainState(model, optimizer, lambda step: 0.1))
    saved = {**states[0].state_dict(), "args": ARGS}
    with pytest.raises(UserError, match=r"start from its weights, --weights x.pth"):
        checkpoint.restore(states[1], saved, ARGS, "x.pth", resume_anyway=True)


def restore(before: dict, now: dict, resume_anyway: bool = False) -> engine.TrainState:
    """Resume a run with the arguments `before` after two epochs and five steps."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = engine.TrainState(model, optimizer, lambda step: 0.1)
    progress = {"epoch": 2, "step": 25, "best_AP": 0.5}
    saved = {**state.state_dict(), **progress, "args": before}
    checkpoint.restore(state, saved, now, "x.pth", resume_anyway)
    return state


def test_restore_progress(capsys):
    state = restore(ARGS, ARGS)
    assert (state.epoch, state.step, state.best_AP) == (2, 25, 0.5)
    # arguments that an older checkpoint lacks are not compared
    older = {key: value for key, value in ARGS.items() if key != "ema"}
    assert restore(older, {**ARGS, "ema": 0.9}).step == 25
    assert capsys.readouterr().out == ""


def test_older_checkpoints_have_the_defaults_of_later_flags():
    older = {key: value for key, value in ARGS.items() if key not in checkpoint.BEFORE}
    assert restore(older, {**ARGS, **checkpoint.BEFORE}).step == 25
    with pytest.raises(UserError, match=r"--train-norm-affine False \(now True\)"):
        restore(older, {**ARGS, **checkpoint.BEFORE, "train_norm_affine": True})


@pytest.mark.parametrize("name", checkpoint.RESUME_INVARIANTS)
def test_changed_invariant_is_rejected(name, capsys):
    descriptions = {"train_data": "other training data", "val_data": "other validation data"}
    descriptions |= {
        key: f"{key.replace('_', ' ')} None (now 7)" for key in ("precision", "augmentation_code")
    }
    descriptions |= {"global_batch": "global batch 4 (now 7)"}
    before = ARGS[name]
    before = "not set" if before is None else before
    described = descriptions.get(name, f"--{name.replace('_', '-')} {before} (now 7)")
    with pytest.raises(UserError) as caught:
        restore(ARGS, {**ARGS, name: 7})
    assert f"x.pth was trained with {described}: use the same" in str(caught.value)
    assert "--resume-anyway" in str(caught.value)
    state = restore(ARGS, {**ARGS, name: 7, "steps_per_epoch": 20}, resume_anyway=True)
    output = capsys.readouterr().out
    assert f"--resume-anyway: so far trained with {described}" in output
    restarts = name in ("seed", "global_batch", "keep_empty", "aspect_ratio_group_factor")
    restarts = restarts or name in ("train_data", "repeat_factor_threshold")
    assert ("epoch 2 restarts" in output) == restarts
    assert (state.epoch, state.step) == (2, 40 if restarts else 25)


def test_all_changed_invariants_are_reported():
    with pytest.raises(UserError, match=r"--seed 0 \(now 1\), --lr 0.1 \(now 0.2\): use"):
        restore(ARGS, {**ARGS, "lr": 0.2, "seed": 1})


def test_changed_world_size_is_logged(capsys):
    assert restore({**ARGS, "world_size": 2}, ARGS).step == 25
    assert "1 processes instead of 2: same batches" in capsys.readouterr().out


def test_add_resume_facts():
    class Index:
        def fingerprint(self) -> str:
            return "abc"

    plan = samplers.TrainingPlan(np.zeros(9, dtype=np.int64), 4)
    args = {"data_augmentation": "hflip"}
    facts = checkpoint.add_resume_facts(args, plan, torch.bfloat16, {"train": Index()})
    assert facts == {
        **{
            **args,
            "augmentation_code": None,
            "steps_per_epoch": 2,
            "global_batch": 4,
            "world_size": 1,
        },
        **{"precision": "bfloat16", "train_data": "abc"},
    }
    assert checkpoint.add_resume_facts(args, plan, None, {})["precision"] == "float32"


def test_checkpoints_are_listed_newest_first(tmp_path):
    for step in (99_999_999, 100_000_001):  # more digits than the padded file name
        save(tmp_path, step)
    assert steps_in(tmp_path) == [100_000_001, 99_999_999]
    (tmp_path / "checkpoint_last.pth").touch()
    assert checkpoint.list_checkpoints(tmp_path) == checkpoint.list_numbered(tmp_path)
    shutil.copy(tmp_path / checkpoint.NEWEST, tmp_path / "copy")
    (tmp_path / "copy").replace(tmp_path / checkpoint.NEWEST)
    assert checkpoint.list_checkpoints(tmp_path)[-1] == tmp_path / checkpoint.NEWEST


def test_best_is_saved_before_numbered_checkpoint(tmp_path, monkeypatch):
    """Otherwise a kill in between loses the best: a resumed run does not evaluate again."""
    replace = os.replace

    def fail_at_numbered_checkpoint(source, target):
        if Path(target).name == "checkpoint_00000003.pth":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_numbered_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {**STATE, "step": 3}, best=True)
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 3
    assert not checkpoint.list_numbered(tmp_path)
