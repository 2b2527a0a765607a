"""Read the rows of an image in order, also of one that is too large to be decoded as a whole.

Images of up to `internals.images.MAX_PIXELS` are decoded as in a training. Of larger ones regions
are read with rasterio (`pip install rasterio`, optional), whose wheels include GDAL:

    JPEG, PNG, BMP, WebP, GIF, TIFF and BigTIFF (strips or tiles, also compressed), PGM and PPM
    8 bits: gray, RGB, palette, CMYK, YCbCr, with alpha or further bands, which are dropped
    1, 2 and 4 bits: gray, palette
    16 bits: gray, by a bit depth that is given

A baseline JPEG, a PNG, a BMP, and a TIFF of small strips or tiles are decoded row by row. Of a
progressive JPEG the coefficients are in memory, 2 to 4 bytes a pixel; a WebP image is decoded as a
whole.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from internals import images
from internals.bit_depth import Samples, scale_gray
from internals.errors import DataError, UserError
from internals.image_notes import PAGES, UNTURNED, WARNED, ImageNote, warnings_as_notes
from internals.images import DEFAULT_RULES, IMAGE_FORMATS, ImageRules
from internals.tiles import Rows

COLOR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SINGLE_BAND_MODES = ("1", "L", "LA", "P", "PA")
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 64,  # MiB of decoded blocks: by default 5 % of the memory
    # Files beside the image that look like its metadata are neither read nor written.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_ALLOW_LARGE_LIBJPEG_MEM_ALLOC": "YES",  # for progressive JPEGs
}


@contextlib.contextmanager
def open_rows(
    path: Path,
    rules: ImageRules = DEFAULT_RULES,
    notes: list[ImageNote] | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Rows]:
    """Open an image file, to read its rows in order as RGB.

    Args:
        path: The file.
        rules: Those of the data set.
        notes: What is to be known about the image is appended, at the latest at the end.
        size: The width and height that the image must have; an EXIF orientation is then applied
            as `internals.images.read_image` does, else always.

    Raises:
        DataError: The file cannot be read, or has another size; also while rows are read.
        UserError: The image is larger than the limit, and rasterio is not installed.
    """
    notes = [] if notes is None else notes
    header = _try_to_read_header(path, notes)
    if header is None or not header.is_large:  # reading it explains what is wrong with it
        if size:
            pixels = images.read_image(path, *size, rules, notes)
        else:
            pixels = images.read_upright(path, rules, notes)
        yield ArrayRows(pixels.permute(1, 2, 0).numpy())
        return
    _check_orientation(path, header, size, notes)
    with _open_regions(path, header, rules, notes) as rows:
        yield rows


def read_size(path: Path) -> tuple[int, int] | None:
    """Return (width, height) of an image after EXIF rotation, without decoding it.

    None: its header cannot be read, and an attempt to decode it raises an error that says why.
    """
    header = _try_to_read_header(path, [])
    return header and header.upright


class _Header(NamedTuple):
    """What an image file says about itself."""

    mode: str  # Pillow's
    upright: tuple[int, int]  # width, height after EXIF rotation
    stored: tuple[int, int]
    orientation: int
    samples: Samples
    has_maximum: bool  # PGM and PPM, which Pillow scales by it

    @property
    def is_large(self) -> bool:
        return self.stored[0] * self.stored[1] > images.MAX_PIXELS


def _try_to_read_header(path: Path, notes: list[ImageNote]) -> _Header | None:
    """Read the header; notes are appended for images beyond the limit only."""
    found = []
    try:
        with warnings_as_notes(path, found), Image.open(path, formats=IMAGE_FORMATS) as image:
            header = _describe(image, path, found)
            if header.is_large and image.format != "MPO" and getattr(image, "is_animated", False):
                found.append(ImageNote(PAGES, str(path)))
    except Exception:  # decoders raise errors of many types
        return None
    if header.is_large:
        notes += found
    return header


def _describe(image: Image.Image, path: Path, notes: list[ImageNote]) -> _Header:
    sizes = image.size, image.size, 1
    # Of a PNG without EXIF before its pixels, Pillow would decode these to look behind them.
    if image.format != "PNG" or "exif" in image.info:
        try:
            sizes = images.read_sizes(image)
        except Exception as error:  # as in `images`: the pixels do not depend on it
            notes.append(ImageNote(WARNED, f"{path}: unreadable EXIF data ({error})"))
    has_maximum = image.format == "PPM" and image.tile[0][0] != "raw"
    return _Header(image.mode, *sizes, Samples.of(image), has_maximum)


def _check_orientation(
    path: Path, header: _Header, size: tuple[int, int] | None, notes: list[ImageNote]
) -> None:
    """Raise DataError for a large image of another `size`, or that would have to be turned."""
    if size == header.stored != header.upright:
        notes.append(ImageNote(UNTURNED, str(path)))
        return
    if size and size != header.upright:
        raise images.wrong_size(path, header.upright, size)
    if header.orientation != 1:
        raise _refuse(
            path, header, f"is to be turned (EXIF orientation {header.orientation})",
            "store it upright, without that tag",
        )  # fmt: skip


class ArrayRows:
    """The rows of an image in memory."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return some rows, a view."""
        return self.pixels[start:stop]


# --------------------------------------------------------------------------- beyond the limit


@contextlib.contextmanager
def _open_regions(
    path: Path, header: _Header, rules: ImageRules, notes: list[ImageNote]
) -> Iterator[Rows]:
    if header.mode not in (*COLOR_MODES, *SINGLE_BAND_MODES) and not header.mode.startswith("I"):
        raise _refuse(path, header, f"has pixels of the kind {header.mode}")
    if header.has_maximum:
        raise _refuse(path, header, "is scaled by a maximum that is not 255 or 65,535")
    rasterio = _import_rasterio(path, header)
    with rasterio.Env(**GDAL_OPTIONS):
        try:
            dataset = rasterio.open(path)
        except UnicodeEncodeError as error:
            raise _unreadable(path, "its name is not UTF-8: rename it") from error
        except rasterio.errors.RasterioIOError as error:
            raise _unreadable(path, error) from error
        with dataset:
            make_rows = _Gray16Rows if dataset.dtypes[0] == "uint16" else _ByteRows
            rows = make_rows(path, header, dataset, rules)
            yield rows
        notes += rows.find_notes()


def _import_rasterio(path: Path, header: _Header):
    try:
        import rasterio
    except ImportError:
        width, height = header.stored
        raise UserError(
            f"{path}: {width} x {height} pixels is more than the limit of {images.MAX_PIXELS:,}. "
            "To read such images in parts: pip install rasterio"
        ) from None
    # Images without a place on a map are the rule here.
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def _refuse(path: Path, header: _Header, reason: str, remedy: str = "") -> DataError:
    width, height = header.stored
    remedy = remedy or "convert it to a TIFF or JPEG of 8-bit RGB"
    return DataError(
        f"{path} {reason}, which is not supported for images of more than {images.MAX_PIXELS:,} "
        f"pixels (it has {width} x {height}): {remedy}",
        kind=images.TOO_LARGE,
    )


def _unreadable(path: Path, error: Exception) -> DataError:
    """Return the error of a file that GDAL cannot read; rasterio hides the reason in a cause."""
    reason = str(error.__cause__ or error).rpartition(": ")[2].strip().rstrip(".")
    return DataError(
        f"{path} cannot be read as an image, it is damaged or incomplete: {reason}",
        kind="image files that cannot be read",
    )


class _RegionRows:
    """The rows of an open file of rasterio."""

    def __init__(self, path: Path, dataset, bands: tuple[int, ...]):
        self.path, self.dataset, self.bands = path, dataset, bands
        self.width, self.height = dataset.width, dataset.height

    def read_bands(self, start: int, stop: int) -> np.ndarray:
        """Return rows as they are stored, `[stop - start, width, bands]`."""
        import rasterio
        from rasterio.windows import Window

        shape = stop - start, self.width, len(self.bands)
        pixels = np.empty(shape, dtype=self.dataset.dtypes[0])
        window = Window(0, start, self.width, stop - start)
        try:
            # Into a view: rasterio's order is bands, rows, columns.
            self.dataset.read(indexes=self.bands, window=window, out=pixels.transpose(2, 0, 1))
        except rasterio.errors.RasterioIOError as error:
            raise _unreadable(self.path, error) from error
        return pixels

    def find_notes(self) -> list[ImageNote]:
        """Return what is to be known after the last row."""
        return []


class _ByteRows(_RegionRows):
    """Rows of up to 8 bits."""

    def __init__(self, path: Path, header: _Header, dataset, rules: ImageRules):
        is_color = header.mode in COLOR_MODES
        names = [color.name for color in dataset.colorinterp[:3]]
        if set(dataset.dtypes) != {"uint8"} or (is_color and names != ["red", "green", "blue"]):
            kinds = ", ".join(dict.fromkeys(dataset.dtypes))
            raise _refuse(path, header, f"has {dataset.count} bands of {kinds}")
        super().__init__(path, dataset, (1, 2, 3) if is_color else (1,))
        self.colors = None if is_color else _color_table(dataset)

    def read(self, start: int, stop: int) -> np.ndarray:
        pixels = self.read_bands(start, stop)
        return pixels if self.colors is None else self.colors[pixels[:, :, 0]]


def _color_table(dataset) -> np.ndarray:
    """Return the color of each value of a single band, uint8 `[256, 3]`."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    if dataset.colorinterp[0].name == "palette":
        for value, color in dataset.colormap(1).items():
            colors[value] = color[:3]
        return colors
    bits = int(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    values = np.arange(1 << bits)
    colors[values] = (values * 255 // values[-1])[:, None]
    return colors


class _Gray16Rows(_RegionRows):
    """Rows of 16-bit gray."""

    def __init__(self, path: Path, header: _Header, dataset, rules: ImageRules):
        if not header.mode.startswith("I") or dataset.count > 1:
            raise _refuse(path, header, f"has {dataset.count} bands of 16 bits")
        if rules.bit_depth is None:
            raise _refuse(
                path, header, "has 16-bit gray values of unknown range",
                "state the number of bits that they use with --bit-depth",
            )  # fmt: skip
        super().__init__(path, dataset, (1,))
        self.samples, self.bit_depth, self.highest = header.samples, rules.bit_depth, 0

    def read(self, start: int, stop: int) -> np.ndarray:
        values = self.read_bands(start, stop)[:, :, 0]
        self.highest = max(self.highest, int(values.max()))
        return np.repeat(self.scale(values, [])[:, :, None], 3, axis=2)

    def scale(self, values: np.ndarray, notes: list[ImageNote]) -> np.ndarray:
        return scale_gray(values, self.path, self.samples, self.bit_depth, notes)

    def find_notes(self) -> list[ImageNote]:
        notes = []  # of the image, not of each of its parts
        self.scale(np.array([[self.highest]]), notes)
        return notes
