"""Read image files of common formats as RGB, and list those in a folder."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from internals.errors import DataError

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
# The file name suffixes of these formats.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Pillow warns above this number of pixels and raises an error at twice as many. `_read` rejects
# them with a clearer message, so Pillow's check is disabled.
MAX_PIXELS, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None


def read_image(path: Path, width: int, height: int) -> torch.Tensor:
    """Read an image file of known size as RGB.

    16-bit gray is scaled to 8 bits, transparency is dropped. An EXIF orientation is applied, as
    annotation tools do, unless only the image without it has the given size.

    Returns:
        uint8 `[3, height, width]`.

    Raises:
        DataError: The file cannot be read, or has another size.
    """
    image = _read(path, (width, height))
    if image.shape != (3, height, width):
        raise DataError(
            f"{path} is {image.shape[2]} x {image.shape[1]} pixels, but annotated as "
            f"{width} x {height}: correct 'width', 'height' and the boxes in the annotation file",
            kind="image files of another size than annotated",
        )
    return image


def read_upright(path: Path) -> torch.Tensor:
    """Read an image file of unknown size as RGB, uint8 `[3, H, W]`.

    As `read_image`, but an EXIF orientation is always applied.
    """
    return _read(path, None)


def _read(path: Path, size: tuple[int, int] | None) -> torch.Tensor:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels is more than the limit of "
                    f"{MAX_PIXELS:,}: downscale the image",
                    kind="image files that are too large",
                )
            pixels = _to_rgb(_apply_orientation(image, size), path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of many types
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not in a supported format" if path.stat().st_size else "the file is empty"
        raise DataError(
            f"{path} cannot be read as an image: {reason}", kind="image files that cannot be read"
        ) from error
    # A view: a copy with channels first would take half as long as decoding.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _apply_orientation(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Apply the EXIF orientation, unless the result would not have the given `size`."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    upright = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    applies = orientation != 1 and (size is None or upright == size)
    return ImageOps.exif_transpose(image) if applies else image


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode == "F":
        raise DataError(
            f"{path} has floating-point pixels of unknown range: store it with 8 or 16 bits",
            kind="image files that cannot be read",
        )
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def narrowness(height: int, width: int, transform: GeneralizedRCNNTransform) -> str | None:
    """Return why an image of this size is too narrow for a model, None if it is not.

    Args:
        height: In pixels.
        width: In pixels.
        transform: That of the model, which must not resize a side to 0 pixels.
    """
    if transform.fixed_size:
        return None
    shorter, longer = sorted((height, width))
    if shorter * min(transform.min_size[-1] / shorter, transform.max_size / longer) >= 1:
        return None
    return (
        f"{width} x {height} pixels are too narrow for this model, which resizes the longest side "
        f"to {transform.max_size}: cut the image into parts"
    )


def image_files(folder: Path) -> list[Path]:
    """List the files with an image suffix in a folder and its subfolders, sorted.

    Hidden files and folders are skipped: operating systems store thumbnails in them.
    """
    files, visited = [], set()
    for home, folders, names in os.walk(folder, followlinks=True):
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
