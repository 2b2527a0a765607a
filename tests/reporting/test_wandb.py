import json
import os
import struct
import sys
from pathlib import Path

import pytest
from helpers import read_metrics, split_of, train
from report_helpers import DETECTIONS, rows_of

from coco_utils import CocoIndex
from internals.errors import UserError
from reporting.trackers import draw, open_writer

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME"):  # where the user's key is
        monkeypatch.setenv(name, str(tmp_path / "home"))
    yield
    wandb.teardown()


def read_records(folder: Path) -> list:
    """Return the records of all offline runs in a folder, in the order in which they were written.

    The files are in the log format of LevelDB, with W&B's header; the records are protobuf's.
    """
    from wandb.proto import wandb_internal_pb2

    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, position, parts = file.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:  # the rest of a block is padding
                position += 32768 - position % 32768
                continue
            length, kind = struct.unpack_from("<HB", content, position + 4)
            parts += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                records.append(wandb_internal_pb2.Record.FromString(parts))
                parts = b""
    return records


def read_history(folder: Path) -> list[dict]:
    """Return the logged rows without those keys that W&B adds."""
    rows = []
    for record in read_records(folder):
        if record.HasField("history"):
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.append({key: value for key, value in row.items() if key[0] != "_"})
    return rows


def test_run_can_be_read_back(tiny, tmp_path):
    writer = open_writer("wandb", tmp_path, None, None)
    writer.write_config({"lr": 0.02, "lr_steps": [1, 2], "weights": None})
    writer.write_metrics({"train/loss": 0.25, "eval/per_category/猫 a.b/(c)": 0.5}, 3)
    writer.write_images(draw(CocoIndex(split_of(tiny, "val")), rows_of(DETECTIONS)), 4)
    writer.close("finished")
    metrics, images = read_history(tmp_path)
    assert metrics == {"step": 3, "train/loss": 0.25, "eval/per_category/猫 a.b/(c)": 0.5}
    assert images.pop("step") == 4
    assert {key.rpartition("/")[0] for key in images} == {
        f"validation/{i}" for i in (100, 101, 102)
    }
    [folder] = tmp_path.glob("wandb/offline-run-*")
    for i in (100, 101, 102):
        image = folder / "files" / images[f"validation/{i}/path"]
        assert image.stat().st_size == images[f"validation/{i}/size"]
    records = read_records(tmp_path)
    [run] = [record.run for record in records if record.HasField("run")]
    expected = (writer.run_id, "faster-rcnn", tmp_path.name)
    assert (run.run_id, run.project, run.display_name) == expected
    config = {
        item.key: json.loads(item.value_json)
        for record in records
        for item in [*record.run.config.update, *record.config.update]
    }
    assert (config["lr"], config["lr_steps"], config["weights"]) == (0.02, [1, 2], None)
    defined = [record.metric for record in records if record.HasField("metric")]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in defined]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_resumed_run_continues_with_each_steps_newest_value(tmp_path):
    writer = open_writer("wandb", tmp_path, None, None)
    writer.write_config({"workers": 4})
    for step in (1, 2, 3):  # stopped after a checkpoint of step 1
        writer.write_metrics({"train/loss": 10 + step}, step)
    writer.close("stopped")
    resumed = open_writer("wandb", tmp_path, 1, writer.run_id)
    resumed.write_config({"workers": 2})
    for step in (2, 3, 4):
        resumed.write_metrics({"train/loss": 20 + step}, step)
    resumed.close("finished")
    runs = [record.run.run_id for record in read_records(tmp_path) if record.HasField("run")]
    assert set(runs) == {writer.run_id}
    newest = {row["step"]: row["train/loss"] for row in read_history(tmp_path)}
    assert newest == {1: 11, 2: 22, 3: 23, 4: 24}


def test_run_without_a_key_is_refused_and_never_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    with pytest.raises(UserError, match=r"wandb login.*WANDB_MODE=offline"):
        open_writer("wandb", tmp_path, None, None)


def find_services(mark: str) -> list[str]:
    """Return the processes of W&B with this text in their environment (Linux only)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().decode())
        except OSError:  # ended, or of another user
            continue
    return [command for command in found if "wandb-core" in command]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stopped_training_continues_its_runs(tiny, tmp_path):
    """With loading processes, which are forked after the trackers' threads have started."""
    mlflow = pytest.importorskip("mlflow")
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--epochs", "2")
    flags += ("--tracker", "mlflow", "wandb", "--workers", "2")
    mark = f"run of {tmp_path}"
    variables = {"WANDB_NAME": mark, "WANDB_MODE": "offline"}
    stopped = train(*flags, FAULT="term@step:0:2", **variables)
    assert stopped.returncode == 75, stopped.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    ids = json.loads((tmp_path / "out/trackers.json").read_text())
    assert client.get_run(ids["mlflow"]).info.status == "KILLED"
    assert not find_services(mark)

    finished = train(*flags, "--resume", "auto", **variables)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "out/trackers.json").read_text()) == ids
    assert client.get_run(ids["mlflow"]).info.status == "FINISHED"
    lines = read_metrics(tmp_path / "out", "train")
    expected = {line["step"]: line["loss"] for line in lines}
    assert sorted(expected) == list(range(1, 9))
    history = client.get_metric_history(ids["mlflow"], "train/loss")
    assert {row.step: row.value for row in history} == expected
    rows = [row for row in read_history(tmp_path / "out") if "train/loss" in row]
    assert {row["step"]: row["train/loss"] for row in rows} == expected
    assert not find_services(mark)
    assert finished.stderr == ""
