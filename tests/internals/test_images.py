"""Reading image files of any mode, and finding them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from internals import images
from internals.errors import DataError


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_converted_to_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((4, 6), 255, dtype=np.uint8))
    file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    grey.convert("RGB").convert(mode).save(file)
    image = images.read_image(file, 6, 4)
    assert image.shape == (3, 4, 6)
    assert image.min() >= 250


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    image = images.read_image(tmp_path / "x.png", 16, 16)
    assert torch.equal(image[0], image[2])
    assert image[0].flatten().tolist() == (ramp.flatten() >> 8).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_by_stated_size(tmp_path, orientation):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:8, :8] = 255  # a white corner, to detect the rotation
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    transposed = orientation >= 5
    upright = images.read_image(tmp_path / "x.png", *((20, 30) if transposed else (30, 20)))
    corners = [upright[0, 0, 0], upright[0, 0, -1], upright[0, -1, -1], upright[0, -1, 0]]
    # Position of the first stored row and column, by the EXIF standard.
    where = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert [int(c) for c in corners].index(255) == where
    if transposed:  # with the stored size, the boxes belong to the stored image
        raw = images.read_image(tmp_path / "x.png", 30, 20)
        assert np.array_equal(raw.permute(1, 2, 0).numpy(), pixels)
    # Without a stated size the orientation is applied, as image viewers do.
    assert torch.equal(images.read_upright(tmp_path / "x.png"), upright)


def test_exif_orientation_of_square_image(tmp_path):
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    for image in (
        images.read_upright(tmp_path / "x.png"),
        images.read_image(tmp_path / "x.png", 20, 20),
    ):
        assert image[0, 0, -1] == 255
        assert image[0, 0, 0] == 0


def test_read_upright_rejects_huge_and_broken_images(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, message in (("huge", "pixels is more than"), ("broken", "cannot be read as an im")):
        with pytest.raises(DataError, match=message):
            images.read_upright(tmp_path / f"{name}.png")


def test_unreadable_images_are_named(tmp_path):
    file = tmp_path / "x.png"
    with pytest.raises(DataError, match=r"x\.png cannot be read.*No such file"):
        images.read_image(file, 4, 4)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.png cannot be read"):
        images.read_image(file, 4, 4)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    with pytest.raises(DataError, match=r"is 50 x 50 pixels, but annotated as 4 x 4"):
        images.read_image(file, 4, 4)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"x\.png cannot be read.*truncated"):
        images.read_image(file, 50, 50)


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_huge_images_are_rejected_before_decoding(side, tmp_path):
    Image.new("1", (side, side)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=f"{side} x {side} pixels is more than"):
        images.read_image(tmp_path / "x.png", side, side)


def test_image_files_are_sorted_and_unique(tmp_path):
    for name in ("b.jpg", "a.PNG", "c d/[1].tiff", "notes.txt", "._a.png", ".hidden/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c d/round").symlink_to(tmp_path)
    (tmp_path / "broken.png").symlink_to(tmp_path / "missing.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.png")
    names = [str(path.relative_to(tmp_path)) for path in images.image_files(tmp_path)]
    assert names == ["a.PNG", "b.jpg", "broken.png", "c d/[1].tiff"]
    assert images.image_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("height", "width", "too_narrow"),
    [
        *((1, 160, False), (1, 161, True), (161, 1, True), (8, 12_000, True), (1, 1, False)),
        (49, 49 * 160, True),  # by the rounding of torchvision's computation
    ],
)
def test_too_narrow_images_are_those_that_torchvision_cannot_resize(height, width, too_narrow):
    transform = GeneralizedRCNNTransform(96, 160, [0.5] * 3, [0.5] * 3).eval()
    assert (images.narrowness(height, width, transform) is not None) == too_narrow
    try:
        transform([torch.zeros(3, height, width)])
    except RuntimeError:
        assert too_narrow
    else:
        assert not too_narrow
    transform.fixed_size = (64, 64)
    assert images.narrowness(height, width, transform) is None
