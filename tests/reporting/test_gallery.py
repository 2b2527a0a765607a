import shutil

from helpers import rewrite, split_of
from report_helpers import results_in, two_epochs, write_output

from reporting import gallery


def test_images_are_chosen_by_their_errors(tiny, tmp_path):
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    # Image 100 has one error and nothing correct, 101 two errors, 102 one and one correct.
    assert gallery.choose_images(results) == {"best": [2], "worst": [1, 0], "random": []}


def test_images_without_errors_are_chosen_at_random(tiny, tmp_path):
    rewrite(split_of(tiny, "val"), lambda data: data.update(annotations=[]))
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny), ()))
    assert gallery.choose_images(results) == {"best": [], "worst": [], "random": [0, 1, 2]}


def test_image_card_summary_and_images(tiny, tmp_path):
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    card = gallery.build_card(results, 1)
    assert card["summary"] == ["1 correct", "1 missed (cat)", "1 false positive (cat 0.70)"]
    assert [image["label"] for image in card["images"]] == ["ground truth", "detections"]
    assert card["images"][0]["uri"].startswith("data:image/jpeg;base64,")
    other = gallery.build_card(results, 0)["summary"]
    assert other == ["0 correct", "1 wrong category (cat detected as dog 0.90)"]


def test_image_card_of_missing_image(tiny, tmp_path):
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    shutil.rmtree(tiny / "val2017")
    card = gallery.build_card(results, 1)
    assert card["images"] == []
    assert str(tiny / "val2017/1.png") in card["problem"]


def test_names_that_no_font_has_are_drawn_as_the_id(tiny, tmp_path):
    def rename(data):
        for row, name in zip(data["categories"], ("\U000f0000", "d\u00f6g"), strict=True):
            row["name"] = name  # of the area for private use

    rewrite(split_of(tiny, "val"), rename)
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    boxes, missed = gallery.label_ground_truth(results, 1)
    assert [text for _, text, _ in boxes] == ["d\u00f6g", "category 2, missed"]
    assert missed == ["\U000f0000"]  # in the page, whose reader may have a font
    boxes, texts = gallery.label_detections(results, 0)
    assert [text for _, text, _ in boxes] == ["d\u00f6g 0.90, is category 2"]
    assert texts["wrong category"] == ["\U000f0000 detected as d\u00f6g 0.90"]
