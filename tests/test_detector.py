"""The API of one page, and tiles: what is found in an image does not depend on how it is cut."""

import numpy as np
import pytest
import torch
from helpers import main_in_process, write_split
from PIL import Image
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from coco_utils import Categories
from detector import LoadedModel
from internals import images
from internals.detections import Settings
from internals.errors import UserError
from predict import Detector

NAMES = {3: "cat", 7: "dog"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train for a step; return the folder with `data` and `out`, and flags for many detections."""
    root = tmp_path_factory.mktemp("trained")
    sizes = [(64, 48), (48, 64), (200, 100), (64, 48)]
    boxes = [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30]], [[2, 0, 0, 12, 16]], []]
    for split in ("train", "val"):
        write_split(root / "data", split, sizes, boxes)
    main_in_process(
        *("--data-path", root / "data", "--output-dir", root / "out", "--epochs", 1, "--no-report"),
        *("--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--weights-backbone", "none"),
        *("--min-size", 64, "--print-freq", 1, "-j", 0),
    )
    return root


def load(trained, **settings) -> Detector:
    return Detector.load(trained / "out/model_best.pth", score_threshold=0, **settings)


def equal(first, second, atol: float = 0) -> bool:
    return (
        len(first) == len(second)
        and np.allclose(first.boxes, second.boxes, rtol=0, atol=atol)
        and np.allclose(first.scores, second.scores, rtol=0, atol=atol)
        and (first.category_ids == second.category_ids).all()
    )


# ----------------------------------------------------------------------------------- the page


def test_paths_pil_images_and_arrays_are_the_same(trained):
    detector, file = load(trained), trained / "data/val2017/2.png"
    image = Image.open(file)
    from_path = detector(str(file))
    assert len(from_path) > 10
    assert (np.diff(from_path.scores) <= 0).all()
    array = np.asarray(image.convert("RGB"))
    for other in (file, image, array, array[:, ::-1][:, ::-1], np.asfortranarray(array)):
        assert equal(detector(other), from_path)
    assert (from_path.boxes.dtype, from_path.scores.dtype) == (np.float32, np.float32)
    assert from_path.boxes.max() <= 200
    assert from_path.boxes[:, 3].max() <= 100


def test_result_of_several_images_is_a_list(trained):
    files = [trained / f"data/val2017/{n}.png" for n in (2, 0, 1, 3)]
    detector = load(trained)
    found = detector(files)
    assert [equal(a, detector(b)) for a, b in zip(found, files, strict=True)] == [True] * 4
    assert len({len(each) for each in found} | {float(each.scores[0]) for each in found}) > 3
    assert detector([]) == []


def test_images_are_taken_from_an_iterator_as_they_are_needed(trained):
    detector, taken, left = load(trained), [], []

    def images():
        for n in range(30):
            taken.append(n)
            yield np.full((48, 64, 3), n, np.uint8)

    start = detector._start
    detector._start = lambda batch: left.append(len(taken)) or start(batch)
    assert len(detector(images())) == 30
    assert left[0] < 10
    assert left == sorted(left)


def test_array_may_be_used_again_for_the_next_image(trained):
    files = [trained / f"data/val2017/{n}.png" for n in (0, 3, 0, 3)]
    arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]

    def images():
        buffer = np.empty_like(arrays[0])
        for array in arrays:
            buffer[:] = array
            yield buffer

    detector = load(trained)
    assert all(map(equal, detector(images()), detector(arrays)))


def test_batches_find_the_same_in_the_same_order(trained):
    files = [trained / f"data/val2017/{n}.png" for n in (0, 2, 1, 3, 2, 0, 0)]
    found, alone = (load(trained, batch_size=size)(files) for size in (3, 1))
    for batched, single in zip(found, alone, strict=True):
        assert abs(len(batched) - len(single)) <= 2  # rounding moves scores across 0.05
        np.testing.assert_allclose(batched.scores[:10], single.scores[:10], atol=1e-4)


def test_results_convert_to_plain_arrays(trained):
    found = load(trained)(trained / "data/val2017/0.png")
    few = found[found.scores >= found.scores[4]]
    assert len(few) == 5
    arrays = few.to_arrays()
    assert arrays.keys() == {"xyxy", "confidence", "class_id", "data"}
    assert arrays["xyxy"].shape == (5, 4)
    assert arrays["data"]["class_name"].tolist() == few.names
    assert set(few.names) <= {"cat", "dog"}
    rows = few.to_rows(9)
    assert (rows[:, 0] == 9).all()
    np.testing.assert_allclose(rows[:, 1:3] + rows[:, 3:5], few.boxes[:, 2:], rtol=1e-6)


def test_arrays_are_those_of_supervision(trained):
    supervision = pytest.importorskip("supervision")
    found = load(trained)(trained / "data/val2017/0.png")
    theirs = supervision.Detections(**found.to_arrays())
    assert len(theirs) == len(found) > 0
    assert theirs["class_name"].tolist() == found.names


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "not an array of float64"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\) is no image"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\) is no image"),
        (np.zeros((1, 3000, 3), np.uint8), "image 0: 3000 x 1 pixels are too narrow"),
        (Image.new("I;16", (9, 9)), "mode I;16 has no range: give its path"),
        ("missing.jpg", "missing.jpg cannot be read as an image"),
        (7, "a uint8 array, not int"),
        (None, "a uint8 array, not NoneType"),
        (torch.zeros(3, 4, 4), "a uint8 array, not Tensor"),
        ("film.mp4", "film.mp4 is a video: use predict.py"),
    ],
)
def test_unusable_image_is_an_error(trained, image, message):
    for given in (image, [image]):
        with pytest.raises(UserError, match=message):
            load(trained)(given)


@pytest.mark.parametrize(
    "settings",
    [
        {"tiles": 7},
        {"tile": 5},
        {"tile_overlap": 1.0},
        {"score_threshold": 2},
        {"score_threshold": "bset"},
        {"nms_threshold": -1},
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"tile": "800"},
        {"bit_depth": 9},
        {"truncated_images": "yes"},
        {"max_detections": 0},
    ],
)
def test_wrong_setting_is_an_error(trained, settings):
    (name,) = settings
    with pytest.raises((UserError, TypeError), match=name):
        Detector.load(trained / "out/model_best.pth", **settings)


def test_settings_may_be_numbers_of_numpy(trained):
    detector = load(trained, nms_threshold=np.float32(0.5), tile=np.int64(64))
    assert len(detector(trained / "data/val2017/0.png")) > 10


def test_class_agnostic_nms(trained):
    file = trained / "data/val2017/2.png"
    every, few = (load(trained, class_agnostic_nms=flag)(file) for flag in (False, True))
    assert 0 < len(few) < len(every)
    assert max_overlap(few) <= 0.5 < max_overlap(every)


def test_nms_threshold(trained):
    file = trained / "data/val2017/2.png"
    found = {iou: load(trained, nms_threshold=iou)(file) for iou in (0.1, 0.5, 0.9)}
    assert equal(found[0.5], load(trained)(file))
    overlaps = {
        iou: max(max_overlap(each[each.category_ids == i]) for i in (2, 5))
        for iou, each in found.items()
    }
    assert overlaps[0.1] <= 0.1 < overlaps[0.5] <= 0.5 < overlaps[0.9] <= 0.9


def max_overlap(found) -> float:
    from torchvision.ops import box_iou

    boxes = torch.from_numpy(found.boxes)
    return float(box_iou(boxes, boxes).fill_diagonal_(0).max())


# -------------------------------------------------------------------------------------- tiles


class FindRectangles(nn.Module):
    """A detector that finds rectangles on black exactly: each is of a gray level of its own.

    Of what it sees, its parts count: levels above 100 are dogs, others are cats.
    """

    def __init__(self):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(100, 100, [0, 0, 0], [1, 1, 1])
        self.nms_thresh = 0.5
        self.seen = []

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        """Return the detections, as torchvision does."""
        self.seen.append([tuple(image.shape) for image in images])
        return [self.find((image[0] * 255).round().int().numpy()) for image in images]

    def find(self, gray: np.ndarray) -> dict:
        boxes, labels, scores = [], [], []
        for level in np.unique(gray[gray > 0]):
            y, x = np.nonzero(gray == level)
            box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            # Reduced images have mixed levels at borders.
            if len(x) == (box[2] - box[0]) * (box[3] - box[1]) and len(x) > 20 and level % 5 == 0:
                boxes.append(box)
                labels.append(1 + (level > 100))
                scores.append(1 - level / 1000)
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }


def rectangle_detector(**settings) -> Detector:
    categories = Categories.from_names(NAMES)
    loaded = LoadedModel(FindRectangles(), categories)
    return Detector(loaded, Settings(**settings), dict.fromkeys(NAMES, 0.0))


BOXES = {  # level: x1, y1, x2, y2
    5: (10, 10, 30, 40),
    10: (90, 20, 115, 35),  # across the border of the first tile
    15: (250, 5, 260, 15),
    20: (70, 70, 180, 90),  # longer than a tile
    150: (0, 280, 60, 300),
    155: (95, 95, 105, 105),  # in four tiles
    160: (130, 120, 330, 270),  # larger than tiles
    165: (380, 290, 400, 300),
}


def rectangles(boxes: dict, width: int = 400, height: int = 300) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    for level, (x1, y1, x2, y2) in boxes.items():
        image[y1:y2, x1:x2] = level
    return image


def found_boxes(detections) -> dict[tuple, str]:
    """Return the boxes; those from the whole image, which was reduced by 4, are inexact."""
    expected, boxes = np.array(list(BOXES.values())), detections.boxes.astype(int)
    nearest = expected[np.abs(boxes[:, None] - expected).max(axis=2).argmin(axis=1)]
    close = (np.abs(boxes - nearest) <= 4).all(axis=1) & (longest_sides(boxes) > 60)
    boxes[close] = nearest[close]
    return dict(zip(map(tuple, boxes.tolist()), detections.names, strict=True))


def longest_sides(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).max(axis=1)


EXPECTED = {box: "dog" if level > 100 else "cat" for level, box in BOXES.items()}


@pytest.mark.parametrize("tile", [64, 100, 101, 150, 399, 400, 1000])
@pytest.mark.parametrize("overlap", [0.2, 0.35])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_objects_are_found_once_in_tiles(tile, overlap, batch_size):
    detector = rectangle_detector(tile=tile, tile_overlap=overlap, batch_size=batch_size)
    found = detector(rectangles(BOXES))
    assert found_boxes(found) == EXPECTED
    assert len(found) == len(BOXES)
    assert (np.diff(found.scores) < 0).all()


def test_tiles_have_the_size_asked_for_and_the_whole_image_is_reduced():
    detector = rectangle_detector(tile=100, tile_overlap=0.25)
    detector(rectangles(BOXES))
    seen = [shape for batch in detector.model.seen for shape in batch]
    # 5 x 4 tiles, and the whole image reduced by 4, as the model resizes the longer side to 100.
    assert seen == [(3, 100, 100)] * 20 + [(3, 75, 100)]


def test_whole_image_adds_only_objects_longer_than_a_tile():
    """Smaller ones are seen better in tiles: in the whole image they look like something else."""
    detector = rectangle_detector(tile=100)
    find = detector.model.find

    def find_a_cat_in_all(gray):
        found = find(gray)
        if gray.shape == (75, 100):  # the whole image, reduced by 4
            for name, row in (("boxes", [50.0, 50, 74, 60]), ("labels", 1), ("scores", 1.0)):
                found[name] = torch.cat([found[name], torch.tensor([row]).to(found[name])])
        return found

    detector.model.find = find_a_cat_in_all
    assert found_boxes(detector(rectangles(BOXES))) == EXPECTED
    detector.settings = Settings(tile=95)  # 24 x 4 = 96
    assert (200, 200, 296, 240) in found_boxes(detector(rectangles(BOXES)))


def test_image_that_fits_into_a_tile_is_seen_once():
    detector = rectangle_detector(tile=400)
    assert found_boxes(detector(rectangles(BOXES))) == EXPECTED
    assert detector.model.seen == [[(3, 300, 400)]]


def test_narrow_image_is_seen_in_tiles_only():
    detector = rectangle_detector(tile=50)
    image = rectangles({5: (100, 0, 110, 4), 110: (1890, 1, 1900, 4)}, 1900, 4)
    assert found_boxes(detector(image)) == {(100, 0, 110, 4): "cat", (1890, 1, 1900, 4): "dog"}
    with pytest.raises(UserError, match="too narrow"):
        rectangle_detector()(rectangles({}, 1900, 4))


def test_max_detections_counts_the_whole_image():
    detector = rectangle_detector(tile=100)
    detector.settings = Settings(tile=100, max_detections=3)
    found = detector(rectangles(BOXES))
    assert found.boxes.astype(int).tolist() == [list(BOXES[level]) for level in (5, 10, 15)]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_image_too_large_for_memory_is_read_in_parts(suffix, tmp_path, monkeypatch):
    pytest.importorskip("rasterio")
    file = tmp_path / f"large{suffix}"
    Image.fromarray(rectangles(BOXES)).save(file, quality=100, subsampling=0)
    monkeypatch.setattr(images, "MAX_PIXELS", 400 * 300 - 1)
    for tile in (None, 400):  # a tile must not hold the whole image
        with pytest.raises(
            UserError, match=r"large.* the limit of .*: use --tile with a smaller SIZE"
        ):
            rectangle_detector(tile=tile)(file)
    found = rectangle_detector(tile=100)([file, rectangles({5: (3, 3, 20, 20)})])
    assert found_boxes(found[1]) == {(3, 3, 20, 20): "cat"}
    if suffix != ".jpg":  # whose levels differ slightly
        assert found_boxes(found[0]) == EXPECTED
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"large{suffix}"):
        rectangle_detector(tile=100)(file)
