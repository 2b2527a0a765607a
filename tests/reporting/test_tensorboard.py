import pytest
from helpers import split_of
from report_helpers import DETECTIONS, eval_line, rows_of, train_line

from coco_utils import CocoIndex
from reporting.tensorboard import TensorBoardWriter


def test_metrics_and_images_are_written(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path / "tensorboard", 0)
    for line in (train_line(3), eval_line(tiny, 0), {"kind": "end", "seconds": 9.0}):
        writer.write_metrics(line.pop("kind"), line)
    writer.write_images(CocoIndex(split_of(tiny, "val")), rows_of(DETECTIONS), 4)
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = written.Tags()
    assert {"train/loss", "train/lr", "eval/AP", "eval/per_category/cat"} <= set(tags["scalars"])
    assert {f"eval/score_threshold/{x}" for x in ("threshold", "F1")} <= set(tags["scalars"])
    assert not {"eval/APl", "train/step", "eval/epoch"} & set(tags["scalars"])  # APl is null
    assert not [tag for tag in tags["scalars"] if "seconds" in tag]
    [loss] = written.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, pytest.approx(1 / 3))
    assert tags["images"] == ["validation/100", "validation/101", "validation/102"]
    assert [image.step for image in written.Images("validation/100")] == [4]
