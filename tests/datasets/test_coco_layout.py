"""Behaviour that the converters and split.py share."""

import importlib
import os
import shlex
import shutil
import sys

import pytest
import split
import yolo_to_coco
from helpers import ROOT, main_in_process, read_labels, rewrite, run, run_train, split_of

from internals.errors import UserError
from internals.layouts import find_split

SCRIPTS = ("voc_to_coco", "yolo_to_coco", "split")


@pytest.fixture
def inputs(request, script) -> list[str]:
    """Return the positional arguments of a script without OUTPUT."""
    if script == "split":
        return list(map(str, split_of(request.getfixturevalue("coco"))))
    return [str(request.getfixturevalue(script.partition("_")[0]))]


def test_images_are_hard_linked_or_copied(coco, yolo, tmp_path, monkeypatch, capsys):
    original = coco / "train2017/0.png"
    yolo_to_coco.main([str(yolo), str(tmp_path / "linked")])
    assert "6 images as hard links" in capsys.readouterr().out
    linked = tmp_path / "linked/train2017/0.png"
    assert linked.samefile(original)
    assert not linked.is_symlink()

    def fail(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", fail)
    yolo_to_coco.main([str(yolo), str(tmp_path / "copied")])
    assert "6 images as copies" in capsys.readouterr().out
    copied = tmp_path / "copied/train2017/0.png"
    assert copied.read_bytes() == original.read_bytes()
    assert not copied.samefile(original)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_categories_are_read_as_by_train(coco, yolo, out, encoding):
    file = split_of(coco).annotations
    rewrite(
        split_of(coco), lambda data: [row.update(id=str(row["id"])) for row in data["categories"]]
    )
    file.write_bytes(file.read_text().encode(encoding))
    yolo_to_coco.main([str(yolo), str(out), "--categories", str(file)])
    assert read_labels(out, "val") == read_labels(coco, "val")


@pytest.mark.usefixtures("crowd")
def test_split_table_and_next_command(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    split.main([*map(str, split_of(coco)), "my images", "--val-share", "0.25"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["train", "val", "in", "val"]
    rows = {" ".join(line.split()[:-3]): line.split()[-3:] for line in lines[1:7]}
    totals = {name: int(train) + int(val) for name, (train, val, _) in rows.items()}
    assert totals == {
        "images": 4, "without a box": 1, "boxes": 7, "crowds": 1, "cat": 5, "dog": 2
    }  # fmt: skip
    assert rows["images"] == ["3", "1", "25.0%"]
    train = shlex.quote(os.path.relpath(ROOT / "train.py", tmp_path))
    assert lines[-1] == f"  python {train} --data-path 'my images' --check-data"


def test_next_command_without_val_is_split(yolo, out, capsys):
    for kind in ("images", "labels"):
        for file in (yolo / kind / "train").iterdir():
            file.rename(yolo / kind / file.name)
        for name in ("train", "val"):
            (yolo / kind / name).rename(yolo / f"{kind}_{name}")
    yolo_to_coco.main([str(yolo), str(out)])
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[1].endswith("split.py")
    split.main([*command[2:], "--val-share", "0.5"])
    assert len(read_labels(out.with_name("out_split"), "val")) == 2


@pytest.mark.parametrize("lone", ["train", "one file"])
def test_command_to_split_is_given_and_works(tiny, lone):
    (tiny / "annotations/instances_val2017.json").unlink()
    shutil.rmtree(tiny / "val2017")
    if lone == "one file":
        (tiny / "annotations/instances_train2017.json").rename(tiny / "result.json")
        (tiny / "train2017").rename(tiny / "images")
    done = run_train("--data-path", tiny, "--check-data", "-j", "0")
    assert done.returncode == 2
    assert f"no validation data found in {tiny}: to split " in done.stderr
    python, script, *arguments = shlex.split(done.stderr.splitlines()[-1])
    assert (python, script.split("/")[-1]) == ("python", "split.py")
    split.main(arguments)
    assert "data check passed" in main_in_process(
        "--data-path", arguments[-1], "--check-data", "-j", "0"
    )


def test_command_to_convert_is_given_and_works(yolo):
    done = run_train("--data-path", yolo, "--check-data", "-j", "0")
    assert done.returncode == 2
    assert "it is a YOLO folder, to be converted:" in done.stderr
    yolo_to_coco.main(shlex.split(done.stderr.splitlines()[-1])[2:])
    assert find_split(yolo.with_name("yolo_coco"), "val", None, None).exists()


def test_first_20_errors_are_listed(yolo, out):
    (yolo / "labels/train/0.txt").write_text("0 1\n" * 30)
    (yolo / "labels/train/missing.txt").write_text("")
    (yolo / "images/val/1.png").unlink()
    (yolo / "images/val/1.png").write_bytes(b"not an image")
    with pytest.raises(UserError) as caught:
        yolo_to_coco.main([str(yolo), str(out)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "32 errors:"
    missing = f"its image {yolo}/images/train/missing.jpg is missing"
    assert lines[1] == f"  {yolo}/labels/train/missing.txt: {missing}"
    assert lines[20].startswith(f"  {yolo}/labels/train/0.txt:19: 2 columns")
    assert lines[21:] == ["  and 12 more"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_exit_code_of_unknown_flag(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--help"])
    assert stopped.value.code == 0
    assert f"python datasets/{script}.py" in capsys.readouterr().out
    done = run(sys.executable, ROOT / f"datasets/{script}.py", "--no-such-flag", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}.py: error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_existing_output_is_rejected(script, inputs, out):
    main = importlib.import_module(script).main
    (out / "train2017").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{out} exists: remove it, or name another folder"):
        main([*inputs, str(out)])
    (out / "train2017").rmdir()
    main([*inputs, str(out)])  # an empty folder is accepted
    below = out / "annotations/instances_train2017.json/below"
    with pytest.raises(UserError, match="below cannot be created: Not a directory"):
        main([*inputs, str(below)])
