"""The best IoU of boxes with anchors: by hand, and against torchvision's own anchors."""

import argparse

import numpy as np
import pytest
import torch
from helpers import main_in_process, rewrite, split_of, write_split
from torchvision.models import get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from coco_utils import CocoIndex
from internals import anchor_coverage, anchors

FASTER_RCNN, RETINANET = "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"


def flags(model: str = FASTER_RCNN, **values) -> argparse.Namespace:
    defaults = {"anchor_sizes": None, "anchor_ratios": None, "fixed_size": None}
    sizes = {"min_size": 100, "max_size": 1000}
    return argparse.Namespace(**{"model": model, **defaults, **sizes, **values})


def index_of(folder, size: tuple[int, int], boxes: list) -> CocoIndex:
    write_split(folder, "train", [size], [[[2, *box] for box in boxes]])
    return CocoIndex(split_of(folder))


def overlap_of(box: list, shape: list, stride: int = 4) -> float:
    boxes = np.array([box], dtype=np.float32)
    images = np.array([[320, 320]], dtype=np.float32)
    shapes = [np.array([shape], dtype=np.float32)]
    return anchor_coverage.best_overlaps(boxes, images, [stride], shapes).item()


@pytest.mark.parametrize(
    ("box", "shape", "stride", "expected"),
    [
        ([24, 24, 16, 16], [16, 16], 4, 1.0),  # the center is on the grid
        ([24, 24, 16, 16], [32, 32], 4, 0.25),  # inside of the anchor
        ([26, 24, 16, 16], [16, 16], 4, 14 * 16 / (2 * 256 - 14 * 16)),  # 2 pixels from the grid
        ([26, 26, 16, 16], [16, 16], 4, 14 * 14 / (2 * 256 - 14 * 14)),
        ([24, 24, 32, 8], [8, 32], 4, 64 / (2 * 256 - 64)),
        ([30, 30, 4, 4], [4, 4], 64, 0.0),  # between the anchors
        ([316, 316, 4, 4], [8, 8], 32, 0.0),  # behind the last center, at 288
    ],
)
def test_overlap_by_hand(box, shape, stride, expected):
    assert overlap_of(box, shape, stride) == pytest.approx(expected)


@pytest.mark.parametrize("name", [FASTER_RCNN, RETINANET, "fasterrcnn_mobilenet_v3_large_fpn"])
@pytest.mark.parametrize("size", [(333, 250), (100, 640)])
def test_overlaps_equal_those_with_torchvisions_anchors(name, size, tmp_path):
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 0.8, (40, 2)) * size
    sides = np.minimum(np.exp(rng.uniform(1, 5, (40, 2))), np.array(size) - corners)
    index = index_of(tmp_path, size, np.concatenate([corners, sides], axis=1).tolist())
    model = get_model(name, weights=None, weights_backbone=None, min_size=200, max_size=500).eval()
    image = torch.zeros(3, size[1], size[0])
    target = {"boxes": torch.tensor(np.concatenate([corners, corners + sides], 1)).float()}
    batch, (resized,) = model.transform([image], [target])
    with torch.no_grad():
        features = list(model.backbone(batch.tensors).values())
    every = anchors.find_generator(model)(batch, features)[0]
    expected = box_iou(resized["boxes"], every).amax(dim=1)
    strides, _ = anchor_coverage.levels_of(name)
    boxes, images = anchor_coverage.resize(index, 200, 500, None)
    shapes = anchor_coverage.cell_shapes(*anchors.default_anchors(name))
    actual = anchor_coverage.best_overlaps(boxes, images, strides, shapes)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_fixed_size_stretches(tmp_path):
    index = index_of(tmp_path, (100, 50), [[10, 10, 20, 20]])
    boxes, images = anchor_coverage.resize(index, 800, 1333, [100, 400])
    assert boxes.tolist() == [[40, 20, 80, 40]]
    assert images.tolist() == [[416, 128]]


def test_levels_are_those_of_torchvision():
    assert anchor_coverage.levels_of(FASTER_RCNN) == ([4, 8, 16, 32, 64], [0.7, 0.5, 0.3])
    assert anchor_coverage.levels_of(RETINANET) == ([8, 16, 32, 64, 128], [0.5, 0.4])


def test_sizes_and_thresholds_are_counted(tmp_path):
    """Squares on the grid, in anchors of 64 pixels: 64, 48, 40 and 24 pixels, and a crowd."""
    boxes = [[64 - s / 2, 64 - s / 2, s, s] for s in (64, 48, 40, 24, 64)]
    index = index_of(tmp_path, (512, 512), boxes)
    rewrite(split_of(tmp_path), lambda data: data["annotations"][4].update(iscrowd=1))
    index = CocoIndex(split_of(tmp_path))
    lines = anchor_coverage.report(
        index, flags(min_size=512, anchor_sizes=[[64]] * 5, anchor_ratios=[1.0])
    )
    # (24 / 64) ** 2 = 0.14, (40 / 64) ** 2 = 0.39, (48 / 64) ** 2 = 0.56
    assert (
        lines[1] == "  small          1 boxes, median 0.14; below 0.7: 100%, 0.5: 100%, 0.3: 100%"
    )
    assert lines[2] == "  medium         3 boxes, median 0.56; below 0.7: 67%, 0.5: 33%, 0.3: 0%"
    assert len(lines) == 4
    assert lines[3].startswith("note: 50% of the boxes have no anchor with an IoU of 0.5. Their")


def note_of(folder, boxes: list, **values) -> str:
    lines = anchor_coverage.report(index_of(folder, (800, 600), boxes), flags(**values))
    return next((line for line in lines if line.startswith("note")), "")


def test_small_boxes_get_smaller_anchors(tmp_path):
    boxes = [[x, y, 6, 6] for x in range(0, 700, 50) for y in range(0, 500, 50)]
    note = note_of(tmp_path, boxes, min_size=600)
    assert "100% of the boxes have no anchor" in note
    assert "median side is 6 pixels" in note
    assert "--anchor-sizes 8 16 32 64 128 leaves 0%" in note
    assert "--anchor-ratios" not in note
    assert "--min-size" not in note  # 12 pixels are too few, too


def test_long_boxes_get_longer_anchors(tmp_path):
    boxes = [[x, y, 160, 32] for x in range(0, 600, 50) for y in range(0, 500, 50)]
    note = note_of(tmp_path, boxes, min_size=600)
    assert "100% are longer than 3:1" in note
    assert "--anchor-ratios 0.25 0.5 1 2 4 leaves 0%" in note


def test_larger_images_are_suggested_where_they_help(tmp_path):
    boxes = [[x, y, 18, 18] for x in range(0, 700, 50) for y in range(0, 500, 50)]
    assert "twice the --min-size leaves 0%" in note_of(tmp_path, boxes, min_size=600)


def test_well_covered_boxes_get_no_suggestion(tmp_path):
    boxes = [[x, y, 60, 60] for x in range(0, 700, 50) for y in range(0, 500, 50)]
    assert note_of(tmp_path, boxes, min_size=600) == ""


def test_models_without_such_anchors_have_no_lines(tmp_path):
    index = index_of(tmp_path, (100, 50), [[10, 10, 20, 20]])
    for name in ("fcos_resnet50_fpn", "ssd300_vgg16"):
        assert anchor_coverage.report(index, flags(name)) == []
    index.usable[:] = False
    assert anchor_coverage.report(index, flags()) == []


def test_generator_has_the_shapes():
    sizes, ratios = [[8, 12], [40, 50]], [0.3, 1, 4]
    cells = AnchorGenerator(sizes, [ratios] * 2).cell_anchors
    for shapes, cell in zip(anchor_coverage.cell_shapes(sizes, ratios), cells, strict=True):
        expected = torch.stack([cell[:, 2] - cell[:, 0], cell[:, 3] - cell[:, 1]], dim=1)
        np.testing.assert_array_equal(shapes, expected)
        assert (cell[:, :2] == -cell[:, 2:]).all()  # centered


def test_check_data_reports_the_run_s_anchors(tiny):
    command = ("--data-path", tiny, "--check-data", "-j", "0", "--min-size", "300")
    assert "anchors: sizes 32 64 128 256 512, height / width 0.5 1 2" in main_in_process(*command)
    own = ("--anchor-sizes", *("9", "17", "33", "65", "129"), "--anchor-ratios", "1")
    assert "sizes 9 17 33 65 129, height / width 1;" in main_in_process(*command, *own)
