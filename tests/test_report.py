import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import ROOT, rewrite, run, split_of
from report_helpers import (
    DETECTIONS,
    eval_line,
    start_line,
    train_line,
    two_epochs,
    write_output,
)

import report
from internals.errors import UserError

FIGURES = {"loss", "loss_terms", "ap", "lr", "precision50", "precision75", "f1", "sizes"}


@pytest.fixture
def output(tiny, tmp_path) -> Path:
    """Write the output folder of a training of two epochs."""
    return write_output(tmp_path / "out", two_epochs(tiny))


def write_page(folder: Path) -> str:
    return report.write(folder).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """Return the visible text of a page in one line."""
    body = re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def figures_in(html: str) -> set[str]:
    return set(re.findall(r'<svg role="img" aria-labelledby="(\w+)-title"', html))


# ------------------------------------------------------------------------------------- the page


def test_complete_report(output):
    html = write_page(output)
    assert figures_in(html) == FIGURES
    assert html.count("data:image/jpeg;base64,") == 6 + 3  # three pairs, three suspects
    text = text_of(html)
    for expected in (
        "trained to detect 2 categories on 8 images; after 8 steps",
        "50% recall at score 0.5",
        "40% precision at score 0.5",
        "5 detections with a score of at least 0.5: 2 are correct, 1 have a wrong category, and 2",
        "last and best, epoch 1",
        "AP, large boxes (area over 96 x 96) - ",  # absent
        "2 planned; 8 steps, up to epoch 1",
        "0.02 (sgd), x 0.1 after 1 and 2 epochs",
        "1 h 2 min, evaluations included",
        "1 missed (cat)",
        # Of 4 boxes, from the highest score on: F1 2/5, 2/6, 4/7, 4/8, 4/9, and 6/10 with all.
        "is highest at a score threshold of 0.150: precision 50%, recall 75%",
    ):
        assert expected in text
    assert "Notes" not in text
    assert len(re.sub(r"base64,[^\"]+", "", html)) < 150_000


def test_many_categories_show_most_confused(tiny, output):
    def change(data):
        data["categories"] += [{"id": i, "name": f"thing {i}"} for i in range(6, 40)]

    rewrite(split_of(tiny, "val"), change)
    html = write_page(output)
    assert "Of 36 categories, the 20 most confused ones are shown" in text_of(html)
    assert "cat detected as dog: 1" in text_of(html)
    header = re.search(r'<table class="matrix wide">.*?</thead>', html, re.DOTALL)[0]
    assert header.count('scope="col"') == 21


class Addresses(HTMLParser):
    """A parser that collects the tags of a page and every address that it loads or links."""

    def __init__(self):
        super().__init__()
        self.addresses, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.addresses += [value for name, value in attrs if name in attributes]


def test_page_is_self_contained(output):
    html = write_page(output)
    parser = Addresses()
    parser.feed(html)
    assert len(parser.addresses) > 20
    assert all(re.match(r"(data:|#)", address) for address in parser.addresses)
    assert not parser.tags & {"script", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"https?://|@import|url\([^#]", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert {a or b for a, b in used} <= {*ids, "notes"}


def test_names_are_escaped(tiny, tmp_path, recwarn):
    names = {"cat": "<script>alert(1)</script>", "dog": "_$x_{1}$ \u732b"}
    file_name = '"><img src=x onerror=alert(1)>.png'

    def change(data):
        for row in data["categories"]:
            row["name"] = names[row["name"]]
        data["images"][1]["file_name"] = file_name

    rewrite(split_of(tiny, "val"), change)
    (tiny / "val2017/1.png").rename(tiny / "val2017" / file_name)
    lines = two_epochs(tiny)
    lines[0]["categories"] = [{"id": 2, "name": names["cat"]}, {"id": 5, "name": names["dog"]}]
    html = write_page(write_output(tmp_path / "<b>out", lines))
    parser = Addresses()
    parser.feed(html)
    assert "script" not in parser.tags
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 4
    drawn = re.search(r'aria-labelledby="precision50-title".*?</svg>', html, re.DOTALL)[0]
    assert names["dog"] in drawn
    assert "<h1>&lt;b&gt;out</h1>" in html
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_names_that_are_no_unicode(tiny, tmp_path):
    lines = two_epochs(tiny)
    lines[0]["categories"] = [{"id": 2, "name": "half \ud83d"}, {"id": 5, "name": "dog"}]
    assert "half ?" in write_page(write_output(tmp_path / "out", lines))


def test_font_is_validated(output, capsys):
    with pytest.raises(UserError, match=r"--font .*metrics\.jsonl cannot be read as a font"):
        report.main([str(output), "--font", str(output / "metrics.jsonl")])


def test_resumed_runs_are_counted(tiny, output):
    resumed = start_line(tiny, resume="output/checkpoint.pth")
    lines = two_epochs(tiny)
    assert "resumed once" in text_of(write_page(write_output(output, [*lines[:-1], resumed])))
    lines = [*lines[:4], resumed, *lines[4:-1], resumed, lines[-1]]
    text = text_of(write_page(write_output(output, lines)))
    assert "1 h 2 min since it was resumed (resumed 2 times)" in text


def test_test_only_after_training_has_separate_column(tiny, output):
    test_only = start_line(tiny, test_only=True, resume="model_best.pth")
    text = text_of(
        write_page(write_output(output, [*two_epochs(tiny), test_only, eval_line(tiny, 0)]))
    )
    assert "last (--test-only), epoch 0 best, epoch 1" in text


def test_test_only_without_training(tiny, output):
    start = start_line(tiny, test_only=True, weights="COCO_V1")
    start["train_images"] = None
    evaluation = {**eval_line(tiny, 0), "epoch": None, "step": None}
    html = write_page(write_output(output, [start, evaluation]))
    assert figures_in(html) == FIGURES - {"loss", "loss_terms", "lr", "ap"}
    assert "evaluated on 2 categories" in text_of(html)
    assert "evaluation only" in text_of(html)


def test_recipe_is_shown_if_the_run_has_one(tiny, output):
    lines = two_epochs(tiny)
    assert "Recipe" not in text_of(write_page(write_output(output, lines)))  # an older version
    lines[0] = start_line(tiny, recipe="strong")
    assert "Recipe strong" in text_of(write_page(write_output(output, lines)))


def test_overfit(tiny, output):
    lines = two_epochs(tiny)
    lines[0] = start_line(tiny, overfit=2)
    text = text_of(write_page(write_output(output, lines, DETECTIONS[:3])))
    assert "the same (--overfit 2)" in text
    assert "On 2 images with 3 ground-truth boxes" in text


def test_suspects_are_written_logged_and_shown(output, capsys):
    text = text_of(write_page(output))
    rows = json.loads((output / "suspects.json").read_text())["annotations"]
    # The cat as a dog, the detection on background and the cat that is missed; no duplicate.
    assert {(row["suspect"], row["image_id"], row["annotation_id"]) for row in rows} == {
        ("wrong category", 100, 0),
        ("not annotated", 101, None),
        ("not found", 101, 1001),
    }
    counts = "1 wrong category, 1 not annotated, 1 not found"
    printed = capsys.readouterr().out
    assert f"report: 3 suspect annotations in {output / 'suspects.json'}: {counts}" in printed
    assert f"one of them is wrong: {counts}" in text
    names = r"annotated as cat, detected as dog 0\.\d\d"
    caption = rf"1\. wrong category, 0\.\d\d {names} 0\.png, image 100, annotation 0 2\. not "
    assert re.search(caption, text)


def test_suspects_without_images(tiny, output):
    for file in (tiny / "val2017").glob("*.png"):
        file.unlink()
    assert re.search(r"0\.png is missing in \S+ 1\. wrong category", text_of(write_page(output)))


# -------------------------------------------------------------------------------- missing input


def test_run_without_evaluation(tiny, output):
    html = write_page(write_output(output, [start_line(tiny), train_line(1)]))
    assert figures_in(html) == {"loss", "loss_terms", "lr"}
    assert "no evaluation yet" in text_of(html)
    assert "the run did not finish" in text_of(html)


def test_run_before_first_step(tiny, output):
    html = write_page(write_output(output, [start_line(tiny)]))
    assert figures_in(html) == set()
    assert "metrics.jsonl has no training steps" in text_of(html)


def test_empty_start_line(output):
    html = write_page(write_output(output, [{"kind": "start"}, train_line(1), {"kind": "eval"}]))
    assert figures_in(html) == {"loss", "loss_terms", "lr"}


def test_no_detections(tiny, output):
    lines = [start_line(tiny), train_line(1), eval_line(tiny, 0, ())]
    html = write_page(write_output(output, lines, ()))
    assert figures_in(html) == FIGURES - {"f1"}
    assert "there are 0 detections" in text_of(html)
    assert "4 ground-truth boxes were missed" in text_of(html)
    assert "Notes" not in html


@pytest.mark.parametrize("detections", [DETECTIONS, ()])
def test_no_ground_truth_boxes(tiny, output, detections):
    rewrite(split_of(tiny, "val"), lambda data: data.update(annotations=[]))
    lines = [start_line(tiny), train_line(1), eval_line(tiny, 0, detections)]
    html = write_page(write_output(output, lines, detections))
    assert figures_in(html) == {"loss", "loss_terms", "lr"}
    assert "the validation images have no ground-truth boxes" in text_of(html)
    assert "On 3 images with 0 ground-truth boxes" in text_of(html)
    assert "Notes" not in html


@pytest.mark.parametrize("content", [None, '[{"image_id": 1}]', '[{"image', "{}", "[3]"])
def test_missing_or_invalid_detections_are_reported(output, content, capsys):
    file = output / "detections.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    html = write_page(output)
    assert figures_in(html) == {"loss", "loss_terms", "lr", "ap"}
    for message in (text_of(html), capsys.readouterr().out):
        assert f"Detections cannot be compared with the ground truth: {file}" in message


def test_changed_detections_are_noted(tiny, output):
    write_output(output, two_epochs(tiny), DETECTIONS[:-2])
    text = text_of(write_page(output))
    assert "Notes" in text
    assert "one of the files has changed since" in text


def test_unknown_images_and_categories_are_noted(tiny, output):
    unknown = ((7, 2, [0, 0, 9, 9], 0.9), (100, 4, [0, 0, 9, 9], 0.9))
    html = write_page(write_output(output, two_epochs(tiny), (*DETECTIONS, *unknown)))
    assert "2 detections have images or categories that are not in" in text_of(html)
    assert "there are 5 detections" in text_of(html)


def test_moved_images(tiny, output):
    for file in (tiny / "val2017").glob("*.png"):
        file.unlink()
    html = write_page(output)
    assert figures_in(html) == FIGURES
    assert "image/jpeg" not in html
    assert "3 of 3 images for the page cannot be read" in text_of(html)


def test_moved_data(tiny, output):
    shutil.rmtree(tiny)
    html = write_page(output)
    assert figures_in(html) == {"loss", "loss_terms", "lr", "ap"}
    assert f"{tiny} does not exist: there is no validation data" in text_of(html)


# ---------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_command_writes_page(output):
    (output / "detections.json").unlink()
    done = run(sys.executable, ROOT / "report.py", output, cwd="/")
    assert done.returncode == 0, done.stderr
    assert f"{output / 'report.html'} (" in done.stdout
    assert "detections.json is missing" in done.stdout
    assert (output / "report.html").exists()
    assert not (output / "report.html.partial").exists()


@pytest.mark.slow
def test_user_error_exit_code_and_message(tmp_path):
    done = run(sys.executable, ROOT / "report.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"report.py: error: {tmp_path}/metrics.jsonl cannot be read (")
    assert done.stderr.count("\n") == 1


def test_unwritable_folder_is_rejected(output):
    (output / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        report.write(output)


def test_missing_argument_is_rejected():
    with pytest.raises(UserError, match="--help"):
        report.main([])


@pytest.mark.slow
def test_train_does_not_import_matplotlib():
    code = "import sys, train; sys.exit('matplotlib' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------------ a browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def browse(page: Path, folder: Path) -> tuple[subprocess.CompletedProcess, bool]:
    """Open a page; also return whether it requested anything from outside."""
    log = folder / "net.json"
    done = run(
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
        *("--enable-logging=stderr", "--v=0", f"--log-net-log={log}"),
        *("--window-size=390,900", "--dump-dom", page.as_uri()),
        timeout=60,
    )
    # Requests of the browser itself have the initiator "not an origin".
    return done, '"initiator":"null"' in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_page_in_browser(output, tmp_path):
    done, requested = browse(report.write(output), tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures_in(done.stdout) == FIGURES
    assert (
        done.stdout.count("<figure") == len(FIGURES) + 2 + 6
    )  # bars, matrix, three images, three suspects
    assert "CONSOLE" not in done.stderr
    assert not requested
    # Check that errors and requests would be detected:
    other = tmp_path / "other.html"
    other.write_text('<img src="http://example.test/x.png"><script>console.error(1)</script>')
    done, requested = browse(other, tmp_path)
    assert "CONSOLE" in done.stderr
    assert requested


def test_best_score_threshold_of_categories(tiny, output):
    rows = report.category_table(report.read_history(output / "metrics.jsonl"), None)
    thresholds = {row["name"]: row["threshold"] for row in rows}
    assert thresholds == pytest.approx({"cat": 0.15, "dog": 0.4})


def test_metrics_of_more_detections(tiny, tmp_path):
    """The limit is that of the run; lines of earlier versions have no thresholds."""
    lines = two_epochs(tiny)
    lines[0]["args"]["max_detections"] = 300
    for line in lines:
        if line["kind"] == "eval":
            line["AR300"] = line.pop("AR100")
            del line["score_threshold"]
            for row in line["per_category"].values():
                del row["score_threshold"]
    text = text_of(write_page(write_output(tmp_path / "out", lines)))
    assert "AR300 AR, 300 detections an image 0." in text
    assert "AR100" not in text
    assert "Notes" not in text
