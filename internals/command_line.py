"""Command-line helpers: a parser that raises UserError, argparse types, output folders."""

import argparse
import difflib
import re
from pathlib import Path

from internals.errors import UserError

MAX_NUMBER = 2**63 - 1  # what PyTorch accepts as a seed; also rejects infinity


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing its usage; no abbreviated flags."""

    def __init__(self, description: str, **kwargs):
        super().__init__(description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """Raise UserError; suggest a flag in place of an unknown one."""
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        flags = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"{message}{hint} (see --help)")


def at_least(kind: type, minimum: float):
    """Return an argparse type: a number of type `kind`, at least `minimum`."""

    def convert(text: str):
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        if value > MAX_NUMBER:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return value

    convert.__name__ = kind.__name__  # for "invalid int value"
    return convert


positive_int = at_least(int, 1)
non_negative_int = at_least(int, 0)
int_at_least_2 = at_least(int, 2)
int_at_least_11 = at_least(int, 11)
non_negative_float = at_least(float, 0.0)


def positive_float(text: str) -> float:
    """Parse a number above 0; an argparse type."""
    value = float(text)
    if not 0 < value <= MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """Parse a number between 0 and 1, both excluded; an argparse type."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def share(text: str) -> float:
    """Parse a number above 0 and at most 1; an argparse type."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def share_or_0(text: str) -> float:
    """Parse a number from 0 to 1; an argparse type."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def share_below_1(text: str) -> float:
    """Parse a number from 0 to below 1; an argparse type."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


for _convert in (positive_float, fraction, share, share_or_0, share_below_1):
    _convert.__name__ = "float"  # for "invalid float value"


def evaluator_name(text: str) -> str:
    """Parse an evaluator name, an argparse type: faster-coco-eval is an alias of hotcoco."""
    return "hotcoco" if text == "faster-coco-eval" else text


def prepare_output_dir(folder: Path, must_be_empty: bool = False) -> None:
    """Create the output folder and check that it is writable.

    Raises:
        UserError: It is not writable, or not empty although it `must_be_empty`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
        is_rejected = must_be_empty and any(folder.iterdir())
    except FileExistsError:
        raise UserError(f"--output-dir {folder} is a file: use a folder") from None
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    if is_rejected:
        raise UserError(
            f"--output-dir {folder} is not empty, and files are never overwritten: use a new folder"
        )
