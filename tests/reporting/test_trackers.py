import contextlib
import io
import json

import numpy as np
import pytest
from helpers import read_losses, split_of, train_in_process, train_two_processes
from report_helpers import DETECTIONS, eval_line, rows_of, start_line, train_line

from coco_utils import CocoIndex
from internals.errors import StopRequested, UserError
from reporting import trackers
from reporting.trackers import Trackers, draw, run_config, tagged_numbers


class RecordingWriter:
    """Records what it gets; fails while `error` is set."""

    run_id = "7"

    def __init__(self, *opened_with):
        self.opened_with = opened_with
        self.error = None
        self.written = []

    def _write(self, *row):
        if self.error:
            raise self.error
        self.written.append(row)

    def write_config(self, config):
        self._write("config", config)

    def write_metrics(self, numbers, step):
        self._write("metrics", step, numbers)

    def write_images(self, images, step):
        self._write("images", step, sorted(images))

    def close(self, status):
        self._write("closed", status)


@pytest.fixture
def opened(monkeypatch) -> list[RecordingWriter]:
    """Replace every tracker by a RecordingWriter; return those that were opened."""
    writers = []

    def open_writer(*arguments):
        writers.append(RecordingWriter(*arguments))
        return writers[-1]

    monkeypatch.setattr(trackers, "open_writer", open_writer)
    return writers


def write_line(all_trackers, line: dict) -> None:
    all_trackers.write_metrics(line["kind"], {k: v for k, v in line.items() if k != "kind"})


def test_all_numbers_of_a_line_get_a_tag(tiny):
    numbers = dict(tagged_numbers("train", train_line(3, skipped_steps=0, note="text")))
    assert numbers == {
        **{"train/loss": 1 / 3, "train/loss_classifier": 0.6 / 3, "train/lr": 0.02},
        **{"train/loss_box_reg": 0.4 / 3, "train/skipped_steps": 0},
        **{"train/images_per_second": 5.0, "train/peak_memory_mib": 1000},
    }
    best = {"threshold": 0.6, "F1": 0.5}
    line = eval_line(tiny, 0, val_loss={"loss": 2.0}, score_threshold=best)
    numbers = dict(tagged_numbers("eval", line))
    assert numbers["eval/AP"] == line["AP"]
    assert numbers["eval/per_category/dog"] == line["per_category"][5]["AP"]
    assert numbers["eval/val_loss/loss"] == 2.0
    assert numbers["eval/score_threshold/F1"] == 0.5
    assert not {"eval/APl", "eval/step", "eval/epoch"} & set(numbers)  # APl is null


def test_config_has_all_flags_and_facts_apart(tiny):
    config = run_config(start_line(tiny, train_images=None))
    assert config["train_images"] is None  # the flag
    assert config["run/train_images"] == 8
    assert config["run/precision"] == "float32"
    assert config["lr_steps"] == [1, 2]


def test_first_images_with_boxes_are_drawn(tiny):
    images = draw(CocoIndex(split_of(tiny, "val")), rows_of(DETECTIONS))
    assert list(images) == ["validation/100", "validation/101", "validation/102"]
    for image in images.values():
        height, width, channels = image.shape
        assert (image.dtype, channels) == (np.uint8, 3)
        assert width > height  # two drawings side by side


def test_failure_keeps_numbers_for_the_next_evaluation(opened, tiny, tmp_path, capsys):
    with Trackers() as both:
        both.open(["mlflow", "wandb"], tmp_path, None)
        failing, working = opened
        write_line(both, start_line(tiny))
        write_line(both, train_line(1))
        failing.error = OSError("the disk is full")
        for step in (2, 3, 4):
            write_line(both, train_line(step))
        index = CocoIndex(split_of(tiny, "val"))
        both.write_images(index, rows_of(DETECTIONS), 4)
        assert capsys.readouterr().out.count("the disk is full") == 1
        failing.error = None
        write_line(both, train_line(5))  # does not try before an evaluation
        assert [row[1] for row in failing.written[1:]] == [1]
        write_line(both, eval_line(tiny, 1))
        both.write_images(index, rows_of(DETECTIONS), 8)
    steps = [row[1] for row in working.written if row[0] == "metrics"]
    assert steps == [1, 2, 3, 4, 5, 8]
    assert [row[1] for row in failing.written if row[0] == "metrics"] == steps
    assert [row[1] for row in failing.written if row[0] == "images"] == [8]
    assert [row[1] for row in working.written if row[0] == "images"] == [4, 8]


def test_failure_at_the_end_is_logged(opened, tiny, tmp_path, capsys):
    with Trackers() as one:
        one.open(["mlflow"], tmp_path, None)
        opened[0].error = ConnectionError("server gone")
        write_line(one, train_line(1))
        write_line(one, train_line(2))
    assert "--tracker mlflow lacks 2 lines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (StopRequested(), "stopped"), (RuntimeError("x"), "failed")],
)
def test_status_at_the_end(opened, tmp_path, error, status):
    with contextlib.suppress(StopRequested, RuntimeError), Trackers() as one:
        one.open(["mlflow"], tmp_path, None)
        if error:
            raise error
    assert opened[0].written == [("closed", status)]


def test_run_ids_are_used_by_resumed_runs_only(opened, tmp_path):
    (tmp_path / "trackers.json").write_text('{"mlflow": "5"}')
    Trackers().open(["mlflow", "wandb"], tmp_path, None)
    assert [writer.opened_with for writer in opened] == [
        ("mlflow", tmp_path, None, None),
        ("wandb", tmp_path, None, None),
    ]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "7", "wandb": "7"}
    Trackers().open(["wandb"], tmp_path, 40)
    assert opened[-1].opened_with == ("wandb", tmp_path, 40, "7")
    (tmp_path / "trackers.json").write_text('{"wandb": "my-run"}')  # such as WANDB_RUN_ID sets
    Trackers().open(["wandb"], tmp_path, 40)
    assert opened[-1].opened_with == ("wandb", tmp_path, 40, "my-run")
    for content in ("{", "[]", '{"wandb": 5}', '{"wandb": ""}'):
        (tmp_path / "trackers.json").write_text(content)
        with pytest.raises(UserError, match=r"trackers\.json is damaged.*delete it"):
            Trackers().open(["wandb"], tmp_path, 40)


def test_first_tracker_is_closed_if_the_second_cannot_be_opened(opened, tmp_path, monkeypatch):
    recording = trackers.open_writer

    def fail(name, *arguments):
        if name == "wandb":
            raise UserError("no key")
        return recording(name, *arguments)

    monkeypatch.setattr(trackers, "open_writer", fail)
    with pytest.raises(UserError, match="no key"):
        Trackers().open(["mlflow", "wandb"], tmp_path, None)
    assert opened[0].written == [("closed", "failed")]


@pytest.mark.slow
def test_training_survives_a_failing_tracker(opened, tiny, tmp_path, monkeypatch):
    """Also when an image cannot be drawn."""
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out")
    plain = train_in_process(*flags)
    losses = read_losses(tmp_path / "out")

    def fail(*_):
        raise ConnectionError("no answer")

    monkeypatch.setattr(RecordingWriter, "write_metrics", fail)
    monkeypatch.setattr(RecordingWriter, "close", fail)
    printed = train_in_process(*flags[:3], tmp_path / "tracked", "--tracker", "mlflow")
    assert read_losses(tmp_path / "tracked") == losses
    assert "failed" not in plain
    assert printed.count("--tracker mlflow failed, the training goes on: no answer") == 3


@pytest.mark.slow
def test_tracker_that_cannot_be_opened_ends_all_processes(tiny, tmp_path):
    pytest.importorskip("mlflow")
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--tracker", "mlflow")
    results = train_two_processes(*flags, MLFLOW_TRACKING_URI="htp://nowhere")
    assert [result.returncode for result in results] == [2, 2]
    errors = "".join(result.stderr for result in results)
    assert errors.count("--tracker mlflow cannot be opened") == 1
    assert not list(tmp_path.glob("*.pth"))


def test_nothing_happens_without_trackers(tiny, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed, Trackers() as none:
        none.open([], tmp_path / "out", None)
        write_line(none, eval_line(tiny, 0))
        none.write_images(CocoIndex(split_of(tiny, "val")), rows_of(DETECTIONS), 4)
    assert not printed.getvalue()
    assert not (tmp_path / "out").exists()
