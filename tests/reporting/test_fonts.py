"""Names of categories in scripts that few fonts have."""

import subprocess

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from coco_utils import Categories
from internals.errors import UserError
from reporting import drawing, fonts

CHINESE = "斑马"
# Pillow's font has none of these, matplotlib's has all of them.
OTHERS = ("собака", "كلب", "ζέβρα", "עברית", "dög ñ ß €", "😀")


def write_font(file, characters: str):
    """Write a font with a triangle of its own size for each character, and a box for all others."""

    def glyph(*points):
        pen = TTGlyphPen(None)
        pen.moveTo(points[0])
        for point in points[1:]:
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = {ord(character): f"glyph{n}" for n, character in enumerate(characters)}
    glyphs = {".notdef": glyph((0, 0), (0, 700), (500, 700), (500, 0))}
    for n, name in enumerate(names.values()):
        glyphs[name] = glyph((0, 0), (250, 100 + 5 * n), (500, 0))
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(names)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)
    return file


@pytest.fixture
def chinese_font(tmp_path):
    return write_font(tmp_path / "chinese.ttf", fonts.AROUND_NAMES + CHINESE)


@pytest.fixture(autouse=True)
def system_fonts(monkeypatch):
    """Replace fontconfig; return the files that it answers, to be changed by the test."""
    files, commands = [], []

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="".join(f"{x}\n" for x in files))

    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ())
    monkeypatch.setattr(fonts.subprocess, "run", run)
    for cached in (fonts.find_font, fonts._system_fonts):
        cached.cache_clear()
    yield files, commands
    for cached in (fonts.find_font, fonts._system_fonts):
        cached.cache_clear()
    fonts.prefer_font(None)


def categories(*names: str) -> Categories:
    return Categories.from_names(dict(enumerate(names, start=3)))


def draw(name: str) -> np.ndarray:
    image = torch.zeros(3, 100, 480, dtype=torch.uint8)
    detections = np.array([[1, 10, 60, 200, 30, 0.5, 3]])
    return drawing.draw_detections(image, detections, categories(name)).numpy()


def test_names_are_drawn_without_missing_glyphs():
    assert fonts.readable_names(categories(*OTHERS)) == OTHERS
    for name in OTHERS:
        assert fonts.find_font(name) != fonts.PILLOW
        assert not np.array_equal(draw(name), draw("category 3"))
    assert fonts.find_font("zebra 0.97") == fonts.PILLOW


def test_names_that_no_font_has_become_the_id():
    assert fonts.readable_names(categories("zebra", CHINESE, "斑 собака")) == (
        "zebra", "category 4", "category 5",
    )  # fmt: skip
    assert np.array_equal(draw(CHINESE), draw("category 3"))


def test_font_of_the_system_is_used(chinese_font, system_fonts, tmp_path):
    files, commands = system_fonts
    files += [tmp_path / "missing.ttf", write_font(tmp_path / "half.ttf", "斑"), chinese_font]
    assert fonts.readable_names(categories(CHINESE)) == (CHINESE,)
    assert fonts.find_font(CHINESE + " 0.50") == str(chinese_font)
    assert commands[0][-1] == ":charset=2026 6591 9a6c"  # with the ellipsis of shortened names
    assert not np.array_equal(draw(CHINESE), draw("category 3"))


def test_font_of_the_user_comes_first(chinese_font):
    before = draw("zebra")
    fonts.prefer_font(chinese_font)
    assert fonts.readable_names(categories(CHINESE, "собака")) == (CHINESE, "собака")
    assert fonts.find_font("zebra") == str(chinese_font)
    assert not np.array_equal(draw("zebra"), before)
    fonts.prefer_font(None)
    assert np.array_equal(draw("zebra"), before)


def test_systems_without_fontconfig(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("fc-match")

    monkeypatch.setattr(fonts.subprocess, "run", missing)
    assert fonts.readable_names(categories(CHINESE)) == ("category 3",)


@pytest.mark.parametrize("content", [None, b"no font"])
def test_unusable_font_is_an_error(tmp_path, content):
    file = tmp_path / "x.ttf"
    if content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"--font .*x\.ttf cannot be read as a font"):
        fonts.prefer_font(file)
    assert fonts.find_font("zebra") == fonts.PILLOW


def test_names_are_one_line():
    for name, expected in (
        ("a <b>&\"'\nnew line", "a <b>&\"' new line"),
        ("a\r\n\tb\x00\x85c\u2028d ", "a b c d"),
        ("\u202egnp.exe\u200b", "gnp.exe"),
        ("cafe\u0301", "café"),
        ("bad \ud83d", "bad \ufffd"),
        (" \n", ""),
    ):
        assert fonts.one_line(name) == expected
    assert fonts.readable_names(categories("\n", "a\nb")) == ("category 3", "a b")


def test_other_texts_are_drawn_without_the_characters_that_no_font_has():
    image, box = torch.zeros(3, 100, 480, dtype=torch.uint8), torch.tensor([[9.0, 60, 200, 90]])
    drawn = [
        drawing.draw_boxes(image, box, [text], [(250, 0, 0)]) for text in ("a斑b", "ab", "斑", "?")
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
