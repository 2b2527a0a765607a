import shutil
from pathlib import Path

import pytest
from helpers import split_of
from report_helpers import DETECTIONS, rows_of

from coco_utils import CocoIndex
from internals.errors import UserError
from reporting.trackers import draw, open_writer

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Make a database without runs, which takes MLflow six seconds."""
    folder = tmp_path_factory.mktemp("store")
    client_of(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def out(empty_store, tmp_path) -> Path:
    """Make an output folder with an empty database."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    return folder


def client_of(folder) -> "mlflow.MlflowClient":
    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def test_run_can_be_read_back(tiny, tmp_path):
    folder = tmp_path / "out 猫#%"  # what a file URI has to quote
    folder.mkdir()
    writer = open_writer("mlflow", folder, None, None)
    writer.write_config({"lr": 0.02, "lr_steps": [1, 2], "run/commit": "abc", "long": "x" * 9000})
    for step in (3, 6):
        writer.write_metrics({"train/loss": 1 / step, "eval/per_category/cat": 0.5}, step)
    writer.write_images(draw(CocoIndex(split_of(tiny, "val")), rows_of(DETECTIONS)), 6)
    writer.close("stopped")

    client = client_of(folder)
    [run] = client.search_runs([client.get_experiment_by_name("faster-rcnn").experiment_id])
    assert (run.info.run_id, run.info.run_name) == (writer.run_id, folder.name)
    assert run.info.status == "KILLED"
    assert run.data.params.pop("long") == "x" * 6000
    assert run.data.params == {"lr": "0.02", "lr_steps": "[1, 2]", "run/commit": "abc"}
    assert run.data.metrics["eval/per_category/cat"] == 0.5
    losses = client.get_metric_history(writer.run_id, "train/loss")
    assert [(row.step, row.value) for row in losses] == [(3, 1 / 3), (6, 1 / 6)]
    files = [file.path for file in client.list_artifacts(writer.run_id, "images")]
    images = sorted(file.partition("+timestamp")[0] for file in files if file.endswith(".png"))
    assert images == [f"images/validation~{i}+step+6" for i in (100, 101, 102)]
    assert list((folder / "mlflow_artifacts").rglob("*.png"))


def test_resumed_run_continues_with_each_steps_newest_value(out):
    writer = open_writer("mlflow", out, None, None)
    writer.write_config({"lr": 0.02, "workers": 4})
    for step in (1, 2, 3):  # killed after a checkpoint of step 1
        writer.write_metrics({"train/loss": 10 + step}, step)
    resumed = open_writer("mlflow", out, 1, writer.run_id)
    assert resumed.run_id == writer.run_id
    assert client_of(out).get_run(writer.run_id).info.status == "RUNNING"
    resumed.write_config({"lr": 0.02, "workers": 2, "new": 1})
    for step in (2, 3, 4):
        resumed.write_metrics({"train/loss": 20 + step}, step)
    resumed.close("finished")
    run = client_of(out).get_run(writer.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.02", "workers": "4", "new": "1"}
    assert run.data.metrics == {"train/loss": 24}
    history = client_of(out).get_metric_history(writer.run_id, "train/loss")
    newest = {row.step: row.value for row in sorted(history, key=lambda row: row.timestamp)}
    assert newest == {1: 11, 2: 22, 3: 23, 4: 24}


def test_deleted_run_is_replaced(out, capsys):
    writer = open_writer("mlflow", out, None, None)
    client_of(out).delete_run(writer.run_id)
    for run_id in (writer.run_id, "0" * 32):
        capsys.readouterr()
        assert open_writer("mlflow", out, 1, run_id).run_id != run_id
        assert f"no run {run_id} any more" in capsys.readouterr().out


def test_environment_names_the_experiment_and_the_store(empty_store, tmp_path, monkeypatch):
    store = shutil.copy(empty_store, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cells")
    monkeypatch.chdir(tmp_path)
    writer = open_writer("mlflow", tmp_path / "out", None, None)
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    experiment = client.get_run(writer.run_id).info.experiment_id
    assert client.get_experiment(experiment).name == "cells"
    assert not (tmp_path / "out").exists()


def test_wrong_address_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://nowhere")
    with pytest.raises(UserError, match=r"--tracker mlflow cannot be opened: .*htp://nowhere"):
        open_writer("mlflow", tmp_path, None, None)


def test_every_category_name_is_accepted_and_stays_apart(out):
    names = ["猫", "a/b", "a b.c", "v1.", "cat (small)", "cat [small]", "cat _small_", "50%", "50°"]
    names += ["..", ".", "/", "//", "a//b", "a/", "a/../b", " ", "é", "🐈", "a:b", "x" * 400]
    names += ["x" * 399 + "y", "", "a\\b", 'a"b', "'; drop table metrics"]
    tags = [f"eval/per_category/{name}" for name in names]
    writer = open_writer("mlflow", out, None, None)
    writer.write_metrics({tag: float(n) for n, tag in enumerate(tags)}, 1)
    metrics = client_of(out).get_run(writer.run_id).data.metrics
    assert sorted(metrics.values()) == list(range(len(tags)))
    assert all(name.startswith("eval/per_category/") for name in metrics)
    assert [metrics[tag] for tag in tags[:3]] == [0, 1, 2]  # kept as they are


def test_more_numbers_than_one_request_may_have(out):
    writer = open_writer("mlflow", out, None, None)
    writer.write_metrics({f"eval/per_category/{n}": n / 2 for n in range(1203)}, 1)
    writer.write_config({f"flag{n}": n for n in range(150)})
    data = client_of(out).get_run(writer.run_id).data
    assert (len(data.metrics), len(data.params)) == (1203, 150)
