"""Scale images whose samples have 16 bits, of which they often use fewer, to 8 bits."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from internals.errors import DataError
from internals.image_notes import CLIPPED, DARK, OWN_DEPTH, ImageNote

# The bits that cameras and scanners record.
BIT_DEPTHS = (8, 10, 12, 14, 16)
EARLIER_DEPTH = 16  # that of runs of earlier versions, which do not state it


class Samples(NamedTuple):
    """How a file stores its samples, as far as the mode of Pillow's image does not tell."""

    has_16_bits: bool  # False if Pillow scales them by a maximum that the file states
    stated_maximum: int  # 0: none
    white_is_zero: bool  # which Pillow ignores where samples have 16 bits

    @classmethod
    def of(cls, image: Image.Image) -> "Samples":
        """Describe the samples of an image that is not loaded yet."""
        decoder, _, _, args = image.tile[0] if image.tile else ("", None, 0, "")
        raw_mode = str(args[0] if isinstance(args, tuple) and args else args)
        if image.format == "PPM":  # Pillow scales by the maximum, except where it is the format's
            maximum = 65535 if ";16" in raw_mode else args[1] if decoder != "raw" else 255
            return cls(maximum == 65535, 0, False)
        if image.format != "TIFF":
            return cls(";16" in raw_mode or image.mode.startswith("I"), 0, False)
        maximum = image.tag_v2.get(281, (0,))  # MaxSampleValue
        maximum = max(maximum) if isinstance(maximum, tuple) else maximum
        if raw_mode == "I;12":
            maximum = 4095
        deep = ";16" in raw_mode or image.mode.startswith("I")
        return cls(deep, maximum, image.tag_v2.get(262) == 0)  # PhotometricInterpretation


def scale_gray(
    values: np.ndarray,
    path: Path,
    samples: Samples,
    bit_depth: int | None,
    notes: list[ImageNote],
) -> np.ndarray:
    """Scale gray values of more than 8 bits to 8 bits.

    Args:
        values: Integers `[H, W]`.
        path: Their file, for messages.
        samples: How the file stores them.
        bit_depth: The rule of the data set; None to go by the largest of these values.
        notes: What is to be known about the image is appended.

    Returns:
        uint8 `[H, W]`.

    Raises:
        DataError: There are values below 0 or above 65,535.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"{path} has pixel values from {low:,} to {high:,}, whose range is unknown: store it "
            "with 8 or 16 bits",
            kind="image files that cannot be read",
        )
    depth = (bit_depth or bits_of(high)) if samples.has_16_bits else 16
    if samples.has_16_bits:
        detail = f"{path}, up to {high:,}"
        if bit_depth is None:
            notes.append(ImageNote(OWN_DEPTH, detail))
        elif high >> depth:
            notes.append(ImageNote(CLIPPED, detail))
        elif not high >> (depth - 4):
            notes.append(ImageNote(DARK, detail))
    gray = (values >> (depth - 8)).clip(max=255).astype(np.uint8)
    return 255 - gray if samples.white_is_zero else gray


def bits_of(value: int) -> int:
    """Return the smallest of BIT_DEPTHS whose range has a value from 0 to 65,535."""
    return next(bits for bits in BIT_DEPTHS if value < 1 << bits)
