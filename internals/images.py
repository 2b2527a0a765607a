"""Read image files of common formats as RGB, and list those in a folder."""

import contextlib
import errno
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import utils
from internals.bit_depth import Samples, bits_of, scale_gray
from internals.errors import DataError
from internals.image_notes import PAGES, TRUNCATED, UNTURNED, WARNED, ImageNote, warnings_as_notes

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
# The file name suffixes of these formats.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Pillow warns above this number of pixels and raises an error at twice as many. `_read` rejects
# them with a clearer message, so Pillow's check is disabled.
MAX_PIXELS, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None

# A cut JPEG is used if this share of its rows can be decoded (--truncated-images use).
MIN_DECODED = 0.75
# Only files with these suffixes are searched for 16-bit gray: other formats do not have it.
DEEP_SUFFIXES = (".png", ".tif", ".tiff", ".pgm", ".pnm")
# `measure_bit_depth` opens the first number of such files, and decodes the second.
OPENED, DECODED = 256, 32
# The first bytes of supported formats: JPEG, PNG, GIF; TIFF and BigTIFF.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TOO_LARGE = "image files that are too large"  # a kind of DataError
END_OF_IMAGE = b"\xff\xd9"  # of a JPEG
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageRules:
    """How the images of a data set are read.

    Attributes:
        bit_depth: The number of bits that 16-bit gray images hold: 8, 10, 12, 14 or 16. None: as
            many as the largest value of the image needs.
        use_truncated: Whether to use JPEGs whose end is missing, if most of the image is there.
    """

    bit_depth: int | None = None
    use_truncated: bool = False


DEFAULT_RULES = ImageRules()


def read_image(
    path: Path,
    width: int,
    height: int,
    rules: ImageRules = DEFAULT_RULES,
    notes: list[ImageNote] | None = None,
) -> torch.Tensor:
    """Read an image file of known size as RGB.

    16-bit gray is scaled to 8 bits, transparency is dropped. An EXIF orientation is applied, as
    annotation tools do, unless only the image without it has the given size.

    Args:
        path: The file.
        width: In pixels.
        height: In pixels.
        rules: Those of the data set.
        notes: What is to be known about the image is appended.

    Returns:
        uint8 `[3, height, width]`.

    Raises:
        DataError: The file cannot be read, or has another size.
    """
    image = _read(path, (width, height), rules, notes)
    if image.shape != (3, height, width):
        raise wrong_size(path, (image.shape[2], image.shape[1]), (width, height))
    return image


def wrong_size(path: Path, size: tuple[int, int], annotated: tuple[int, int]) -> DataError:
    """Return the error of an image whose width and height are not those in the annotation file."""
    return DataError(
        f"{path} is {size[0]} x {size[1]} pixels, but annotated as {annotated[0]} x "
        f"{annotated[1]}: correct 'width', 'height' and the boxes in the annotation file",
        kind="image files of another size than annotated",
    )


def read_upright(
    path: Path, rules: ImageRules = DEFAULT_RULES, notes: list[ImageNote] | None = None
) -> torch.Tensor:
    """Read an image file of unknown size as RGB, uint8 `[3, H, W]`.

    As `read_image`, but an EXIF orientation is always applied.
    """
    return _read(path, None, rules, notes)


def _read(
    path: Path, size: tuple[int, int] | None, rules: ImageRules, notes: list[ImageNote] | None
) -> torch.Tensor:
    found = []
    try:
        with warnings_as_notes(path, found):
            pixels = _decode(path, path, size, rules, found)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of many types
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # not the file's fault
        found.clear()
        pixels = _decode_truncated(path, size, rules, found)
        if pixels is None:
            raise _unreadable(path, error) from error
    if notes is not None:
        notes += found
    # A view: a copy with channels first would take half as long as decoding.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, UnidentifiedImageError):
        reason = _why_unidentified(path)
    return DataError(
        f"{path} cannot be read as an image: {reason}", kind="image files that cannot be read"
    )


def _why_unidentified(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "the file is empty"
    if start.startswith(TIFF_SIGNATURES):
        return (
            "the TIFF is damaged or incomplete, or has other bands or bits than are supported: "
            "convert it to 8-bit RGB"
        )
    known = start.startswith(SIGNATURES)
    return "the file is damaged or incomplete" if known else "not in a supported format"


def _decode(
    source: Path | io.BytesIO,
    path: Path,
    size: tuple[int, int] | None,
    rules: ImageRules,
    notes: list[ImageNote],
) -> np.ndarray:
    """Decode the image at `path`, whose content is `source`: uint8 `[H, W, 3]`."""
    with Image.open(source, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{path}: {image.width} x {image.height} pixels is more than the limit of "
                f"{MAX_PIXELS:,}: downscale the image, or cut it into tiles (datasets/tile.py)",
                kind=TOO_LARGE,
            )
        if image.format not in ("JPEG", "MPO") and getattr(image, "is_animated", False):
            notes.append(ImageNote(PAGES, str(path)))
        samples = Samples.of(image)
        return _to_rgb(_apply_orientation(image, path, size, notes), path, samples, rules, notes)


def read_sizes(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return (width, height) after EXIF rotation and as stored, and the EXIF orientation.

    Args:
        image: Opened, but not loaded: Pillow turns TIFFs on loading, and their size before that.
    """
    orientation, stored = image.getexif().get(ExifTags.Base.Orientation, 1), image.size
    if image.format == "TIFF":
        stored = (image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength])
    if orientation not in TURNS:
        orientation = 1
    return (stored[::-1] if orientation >= 5 else stored), stored, orientation


def _apply_orientation(
    image: Image.Image, path: Path, size: tuple[int, int] | None, notes: list[ImageNote]
) -> Image.Image:
    """Apply the EXIF orientation, unless only the image without it has the given `size`."""
    try:
        upright, stored, orientation = read_sizes(image)
    except Exception as error:  # the pixels do not depend on it
        notes.append(ImageNote(WARNED, f"{path}: unreadable EXIF data ({error})"))
        return image
    unturned = size == stored != upright
    if unturned:
        notes.append(ImageNote(UNTURNED, str(path)))
    if image.format == "TIFF":
        image.load()
        orientation = {6: 8, 8: 6}.get(orientation, orientation) if unturned else 1
        unturned = False
    return image if unturned or orientation == 1 else image.transpose(TURNS[orientation])


# --------------------------------------------------------------------------------------- 16 bits


def _to_rgb(
    image: Image.Image,
    path: Path,
    samples: Samples,
    rules: ImageRules,
    notes: list[ImageNote],
) -> np.ndarray:
    if image.mode == "F":
        raise DataError(
            f"{path} has floating-point pixels of unknown range: store it with 8 or 16 bits",
            kind="image files that cannot be read",
        )
    if image.mode.startswith("I"):  # convert("RGB") would clip it at 255
        gray = scale_gray(np.asarray(image), path, samples, rules.bit_depth, notes)
        return np.repeat(gray[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # it is dropped, of which Pillow would warn
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if samples.has_16_bits and pixels.max() < 16:
        raise DataError(
            f"{path} has 16-bit colors whose values need at most 12 bits, and would be nearly "
            "black: store it with 8 bits",
            kind="image files that cannot be read",
        )
    return pixels


def measure_bit_depth(files: Sequence[Path]) -> tuple[int, str] | None:
    """Find how many bits the 16-bit gray images among `files` hold.

    A sample of the files decides: the same for the same files. The significant bits that a PNG
    states do not count, as by its standard the values are scaled to 16 bits nevertheless.

    Returns:
        One of BIT_DEPTHS, and a line for the log; None if the sample has no 16-bit gray.
    """
    deep = [file for file in _spread(files, OPENED) if _largest_gray_value(file, decode=False)]
    largest = {file: _largest_gray_value(file) for file in _spread(deep, DECODED)}
    if not largest:
        return None
    file = max(largest, key=largest.get)
    depth = bits_of(largest[file])
    return depth, (
        f"16-bit gray images hold {depth} bits: divided by {1 << (depth - 8)} (the largest value "
        f"or stated maximum of {len(largest)} files is {largest[file]:,}, in {file})"
    )


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """Return `count` files at even distances, or all if there are fewer."""
    return list(files[:: max(1, -(-len(files) // count))])


def _largest_gray_value(file: Path, decode: bool = True) -> int:
    """Return the largest value of 16-bit gray; 0 for other images and unreadable ones.

    Without `decode` 1 is returned for 16-bit gray; of too large ones always 0.
    """
    with (
        contextlib.suppress(Exception),  # reading it will raise an error that names it
        warnings_as_notes(file, []),
        Image.open(file, formats=IMAGE_FORMATS) as image,
    ):
        samples = Samples.of(image)
        if not (samples.has_16_bits and image.mode.startswith("I")):
            return 0
        if image.width * image.height > MAX_PIXELS:
            return 0
        if not decode:
            return 1
        stated = samples.stated_maximum if samples.stated_maximum < 65535 else 0
        largest = max(int(np.asarray(image).max()), stated)
        return largest if largest <= 65535 else 0
    return 0


# --------------------------------------------------------------------------------- damaged files


def _decode_truncated(
    path: Path, size: tuple[int, int] | None, rules: ImageRules, notes: list[ImageNote]
) -> np.ndarray | None:
    """Decode a JPEG whose end is missing; None if the file is something else.

    With an end-of-image marker appended, libjpeg decodes what is there and leaves the rest gray.
    Unlike Pillow's LOAD_TRUNCATED_IMAGES, this has no effect on other threads.

    Raises:
        DataError: Too little of the image is left, or such images are not to be used.
    """
    try:
        content = path.read_bytes()
        if not content.startswith(b"\xff\xd8"):
            return None
        share = _decoded_share(content)
        with warnings_as_notes(path, notes):
            pixels = _decode(io.BytesIO(content + END_OF_IMAGE), path, size, rules, notes)
    except (DataError, MemoryError):
        raise
    except Exception:
        return None
    enough = share >= MIN_DECODED
    if rules.use_truncated and enough:
        notes.append(ImageNote(TRUNCATED, f"{path}, {100 * share:.0f} % of its rows"))
        return pixels
    remedy = "replace the file, as too little of it can be decoded"
    if enough:
        remedy = f"{100 * share:.0f} % of its rows are used with --truncated-images use"
    raise DataError(
        f"{path} is truncated: {remedy}",
        kind="truncated image files",
    )


def _decoded_share(content: bytes) -> float:
    """Return the share of the rows of a truncated JPEG that can be decoded."""
    with Image.open(io.BytesIO(content + END_OF_IMAGE), formats=("JPEG",)) as image:
        progressive = "progressive" in image.info
        rows = np.asarray(image).reshape(image.height, -1)
    if progressive and not _is_refinement(content):
        return 0.0
    # Rows that libjpeg did not get are 128 in all channels.
    decoded = np.flatnonzero(np.any((rows < 127) | (rows > 129), axis=1))
    return (decoded[-1] + 1) / len(rows) if len(decoded) else 0.0


def _is_refinement(content: bytes) -> bool:
    """Return whether the last scan of a progressive JPEG only adds bits to known coefficients."""
    start = content.rfind(b"\xff\xda")
    components = content[start + 4]
    return content[start + 7 + 2 * components] >> 4 > 0


def is_too_narrow(shorter, longer, min_size: int, max_size: int):
    """Return whether torchvision would resize the shorter side of an image to 0 pixels.

    Args:
        shorter: The shorter side in pixels, or an array of them.
        longer: The longer side, likewise.
        min_size: The size of the shorter side after resizing, unless the longer one exceeds
        max_size: this size.
    """
    return shorter * np.minimum(min_size / shorter, max_size / longer) < 1


def narrowness(height: int, width: int, transform: GeneralizedRCNNTransform) -> str | None:
    """Return why an image of this size is too narrow for a model, None if it is not.

    Args:
        height: In pixels.
        width: In pixels.
        transform: That of the model, which must not resize a side to 0 pixels.
    """
    if transform.fixed_size:
        return None
    if not is_too_narrow(*sorted((height, width)), transform.min_size[-1], transform.max_size):
        return None
    return (
        f"{width} x {height} pixels are too narrow for this model, which resizes the longest side "
        f"to {transform.max_size}: cut the image into parts"
    )


def _note_unread(error: OSError) -> None:
    utils.log(f"note: {error.filename} cannot be read, and is skipped: {error.strerror}")


def image_files(folder: Path) -> list[Path]:
    """List the files with an image suffix in a folder and its subfolders, sorted.

    Hidden files and folders are skipped: operating systems store thumbnails in them.
    """
    files, visited = [], set()
    for home, folders, names in os.walk(folder, onerror=_note_unread, followlinks=True):
        real = os.path.realpath(home)
        if real in visited:  # a link to a folder that is already listed
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(home, name) for name in names if not name.startswith(".")]
    images = (path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    # Reading a FIFO would block; broken links stay in the list, to be reported when they are read.
    return sorted(path for path in images if path.is_file() or not path.exists())
