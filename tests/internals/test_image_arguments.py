from pathlib import Path

import pytest

from internals.errors import UserError
from internals.image_arguments import find_images


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("b [1].png", "a b.jpg", "c1.png", "c2.png", "deep/d.gif", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["in/b [1].png"], ["b [1].png"]),  # a file, not a pattern
        (["in/c?.png", "in/c1.png"], ["c1.png", "c2.png"]),
        (["in/[ab]*"], ["a b.jpg", "b [1].png"]),
        (["in/**/*.gif"], ["d.gif"]),
        (["in", "in/c2.png"], ["a b.jpg", "b [1].png", "c1.png", "c2.png", "deep/d.gif"]),
    ],
)
def test_files_folders_and_patterns(folder, arguments, names):
    images = find_images(arguments)
    assert [name for _, name, _ in images] == names
    assert all(path.is_absolute() and path.is_file() for path, _, _ in images)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("no.png", "no.png: no such file or folder"),
        ("*.bmp", "no file matches this pattern"),
        ("empty", "empty: no image in this folder"),
    ],
)
def test_argument_without_images_is_rejected(folder, argument, message):
    with pytest.raises(UserError) as caught:
        find_images([argument])
    assert message in str(caught.value)


def test_stems_are_unique_ignoring_suffix_and_case(folder):
    for name in ("day1/a.png", "day2/a.bmp", "day2/A.jpg", "day2/a-2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    images = find_images([str(folder / "day1"), str(folder / "day2")])
    assert [(name, stem) for _, name, stem in images] == [
        ("day1/a.png", "day1/a"),
        ("day2/A.jpg", "day2/A"),
        ("day2/a-2.png", "day2/a-2"),
        ("day2/a.bmp", "day2/a-3"),
    ]
