"""Choose a font for the names of categories: Pillow's own has the letters of English only."""

import subprocess
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

from coco_utils import Categories
from internals.errors import UserError

PILLOW = ""  # the font in Pillow
# Of Windows, macOS and Linux, for systems without fontconfig; Pillow searches the system's folders.
SYSTEM_FONTS = ("msyh.ttc", "malgun.ttf", "Nirmala.ttc", "Arial Unicode.ttf", "PingFang.ttc")
SYSTEM_FONTS += ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "seguiemj.ttf")
# What is written beside a name: a font must have these, too.
AROUND_NAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,()…"
JOINERS = "\u200c\u200d"  # invisible, but letters change their shape beside them
_preferred: list[str] = []


def prefer_font(file: Path | None) -> None:
    """Use this font (--font) where it has all characters of a text; None for no other font.

    Raises:
        UserError: It is not a font that scales.
    """
    try:
        _preferred[:] = [str(file)] if file else []
        load_font(*_preferred or [PILLOW], size=20)
    except OSError as error:
        _preferred.clear()
        raise UserError(f"--font {file} cannot be read as a font (.ttf, .otf): {error}") from None
    finally:
        find_font.cache_clear()


def load_font(source: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font of `find_font` in a size in pixels."""
    return ImageFont.truetype(source, size) if source else ImageFont.load_default(size)


def one_line(name: str) -> str:
    """Return a name without line breaks, control and other invisible characters."""
    kept = (
        (c, kind)
        for c in unicodedata.normalize("NFC", name)
        if (kind := unicodedata.category(c)) != "Cf" or c in JOINERS
    )
    visible = (
        " " if kind in ("Cc", "Zl", "Zp") else "\ufffd" if kind == "Cs" or is_noncharacter(c) else c
        for c, kind in kept
    )
    return " ".join("".join(visible).split())


def is_noncharacter(c: str) -> bool:
    """Return whether a code point is none of a character, such as U+FFFE: XML forbids them."""
    return ord(c) & 0xFFFE == 0xFFFE


def readable_names(categories: Categories) -> tuple[str, ...]:
    """Return the names of the categories; "category 3" for those that no font can draw."""
    names = zip(categories.ids, map(one_line, categories.display_names), strict=True)
    return tuple(
        name if name and find_font(name + AROUND_NAMES) is not None else f"category {i}"
        for i, name in names
    )


@lru_cache(maxsize=10_000)
def find_font(text: str) -> str | None:
    """Find a font that has all characters of a text, for `load_font`; None if there is none."""
    characters = frozenset(text) - {" "}
    for source in _candidates(characters):
        if all(_has(source, character) for character in characters):
            return source
    return None


def font_and_text(text: str) -> tuple[str, str]:
    """Return a font for `load_font`, and what it has of a text: all of it if any font does."""
    source = find_font(text)
    if source is not None:
        return source, text
    return PILLOW, "".join(c for c in text if c == " " or _has(PILLOW, c)).strip() or "?"


def _candidates(characters: frozenset[str]) -> Iterator[str]:
    yield from _preferred
    yield PILLOW
    yield str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    yield from _system_fonts(frozenset(c for c in characters if not c.isascii()))


@lru_cache
def _system_fonts(characters: frozenset[str]) -> tuple[str, ...]:
    """Return the fonts that the system proposes for these characters, best first."""
    codes = " ".join(f"{ord(character):x}" for character in sorted(characters))
    files = []
    for command in ("fc-match", "fc-list"):
        try:
            done = subprocess.run(
                [command, "--format", "%{file}\n", f":charset={codes}"],
                **{"capture_output": True, "text": True, "timeout": 20, "check": True},
            )
        except (OSError, subprocess.SubprocessError):  # no fontconfig
            continue
        files += done.stdout.splitlines()[:10]
    return (*dict.fromkeys(files), *SYSTEM_FONTS)


@cache
def _has(source: str, character: str) -> bool:
    """Check whether a font has a character: it is not drawn as those that do not exist."""
    try:
        font = load_font(source, 20)
        drawn, missing = font.getmask(character), font.getmask("\U0010ffff")
    except (OSError, ValueError):  # no such font, or one of bitmaps in a single size
        return False
    if character in JOINERS:
        return True
    return bool(drawn.getbbox()) and (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
