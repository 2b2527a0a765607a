"""Boxes with names and scores on pictures, readable at any picture size."""

import colorsys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 480  # pixels: smaller pictures are enlarged, or no text would fit


def colour(category: int) -> tuple[int, int, int]:
    """A colour for the category at this position, 0 to 255 each; neighbours differ clearly."""
    # Steps of the golden ratio around the circle of hues never come back to one that was there.
    red, green, blue = colorsys.hsv_to_rgb(0.02 + category * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: torch.Tensor,
    boxes: torch.Tensor,
    texts: list[str],
    colours: list[tuple[int, int, int]],
) -> torch.Tensor:
    """A copy of `image`, uint8 `[3, H, W]`, with boxes and a text at each of them.

    `boxes` float32 `[N, 4]` as x1, y1, x2, y2 in pixels of the image, one of `texts` ("" for none)
    and `colours` for each; `N` may be 0. Later ones lie on top, and their texts find room first. A
    picture whose longest side is below 480 pixels is enlarged by a whole number first, so the
    result may be larger than the image.
    """
    factor = max(1, -(-LEAST_SIDE // max(image.shape[-2:])))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        size = (factor * picture.width, factor * picture.height)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    limits = torch.tensor([*picture.size, *picture.size])
    corners = (boxes * factor).clip(torch.zeros(4), limits).round().int().tolist()
    line = max(2, max(picture.size) // 400)
    for box, shade in zip(corners, colours, strict=True):
        _outline(draw, box, shade, line)
    _write(picture, draw, corners, texts, colours)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _outline(draw: ImageDraw.ImageDraw, box: list[int], shade: tuple, line: int) -> None:
    """A frame with a dark rim, which tells touching boxes of one colour apart."""
    rim = max(1, line // 3)
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow draws the last pixel, too
    around = (x1 - rim, y1 - rim, x2 + rim, y2 + rim)
    draw.rectangle(around, outline=(20, 20, 20), width=line + 2 * rim)
    draw.rectangle((x1, y1, x2, y2), outline=shade, width=line)


def _font(width: int, height: int) -> ImageFont.ImageFont:
    """What can be read at this picture size; torchvision would need a font file, Pillow has one."""
    return ImageFont.load_default(max(12, min(max(width, height) // 55, min(width, height) // 6)))


def _write(picture, draw, boxes: list, texts: list[str], colours: list) -> None:
    """Each text on a ground of its colour, at its box, where it hides no other text if possible."""
    font, taken = _font(*picture.size), np.empty((0, 4))
    for box, text, shade in reversed(list(zip(boxes, texts, colours, strict=True))):
        if not text:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = max(2, (bottom - top) // 6)
        width, height = right - left + 2 * pad, bottom - top + 2 * pad
        places = np.array(list(_places(box, width, height)))
        places = places.clip(0, np.maximum(0, np.array(picture.size) - (width, height)))
        low, high = places[:, None], places[:, None] + (width, height)
        overlap = ((low < taken[:, 2:]) & (high > taken[:, :2])).all(axis=2).any(axis=1)
        x, y = places[overlap.argmin()].tolist()
        taken = np.vstack([taken, (x, y, x + width, y + height)])
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=shade)
        bright = np.dot(shade, (0.299, 0.587, 0.114)) > 140
        ink = "black" if bright else "white"
        draw.text((x + pad - left, y + pad - top), text, fill=ink, font=font)


def _places(box: list[int], width: int, height: int) -> Iterator[tuple[int, int]]:
    """Where a text of this size may lie at its box, the best first: outside it, then inside."""
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
    """Pictures of one size, uint8 `[3, H, W]`, from left to right, each below its caption."""
    height, width = images[0].shape[-2:]
    font, gap = _font(width, height), max(4, width // 100)
    _, _, _, bottom = font.getbbox("Ag")
    pitch, top = width + gap, bottom + 6
    picture = Image.new("RGB", (len(images) * pitch - gap, height + top), "white")
    draw = ImageDraw.Draw(picture)
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        draw.text((n * pitch + 2, 3), caption, fill="black", font=font)
        picture.paste(
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (n * pitch, top)
        )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
