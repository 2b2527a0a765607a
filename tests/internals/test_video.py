"""Videos: order, time stamps, orientation, colors, damaged files, seeking, writing."""

import argparse
import functools
import http.server
import importlib
import itertools
import struct
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from helpers import write_video

from internals.errors import DataError, RunError, UserError
from internals.video import VideoReader, is_video, parse_time
from internals.video_writer import VideoWriter

av = pytest.importorskip("av")

HEIGHT, WIDTH = 48, 64
# Irregular times in ms: as of a phone or a screen recording.
TIMES = list(itertools.accumulate([0, 30, 10, 60, 10, 40, 190] + [70] * 23))
COLORS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3, [128] * 3, [200, 100, 50]], np.uint8
)


def make_frames(count=30, height=HEIGHT, width=WIDTH):
    """Return frames that differ from each other and from their mirror images."""
    y, x = np.mgrid[:height, :width]
    still = np.stack([3 * x, 4 * y, x + y], axis=-1)
    return [((still + 5 * n) % 256).astype(np.uint8) for n in range(count)]


def color_bars(width=224, height=HEIGHT):
    return np.repeat(np.tile(COLORS, (height, 1, 1)), -(-width // len(COLORS)), axis=1)[:, :width]


def bar_colors(pixels):
    step = -(-pixels.shape[1] // len(COLORS))
    return pixels[pixels.shape[0] // 2, step // 2 :: step].astype(int)


def with_times(frames, times, time_base):
    for pixels, time in zip(frames, times, strict=True):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = round(time / time_base), time_base
        yield frame


def read(file, *args):
    with VideoReader(str(file), *args) as reader:
        return list(reader), reader


def copy(file, to, *args, change=lambda pixels: pixels):
    """Write the frames that are read from a video; return the reader of the result."""
    with VideoReader(str(file), *args) as reader, VideoWriter(to, reader) as writer:
        for frame in reader:
            writer.write(change(frame.pixels), frame)
    return read(to)


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mkv", {}),
        ("v.mp4", {"codec": "libx264rgb", "pix_fmt": "rgb24", "qp": 0, "bf": 3}),
    ],
)
def test_lossless_video_is_read_bit_for_bit(tmp_path, name, options):
    frames = make_frames()
    found, reader = read(write_video(tmp_path / name, frames, **options))
    assert [frame.number for frame in found] == list(range(30))
    assert [frame.time for frame in found] == pytest.approx([n / 25 for n in range(30)])
    assert all(np.array_equal(a.pixels, b) for a, b in zip(found, frames, strict=True))
    assert all(frame.pixels.flags.c_contiguous for frame in found)
    assert (reader.width, reader.height, reader.rate) == (WIDTH, HEIGHT, 25)
    assert (reader.total, reader.problem) == (30, None)


@pytest.mark.parametrize(("name", "time_base"), [("v.mp4", 1000), ("v.mkv", 1000), ("v.ts", 90000)])
def test_variable_rate_keeps_its_time_stamps(tmp_path, name, time_base):
    time_base = Fraction(1, time_base)
    seconds = [time / 1000 for time in TIMES]
    frames = with_times(make_frames(), seconds, time_base)
    video = write_video(
        tmp_path / name, frames, codec="libx264", bf=3, time_base=time_base, preset="ultrafast"
    )
    found, _ = read(video)
    assert [frame.time for frame in found] == pytest.approx(seconds)
    copied, _ = copy(video, tmp_path / "copy.mp4")
    assert [frame.time for frame in copied] == pytest.approx(seconds, abs=1e-4)
    with av.open(str(tmp_path / "copy.mp4")) as container:  # the last frame is as long as another
        assert container.duration / 1e6 == pytest.approx(seconds[-1] + 0.07, abs=1e-4)
    copied, _ = copy(video, tmp_path / "copy.mp4", 3, 0.1)
    kept = [time for n, time in enumerate(seconds) if n % 3 == 0 and time >= 0.1]
    assert [frame.time for frame in copied] == pytest.approx(
        [time - kept[0] for time in kept], abs=1e-4
    )


def test_every_start_and_end(tmp_path):
    video = write_video(tmp_path / "v.mkv", make_frames(), rate=10)
    for args, numbers in [
        ((7,), [0, 7, 14, 21, 28]),
        ((1, 0.5, 1.0), [5, 6, 7, 8, 9]),  # the end is excluded
        ((4, 0.5, 1.3), [8, 12]),
        ((1, None, 0.2), [0, 1]),
        ((10, 1.0), [10, 20]),
    ]:
        found, reader = read(video, *args)
        assert [frame.number for frame in found] == numbers
        assert [frame.time for frame in found] == pytest.approx([n / 10 for n in numbers])
        assert (reader.total, reader.problem) == (len(numbers), None)
    for args, message in [
        (
            (1, 3.0),
            "has no frame in the part that is asked for: the last one before its end is at 2.90 s",
        ),
        ((10, 0.1, 0.9), "has no frame in the part that is asked for"),
        ((1, 1.0, 1.0), "the start, 1.0 s, must be before the end, 1.0 s"),
    ]:
        with pytest.raises(UserError, match=rf"v\.mkv.* {message}"):
            read(video, *args)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", {"codec": "libx264", "bf": 3, "g": 50}),
        ("open.mp4", {"codec": "libx264", "bf": 3, "g": 50, "x264-params": "open-gop=1"}),
        ("v.mkv", {"codec": "libx264", "bf": 3, "g": 50}),
        ("v.ts", {"codec": "libx264", "bf": 3, "g": 250}),
        ("v.avi", {"codec": "mpeg4", "bf": 2}),
        ("v.h264", {"codec": "libx264", "bf": 3}),  # has no index: it is decoded from the start
    ],
)
def test_start_is_found_by_seeking(tmp_path, name, options, monkeypatch):
    rate = 25 if name == "v.h264" else Fraction(30000, 1001)
    video = write_video(tmp_path / name, make_frames(300), rate, **options)
    everything, _ = read(video)
    assert len(everything) == 300
    decoded = []
    monkeypatch.setattr(
        VideoReader, "_note_damage", lambda self, is_damaged: decoded.append(is_damaged)
    )
    found, _ = read(video, 1, float(240 / rate) - 0.002, float(260 / rate) - 0.002)
    assert [frame.number for frame in found] == list(range(240, 260))
    for a, b in zip(found, everything[240:260], strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert a.time == pytest.approx(b.time)
    if name in ("v.mp4", "v.mkv"):
        assert len(decoded) < 250  # packets and frames, of 500 without seeking


def test_clock_that_is_reset_does_not_stop_the_video(tmp_path):
    parts = [
        write_video(tmp_path / f"{n}.ts", make_frames(10), codec="libx264", bf=0).read_bytes()
        for n in range(2)
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    found, _ = read(tmp_path / "both.ts")
    assert [frame.time for frame in found] == pytest.approx([n / 25 for n in range(20)])
    copied, _ = copy(tmp_path / "both.ts", tmp_path / "copy.mp4")
    assert [frame.time for frame in copied] == pytest.approx([n / 25 for n in range(20)])


def test_later_frames_of_another_size_are_resized(tmp_path):
    parts = []
    options = {"codec": "libx264", "bf": 0}
    for size in (48, 64):
        pixels = np.full((size, size, 3), size, np.uint8)
        parts.append(write_video(tmp_path / f"{size}.ts", [pixels] * 5, **options).read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    found, _ = read(tmp_path / "both.ts")
    assert [frame.pixels.shape for frame in found] == [(48, 48, 3)] * 10
    assert [frame.pixels.mean().round() for frame in found[::9]] == pytest.approx([48, 64], abs=3)


# (a, b, c, d) of the display matrix, which maps x, y to ax + cy, bx + dy
ORIENTATIONS = {
    "90": ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
    "180": ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
    "270": ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda pixels: pixels[::-1]),
    "transposed": ((0, 1, 1, 0), lambda pixels: pixels.transpose(1, 0, 2)),
    "transverse": ((0, -1, -1, 0), lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_frames_are_upright(tmp_path, name):
    (a, b, c, d), turn = ORIENTATIONS[name]
    frames = make_frames(3)
    video = write_video(
        *(tmp_path / "v.mp4", frames),
        **{"codec": "libx264rgb", "pix_fmt": "rgb24", "qp": 0},
        sample_aspect_ratio=Fraction(4, 3),
    )
    content = bytearray(video.read_bytes())
    start = content.index(b"tkhd") + 44
    size = content[start + 36 : start + 44]
    matrix = (a, b, 0, c, d, 0, 0, 0)
    content[start : start + 44] = struct.pack(">8i", *(n << 16 for n in matrix)) + (
        struct.pack(">i", 1 << 30) + size
    )
    video.write_bytes(content)
    found, reader = read(video)
    for frame, pixels in zip(found, frames, strict=True):
        assert np.array_equal(frame.pixels, turn(pixels))
    assert (reader.height, reader.width) == turn(frames[0]).shape[:2]
    is_turned = reader.height == WIDTH
    assert reader.pixel_aspect == (Fraction(3, 4) if is_turned else Fraction(4, 3))
    _, copied = copy(video, tmp_path / "copy.mp4")
    assert (copied.width, copied.height) == (reader.width, reader.height)
    assert copied.pixel_aspect == reader.pixel_aspect


def test_first_of_several_video_streams_is_read(tmp_path):
    frames = make_frames(5)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        videos = [container.add_stream("libx264rgb", rate=25, options={"qp": "0"}) for _ in "ab"]
        for stream in videos:
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb24"
        for stream, shown in zip(videos, (frames, frames[::-1]), strict=True):
            for pixels in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    found, reader = read(tmp_path / "v.mp4")
    assert all(np.array_equal(a.pixels, b) for a, b in zip(found, frames, strict=True))
    assert reader.problem is None


# ---------------------------------------------------------------------------------------- colors


def convert(pixels, pix_fmt, matrix, color_range):
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=color_range)


@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize(("matrix", "flag"), [(1, 1), (5, 6)], ids=["BT.709", "BT.601"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colors_follow_the_flags(tmp_path, pix_fmt, matrix, flag, color_range):
    frame = convert(color_bars(), pix_fmt, matrix, color_range)
    video = write_video(
        *(tmp_path / "v.mp4", [frame] * 2),
        **{"codec": "libx264", "pix_fmt": pix_fmt, "qp": 1, "preset": "ultrafast"},
        **{"colorspace": flag, "color_range": color_range},
    )
    found, _ = read(video)
    assert bar_colors(found[0].pixels) == pytest.approx(COLORS, abs=3)
    copied, _ = copy(video, tmp_path / "copy.mp4")
    assert bar_colors(copied[0].pixels) == pytest.approx(COLORS, abs=8)


@pytest.mark.parametrize(("width", "height", "matrix"), [(224, 48, 5), (1288, 64, 1)])
def test_colors_without_flags_follow_the_size(tmp_path, width, height, matrix):
    frame = convert(color_bars(width, height), "yuv444p", matrix, 1)
    video = write_video(
        tmp_path / "v.mp4", [frame], codec="libx264", pix_fmt="yuv444p", qp=1, preset="ultrafast"
    )
    found, _ = read(video)
    assert bar_colors(found[0].pixels) == pytest.approx(COLORS, abs=3)
    copy(video, tmp_path / "copy.mp4")
    with av.open(str(tmp_path / "copy.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.pix_fmt == "yuv420p"
        assert context.color_range == 1
        assert context.colorspace == {5: 6, 1: 1}[matrix]


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16le", "bgra", "gbrp10le"])
def test_other_pixel_formats_become_rgb(tmp_path, pix_fmt):
    pixels = np.repeat(color_bars()[:, :, :1], 3, axis=2)
    found, _ = read(write_video(tmp_path / "v.mkv", [pixels] * 2, pix_fmt=pix_fmt))
    assert np.abs(found[1].pixels.astype(int) - pixels).max() <= 1


# ------------------------------------------------------------------------------- damaged sources


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    options = {"codec": "libx264", "preset": "ultrafast", "g": 25, "qp": 20}
    mp4 = {**options, "container": {"movflags": "faststart"}}
    rows = {"v.mp4": mp4, "v.mkv": options, "v.ts": options, "v.avi": {"codec": "mpeg4"}}
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(100)]
    return {name: write_video(folder / name, frames, **row) for name, row in rows.items()}


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.avi"])
def test_cut_file_yields_what_is_there_and_has_a_problem(long_videos, tmp_path, name):
    found, reader = read(long_videos[name])
    assert (len(found), reader.problem) == (100, None)
    content = long_videos[name].read_bytes()
    cut = tmp_path / name
    cut.write_bytes(content[: len(content) // 376 * 188 + 100])
    found, reader = read(cut)
    assert 35 < len(found) < 65
    assert ("it ends inside a packet" if name == "v.ts" else "s of 4.00 s") in reader.problem
    found, reader = read(cut, 1, None, 0.4)  # the damage is not reached
    assert (len(found), reader.problem) == (10, None)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_damaged_data_is_a_problem(long_videos, tmp_path, name):
    content = bytearray(long_videos[name].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1500] = bytes(1500)
    (tmp_path / name).write_bytes(content)
    found, reader = read(tmp_path / name)
    assert 50 < len(found) <= 100
    assert "damaged data, first at about" in reader.problem


def test_damaged_byte_is_a_problem(long_videos, tmp_path):
    content = bytearray(long_videos["v.mp4"].read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "v.mp4").write_bytes(content)
    found, reader = read(tmp_path / "v.mp4")
    assert len(found) == 100
    assert "damaged data, first at about" in reader.problem


def write_song(file):
    """Write a file with sound and cover art."""
    with av.open(str(file), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = importlib.import_module("av.stream").Disposition.attached_pic.value
        white = np.full((16, 16, 3), 255, np.uint8)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(white, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    with av.open(str(file)) as container:
        assert len(container.streams.video) == 1


def test_unreadable_files_are_named(long_videos, tmp_path):
    index_at_end = write_video(tmp_path / "v.mp4", make_frames(), codec="libx264")
    cut = index_at_end.read_bytes()[: index_at_end.stat().st_size // 2]
    write_song(tmp_path / "song.mp4")
    for name, content, reason in [
        ("cut.mp4", cut, "the index of this MP4 is missing"),
        ("text.mp4", b"a list of frames\n" * 100, "not a video in a supported format"),
        ("empty.mp4", b"", "the file is empty"),
        ("song.mp4", None, "it has no video stream"),
        ("missing.mp4", None, "No such file"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read as a video: .*{reason}"):
            VideoReader(str(tmp_path / name))


def test_names_with_colons_and_texts_that_are_not_utf8(tmp_path):
    video = write_video(tmp_path / "v.mkv", make_frames(3))
    content = video.read_bytes()
    assert b"Lavf" in content
    (tmp_path / "12:30.mkv").write_bytes(content.replace(b"Lavf", b"\xe4\xf6\xfc\xff"))
    found, _ = read(tmp_path / "12:30.mkv")
    assert len(found) == 3


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        VideoReader(str(tmp_path / "v.mp4"))
    monkeypatch.undo()
    monkeypatch.setattr(importlib.import_module("av"), "__version__", "16.1.0")
    with pytest.raises(UserError, match=r"this is 16\.1\.0: pip install -U av"):
        VideoReader(str(tmp_path / "v.mp4"))


# -------------------------------------------------------------------------------------- URLs


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """Serve `tmp_path`; return the address."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_read(tmp_path, server):
    frames = make_frames(100)
    write_video(tmp_path / "v.mkv", frames)
    found, reader = read(f"{server}/v.mkv")
    assert all(np.array_equal(a.pixels, b) for a, b in zip(found, frames, strict=True))
    assert reader.problem is None
    # This server does not answer requests for parts of a file.
    found, _ = read(f"{server}/v.mkv", 1, 3.0, 3.2)
    assert [frame.number for frame in found] == [75, 76, 77, 78, 79]
    with pytest.raises(DataError, match=r"/missing\.mkv cannot be read as a video: .*404"):
        VideoReader(f"{server}/missing.mkv")


@pytest.mark.parametrize("is_silent", [False, True], ids=["disconnects", "falls silent"])
def test_camera_without_an_end(server, monkeypatch, is_silent):
    """A stream of images without a stated length."""
    over = threading.Event()

    def send_images(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=image")
        self.end_headers()
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        encoder.time_base = Fraction(1, 25)
        for pixels in make_frames(60):
            [packet] = encoder.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
            head = f"--image\r\nContent-Type: image/jpeg\r\nContent-Length: {packet.size}\r\n\r\n"
            self.wfile.write(head.encode() + bytes(packet) + b"\r\n")
        if is_silent:
            over.wait(10)

    monkeypatch.setattr(QuietHandler, "do_GET", send_images)
    monkeypatch.setattr("internals.video.TIMEOUT", 1.0)
    found, reader = read(f"{server}/camera", 2, 1.5)
    over.set()
    assert reader.total is None
    assert [frame.number for frame in found] == list(range(38, 60, 2))
    assert all(a.time < b.time for a, b in itertools.pairwise(found))
    assert is_silent == ("no data for 1 s" in str(reader.problem))


# --------------------------------------------------------------------------------------- writing


def test_odd_and_enlarged_sizes(tmp_path):
    video = write_video(tmp_path / "v.mkv", [np.full((47, 63, 3), 90, np.uint8)] * 3)
    found, _ = copy(video, tmp_path / "copy.mp4")
    assert found[0].pixels.shape == (48, 64, 3)
    assert found[0].pixels.astype(int) == pytest.approx(90, abs=3)  # also the padding
    found, _ = copy(video, tmp_path / "copy.mp4", change=lambda x: x.repeat(5, 0).repeat(5, 1))
    assert found[0].pixels.shape == (236, 316, 3)


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), 25, 10])
def test_rate_and_duration_are_those_of_the_input(tmp_path, rate):
    video = write_video(tmp_path / "v.mp4", make_frames(120), rate, codec="libx264", bf=2)
    for args, count in [((), 120), ((1, float(20 / rate) - 0.001), 100)]:
        copied, _ = copy(video, tmp_path / "copy.mp4", *args)
        assert [frame.time for frame in copied] == pytest.approx([n / rate for n in range(count)])
        with av.open(str(tmp_path / "copy.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.average_rate, stream.frames, stream.start_time) == (rate, count, 0)
            assert stream.duration * stream.time_base == count / Fraction(rate)


@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), 7])
def test_rate_of_a_file_with_rounded_time_stamps(tmp_path, rate):
    """Matroska has milliseconds."""
    video = write_video(tmp_path / "v.mkv", make_frames(50), rate)
    copied, reader = copy(video, tmp_path / "copy.mp4")
    assert reader.rate == rate
    assert [frame.time for frame in copied] == pytest.approx(
        [float(n / Fraction(rate)) for n in range(50)], abs=1e-6
    )


def test_build_without_x264(tmp_path, monkeypatch):
    from internals import video_writer as module

    monkeypatch.setattr(module, "ENCODERS", {"mpeg4": module.ENCODERS["mpeg4"]})
    frames = make_frames()
    source = write_video(tmp_path / "v.ts", frames, codec="libx264", bf=2)  # 1/90000 s
    found, reader = copy(source, tmp_path / "copy.mp4")
    assert [frame.time for frame in found] == pytest.approx([n / 25 for n in range(30)])
    assert reader.rate == 25


def test_interrupted_run_leaves_a_video(tmp_path):
    video = write_video(tmp_path / "v.mkv", make_frames())

    def write_some():
        with VideoReader(str(video)) as reader, VideoWriter(tmp_path / "w.mp4", reader) as writer:
            for frame in reader:
                writer.write(frame.pixels, frame)
                if frame.number == 9:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_some()
    found, reader = read(tmp_path / "w.mp4")
    assert (len(found), reader.problem) == (10, None)


def test_killed_run_leaves_the_first_part(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(100)]
    video = write_video(tmp_path / "v.mkv", noise)
    with VideoReader(str(video)) as reader, VideoWriter(tmp_path / "w.mp4", reader) as writer:
        for frame in itertools.chain.from_iterable(itertools.repeat(list(reader), 6)):
            writer.write(frame.pixels, frame)
        (tmp_path / "killed.mp4").write_bytes((tmp_path / "w.mp4").read_bytes())
    found, _ = read(tmp_path / "killed.mp4")
    assert len(found) > 200


def test_file_is_closed_when_the_iteration_is_left(tmp_path):
    reader = VideoReader(str(write_video(tmp_path / "v.mkv", make_frames())))
    frames = iter(reader)
    next(frames)
    frames.close()
    with pytest.raises((AssertionError, ValueError)):
        reader._container.size  # noqa: B018
    with VideoReader(str(tmp_path / "v.mkv")) as reader, VideoWriter(tmp_path / "w.mp4", reader):
        pass  # no frame, no file
    assert not (tmp_path / "w.mp4").exists()


def test_file_that_cannot_be_created(tmp_path):
    video = write_video(tmp_path / "v.mkv", make_frames())
    with pytest.raises(RunError, match=r"no/w\.mp4 cannot be written: No such file"):
        copy(video, tmp_path / "no/w.mp4")


# ----------------------------------------------------------------------------- names and times


def test_is_video():
    for source in ("a.mp4", "A.MOV", "b/c.MKV", "rtsp://camera/1", "http://host/a.jpg"):
        assert is_video(source)
    for source in ("a.gif", "a.jpg", "a.webp", "folder", "mp4", "a.mp4.txt"):
        assert not is_video(source)


def test_parse_time():
    for text, seconds in [
        ("12.5", 12.5),
        ("0", 0),
        ("90", 90),
        ("1:02", 62),
        ("1:02:03.5", 3723.5),
    ]:
        assert parse_time(text) == seconds
    for text in ("", "-1", "1:60", "1:75:00", "1:2:3:4", "x", "1,5", "nan", "1:", ":5"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
            parse_time(text)
