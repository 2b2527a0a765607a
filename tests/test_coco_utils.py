import gc
import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import rewrite, split_of
from PIL import Image

import coco_utils
from coco_utils import Categories, CocoDetection, CocoIndex, Split
from internals import preemption
from internals.errors import DataError


def dataset_of(root, part="train") -> CocoDetection:
    index = CocoIndex(split_of(root, part))
    return CocoDetection(index, index.categories)


# ------------------------------------------------------------------------------------- finding


def test_both_layouts_and_explicit_paths_are_found(tiny, tmp_path):
    assert coco_utils.find_split(tiny, "val", None, None) == split_of(tiny, "val")
    for folder in ("train", "valid"):
        (tmp_path / "export" / folder).mkdir(parents=True)
        (tmp_path / "export" / folder / "_annotations.coco.json").touch()
    home = tmp_path / "export" / "valid"
    found = coco_utils.find_split(tmp_path / "export", "val", None, None)
    assert found == Split(home / "_annotations.coco.json", home)
    explicit = split_of(tiny, "train")
    assert coco_utils.find_split(tmp_path / "nowhere", "val", *explicit) == explicit


def test_missing_data_says_what_was_looked_for_and_the_ways_on(tmp_path):
    with pytest.raises(DataError) as caught:
        coco_utils.find_split(tmp_path, "val", None, None)
    message = str(caught.value)
    for part in ("instances_val2017.json (missing)", "valid", "download_coco.sh", "quickstart.sh"):
        assert part in message
    with pytest.raises(DataError, match="belong together"):
        coco_utils.find_split(tmp_path, "val", tmp_path / "a.json", None)


# ---------------------------------------------------------------------------------- categories


def test_labels_leave_no_gaps_but_for_coco_itself():
    own = Categories.from_names({4: "WBC", 1: "Platelets", 3: "RBC"})
    assert own.ids == (1, 3, 4)
    assert own.labels == (1, 2, 3)
    assert own.num_classes == 4
    coco = Categories.from_names({i: str(i) for i in coco_utils.COCO_CATEGORY_IDS})
    assert len(coco.ids) == 80
    assert coco.labels == coco.ids
    assert coco.num_classes == 91
    part = Categories.from_names({i: str(i) for i in coco.ids[:-1]})
    assert part.num_classes == 80


@pytest.mark.parametrize("ids", [(0, 7, 1000), (5,), coco_utils.COCO_CATEGORY_IDS])
def test_ids_become_labels_and_ids_again(ids):
    categories = Categories.from_names({i: f"n{i}" for i in ids})
    labels = categories.labels_of(np.array(ids))
    assert (labels > 0).all()
    assert categories.ids_of_labels()[labels].tolist() == list(ids)
    assert categories.ids_of_labels()[0] == -1
    assert Categories.from_list(json.loads(json.dumps(categories.to_list()))) == categories


def test_other_categories_are_refused_by_name(tmp_path):
    ours = Categories.from_names({1: "a", 2: "b"})
    ours.check_contains(Categories.from_names({2: "b"}), tmp_path)
    with pytest.raises(DataError, match=r"category 2 \('x'\).*category 2 is 'b'"):
        ours.check_contains(Categories.from_names({2: "x"}), tmp_path)


# --------------------------------------------------------------------------------------- index


def test_the_index_has_what_the_file_says(tiny):
    index = CocoIndex(split_of(tiny))
    assert len(index) == 8
    assert index.image_ids.tolist() == list(range(100, 108))
    assert index.file_name(3) == "3.png"
    assert index.sizes[1].tolist() == [48, 64]
    assert index.boxes[index.box_range(1)].tolist() == [[10, 8, 20, 30], [0, 0, 12, 16]]
    assert index.category_ids[index.box_range(1)].tolist() == [5, 2]
    assert index.areas[index.box_range(1)].tolist() == [600, 192]


def test_annotations_need_not_be_in_order_nor_complete(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)

    def change(data):
        data["annotations"].reverse()
        for row in data["annotations"]:
            del row["area"], row["iscrowd"], row["id"]
            row["segmentation"] = {"counts": "abc", "size": [1, 1]}
        data["info"] = {"anything": [1, None]}

    rewrite(split, change)
    after = CocoIndex(split)
    assert np.array_equal(before.offsets, after.offsets)
    assert np.array_equal(before.areas, after.areas[::1].reshape(-1)[np.argsort(_rows(after))])
    assert not after.iscrowd.any()
    assert (after.annotation_ids == -1).all()


def _rows(index) -> np.ndarray:
    """Sorts the boxes of each image back into the order of the file."""
    order = []
    for i in range(len(index)):
        rows = range(len(index.boxes))[index.box_range(i)]
        order += [rows[0] + n for n in reversed(range(len(rows)))]
    return np.array(order)


def test_crowds_and_boxes_without_a_size_do_not_train(tiny):
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


@pytest.mark.parametrize("decoder", ["msgspec", "python"])
def test_any_decoder_gives_the_same_index(tiny, decoder, monkeypatch):
    split = split_of(tiny)

    def change(data):
        data["annotations"][0].update(area=None, iscrowd=1, segmentation=[[1, 2, 3]])
        data["categories"][0]["name"] = None
        data["images"][0]["id"] = data["annotations"][0]["image_id"] = 2**53

    rewrite(split, change)
    if decoder == "python":
        monkeypatch.setattr(coco_utils, "msgspec", None)
    else:
        pytest.importorskip("msgspec")
        monkeypatch.setattr(coco_utils, "_read_leniently", None)
    index = CocoIndex(split)
    assert index.image_ids[:2].tolist() == [2**53, 101]
    assert index.boxes.dtype == index.areas.dtype == np.float64
    assert index.boxes[:2].tolist() == [[4, 4, 30, 20], [10, 8, 20, 30]]
    assert index.areas[:2].tolist() == [600, 600]
    assert index.iscrowd[:2].tolist() == [True, False]
    assert index.categories.names == ("category 2", "dog")
    assert index.faults == []


def shuffled(data: dict, order: str, indent: int | None) -> str:
    """The file with its lists in another order, and with lists and brackets that may mislead."""
    data["images"][0]["note"] = 'ends like this: }], "annotations": [{'
    data["annotations"][3]["segmentation"] = [{"x": [1]}, {"x": [2]}]
    data["categories"][0]["skeleton"] = [[1, 2], [3]]
    data["licenses"] = [{"id": 1}, {"id": 2, "annotations": []}]
    return json.dumps({key: data[key] for key in order.split()}, indent=indent)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "order",
    [
        "images annotations categories licenses",
        "licenses categories annotations images",
        "categories images licenses annotations",
        "annotations categories images",
    ],
)
def test_lists_may_come_in_any_order_and_format(tiny, order, indent, monkeypatch):
    split = split_of(tiny)
    expected = vars(CocoIndex(split))
    split.annotations.write_text(shuffled(json.loads(split.annotations.read_text()), order, indent))
    for part in (1, 300, 2**20):
        monkeypatch.setattr(coco_utils, "PART", part)
        for name, value in vars(CocoIndex(split)).items():
            assert np.array_equal(value, expected[name]), name


@pytest.mark.parametrize("after", ["licenses", "categories licenses", "licenses videos info"])
def test_other_lists_after_the_annotations_cost_no_speed(tiny, after, monkeypatch):
    pytest.importorskip("msgspec")
    split = split_of(tiny)
    expected = CocoIndex(split)
    data = json.loads(split.annotations.read_text())
    others = {"licenses": [{"id": 1}], "videos": [{"id": n} for n in range(9)], "info": {"a": [1]}}
    order = ["images", "categories", "annotations", *after.split()]
    order = [key for n, key in enumerate(order) if key not in order[n + 1 :]]
    split.annotations.write_text(json.dumps({key: {**data, **others}[key] for key in order}))
    monkeypatch.setattr(coco_utils, "_read_leniently", None)
    for part in (100, 2**20):
        monkeypatch.setattr(coco_utils, "PART", part)
        index = CocoIndex(split)
        assert index.fingerprint() == expected.fingerprint()
        assert index.faults == []


def test_a_large_file_is_decoded_by_several_processes(tiny, monkeypatch):
    pytest.importorskip("msgspec")
    split = split_of(tiny)

    def grow(data):
        rows = data["annotations"]
        data["annotations"] = [{**row, "id": n} for n, row in enumerate(rows * 40)]

    rewrite(split, grow)
    whole = vars(CocoIndex(split))
    used = []
    copies = coco_utils._copies
    monkeypatch.setattr(coco_utils, "PART", 500)
    monkeypatch.setattr(coco_utils.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(coco_utils.sys, "platform", "linux")
    monkeypatch.setattr(coco_utils, "_read_leniently", None)
    monkeypatch.setattr(coco_utils, "_copies", lambda *a: used.append(a[2]) or copies(*a))
    for name, value in vars(CocoIndex(split)).items():
        assert np.array_equal(value, whole[name]), name
    assert used == [3]
    assert len(whole["boxes"]) == 480


def raise_at(span: tuple[int, int]) -> dict:
    if span == (3, 4):
        raise ValueError("no number")
    return {"a": np.zeros(100_000)}


def die_at(span: tuple[int, int]) -> dict:
    if span == (3, 4):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"a": np.zeros(100_000)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads in one process elsewhere")
@pytest.mark.parametrize(("decode", "error"), [(raise_at, ValueError), (die_at, EOFError)])
def test_a_reading_process_that_fails_or_is_killed_ends_all(decode, error):
    spans = [(i, i + 1) for i in range(20)]
    with pytest.raises(error), coco_utils._copies(decode, spans, 3) as pipes:
        list(coco_utils._received(pipes, len(spans)))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("lengths", [[0], [3], [0, 2, 0], [1, 1, 1], [1, 50, 2, 700], [9, 0, 1]])
def test_parts_of_any_length_are_joined(lengths):
    rng = np.random.default_rng(0)
    parts = [{"image_id": rng.integers(9, size=n), "bbox": rng.random((n, 4))} for n in lengths]
    for name, column in coco_utils._joined(iter(parts), len(parts)).items():
        whole = np.concatenate([part[name] for part in parts])
        assert np.array_equal(column, whole), name
        assert column.dtype == whole.dtype


@pytest.mark.skipif(sys.platform != "linux", reason="reads in one process elsewhere")
def test_a_reading_process_killed_within_a_message_is_noticed():
    with coco_utils._copies(raise_at, [(i, i + 1) for i in range(5, 25)], 2) as pipes:
        parts = coco_utils._received(pipes, 20)
        next(parts)
        for copy in multiprocessing.active_children():  # each waits to send more than a pipe holds
            copy.kill()
            copy.join()
        with pytest.raises(EOFError):
            list(parts)


@pytest.mark.skipif(sys.platform != "linux", reason="reads in one process elsewhere")
def test_a_killed_reading_process_is_said(tiny, monkeypatch):
    pytest.importorskip("msgspec")
    monkeypatch.setattr(coco_utils, "PART", 30)
    monkeypatch.setattr(coco_utils.os, "cpu_count", lambda: 2)
    here, decode = os.getpid(), coco_utils._decode_part

    def die_elsewhere(*args):
        return decode(*args) if os.getpid() == here else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(coco_utils, "_decode_part", die_elsewhere)

    def grow(data):
        data["annotations"] = data["annotations"] * 10

    rewrite(split_of(tiny), grow)
    with pytest.raises(DataError, match=r"json: a process that read it was killed"):
        CocoIndex(split_of(tiny))


@pytest.mark.parametrize("step", [1, 2**40])  # ids close together, and too far apart for a table
def test_rows_are_put_in_the_order_of_their_images(step):
    rng = np.random.default_rng(0)
    index = CocoIndex.__new__(CocoIndex)
    index.image_ids = rng.permutation(3000)[:1000] * step
    count = 2**18 + 5000  # more than are looked up at a time
    column = rng.integers(3000, size=count) * step
    places = {i: n for n, i in enumerate(index.image_ids.tolist())}
    positions = np.array([places.get(i, -1) for i in column.tolist()])
    rows, starts = index._by_image(column)
    assert np.array_equal(rows, np.argsort(positions, kind="stable"))
    assert np.array_equal(starts, np.searchsorted(np.sort(positions), np.arange(1001)))
    assert starts[0] == (positions < 0).sum() > 0
    rows, starts = index._by_image(column[:0])
    assert (rows.tolist(), starts.any()) == ([], False)


def test_every_column_is_put_in_the_order_of_the_images(tiny):
    split, rng = split_of(tiny), np.random.default_rng(0)
    rows = [
        {"id": n, "image_id": int(rng.integers(98, 108)), "category_id": int(rng.choice([2, 5]))}
        | {"bbox": rng.random(4).tolist(), "area": float(n % 7), "iscrowd": int(n % 3)}
        for n in range(500)
    ]
    rewrite(split, lambda data: data.update(annotations=rows))
    index = CocoIndex(split)
    kept = sorted((r for r in rows if r["image_id"] >= 100), key=lambda r: r["image_id"])
    lost = [r for r in rows if r["image_id"] < 100]
    assert index.annotation_ids.tolist() == [r["id"] for r in kept]
    assert index.category_ids.tolist() == [r["category_id"] for r in kept]
    assert index.boxes.tolist() == [r["bbox"] for r in kept]
    assert index.areas.tolist() == [r["area"] for r in kept]
    assert index.iscrowd.tolist() == [r["iscrowd"] > 0 for r in kept]
    assert index.image_ids[index.image_of_rows()].tolist() == [r["image_id"] for r in kept]
    (fault,) = index.faults
    assert fault.count == len(lost) > 20
    assert fault.found == [f"{r['id']} of image {r['image_id']}" for r in lost[:20]]


def test_what_is_wrong_with_an_image_ends_the_search_for_the_annotations(tiny, monkeypatch):
    pytest.importorskip("msgspec")
    split, tried, without = split_of(tiny), [], coco_utils._without
    rewrite(split, lambda data: data["images"][-1].update(height=None))
    monkeypatch.setattr(coco_utils, "_without", lambda *a: tried.append(a) or without(*a))
    assert str(CocoIndex(split).faults[0]).startswith("images without 'height' (1): id 107.")
    assert len(tried) == 1


def test_ids_far_apart_are_found_as_well(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)

    def change(data):
        data["images"][0]["id"] = data["annotations"][0]["image_id"] = -(2**50)

    rewrite(split, change)
    index = CocoIndex(split)
    assert np.array_equal(index.boxes, before.boxes)
    for some in (before, index):
        looked_up = some.positions_of(np.array([103, 5, 2**52, -(2**51), 107, some.image_ids[0]]))
        assert looked_up.tolist() == [3, -1, -1, -1, 7, 0]


def test_numbers_of_other_types_are_read_where_they_fit(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)

    def change(data):
        for row in data["annotations"]:
            row.update(image_id=str(row["image_id"]), bbox=[str(x) for x in row["bbox"]])
            row.update(iscrowd=None, category_id=float(row["category_id"]))

    rewrite(split, change)
    after = CocoIndex(split)
    for name in ("boxes", "category_ids", "image_ids", "offsets", "iscrowd"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


def test_no_python_object_is_kept_for_an_annotation(tiny):
    arrays = [v for v in vars(CocoIndex(split_of(tiny))).values() if isinstance(v, np.ndarray)]
    assert len(arrays) == 10
    for array in arrays:
        assert array.dtype != object
        assert array.base is None or array.base.nbytes <= 1.25 * array.nbytes + 8


def test_images_can_be_taken_out_as_if_they_had_never_been_listed(tiny):
    split = split_of(tiny)
    less = CocoIndex(split).without([1, 6])

    def change(data):
        data["images"] = [row for row in data["images"] if row["id"] not in (101, 106)]
        data["annotations"] = [
            row for row in data["annotations"] if row["image_id"] not in (101, 106)
        ]

    rewrite(split, change)
    expected = CocoIndex(split)
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(less, name), value), name
    assert len(less.without([])) == len(less) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(categories=[]), "has no categories"),
        (lambda data: data.pop("categories"), "has no list 'categories'"),
        (lambda data: data.update(images=[], annotations=[]), "lists no images"),
        (
            lambda data: [row.pop("width") for row in data["images"]],
            r"images without 'width' \(8\)",
        ),
        (
            lambda data: [row.update(file_name="\ud800") for row in data["images"]],
            r"images whose 'file_name' is not a text \(8\)",
        ),
        (lambda data: data["categories"].append({"id": 2}), "two categories with the same id"),
    ],
)
def test_a_file_without_what_is_needed_is_refused(tiny, change, message):
    split = split_of(tiny)
    rewrite(split, change)
    with pytest.raises(DataError, match=message) as caught:
        CocoIndex(split)
    assert str(split.annotations) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "not valid JSON"),
        (b"[]", "holds a list at its top level"),
        (b'{"images": "\xff"}', "not UTF-8"),
        (b"", "is empty"),
    ],
)
def test_files_that_are_no_annotations_are_named(tiny, content, message):
    split = split_of(tiny)
    split.annotations.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        CocoIndex(split)
    assert str(split.annotations) in str(caught.value)


# -------------------------------------------------------------------------------------- images


def test_a_target_is_as_torchvision_wants_it(tiny):
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


def test_boxes_are_clipped_to_the_picture(tiny):
    rewrite(split_of(tiny), lambda d: d["annotations"][0].update(bbox=[-5, 10, 200, 500]))
    assert dataset_of(tiny)[0][1]["boxes"].tolist() == [[0, 10, 64, 48]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((4, 6), 255, dtype=np.uint8))
    file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    grey.convert("RGB").convert(mode).save(file)
    image = coco_utils.read_image(file, 6, 4)
    assert image.shape == (3, 4, 6)
    assert image.min() >= 250


def test_16_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    image = coco_utils.read_image(tmp_path / "x.png", 16, 16)
    assert torch.equal(image[0], image[2])
    assert image[0].flatten().tolist() == (ramp.flatten() >> 8).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_where_the_size_says_so(tmp_path, orientation):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:8, :8] = 255  # a white corner, to see what was turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    turned = orientation >= 5
    upright = coco_utils.read_image(tmp_path / "x.png", *((20, 30) if turned else (30, 20)))
    corners = [upright[0, 0, 0], upright[0, 0, -1], upright[0, -1, -1], upright[0, -1, 0]]
    # Where the first row and column of the file belong, by the EXIF standard.
    where = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert [int(c) for c in corners].index(255) == where
    if turned:  # the other size says that the boxes belong to the file as it is stored
        raw = coco_utils.read_image(tmp_path / "x.png", 30, 20)
        assert np.array_equal(raw.permute(1, 2, 0).numpy(), pixels)
    # Without a stated size the picture is what a viewer shows.
    assert torch.equal(coco_utils.read_upright(tmp_path / "x.png"), upright)


def test_a_square_picture_is_turned_as_well(tmp_path):
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    for image in (
        coco_utils.read_upright(tmp_path / "x.png"),
        coco_utils.read_image(tmp_path / "x.png", 20, 20),
    ):
        assert image[0, 0, -1] == 255
        assert image[0, 0, 0] == 0


def test_a_picture_of_no_stated_size_is_refused_for_the_same_reasons(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, message in (("huge", "pixels is more than"), ("broken", "cannot be read as an im")):
        with pytest.raises(DataError, match=message):
            coco_utils.read_upright(tmp_path / f"{name}.png")


def test_bad_pictures_are_named(tmp_path):
    file = tmp_path / "x.png"
    with pytest.raises(DataError, match=r"x\.png cannot be read.*No such file"):
        coco_utils.read_image(file, 4, 4)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.png cannot be read"):
        coco_utils.read_image(file, 4, 4)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    with pytest.raises(DataError, match=r"is 50 x 50 pixels, its annotation file says 4 x 4"):
        coco_utils.read_image(file, 4, 4)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"x\.png cannot be read.*truncated"):
        coco_utils.read_image(file, 50, 50)


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_huge_pictures_are_refused_before_decoding(side, tmp_path):
    Image.new("1", (side, side)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=f"{side} x {side} pixels is more than"):
        coco_utils.read_image(tmp_path / "x.png", side, side)


def test_image_files_are_found_below_a_folder_once_and_in_order(tmp_path):
    for name in ("b.jpg", "a.PNG", "c d/[1].tiff", "notes.txt", "._a.png", ".hidden/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c d/round").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in coco_utils.image_files(tmp_path)]
    assert found == ["a.PNG", "b.jpg", "c d/[1].tiff"]
    assert coco_utils.image_files(tmp_path / "nowhere") == []


def test_an_error_of_a_loading_process_keeps_only_its_own_words(tiny):
    (tiny / "train2017/0.png").write_bytes(b"no picture")
    loader = torch.utils.data.DataLoader(dataset_of(tiny), num_workers=1)
    try:
        list(loader)
        said = ""
    except DataError as error:
        said = str(error)
    preemption.kill_workers()  # under xdist a loading process takes long to end by itself
    gc.collect()
    assert said.startswith(str(tiny / "train2017/0.png"))
    assert "Traceback" not in said
    assert "--max-bad-images" in said
