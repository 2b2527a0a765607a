"""Rows of image files: of those that are decoded as a whole, and of those beyond the limit."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from internals import images
from internals.errors import DataError, UserError
from internals.image_notes import CLIPPED, DARK, PAGES, UNTURNED
from internals.image_rows import open_rows, read_size
from internals.images import ImageRules, read_upright

pytest.importorskip("rasterio")
RULES = ImageRules(bit_depth=12)
ORIENTATION = 274


@pytest.fixture
def limit(monkeypatch):
    """Lower the limit of whole images to 1,000 pixels."""
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)


def make_colors(width=90, height=61) -> Image.Image:
    """Return a smooth image, which JPEG hardly changes, with a different color in each pixel."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * x, 4 * y, x + y], axis=2).astype(np.uint8))


def make_deep(factor: int = 45) -> Image.Image:
    """Return 16-bit gray with values up to 89 times the factor."""
    return Image.fromarray((np.mgrid[:61, :90][1] * factor).astype(np.uint16))


def read_all(path, step: int = 17, rules=RULES, notes=None, **options) -> np.ndarray:
    with open_rows(path, rules, notes, **options) as rows:
        ranges = [(y, min(y + step, rows.height)) for y in range(0, rows.height, step)]
        parts = [rows.read(*each) for each in ranges]
        assert [part.shape for part in parts] == [(b - a, rows.width, 3) for a, b in ranges]
    assert all(part.dtype == np.uint8 for part in parts)
    return np.concatenate(parts)


def read_whole(path, monkeypatch) -> np.ndarray:
    """Return what a training reads, as uint8 `[H, W, 3]`."""
    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 10**6)
        return read_upright(path, RULES).permute(1, 2, 0).numpy()


FILES = {
    "rgb.jpg": ("RGB", {"quality": 95}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "gray.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "rgb.png": ("RGB", {}),
    "gray.png": ("L", {}),
    "gray_alpha.png": ("LA", {}),
    "alpha.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "palette4.png": ("P", {"bits": 4}),
    "bits.png": ("1", {}),
    "rgb.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
    "gray.bmp": ("L", {}),
    "bits.bmp": ("1", {}),
    "rgb.webp": ("RGB", {"lossless": True}),
    "lossy.webp": ("RGB", {}),
    "rgb.gif": ("RGB", {}),
    "rgb.ppm": ("RGB", {}),
    "gray.pgm": ("L", {}),
    "rgb.tif": ("RGB", {}),
    "lzw.tif": ("RGB", {"compression": "tiff_lzw"}),
    "deflate.tif": ("RGB", {"compression": "tiff_deflate"}),
    "jpeg.tif": ("RGB", {"compression": "jpeg"}),
    "fax.tif": ("1", {"compression": "group4"}),
    "gray.tif": ("L", {}),
    "inverted.tif": ("L", {"tiffinfo": {262: 0}}),
    "gray_alpha.tif": ("LA", {}),
    "alpha.tif": ("RGBA", {}),
    "palette.tif": ("P", {}),
    "cmyk.tif": ("CMYK", {}),
    "ycbcr.tif": ("YCbCr", {}),
    "deep.png": ("I;16", {}),
    "deep.tif": ("I;16", {}),
    "deep.pgm": ("I;16", {}),
    "deep_inverted.tif": ("I;16", {"tiffinfo": {262: 0}}),
}


@pytest.mark.parametrize("name", FILES)
def test_large_image_is_read_as_in_training(tmp_path, monkeypatch, limit, name):
    mode, options = FILES[name]
    image = make_deep() if mode == "I;16" else make_colors().convert(mode)
    image.save(tmp_path / name, **options)
    with pytest.raises(DataError, match="more than the limit"):
        read_upright(tmp_path / name)
    expected = read_whole(tmp_path / name, monkeypatch).astype(int)
    found = read_all(tmp_path / name)
    # The decoders of JPEG differ in how they round and upsample colors, and GDAL before 3.10 in how
    # it rounds the 16-bit palette of a TIFF.
    tolerance = 4 if name.endswith((".jpg", "jpeg.tif", "lossy.webp", "ycbcr.tif")) else 0
    tolerance = 1 if name == "palette.tif" else tolerance
    assert np.abs(found - expected).max() <= tolerance
    assert expected.std() > 20


@pytest.mark.parametrize(
    ("bands", "options"),
    [
        (1, {"compress": "deflate"}),
        (3, {"compress": "deflate", "photometric": "rgb"}),
        (3, {"compress": "jpeg", "photometric": "ycbcr"}),
        (5, {"compress": "lzw", "photometric": "rgb"}),
        (3, {"interleave": "band", "photometric": "rgb"}),
    ],
)
def test_tiled_big_tiff(tmp_path, limit, bands, options):
    rasterio = pytest.importorskip("rasterio")
    colors = np.asarray(make_colors())
    pixels = np.concatenate([colors, colors[:, :, :2] // 2], axis=2)[:, :, :bands]
    file = tmp_path / "big.tif"
    shape = {"width": 90, "height": 61, "count": bands, "dtype": "uint8"}
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 16}
    with rasterio.open(file, "w", driver="GTiff", bigtiff="YES", **shape, **tiles, **options) as d:
        d.write(pixels.transpose(2, 0, 1))
    assert file.read_bytes()[:4] == b"II+\0"
    found = read_all(file).astype(int)
    tolerance = 12 if options.get("compress") == "jpeg" else 0
    assert np.abs(found - pixels[:, :, :3]).max() <= tolerance
    assert read_size(file) == (90, 61)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_image_within_limit_is_decoded_without_rasterio(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    make_colors().save(tmp_path / name)
    np.testing.assert_array_equal(
        read_all(tmp_path / name), read_whole(tmp_path / name, monkeypatch)
    )


def test_orientation_is_applied_within_limit(tmp_path, monkeypatch):
    save_turned(tmp_path / "a.jpg", 6)
    assert read_size(tmp_path / "a.jpg") == (61, 90)
    assert read_all(tmp_path / "a.jpg").shape == (90, 61, 3)
    notes = []
    assert read_all(tmp_path / "a.jpg", notes=notes, size=(90, 61)).shape == (61, 90, 3)
    assert [note.kind for note in notes] == [UNTURNED]


def save_turned(path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    make_colors().save(path, exif=exif)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_large_image_to_be_turned_is_refused(tmp_path, limit, name, orientation):
    file = tmp_path / name
    save_turned(file, orientation)
    assert read_size(file) == ((61, 90) if orientation == 6 else (90, 61))
    if orientation == 1:
        assert read_all(file).shape == (61, 90, 3)
        return
    with pytest.raises(DataError, match=rf"{name} is to be turned .*{orientation}.*store it up"):
        read_all(file)


def test_large_image_of_annotated_size(tmp_path, limit):
    notes, file = [], tmp_path / "a.jpg"
    save_turned(file, 6)
    unturned = read_all(file, notes=notes, size=(90, 61))
    assert np.abs(unturned.astype(int) - np.asarray(make_colors())).max() < 20
    assert [note.kind for note in notes] == [UNTURNED]
    with pytest.raises(DataError, match="is to be turned"):
        read_all(file, size=(61, 90))
    with pytest.raises(DataError, match=r"a.jpg is 61 x 90 pixels, but annotated as 60 x 90"):
        read_all(file, size=(60, 90))


def test_large_image_without_rasterio(tmp_path, monkeypatch, limit):
    make_colors().save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(
        UserError, match=r"a.png: 90 x 61 .* limit of 1,000\..*pip install rasterio"
    ):
        read_all(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0.05, 0.6, 0.98])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("a.jpg", {}), ("a.jpg", {"progressive": True}), ("a.png", {}), ("a.bmp", {})),
        *(("a.webp", {}), ("a.gif", {}), ("a.ppm", {}), ("a.tif", {})),
        *(("a.tif", {"compression": "tiff_deflate"}), ("a.tif", {"compression": "jpeg"})),
    ],
)
def test_cut_file_is_refused(tmp_path, limit, name, options, share):
    file = tmp_path / name
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    read_all(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=name):
        read_all(file, rules=ImageRules(use_truncated=True))


def test_missing_and_unsupported_files(tmp_path, limit):
    (tmp_path / "a.png").write_text("text")
    for name in ("a.png", "b.png"):
        assert read_size(tmp_path / name) is None
        with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
            read_all(tmp_path / name)


def save_pixels(dtype: str, bands: int):
    def save(path) -> None:
        rasterio = pytest.importorskip("rasterio")
        shape = {"width": 90, "height": 61, "count": bands, "dtype": dtype}
        shape["photometric"] = "rgb" if bands == 3 else "minisblack"
        with rasterio.open(path, "w", driver="GTiff", **shape) as file:
            file.write(np.ones((bands, 61, 90), dtype))

    return save


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_pixels("float32", 1), "kind F"),
        (save_pixels("int32", 1), "1 bands of int32"),
        (save_pixels("uint16", 3), "3 bands of 16 bits"),
        (lambda path: make_colors().convert("LAB").save(path), "kind LAB"),
        (lambda path: path.write_bytes(b"P5 90 61 100\n" + bytes(90 * 61)), "maximum that is not"),
    ],
)
def test_unsupported_pixels_are_refused(tmp_path, limit, save, message):
    save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=f"a.tif .*{message}.* 90 x 61.*: convert it to"):
        read_all(tmp_path / "a.tif")


def test_large_16_bit_gray_needs_bit_depth(tmp_path, limit):
    make_deep().save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png has 16-bit gray .*--bit-depth"):
        read_all(tmp_path / "a.png", rules=ImageRules())


@pytest.mark.parametrize(("factor", "kinds"), [(1, [DARK]), (45, []), (90, [CLIPPED])])
def test_notes_on_16_bit_gray_are_those_of_the_whole_image(
    tmp_path, monkeypatch, limit, factor, kinds
):
    # The first rows alone would be nearly black.
    values = np.asarray(make_deep(factor)).copy()
    values[:30] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    notes, expected = [], []
    read_all(tmp_path / "a.png", notes=notes)
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    read_upright(tmp_path / "a.png", RULES, expected)
    assert [note.kind for note in notes] == kinds
    assert notes == expected


def test_first_page_of_large_image_is_read_with_a_note(tmp_path, limit):
    pages, notes = [make_colors(), make_colors().rotate(180)], []
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_all(tmp_path / "a.tif", notes=notes), np.asarray(pages[0]))
    assert [note.kind for note in notes] == [PAGES]


def test_reading_leaves_no_files_and_gives_no_warnings(tmp_path, limit, recwarn, capfd):
    make_colors().save(tmp_path / "a.jpg")
    read_all(tmp_path / "a.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_tensor_of_rows_is_that_of_training(tmp_path):
    make_colors().save(tmp_path / "a.png")
    rows = torch.from_numpy(read_all(tmp_path / "a.png")).permute(2, 0, 1)
    assert torch.equal(rows, read_upright(tmp_path / "a.png"))
