"""Notes on images that are used: their kinds, Pillow's warnings as notes, and the log of a run."""

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import utils

# The kinds of `ImageNote`, and what to do about them.
TRUNCATED = "truncated image files that are used"
WARNED = "image files with warnings of their decoder"
CLIPPED = "16-bit images with values that need more bits than --bit-depth"
OWN_DEPTH = "16-bit images scaled by their own largest value"
DARK = "16-bit images that are nearly black"
UNTURNED = "images used without their EXIF rotation"
PAGES = "image files of several pages or frames"
NOTE_REMEDIES = {
    TRUNCATED: "Their missing part is gray",
    WARNED: "They are used: check that they look right",
    CLIPPED: "Such values are clipped: set --bit-depth",
    OWN_DEPTH: "Their brightness cannot be compared: set --bit-depth",
    DARK: "They use less than a sixteenth of the range of --bit-depth: store all images with the "
    "same number of bits",
    UNTURNED: "Only so they have the annotated size, but boxes drawn in the rotated image would "
    "not fit: look at a few with predict.py --show-truth",
    PAGES: "Only the first is used",
}


class ImageNote(NamedTuple):
    """Something to know about an image that is used."""

    kind: str  # a key of NOTE_REMEDIES
    text: str  # with the path


# Said when images are used; the others in the report of --check-data only.
LOGGED_KINDS = (TRUNCATED, WARNED, CLIPPED, OWN_DEPTH, DARK, PAGES)
MAX_LOGGED = 20  # of each kind, in each process
_logged = {kind: set() for kind in LOGGED_KINDS}


def log_notes(notes: Sequence[ImageNote]) -> None:
    """Log each note once, with the number of such images so far."""
    for note in notes:
        known = _logged.get(note.kind)
        if known is None or note.text in known:
            continue
        known.add(note.text)
        rest = ". Further ones are not listed" if len(known) == MAX_LOGGED else ""
        if len(known) <= MAX_LOGGED:
            utils.log_everywhere(f"note: {note.kind} ({len(known)} so far): {note.text}{rest}")


# -------------------------------------------------------------------------------------- warnings

_reading = threading.local()  # the file and the notes of the image that a thread is reading
_hook_lock = threading.Lock()
_show_elsewhere = warnings.showwarning


@contextlib.contextmanager
def warnings_as_notes(path: Path, notes: list[ImageNote]) -> Iterator[None]:
    """Turn Pillow's warnings in this thread into notes with the file's name.

    `warnings.catch_warnings` is not safe with threads, and Python shows equal warnings only once.
    """
    global _show_elsewhere
    with _hook_lock:
        if warnings.showwarning is not _show_warning:
            _show_elsewhere, warnings.showwarning = warnings.showwarning, _show_warning
            warnings.filterwarnings("always", category=UserWarning, module="PIL")
    _reading.file = (path, notes)
    try:
        yield
    finally:
        _reading.file = None


def _show_warning(message, category, *details, **more) -> None:
    path, notes = getattr(_reading, "file", None) or (None, None)
    if path is None or not issubclass(category, UserWarning):
        return _show_elsewhere(message, category, *details, **more)
    note = ImageNote(WARNED, f"{path}: {' '.join(str(message).split())}")
    return None if note in notes else notes.append(note)
