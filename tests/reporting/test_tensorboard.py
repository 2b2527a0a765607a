import pytest
from helpers import split_of
from report_helpers import DETECTIONS, rows_of

from coco_utils import CocoIndex
from reporting.trackers import draw, open_writer


def test_metrics_and_images_are_written(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = open_writer("tensorboard", tmp_path, None, None)
    writer.write_metrics({"train/loss": 0.25, "eval/per_category/cat": 0.5}, 3)
    writer.write_images(draw(CocoIndex(split_of(tiny, "val")), rows_of(DETECTIONS)), 4)
    writer.close("finished")
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = written.Tags()
    assert set(tags["scalars"]) == {"train/loss", "eval/per_category/cat"}
    [loss] = written.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, 0.25)
    assert tags["images"] == ["validation/100", "validation/101", "validation/102"]
    [image] = written.Images("validation/100")
    assert (image.step, image.width > image.height) == (4, True)
