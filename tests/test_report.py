import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, rewrite, run, split_of

import coco_eval
import report
from coco_utils import CocoIndex
from internals.errors import UserError
from reporting import analysis

pytest.importorskip("matplotlib")

# The pictures of `tiny` for validation are 100 (a cat), 101 (a dog and a cat) and 102 (a cat).
DETECTIONS = (
    (100, 5, [4, 4, 30, 20], 0.9),  # a cat, called a dog
    (100, 2, [4, 4, 30, 20], 0.3),  # the same cat by its name, but not sure enough
    (101, 5, [10, 8, 20, 30], 0.8),  # right
    (101, 2, [30, 40, 10, 10], 0.7),  # nothing is there; the cat is missed
    (102, 2, [4, 4, 30, 20], 0.95),  # right
    (102, 2, [5, 4, 30, 20], 0.6),  # the same cat once more
)
FIGURES = {"loss", "parts", "ap", "rate", "precision50", "precision75", "sizes"}


def start_line(tiny: Path, **changes) -> dict:
    args = {"data_path": str(tiny), "model": "fasterrcnn_resnet50_fpn", "epochs": 2, "lr": 0.02}
    args |= {"batch_size": 2, "opt": "sgd", "lr_scheduler": "multisteplr", "lr_steps": [1, 2]}
    return {
        "kind": "start",
        "args": args | changes,
        "versions": {"torch": "2.11.0"},
        "device": "cpu (x86_64)",
        "world_size": 1,
        "precision": "float32",
        "train_images": 8,
        "val_images": 3,
        "categories": [{"id": 2, "name": "cat", "label": 1}, {"id": 5, "name": "dog", "label": 2}],
    }


def train_line(step: int, **values) -> dict:
    losses = {"loss": 1 / step, "loss_classifier": 0.6 / step, "loss_box_reg": 0.4 / step}
    line = {"kind": "train", "epoch": (step - 1) // 4, "step": step, "lr": 0.02, **losses}
    return {**line, "images_per_second": 5.0, "peak_memory_mib": 1000, **values}


def eval_line(tiny: Path, after: int, detections=DETECTIONS, **values) -> dict:
    """The evaluation after the epoch `after`, as train.py writes it."""
    index = CocoIndex(split_of(tiny, "val"))
    numbers = coco_eval.evaluate_detections(index, rows_of(detections), "pycocotools")
    return {"kind": "eval", "epoch": after, "step": 4 * (after + 1), **numbers, **values}


def rows_of(detections) -> np.ndarray:
    rows = [(i, *box, score, c) for i, c, box, score in detections]
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def put(folder: Path, lines: list[dict], detections=DETECTIONS) -> Path:
    """An output folder with these lines and, unless None, detections."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if detections is not None:
        coco_eval.write_results(rows_of(detections), folder / "detections.json")
    return folder


def usual_lines(tiny: Path) -> list[dict]:
    steps = [train_line(step) for step in range(1, 9)]
    evals = [eval_line(tiny, 0, AP=0.1), eval_line(tiny, 1)]
    end = {"kind": "end", "best_AP": evals[1]["AP"], "seconds": 3725.0}
    return [start_line(tiny), *steps[:4], evals[0], *steps[4:], evals[1], end]


@pytest.fixture
def output(tiny, tmp_path) -> Path:
    """The output folder of a training of two epochs."""
    return put(tmp_path / "out", usual_lines(tiny))


def page(folder: Path) -> str:
    return report.write(folder).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def figures_in(html: str) -> set[str]:
    return set(re.findall(r'<svg role="img" aria-labelledby="(\w+)-title"', html))


def results_of(folder: Path) -> analysis.Results:
    return analysis.read_results(folder, analysis.read_record(folder / "metrics.jsonl"))


# ------------------------------------------------------------------------------- what is counted


def test_the_confusion_matrix_is_that_counted_by_hand(output):
    results = results_of(output)
    # rows: cat, dog, nothing there; columns: cat, dog, missed
    assert analysis.confusion(results).tolist() == [[1, 1, 1], [0, 1, 0], [2, 0, 0]]
    counts = results.counts()
    assert counts["true"] == 4
    assert counts["found"] == 5
    assert (counts["right"], counts["mixed_up"]) == (2, 1)
    assert (counts["false"], counts["missed"]) == (2, 1)
    text = text_of(page(output))
    assert "found 5 boxes with a score of 0.5 or more: 2 are right, 1 have a wrong name" in text
    assert "50% of the true boxes found" in text
    assert "40% of the found boxes right" in text


def test_recall_by_size_is_that_counted_by_hand(output):
    results = results_of(output)
    assert results.found_at.tolist()[:2] == [0.3, 0.8]
    assert np.isnan(results.found_at[2])
    sides = np.sqrt(results.index.boxes[:, 2:].prod(axis=1))  # three of 24.5 and one of 13.9
    edges, total, sure, found = analysis.recall_by_size(sides, results.found_at)
    assert edges == pytest.approx([2**3.5, 16, 2**4.5, 32])
    assert total.tolist() == [1, 0, 3]
    assert sure.tolist() == [0, 0, 2]
    assert found.tolist() == [0, 0, 3]


def test_a_side_of_32_counts_as_medium():
    edges, total, *_ = analysis.recall_by_size(np.array([31.9, 32.0]), np.full(2, np.nan))
    assert dict(zip(edges.tolist(), total.tolist(), strict=False))[32.0] == 1


def test_what_is_in_a_crowd_counts_neither_way(tiny, output):
    def change(data):
        data["annotations"][0]["iscrowd"] = 1  # the cat of image 100

    rewrite(split_of(tiny, "val"), change)
    put(output, usual_lines(tiny), (*DETECTIONS, (100, 2, [6, 6, 9, 9], 0.99)))
    results = results_of(output)
    assert analysis.confusion(results).tolist() == [[1, 0, 1], [0, 1, 0], [2, 1, 0]]
    assert results.counts()["crowds"] == 1
    assert results.counts()["found"] == 5


def test_the_most_confused_categories():
    matrix = np.array([[9, 0, 0, 50], [0, 9, 2, 0], [1, 0, 9, 0], [70, 0, 0, 0]])
    assert analysis.most_confused(matrix, 2).tolist() == [1, 2]
    pairs = report.mixed_up_pairs(matrix, ("a", "b", "c"))
    assert pairs == [
        {"true": "b", "found": "c", "count": 2},
        {"true": "c", "found": "a", "count": 1},
    ]


def test_many_categories_show_the_most_confused_ones(tiny, output):
    def change(data):
        data["categories"] += [{"id": i, "name": f"thing {i}"} for i in range(6, 40)]

    rewrite(split_of(tiny, "val"), change)
    html = page(output)
    assert "Of 36 categories, the 20 that are mixed up most are shown" in text_of(html)
    assert "cat found as dog: 1" in text_of(html)
    header = re.search(r'<table class="matrix wide">.*?</thead>', html, re.DOTALL)[0]
    assert header.count('scope="col"') == 21


def test_pictures_are_chosen_by_their_mistakes(output):
    results = results_of(output)
    chosen = report.choose_pictures(results)
    # Image 100 has one mistake and nothing right, 101 has two, 102 one and one right.
    assert chosen == {"best": [2], "worst": [1, 0], "random": []}
    card = report.card(results, 1)
    assert card["said"] == ["1 right", "1 missed (cat)", "1 false (cat 0.70)"]
    assert [picture["label"] for picture in card["pictures"]] == ["truth", "found"]
    assert card["pictures"][0]["uri"].startswith("data:image/jpeg;base64,")
    assert report.card(results, 0)["said"] == [
        "0 right",
        "1 with a wrong name (cat called dog 0.90)",
    ]


# ------------------------------------------------------------------------------------- the page


def test_a_whole_report(output):
    html = page(output)
    assert figures_in(html) == FIGURES
    assert html.count("data:image/jpeg;base64,") == 6
    text = text_of(html)
    assert "trained to find 2 categories in 8 pictures; after 8 steps" in text
    assert "last and best, epoch" in text.replace("\u00a0", " ")
    assert "AP, large boxes (area over 96 x 96) - " in text  # absent
    assert "1 h 2 min, evaluations included" in text
    assert "Worth knowing" not in text
    assert len(re.sub(r"base64,[^\"]+", "", html)) < 150_000


def test_ids_are_unique_and_references_have_their_target(output):
    html = page(output)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert len(ids) > 100
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert {a or b for a, b in used} <= set(ids)


class Addresses(HTMLParser):
    """Every address that a page loads or points to, and its tags."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        named = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.found += [value for name, value in attrs if name in named]


def test_the_page_needs_nothing_but_itself(output):
    html = page(output)
    parser = Addresses()
    parser.feed(html)
    assert len(parser.found) > 20
    assert all(re.match(r"(data:|#)", address) for address in parser.found)
    assert not parser.tags & {"script", "iframe", "object", "embed", "form", "base"}
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert "width=device-width" in html


def test_strange_names_stay_text(tiny, tmp_path):
    evil = {"cat": "<script>alert(1)</script>", "dog": "_$x_{1}$ \u732b"}

    def change(data):
        for row in data["categories"]:
            row["name"] = evil[row["name"]]
        data["images"][1]["file_name"] = '"><img src=x onerror=alert(1)>.png'

    rewrite(split_of(tiny, "val"), change)
    folder = tiny / "val2017"
    (folder / "1.png").rename(folder / '"><img src=x onerror=alert(1)>.png')
    lines = usual_lines(tiny)
    lines[0]["categories"] = [{"id": 2, "name": evil["cat"]}, {"id": 5, "name": evil["dog"]}]
    lines[0]["args"]["resume"] = None
    html = page(put(tmp_path / "<b>out", lines))
    parser = Addresses()
    parser.feed(html)
    assert "script" not in parser.tags
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 4
    drawn = re.search(r'aria-labelledby="precision50-title".*?</svg>', html, re.DOTALL)[0]
    assert "_$x_{1}$ \u732b" in drawn
    assert "<h1>&lt;b&gt;out</h1>" in html


def test_nothing_of_matplotlib_is_changed_for_others(output):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.write(output)
    assert dict(matplotlib.rcParams) == before


def test_validation_loss_is_drawn_beside_the_loss(tiny, output):
    lines = usual_lines(tiny)
    for n, line in enumerate(line for line in lines if line["kind"] == "eval"):
        line["val_loss"] = {"loss": 0.5 + n, "loss_classifier": 0.2}
    html = page(put(output, lines))
    drawn = re.search(r'aria-labelledby="loss-title".*?</svg>', html, re.DOTALL)[0]
    assert ">validation</text>" in drawn
    assert "learns its pictures by heart" in html
    assert "learns its pictures by heart" not in page(put(output, usual_lines(tiny)))


def test_long_runs_make_small_figures(tiny, output):
    steps = [train_line(step) for step in range(1, 20_001)]
    html = page(put(output, [start_line(tiny), *steps]))
    assert len(html) < 400_000
    assert "(logarithmic)" in html


def test_thinning_keeps_what_stands_out():
    from reporting.figures import smoothed, thinned

    y = np.sin(np.arange(100_000) / 1000)
    y[12_345], y[23_456] = 9, np.nan
    x, kept = thinned(np.arange(100_000), y)
    assert len(x) <= 500
    assert kept[np.searchsorted(x, 12_345)] == 9
    assert smoothed(np.array([1.0, np.nan, 3.0])).tolist()[::2] == [1, 3]
    assert smoothed(np.arange(9.0))[1:-1] == pytest.approx(np.arange(9.0)[1:-1])


# -------------------------------------------------------------------------- what the lines mean


def record_of(folder: Path, lines: list[dict]) -> analysis.Record:
    return analysis.read_record(put(folder, lines, None) / "metrics.jsonl")


def test_of_steps_that_were_done_again_the_last_counts(tiny, tmp_path):
    resumed = start_line(tiny, resume="output/checkpoint.pth")
    lines = [start_line(tiny), train_line(1), train_line(2), train_line(3), resumed]
    lines += [train_line(2, loss=9), train_line(3, loss=9), eval_line(tiny, 0), resumed]
    lines += [train_line(4, loss=9), eval_line(tiny, 0, AP=0.7)]
    record = record_of(tmp_path / "out", lines)
    assert [(line["step"], line["loss"]) for line in record.train] == [
        *((1, 1), (2, 9), (3, 9), (4, 9))
    ]
    assert [line["AP"] for line in record.evals] == [0.7]
    assert record.resumed == 2
    assert "resumed 2 times" in text_of(page(put(tmp_path / "out", lines)))


def test_a_new_training_in_the_folder_replaces_the_old_one(tiny, tmp_path):
    lines = [*usual_lines(tiny), start_line(tiny), train_line(3)]
    record = record_of(tmp_path / "out", lines)
    assert [line["step"] for line in record.train] == [3]
    assert record.evals == []
    assert record.end is None


def test_an_evaluation_alone_does_not_mix_with_those_of_the_training(tiny, tmp_path):
    alone = start_line(tiny, test_only=True, resume="model_best.pth")
    lines = [*usual_lines(tiny), alone, eval_line(tiny, 0)]
    record = record_of(tmp_path / "out", lines)
    assert [line["epoch"] for line in record.evals] == [0, 1]
    assert record.last["epoch"] == 0
    assert record.start == lines[0]
    assert record.tested == alone
    heads = report.accuracy_table(record)["heads"]
    assert [head.replace("\u00a0", " ") for head in heads] == [
        "last (--test-only), epoch 0",
        "best, epoch 1",
    ]


def test_overfit_is_compared_with_the_first_training_pictures(tiny, output):
    lines = usual_lines(tiny)
    lines[0] = start_line(tiny, overfit=2)
    lines[0]["val_images"] = 2
    index = results_of(put(output, lines, DETECTIONS[:3])).index
    assert index.annotation_file == tiny / "annotations/instances_train2017.json"
    assert index.image_ids.tolist() == [100, 101]


def test_pictures_that_were_left_out_do_not_count(tiny, output):
    """The second of three, with a box that nothing found."""
    lines = usual_lines(tiny)
    lines[0]["val_images_left_out"] = [101]
    put(output, lines, DETECTIONS[:3])
    assert results_of(output).counts()["images"] == 2
    lines[0]["val_images_left_out"] = []
    put(output, lines, DETECTIONS[:3])
    assert results_of(output).counts()["images"] == 3


# --------------------------------------------------------------------------- what is not there


def test_a_run_without_an_evaluation(tiny, output):
    (output / "detections.json").unlink()
    html = page(put(output, [start_line(tiny), train_line(1)], None))
    assert figures_in(html) == {"loss", "parts", "rate"}
    assert "there was no evaluation yet" in text_of(html)
    assert "not at its end" in text_of(html)


def test_a_run_that_has_only_begun(tiny, output):
    html = page(put(output, [start_line(tiny)]))
    assert figures_in(html) == set()
    assert "metrics.jsonl has no steps of a training" in text_of(html)


def test_an_evaluation_alone(tiny, output):
    start = start_line(tiny, test_only=True, weights="COCO_V1")
    start["train_images"] = None
    html = page(put(output, [start, eval_line(tiny, 0, epoch=None, step=None)]))
    assert figures_in(html) == FIGURES - {"loss", "parts", "rate", "ap"}
    assert "evaluated for 2 categories" in text_of(html)
    assert "an evaluation only" in text_of(html)


def test_no_detections_at_all(tiny, output):
    lines = [start_line(tiny), train_line(1), eval_line(tiny, 0, ())]
    html = page(put(output, lines, ()))
    assert figures_in(html) == FIGURES
    assert "found 0 boxes" in text_of(html)
    assert "4 true boxes were missed" in text_of(html)
    assert "Worth knowing" not in html


def test_no_true_boxes(tiny, output):
    rewrite(split_of(tiny, "val"), lambda data: data.update(annotations=[]))
    html = page(put(output, [start_line(tiny), train_line(1), eval_line(tiny, 0)]))
    assert figures_in(html) == {"loss", "parts", "rate"}
    assert "the validation pictures have no boxes" in text_of(html)
    assert "On 3 pictures with 0 true boxes" in text_of(html)
    assert "Worth knowing" not in html


def test_neither_boxes_nor_detections(tiny, output):
    rewrite(split_of(tiny, "val"), lambda data: data.update(annotations=[]))
    assert "found 0 boxes" in text_of(page(put(output, usual_lines(tiny), ())))


def test_numbers_that_are_null_or_nan(tiny, output):
    nothing = dict.fromkeys(("loss", "lr", "loss_classifier", "images_per_second"))
    lines = [start_line(tiny), train_line(1, **nothing), train_line(2, loss=float("nan"))]
    lines += [eval_line(tiny, 0, AP=float("nan"), AP50=None, per_category=None, epoch=None)]
    html = page(put(output, lines))
    assert {"parts", "rate"} < figures_in(html)
    assert "nan" not in text_of(html).lower()
    lines[2] = train_line(2, **nothing, loss_box_reg=None)
    lines[1] = train_line(1, **nothing, loss_box_reg="much")
    assert not {"loss", "parts", "rate"} & figures_in(page(put(output, lines)))


def test_a_start_line_that_knows_nothing(tiny, output):
    html = page(put(output, [{"kind": "start"}, train_line(1), {"kind": "eval"}, {"kind": "end"}]))
    assert figures_in(html) == {"loss", "parts", "rate"}


def test_missing_detections_are_named(output):
    (output / "detections.json").unlink()
    html = page(output)
    assert figures_in(html) == {"loss", "parts", "rate", "ap"}
    assert f"{output / 'detections.json'} is missing" in text_of(html)
    assert "at the top" in html


@pytest.mark.parametrize("content", ['[{"image_id": 1}]', '[{"image', "{}", "[3]"])
def test_damaged_detections_are_named(output, content, capsys):
    (output / "detections.json").write_text(content)
    assert figures_in(page(output)) == {"loss", "parts", "rate", "ap"}
    assert f"{output / 'detections.json'}" in capsys.readouterr().out


def test_other_detections_than_were_scored_are_noted(tiny, output):
    put(output, usual_lines(tiny), DETECTIONS[:-2])
    assert "one of the files was changed since" in text_of(page(output))


def test_detections_of_unknown_images_and_categories_are_noted(tiny, output):
    strange = ((7, 2, [0, 0, 9, 9], 0.9), (100, 4, [0, 0, 9, 9], 0.9))
    html = page(put(output, usual_lines(tiny), (*DETECTIONS, *strange)))
    assert "1 detections are of images that" in text_of(html)
    assert "1 detections are of categories that" in text_of(html)
    assert "found 5 boxes" in text_of(html)


def test_pictures_that_were_moved(tiny, output):
    for file in (tiny / "val2017").glob("*.png"):
        file.unlink()
    html = page(output)
    assert figures_in(html) == FIGURES
    assert "image/jpeg" not in html
    assert "3 of 3 pictures for the page cannot be read" in text_of(html)


def test_data_that_were_moved(tiny, output):
    shutil.rmtree(tiny)
    html = page(output)
    assert figures_in(html) == {"loss", "parts", "rate", "ap"}
    assert "the validation data are not where the run found them" in text_of(html)


def test_a_line_cut_by_a_crash_is_noted(output):
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert "the last line was cut by a crash" in text_of(page(output))


# ------------------------------------------------------------------------------------ the command


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    return run(sys.executable, ROOT / "report.py", *arguments, cwd="/", **environment)


def test_the_command_writes_the_page_and_says_where(output):
    (output / "detections.json").unlink()
    done = command(output)
    assert done.returncode == 0, done.stderr
    assert f"{output / 'report.html'} (" in done.stdout
    assert "detections.json is missing" in done.stdout
    assert (output / "report.html").exists()
    assert not (output / "report.html.partial").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "metrics.jsonl is missing"),
        ("", "metrics.jsonl is empty"),
        ('{"kind": "start"}\nnonsense\n{"kind": "end"}\n', "metrics.jsonl:2 is not JSON"),
        ('{"kind": "start"}\n[1]\n', "metrics.jsonl:2 is no object with a 'kind'"),
    ],
)
def test_what_is_no_record_of_a_run_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        report.main([str(tmp_path)])
    assert str(raised.value).startswith(f"{tmp_path}/metrics.jsonl")


def test_an_error_is_one_message_and_exit_code_2(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"report.py: error: {tmp_path}/metrics.jsonl is missing: ")
    assert done.stderr.count("\n") == 1


def test_without_matplotlib_there_is_one_clear_message(output, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ImportError('hidden')")
    done = command(output, PYTHONPATH=str(hidden))
    assert done.returncode == 2
    assert done.stderr == "report.py: error: report.html needs matplotlib: pip install matplotlib\n"


def test_a_folder_that_cannot_be_written_is_refused(output):
    (output / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        report.write(output)


def test_a_wrong_command_line_is_refused():
    with pytest.raises(UserError, match="--help"):
        report.main([])


# ------------------------------------------------------------------------------------ a browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def browse(page: Path, folder: Path) -> tuple[subprocess.CompletedProcess, bool]:
    """Open a page; also says whether it asked for anything outside."""
    log = folder / "net.json"
    done = run(
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
        *("--enable-logging=stderr", "--v=0", f"--log-net-log={log}"),
        *("--window-size=390,900", "--dump-dom", page.as_uri()),
        timeout=60,
    )
    # What the browser asks for on its own account has "not an origin" there.
    return done, '"initiator":"null"' in log.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_without_errors_or_requests(output, tmp_path):
    done, asked = browse(report.write(output), tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures_in(done.stdout) == FIGURES
    assert done.stdout.count("<figure") == len(FIGURES) + 2 + 3  # bars, matrix, three pictures
    assert "CONSOLE" not in done.stderr
    assert not asked
    # That the last two would be noticed:
    other = tmp_path / "other.html"
    other.write_text('<img src="http://example.test/x.png"><script>console.error(1)</script>')
    done, asked = browse(other, tmp_path)
    assert "CONSOLE" in done.stderr
    assert asked
