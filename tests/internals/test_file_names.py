"""File names as annotation tools write them, and the files that they mean."""

import unicodedata

import numpy as np
import pytest
from helpers import rewrite, run_train, split_of

from coco_utils import CocoIndex, Split
from internals import file_names
from internals.file_names import ADDRESS, AMBIGUOUS, MISSING, OUTSIDE, PARENT

NFC, NFD = "Zoë.jpg", unicodedata.normalize("NFD", "Zoë.jpg")


def resolve(folder, files, *names):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    array = np.array([name.encode() for name in names], dtype=np.bytes_)
    result = file_names.resolve_names(array, folder)
    return [
        int(problem) or name.decode()
        for name, problem in zip(result.names.tolist(), result.problems, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("images\\a.jpg", "images/a.jpg"),
        (".\\a.jpg", "a.jpg"),
        ("C:\\Users\\me\\set\\a.jpg", "a.jpg"),
        ("C:\\Users\\me\\set\\images\\a.jpg", "images/a.jpg"),
        ("/content/set/a.jpg", "a.jpg"),
        ("images/a.jpg", "a.jpg"),
        ("a.jpg", "images/a.jpg"),
        ("../set/a.jpg", "a.jpg"),
        ("sub/../a.jpg", "a.jpg"),
        ("A.JPG", "a.jpg"),
        ("Images/a.jpg", "images/A.jpg"),
        (NFC, NFD),
        (NFD, NFC),
        ("a%20b.jpg", "a b.jpg"),
        ("http://localhost:8080/data/upload/a.jpg", "a.jpg"),
        ("https://x.org/a.jpg?token=1#x", "a.jpg"),
        ("https://x.org/v0/b/o/set%2Fa.jpg?alt=media", "set/a.jpg"),
        ("s3://bucket/set/a.jpg", "a.jpg"),
        ("/data/upload/3/1a2b3c-a.jpg", "a.jpg"),
        ("/data/upload/3/1a2b3c4d-a.jpg", "1a2b3c4d-a.jpg"),
        ("/data/local-files/?d=set/a.jpg", "a.jpg"),
        ("/data/local-files/?d=set%5Ca%20b.jpg", "a b.jpg"),
    ],
)
def test_names_that_mean_one_file_are_resolved(tmp_path, name, file):
    assert resolve(tmp_path / "images", [file, "other.jpg"], name) == [file]


def test_absolute_paths_inside_the_folder_are_resolved(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    names = [f"{tmp_path}/{folder}/sub/a.jpg" for folder in ("real", "link")]
    names.append(f"file://{tmp_path}/real/sub/a.jpg")
    assert resolve(tmp_path / "link", ["sub/a.jpg", "a.jpg"], *names) == ["sub/a.jpg"] * 3
    assert resolve(tmp_path / "link", [], "../link/sub/a.jpg") == ["sub/a.jpg"]


@pytest.mark.parametrize(
    ("files", "names", "expected"),
    [
        ([], ["a.jpg"], [MISSING]),
        (["b/0.jpg"], ["a/0.jpg"], [MISSING]),  # another folder, which is there
        (["0.jpg"], ["0.jpg", "a/0.jpg"], ["0.jpg", MISSING]),  # the file of another name
        (["0.jpg"], ["b/0.jpg", "a/0.jpg"], [AMBIGUOUS, AMBIGUOUS]),
        (["x/0.jpg", "y/0.jpg"], ["0.jpg"], [AMBIGUOUS]),
        (["a.jpg", "A.jpg"], ["a.JPG"], [AMBIGUOUS]),
        (["a.jpg", "A.jpg"], ["A.jpg"], ["A.jpg"]),
        (["images/a.jpg"], ["images\\a.jpg", "images/a.jpg"], ["images/a.jpg"] * 2),
        (["images/b.jpg"], ["/content/a.jpg", "D:\\a.jpg"], [OUTSIDE, OUTSIDE]),
        (["b.jpg"], ["../a.jpg", "sub/../../a.jpg"], [PARENT, PARENT]),
        (["b.jpg"], ["http://x.org/a.jpg", "/data/upload/1/a.jpg"], [ADDRESS, ADDRESS]),
        (["b.jpg"], ["http://[", "..", "\0.jpg"], [ADDRESS, PARENT, MISSING]),
        (["b.jpg"], ["%", "%zz", "?", "a"], [MISSING] * 4),
        (["1a2b3c-a.jpg", "a.jpg"], ["4d5e6f-a.jpg"], [MISSING]),
    ],
)  # fmt: skip
def test_other_names_are_told_by_kind(tmp_path, files, names, expected):
    assert resolve(tmp_path / "images", files, *names) == expected


def test_files_of_this_machine_outside_the_folder_are_not_replaced(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jpg").touch()
    names = [f"{tmp_path}/other/a.jpg", "../other/a.jpg"]
    assert resolve(tmp_path / "images", ["a.jpg"], *names) == [OUTSIDE, PARENT]


def test_parent_of_a_linked_folder_is_not_reached(tmp_path):
    (tmp_path / "private/below").mkdir(parents=True)
    (tmp_path / "private/a.jpg").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/sub").symlink_to(tmp_path / "private/below")
    assert resolve(tmp_path / "images", [], "sub/../a.jpg") == [MISSING]


def test_names_that_need_no_repair_are_unchanged(tmp_path):
    names = ("a.jpg", "sub/a.jpg", "./a.jpg", "sub//a.jpg")
    array = np.array([name.encode() for name in names], dtype=np.bytes_)
    resolve(tmp_path, ["a.jpg", "sub/a.jpg"])
    result = file_names.resolve_names(array, tmp_path)
    assert result.names is array
    assert not result.problems.any()
    assert result.notes == []


def test_links_to_a_folder_above_are_not_followed(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.jpg").touch()
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a")
    (tmp_path / "again").symlink_to(tmp_path / "a/b")  # no loop
    files = sorted(
        file.relative_to(tmp_path).as_posix() for file in file_names.walk_files(tmp_path)
    )
    assert files == ["a/b/x.jpg", "again/x.jpg"]


def test_all_readers_use_the_resolved_names(tiny):
    split = split_of(tiny)
    sound = CocoIndex(split)

    def change(data):
        for row in data["images"]:
            row["file_name"] = f"C:\\set\\{row['file_name']}"

    rewrite(split, change)
    index = CocoIndex(split)
    assert index.file_names.tolist() == sound.file_names.tolist()
    assert index.fingerprint() == sound.fingerprint()
    assert index.read_image(0).equal(sound.read_image(0))
    (note,) = index.issues
    assert not note.fatal
    assert str(note).startswith(
        f"image file names resolved to files below {split.images} (8): C:\\"
    )
    assert "C:\\set\\0.png -> 0.png, " in str(note)
    assert str(note).endswith(" and 5 more. These files are used")
    done = run_train("--data-path", tiny, "--check-data", "-j", "0")
    assert done.returncode == 0, done.stderr


def test_files_without_names_can_be_matched(tmp_path):
    names = ["C:\\set\\a.jpg", "b.jpg", "http://x.org/c.jpg"]
    matched = file_names.match_files(names, tmp_path, ["a.jpg", "sub/c.jpg", "d.jpg"])
    assert matched == {"a.jpg": names[0], "sub/c.jpg": names[2]}


def test_missing_folder_makes_all_files_missing(tiny, tmp_path):
    index = CocoIndex(Split(split_of(tiny).annotations, tmp_path / "none"))
    assert (index.file_problems == MISSING).all()


def test_many_files_of_one_base_name_are_resolved(tmp_path):
    files = [f"{n:05}/rgb.png" for n in range(3000)]
    names = [f"train/{file}" for file in files]
    matched = file_names.match_files(names, tmp_path, files)
    assert matched == dict(zip(files, names, strict=True))


def test_picture_in_place_of_a_name_is_reported(tiny):
    text = "data:image/jpeg;base64," + "A" * 1_000_000
    rewrite(split_of(tiny), lambda data: data["images"][0].update(file_name=text))
    index = CocoIndex(split_of(tiny))
    assert len(index) == 7
    assert "'file_name' is not a string of at most 1,024 characters" in index.issues[0].kind
