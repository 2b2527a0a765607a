import gc
import json

import numpy as np
import pytest
import torch
from helpers import rewrite, split_of
from PIL import Image

import coco_utils
from coco_utils import Categories, CocoDetection, CocoIndex
from internals import preemption
from internals.errors import DataError, ImageError, UnexpectedImageError
from internals.image_notes import PAGES


def dataset_of(root, split="train") -> CocoDetection:
    index = CocoIndex(split_of(root, split))
    return CocoDetection(index, index.categories)


# ---------------------------------------------------------------------------------- categories


def test_labels_are_contiguous_except_for_coco():
    custom = Categories.from_names({4: "WBC", 1: "Platelets", 3: "RBC"})
    assert custom.ids == (1, 3, 4)
    assert custom.labels == (1, 2, 3)
    assert custom.num_classes == 4
    coco = Categories.from_names({i: str(i) for i in coco_utils.COCO_CATEGORY_IDS})
    assert len(coco.ids) == 80
    assert coco.labels == coco.ids
    assert coco.num_classes == 91
    without_one = Categories.from_names({i: str(i) for i in coco.ids[:-1]})
    assert without_one.num_classes == 80


@pytest.mark.parametrize("ids", [(0, 7, 1000), (-1, 2), (5,), coco_utils.COCO_CATEGORY_IDS])
def test_category_ids_and_labels_round_trip(ids):
    categories = Categories.from_names({i: f"n{i}" for i in ids})
    labels = categories.labels_of(np.array(ids))
    assert (labels > 0).all()
    assert categories.ids_of_labels()[labels].tolist() == list(ids)
    assert categories.ids_of_labels()[0] == coco_utils.NO_CATEGORY
    assert categories.id_to_name == {i: f"n{i}" for i in ids}
    assert Categories.from_list(json.loads(json.dumps(categories.to_list()))) == categories


def test_check_contains_names_the_category(tmp_path):
    ours = Categories.from_names({1: "a", 2: "b"})
    ours.check_contains(Categories.from_names({2: "b"}), tmp_path)
    with pytest.raises(DataError, match=r"category 2 \('x'\).*category 2 is 'b'"):
        ours.check_contains(Categories.from_names({2: "x"}), tmp_path)


# --------------------------------------------------------------------------------------- index


def test_index_content(tiny):
    index = CocoIndex(split_of(tiny))
    assert len(index) == 8
    assert index.image_ids.tolist() == list(range(100, 108))
    assert index.file_name(3) == "3.png"
    assert index.sizes[1].tolist() == [48, 64]
    assert index.boxes[index.box_range(1)].tolist() == [[10, 8, 20, 30], [0, 0, 12, 16]]
    assert index.category_ids[index.box_range(1)].tolist() == [5, 2]
    assert index.areas[index.box_range(1)].tolist() == [600, 192]


def test_targets_exclude_crowds_and_empty_boxes(tiny):
    split = split_of(tiny)

    def change(data):
        data["annotations"][0]["iscrowd"] = 1
        data["annotations"][1]["bbox"] = [5, 5, 0, 10]

    rewrite(split, change)
    index = CocoIndex(split)
    assert 0 not in index.images_with_boxes()
    target = CocoDetection(index, index.categories)[1][1]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["area"]) == 1
    assert target["labels"].tolist() == [1]
    empty = CocoDetection(index, index.categories)[0][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["boxes"].dtype == torch.float32


def test_annotations_are_ordered_by_image(tiny):
    split, rng = split_of(tiny), np.random.default_rng(0)
    rows = [
        {"id": n, "image_id": int(rng.integers(98, 108)), "category_id": int(rng.choice([2, 5]))}
        | {"bbox": rng.random(4).tolist(), "area": float(n % 7), "iscrowd": int(n % 3)}
        for n in range(500)
    ]
    rewrite(split, lambda data: data.update(annotations=rows))
    index = CocoIndex(split)
    kept = sorted((r for r in rows if r["image_id"] >= 100), key=lambda r: r["image_id"])
    unlisted = [r for r in rows if r["image_id"] < 100]
    assert index.annotation_ids.tolist() == [r["id"] for r in kept]
    assert index.category_ids.tolist() == [r["category_id"] for r in kept]
    assert index.boxes.tolist() == [r["bbox"] for r in kept]
    assert index.areas.tolist() == [r["area"] for r in kept]
    assert index.iscrowd.tolist() == [r["iscrowd"] > 0 for r in kept]
    assert index.image_ids[index.image_of_rows()].tolist() == [r["image_id"] for r in kept]
    (issue,) = index.issues
    assert issue.count == len(unlisted) > 20
    assert issue.examples == [
        f"annotation {r['id']} of image {r['image_id']}" for r in unlisted[:20]
    ]


def test_positions_of_negative_and_large_ids(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)

    def change(data):
        data["images"][0]["id"] = data["annotations"][0]["image_id"] = -(2**50)

    rewrite(split, change)
    index = CocoIndex(split)
    assert np.array_equal(index.boxes, before.boxes)
    for each in (before, index):
        positions = each.positions_of(np.array([103, 5, 2**52, -(2**51), 107, each.image_ids[0]]))
        assert positions.tolist() == [3, -1, -1, -1, 7, 0]


def test_index_arrays_are_compact(tiny):
    arrays = [v for v in vars(CocoIndex(split_of(tiny))).values() if isinstance(v, np.ndarray)]
    assert len(arrays) == 11
    for array in arrays:
        assert array.dtype != object
        assert array.base is None or array.base.nbytes <= 1.25 * array.nbytes + 8


def test_without_equals_index_of_reduced_file(tiny):
    split = split_of(tiny)
    reduced = CocoIndex(split).without([1, 6])

    def change(data):
        data["images"] = [row for row in data["images"] if row["id"] not in (101, 106)]
        data["annotations"] = [
            row for row in data["annotations"] if row["image_id"] not in (101, 106)
        ]

    rewrite(split, change)
    expected = CocoIndex(split)
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(reduced, name), value), name
    assert len(reduced.without([])) == len(reduced) == 6


def test_fingerprint_is_stable(tiny):
    assert CocoIndex(split_of(tiny)).fingerprint() == "f0c34824eda642cf6a73d3f11747be24"


# ---------------------------------------------------------------------------- images and targets


def test_read_image_checks_size(tiny):
    rewrite(split_of(tiny), lambda data: data["images"][1].update(width=47))
    index = CocoIndex(split_of(tiny))
    assert index.read_image(0).shape == (3, 48, 64)
    with pytest.raises(DataError, match=r"1\.png is 48 x 64 pixels, but annotated as 47 x 64"):
        index.read_image(1)


def test_target_has_torchvision_format(tiny):
    image, target = dataset_of(tiny)[1]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 64, 48)
    expected = np.asarray(Image.open(tiny / "train2017/1.png")).transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)
    assert target["boxes"].tolist() == [[10, 8, 30, 38], [0, 0, 12, 16]]
    assert target["labels"].tolist() == [2, 1]
    assert target["image_id"] == 101
    assert {k: v.dtype for k, v in target.items() if k != "image_id"} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "area": torch.float32,
        "iscrowd": torch.int64,
    }


def test_boxes_are_clipped_to_image(tiny):
    rewrite(split_of(tiny), lambda d: d["annotations"][0].update(bbox=[-5, 10, 200, 500]))
    assert dataset_of(tiny)[0][1]["boxes"].tolist() == [[0, 10, 64, 48]]


@pytest.mark.parametrize("thin", [[30, 8, 0.09, 9], [63.95, 8, 20, 9], [30, 8, 9, 1e-9]])
def test_slivers_neither_train_nor_count(tiny, thin):
    rewrite(split_of(tiny), lambda d: d["annotations"][1].update(bbox=thin))
    dataset = dataset_of(tiny)
    assert dataset[1][1]["boxes"].tolist() == [[0, 0, 12, 16]]
    assert 1 not in dataset.index.ground_truth().rows
    dataset.index.as_annotated = True
    assert 1 in dataset.index.ground_truth().rows


def test_worker_error_has_no_traceback(tiny):
    (tiny / "train2017/0.png").write_bytes(b"no image")
    loader = torch.utils.data.DataLoader(dataset_of(tiny), num_workers=1)
    try:
        list(loader)
        message = ""
    except DataError as error:
        message = str(error)
    preemption.kill_workers()  # under xdist a worker takes long to exit
    gc.collect()
    assert message.startswith(str(tiny / "train2017/0.png"))
    assert "Traceback" not in message
    assert "--max-bad-images" in message


def error_of_loader(dataset: CocoDetection, workers: int) -> Exception:
    """Return what a loader raises for the first image, as in training."""
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, sampler=[(0, 1)])
    try:
        list(loader)
    except Exception as error:
        return error
    finally:
        preemption.kill_workers()
        gc.collect()
    raise AssertionError("no error")


class Reject(torch.nn.Module):
    """An augmentation that raises an error."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def forward(self, *_):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_augmentation_names_the_image(tiny, workers):
    dataset, name = dataset_of(tiny), f"{tiny / 'train2017/0.png'} (id 100)"
    dataset.augmentation = Reject(KeyError("bbox"))
    error = error_of_loader(dataset, workers)
    assert type(error) is UnexpectedImageError
    assert str(error) == f"{name} cannot be loaded: KeyError: 'bbox'"
    assert ("in forward" in error.worker_traceback) == (workers > 0)
    dataset.augmentation = Reject(MemoryError())
    error = error_of_loader(dataset, workers)
    assert type(error) is ImageError
    assert str(error).startswith(f"{name}: out of memory: lower --workers")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_reported_with_others(tiny, workers):
    for n in (0, 3, 5):
        (tiny / f"train2017/{n}.png").write_bytes(b"no image")
    message = str(error_of_loader(dataset_of(tiny), workers))
    assert message.startswith(f"{tiny / 'train2017/0.png'} cannot be read")
    assert "--max-bad-images 3" in message
    listed = message.partition("Of the next 7 images 2 more:")[2].strip().splitlines()
    assert [line.split(":")[0].strip() for line in listed] == ["image 103", "image 105"]


def test_notes_on_images_reach_the_batch(tiny):
    file = tiny / "train2017/0.png"
    image = Image.open(file)
    image.save(file, save_all=True, append_images=[image])
    dataset = dataset_of(tiny)
    samples = [dataset[0], dataset[1]]
    assert "notes" not in samples[1][1]
    assert coco_utils.collate(samples).notes == [(PAGES, str(file))]
