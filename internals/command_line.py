"""What the commands share: a parser whose errors are UserErrors, types of flags, output folders."""

import argparse
from pathlib import Path

from internals.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage; takes no abbreviated flags."""

    def __init__(self, description: str, **kwargs):
        super().__init__(description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def at_least(kind: type, minimum: float):
    """An argparse type: a number of type `kind` that is not below `minimum`."""

    def convert(text: str):
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value

    convert.__name__ = kind.__name__  # argparse says it of what is no number
    return convert


positive_int, non_negative_int, int_at_least_2 = (at_least(int, n) for n in (1, 0, 2))
non_negative_float = at_least(float, 0.0)


def fraction(text: str) -> float:
    """An argparse type: a number strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def evaluator_name(text: str) -> str:
    """An argparse type: faster-coco-eval, which hotcoco has replaced, still stands for it."""
    return "hotcoco" if text == "faster-coco-eval" else text


def prepare_output_dir(folder: Path, must_be_empty: bool = False) -> None:
    """Make the output folder, and fail now if it cannot be written.

    Raises:
        UserError: it cannot be written, or holds something although it `must_be_empty`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
        used = must_be_empty and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    if used:
        raise UserError(
            f"--output-dir {folder} is not empty, and nothing is written over: name a new folder"
        )
