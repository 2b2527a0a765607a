"""Draw boxes with names and scores on images, readable at any image size."""

import colorsys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_convert

from coco_utils import Categories, CocoIndex
from reporting import fonts

MIN_SIDE = 480  # pixels: smaller images are enlarged to fit text
MAX_JPEG_SIDE = 65_500  # pixels: the limit of libjpeg

Color = tuple[int, int, int]


def category_color(category: int) -> Color:
    """Return the RGB color, 0 to 255, of a category by position; neighbours differ clearly."""
    # Steps of the golden ratio on the circle of hues never repeat a hue.
    red, green, blue = colorsys.hsv_to_rgb(0.02 + category * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_comparison(
    image: torch.Tensor,
    index: CocoIndex,
    i: int,
    detections: np.ndarray,
    categories: Categories,
    factor: int = 1,
) -> torch.Tensor:
    """Draw image i of the index twice: with its ground truth, and with its detections.

    Args:
        image: uint8 `[3, H, W]`.
        index: The ground truth. Boxes without a size or of unknown categories are not drawn.
        i: The position of the image in the index.
        detections: float64 `[N, 7]`, rows of `coco_eval.detection_rows`, highest score first.
        categories: The categories of both, for names and colors.
        factor: By which the image is reduced, but not its boxes.

    Returns:
        uint8 `[3, H', W']`, both drawings side by side, with captions.
    """
    rows = index.box_range(i)
    boxes, ids = index.boxes[rows] / factor, index.category_ids[rows]
    drawable = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    drawable &= np.isin(ids, categories.ids)
    suffixes = np.where(index.iscrowd[rows], " (crowd)", "")[drawable].tolist()
    ground_truth = _draw_categories(image, boxes[drawable], ids[drawable], suffixes, categories)
    captions = (f"ground truth: {len(suffixes):,}", f"detections: {len(detections):,}")
    found = draw_detections(image, detections, categories, factor)
    return side_by_side([ground_truth, found], captions)


def draw_detections(
    image: torch.Tensor, detections: np.ndarray, categories: Categories, factor: int = 1
) -> torch.Tensor:
    """Draw detections, rows of `coco_eval.detection_rows`, as in `draw_comparison`."""
    scores, boxes = [f" {score:.2f}" for score in detections[:, 5]], detections[:, 1:5] / factor
    return _draw_categories(image, boxes, detections[:, 6], scores, categories)


def _draw_categories(
    image: torch.Tensor,
    xywh: np.ndarray,
    category_ids: np.ndarray,
    suffixes: list[str],
    categories: Categories,
) -> torch.Tensor:
    """Draw boxes with the colors and names of their categories, the first box on top."""
    positions = np.searchsorted(categories.ids, category_ids).tolist()
    names = fonts.readable_names(categories)
    texts = [names[k] + suffix for k, suffix in zip(positions, suffixes, strict=True)]
    colors = [category_color(k) for k in positions]
    return draw_boxes(image, xywh_to_xyxy(xywh).flip(0), texts[::-1], colors[::-1])


def xywh_to_xyxy(boxes: np.ndarray) -> torch.Tensor:
    """Convert boxes from the format of COCO to that of `draw_boxes`, float32 `[N, 4]`."""
    return box_convert(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")


def draw_boxes(
    image: torch.Tensor, boxes: torch.Tensor, texts: list[str], colors: list[Color]
) -> torch.Tensor:
    """Draw boxes and their texts on a copy of the image.

    Args:
        image: uint8 `[3, H, W]`.
        boxes: float32 `[N, 4]`, xyxy in pixels; later boxes are on top, and their texts are placed
            first. N may be 0.
        texts: One for each box, "" for none. Characters that no font has are left out.
        colors: One for each box.

    Returns:
        uint8 `[3, H', W']`, enlarged by an integer factor if the longest side is below 480 pixels.
    """
    factor = max(1, -(-MIN_SIDE // max(image.shape[-2:])))
    canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        size = (factor * canvas.width, factor * canvas.height)
        canvas = canvas.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    limits = torch.tensor([*canvas.size, *canvas.size])
    corners = (boxes * factor).clip(torch.zeros(4), limits).round().int().tolist()
    width = max(2, max(canvas.size) // 400)
    for box, shade in zip(corners, colors, strict=True):
        _draw_outline(draw, box, shade, width)
    _draw_texts(canvas, draw, corners, texts, colors)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _draw_outline(draw: ImageDraw.ImageDraw, box: list[int], shade: Color, width: int) -> None:
    """Draw a frame with a dark rim, which separates touching boxes of one color."""
    rim = max(1, width // 3)
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow includes the last pixel
    around = (x1 - rim, y1 - rim, x2 + rim, y2 + rim)
    draw.rectangle(around, outline=(20, 20, 20), width=width + 2 * rim)
    draw.rectangle((x1, y1, x2, y2), outline=shade, width=width)


def _font_size(width: int, height: int) -> int:
    """Return a size in pixels that is readable at this image size."""
    return max(12, min(max(width, height) // 55, min(width, height) // 6))


def _draw_texts(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    boxes: list[list[int]],
    texts: list[str],
    colors: list[Color],
) -> None:
    """Draw each text on a background of its color, if possible without covering other texts."""
    size, loaded, occupied = _font_size(*canvas.size), {}, np.empty((0, 4))
    for box, text, shade in reversed(list(zip(boxes, texts, colors, strict=True))):
        if not text:
            continue
        source, text = fonts.font_and_text(text)
        if source not in loaded:
            loaded[source] = fonts.load_font(source, size)
        font = loaded[source]
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = max(2, (bottom - top) // 6)
        width, height = right - left + 2 * pad, bottom - top + 2 * pad
        places = np.array(list(_places(box, width, height)))
        places = places.clip(0, np.maximum(0, np.array(canvas.size) - (width, height)))
        low, high = places[:, None], places[:, None] + (width, height)
        overlap = ((low < occupied[:, 2:]) & (high > occupied[:, :2])).all(axis=2).any(axis=1)
        x, y = places[overlap.argmin()].tolist()
        occupied = np.vstack([occupied, (x, y, x + width, y + height)])
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=shade)
        bright = np.dot(shade, (0.299, 0.587, 0.114)) > 140
        ink = "black" if bright else "white"
        draw.text((x + pad - left, y + pad - top), text, fill=ink, font=font)


def _places(box: list[int], width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield positions for a text of this size at its box, best first: outside, then inside."""
    x1, y1, x2, y2 = box
    if y1 >= height:
        yield x1, y1 - height
        yield x2 - width, y1 - height
    yield x1, y1
    yield x2 - width, y1
    yield x1, y2 - height
    yield x2 - width, y2 - height
    yield x1, y2


def side_by_side(images: list[torch.Tensor], captions: list[str]) -> torch.Tensor:
    """Join images of one size, uint8 `[3, H, W]`, from left to right, with captions on top."""
    height, width = images[0].shape[-2:]
    font = fonts.load_font(fonts.PILLOW, _font_size(width, height))
    gap = max(4, width // 100)
    _, _, _, bottom = font.getbbox("Ag")
    pitch, top = width + gap, bottom + 6
    canvas = Image.new("RGB", (len(images) * pitch - gap, height + top), "white")
    draw = ImageDraw.Draw(canvas)
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        draw.text((n * pitch + 2, 3), caption, fill="black", font=font)
        canvas.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (n * pitch, top))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def save(image: torch.Tensor, file: Path, quality: int) -> None:
    """Write an image, uint8 `[3, H, W]`, as JPEG, or as PNG if it is too large for that."""
    # Subsampled colors, Pillow's default, would smear thin lines.
    options = {"quality": quality, "subsampling": 0}
    if max(image.shape) > MAX_JPEG_SIDE:
        file, options = file.with_name(f"{file.stem}.png"), {}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, **options)
    except OSError as error:  # Pillow's do not name the file
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
