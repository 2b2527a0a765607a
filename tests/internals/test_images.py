"""Reading image files of any mode, and finding them."""

import errno
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from internals import bit_depth, image_notes, images
from internals.errors import DataError
from internals.images import ImageRules


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


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_by_stated_size(tmp_path, orientation, suffix):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:8, :8] = 255  # a white corner, to detect the rotation
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"x{suffix}", exif=exif)
    transposed = orientation >= 5
    upright = images.read_image(tmp_path / f"x{suffix}", *((20, 30) if transposed else (30, 20)))
    corners = [upright[0, 0, 0], upright[0, 0, -1], upright[0, -1, -1], upright[0, -1, 0]]
    # Position of the first stored row and column, by the EXIF standard.
    where = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert [int(c) for c in corners].index(255) == where
    if transposed:  # with the stored size, the boxes belong to the stored image
        raw = images.read_image(tmp_path / f"x{suffix}", 30, 20)
        assert np.array_equal(raw.permute(1, 2, 0).numpy(), pixels)
    # Without a stated size the orientation is applied, as image viewers do.
    assert torch.equal(images.read_upright(tmp_path / f"x{suffix}"), upright)


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


# --------------------------------------------------------------------------------------- 16 bits


def write_gray(file: Path, bits: int, stored=np.uint16, **options) -> np.ndarray:
    """Write a ramp over the whole range of `bits`; return it with 8 bits."""
    ramp = np.linspace(0, (1 << bits) - 1, 256).astype(stored).reshape(16, 16)
    Image.fromarray(ramp).save(file, **options)
    return (ramp.astype(np.int64) >> (bits - 8)).astype(np.uint8)


def read(file: Path, rules=images.DEFAULT_RULES) -> tuple[np.ndarray, list[str]]:
    """Return the red channel and the kinds of the notes."""
    notes = []
    pixels = images.read_upright(file, rules, notes)
    assert all(str(file) in note.text for note in notes)
    return pixels[0].numpy(), [note.kind for note in notes]


@pytest.mark.parametrize("bits", bit_depth.BIT_DEPTHS)
@pytest.mark.parametrize("name", ["x.png", "x.tif", "big_endian.tif", "int32.tif"])
def test_16_bit_images_are_scaled_by_the_bits_that_they_hold(tmp_path, bits, name):
    stored = {"big_endian.tif": ">u2", "int32.tif": np.int32}.get(name, np.uint16)
    expected = write_gray(tmp_path / name, bits, stored)
    assert images.measure_bit_depth([tmp_path / name])[0] == bits
    for rules in (ImageRules(bits), ImageRules()):
        pixels, kinds = read(tmp_path / name, rules)
        assert np.array_equal(pixels, expected)
        assert kinds == ([] if rules.bit_depth else [image_notes.OWN_DEPTH])


def test_one_rule_keeps_brightness_comparable(tmp_path):
    files = [tmp_path / f"{bits}.png" for bits in (8, 12)]
    for file, bits in zip(files, (8, 12), strict=True):
        write_gray(file, bits)
    depth, text = images.measure_bit_depth(files)
    assert depth == 12
    assert "hold 12 bits: divided by 16" in text
    assert "4,095" in text
    assert str(files[1]) in text
    pixels, kinds = read(files[0], ImageRules(12))
    assert pixels.max() == 255 >> 4
    assert kinds == [image_notes.DARK]
    pixels, kinds = read(files[1], ImageRules(8))
    assert (pixels[1:] == 255).all()
    assert kinds == [image_notes.CLIPPED]


def test_images_without_16_bit_gray_have_no_bit_depth(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    Image.new("L", (8, 8)).save(tmp_path / "gray.tif")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = [tmp_path / name for name in ("rgb.png", "gray.tif", "broken.png", "missing.png")]
    assert images.measure_bit_depth(files) is None
    assert images.measure_bit_depth([]) is None


@pytest.mark.parametrize(("head", "kind"), [("P5", "u2"), ("P2", "text")])
@pytest.mark.parametrize("maximum", [1000, 4095, 65535])
def test_stated_maximum_of_pgm(tmp_path, head, kind, maximum):
    values = np.linspace(0, 1000, 256).astype(">u2")
    content = values.tobytes() if kind == "u2" else " ".join(map(str, values)).encode()
    file = tmp_path / "x.pgm"
    file.write_bytes(f"{head}\n16 16\n{maximum}\n".encode() + content)
    stated = maximum < 65535  # the largest number of the format states nothing
    assert (images.measure_bit_depth([file]) is None) == stated
    pixels, kinds = read(file, ImageRules(8))
    assert pixels.max() == (int(1000 / maximum * 255) if stated else 255)
    assert kinds == ([] if stated else [image_notes.CLIPPED])


def test_stated_maximum_of_tiff(tmp_path):
    write_gray(tmp_path / "x.tif", 8, tiffinfo={281: 4095})  # MaxSampleValue
    assert images.measure_bit_depth([tmp_path / "x.tif"])[0] == 12


def test_tiff_with_white_as_zero_is_inverted(tmp_path):
    expected = write_gray(tmp_path / "x.tif", 12, tiffinfo={262: 0})
    assert np.array_equal(read(tmp_path / "x.tif")[0], 255 - expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-1, 5]], dtype=np.int32), "values from -1 to 5, whose range is unknown"),
        (np.array([[0, 65536]], dtype=np.int32), "values from 0 to 65,536, whose range is unknown"),
        (np.array([[0.5, 1]], dtype=np.float32), "floating-point pixels of unknown range"),
    ],
)
def test_numbers_of_unknown_range_are_rejected(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif.*{message}"):
        images.read_upright(tmp_path / "x.tif")


@pytest.mark.parametrize("maximum", [4095, 65535])
def test_16_bit_colors(tmp_path, maximum):
    """Pillow keeps the upper 8 bits only: nothing is left of few."""
    values = np.linspace(0, maximum, 3 * 256).astype(">u2").reshape(16, 16, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    if maximum == 65535:
        assert np.array_equal(read(tmp_path / "x.png")[0], values[:, :, 0] >> 8)
    else:
        with pytest.raises(DataError, match=r"x\.png has 16-bit colors.*nearly black"):
            images.read_upright(tmp_path / "x.png")


# --------------------------------------------------------------------------------- damaged files

USE = ImageRules(use_truncated=True)


def jpeg(mode: str = "RGB", **options) -> bytes:
    """Return a JPEG of 160 x 160 pixels in which every part takes about as many bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    image = Image.fromarray(noise).resize((160, 160), Image.Resampling.BICUBIC).convert(mode)
    image.save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("missing", [2, 0.02, 0.15])
def test_truncated_jpeg_is_used_or_refused(tmp_path, mode, options, missing):
    whole, file = jpeg(mode, **options), tmp_path / "x.jpg"
    file.write_bytes(whole)
    expected = images.read_upright(file).int()
    file.write_bytes(whole[: -missing if missing == 2 else -int(missing * len(whole))])
    with pytest.raises(DataError, match=r"x\.jpg is truncated: \d+ % .*--truncated-images use"):
        images.read_image(file, 160, 160)
    notes = []
    pixels = images.read_image(file, 160, 160, USE, notes)
    assert [note.kind for note in notes] == [image_notes.TRUNCATED]
    assert str(file) in notes[0].text
    rows = 100 if missing == 0.15 else 144
    difference = (pixels.int() - expected)[:, :rows].abs().float().mean()
    assert difference < 2
    assert torch.equal(pixels, images.read_image(file, 160, 160, USE))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("rules", [USE, ImageRules()])
@pytest.mark.parametrize("progressive", [False, True])
def test_half_a_jpeg_is_refused(tmp_path, rules, progressive):
    whole = jpeg(progressive=progressive)
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\.jpg (is truncated: .*too little|.*is truncated)"):
        images.read_image(tmp_path / "x.jpg", 160, 160, rules)


def test_lost_rows_of_a_truncated_jpeg_are_gray(tmp_path):
    whole = jpeg()
    (tmp_path / "x.jpg").write_bytes(whole[: int(0.8 * len(whole))])
    notes = []
    pixels = images.read_image(tmp_path / "x.jpg", 160, 160, USE, notes)
    assert (pixels[:, -16:] == 128).all()
    assert "% of its rows" in notes[0].text
    share = int(notes[0].text.split()[-5])
    assert 75 <= share <= 90


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".bmp", ".tif"])
def test_other_truncated_files_are_refused(tmp_path, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(jpeg())
    Image.open(file).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"x\{suffix} cannot be read as an image"):
        images.read_image(file, 160, 160, USE)


def test_bytes_behind_a_jpeg_do_not_matter(tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    expected = images.read_upright(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(jpeg() + bytes(500))
    pixels, kinds = read(tmp_path / "x.jpg")
    assert np.array_equal(pixels, expected[0])
    assert kinds == []


def test_damaged_file_is_told_from_another_format(tmp_path):
    for content, reason in (
        (b"II*\0" + bytes(50), "damaged or incomplete"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged or incomplete"),
        (b"<html>404</html>", "not in a supported format"),
        (b"", "the file is empty"),
    ):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            images.read_image(tmp_path / "x.jpg", 160, 160)


def test_lack_of_memory_and_of_file_handles_is_not_the_files_fault(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):
        monkeypatch.setattr(images, "_decode", Mock(side_effect=error))
        with pytest.raises(type(error)) as caught:
            images.read_upright(tmp_path / "x.jpg")
        assert caught.value is error


# ----------------------------------------------------------------------------------------- notes


def test_warnings_have_the_name_of_the_file(tmp_path):
    bad_exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x09\0\0\0\x01\0\x06"
    files = [tmp_path / f"{n}.jpg" for n in range(40)]
    for file in files:
        Image.new("RGB", (8, 8)).save(file, exif=bad_exif)

    def texts_of(file: Path) -> list[str]:
        notes = []
        images.read_upright(file, notes=notes)
        return [note.text for note in notes if note.kind == image_notes.WARNED]

    with warnings.catch_warnings(record=True) as elsewhere, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        texts = list(pool.map(texts_of, files))
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert all(
        t.startswith(f"{f}: Corrupt EXIF data") for f, (t,) in zip(files, texts, strict=True)
    )
    assert [str(warning.message) for warning in elsewhere] == ["mine"]


def test_dropped_transparency_is_no_warning(tmp_path):
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    expected = np.asarray(palette.convert("RGB"))[:, :, 0]
    for transparency in (0, bytes([0, 128])):
        palette.save(tmp_path / "x.png", transparency=transparency)
        pixels, kinds = read(tmp_path / "x.png")
        assert np.array_equal(pixels, expected)
        assert kinds == []


def test_unapplied_exif_rotation_is_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        file = tmp_path / f"x{suffix}"
        Image.new("RGB", (30, 20)).save(file, exif=exif)
        for size, expected in (((30, 20), [image_notes.UNTURNED]), ((20, 30), [])):
            notes = []
            images.read_image(file, *size, notes=notes)
            assert [note.kind for note in notes] == expected
        with pytest.raises(DataError, match="20 x 30 pixels, but annotated as 40 x 30"):
            images.read_image(file, 40, 30)
        with Image.open(file) as image:
            assert images.read_sizes(image) == ((20, 30), (30, 20), 6)


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_first_of_several_pages_is_used(tmp_path, suffix):
    file, pages = tmp_path / f"x{suffix}", [Image.new("RGB", (8, 8), c) for c in ("white", "black")]
    pages[0].save(file, save_all=True, append_images=pages[1:])
    pixels, kinds = read(file)
    assert pixels.min() > 250
    assert kinds == [image_notes.PAGES]


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
