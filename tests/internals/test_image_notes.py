"""The log of notes on images."""

import pytest

from internals import image_notes
from internals.image_notes import ImageNote


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    kinds = {kind: set() for kind in image_notes.LOGGED_KINDS}
    monkeypatch.setattr(image_notes, "_logged", kinds)


def test_each_note_is_logged_once_and_counted(capsys):
    notes = [ImageNote(image_notes.TRUNCATED, f"{n}.jpg, 97 % of its rows") for n in (1, 2, 1)]
    image_notes.log_notes(notes)
    image_notes.log_notes(notes[1:])  # in the next epoch
    assert capsys.readouterr().out.splitlines() == [
        "note: truncated image files that are used (1 so far): 1.jpg, 97 % of its rows",
        "note: truncated image files that are used (2 so far): 2.jpg, 97 % of its rows",
    ]


def test_log_is_limited(capsys):
    image_notes.log_notes([ImageNote(image_notes.WARNED, f"{n}.jpg") for n in range(100)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == image_notes.MAX_LOGGED
    assert lines[-1].endswith("Further ones are not listed")


def test_rotations_are_reported_by_the_data_check_only(capsys):
    image_notes.log_notes([ImageNote(image_notes.UNTURNED, "1.jpg")])
    assert capsys.readouterr().out == ""


def test_every_kind_has_a_remedy():
    assert set(image_notes.LOGGED_KINDS) < set(image_notes.NOTE_REMEDIES)
