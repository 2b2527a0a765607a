"""Read videos and live streams frame by frame.

The work is done by PyAV (`av`, an optional package), that is by the libraries of FFmpeg.
"""

import argparse
import importlib
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from internals.errors import DataError, UserError

OLDEST_PYAV = (17, 0)  # the first that converts full range BT.709 and 16-bit gray correctly
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2v", ".vob", ".ts"),
    *(".mts", ".m2ts", ".wmv", ".asf", ".flv", ".3gp", ".3g2", ".ogv", ".mxf", ".mjpeg", ".mjpg"),
    *(".h264", ".264", ".h265", ".hevc", ".dv", ".y4m", ".ivf"),
)
TIMEOUT = 30.0  # seconds: a server or camera that sends nothing for so long is given up
# Seconds before `start` to which the file is seeked. The first would do for most files; in some,
# such as transport streams, decoding can only start a while after the place that is found.
SEEK_MARGINS = (1.0, 10.0, 60.0)
# These formats state the duration in their header, others let FFmpeg estimate it.
STATES_DURATION = ("mp4", "matroska", "flv")
MISSING = 1.0  # seconds: files that end so long before the stated duration are incomplete
TS_PACKETS = (188, 192, 204)  # bytes: transport streams have packets of one of these sizes
# FFmpeg's numbers (AVColorSpace and so on).
BT709, UNSPECIFIED, BT601 = 1, 2, 6
LIMITED_RANGE, FULL_RANGE = 1, 2
SWS_BT709, SWS_BT601 = 1, 5  # the same matrices in PyAV's `reformat`


class Frame(NamedTuple):
    """One frame of a video.

    Attributes:
        number: Counted from 0 in the whole video.
        time: When it is shown, in seconds from the first frame of the video.
        pixels: uint8 `[H, W, 3]`, RGB, upright.
    """

    number: int
    time: float
    pixels: np.ndarray


def is_video(source: str) -> bool:
    """Return whether a path or URL is a video, by its suffix; GIF is an image, URLs are videos."""
    return "://" in source or source.lower().endswith(VIDEO_SUFFIXES)


def parse_time(text: str) -> float:
    """Parse 12.5, 1:02 or 1:02:03.5 as seconds; an argparse type."""
    if not re.fullmatch(r"(\d+|(\d+|\d+:[0-5]?\d):[0-5]?\d)(\.\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text} is not a time: give seconds (12.5) or [hours:]minutes:seconds (1:02:03.5)"
        )
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def import_av() -> ModuleType:
    """Import PyAV, or raise UserError with the command that installs it."""
    wanted = ".".join(map(str, OLDEST_PYAV))
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            f"videos need the package PyAV {wanted} or newer: pip install av"
        ) from error
    if tuple(map(int, av.__version__.split(".")[:2])) < OLDEST_PYAV:
        raise UserError(
            f"videos need PyAV {wanted} or newer, this is {av.__version__}: pip install -U av"
        )
    return av


class VideoReader:
    """The frames of a video in the order in which they are shown; iterate over it once.

    The first video stream is read. All kinds of pixels become 8-bit RGB: transparency is dropped,
    interlaced fields stay in one frame, and high dynamic range (HDR) is not mapped to the usual.

    Attributes:
        width: Of the upright frames in pixels. Later frames of another size are resized to that
            of the first.
        height: Likewise.
        rate: Frames per second, the mean if it varies; None if unknown.
        total: The number of frames that will be yielded, an estimate; None if unknown, as for
            live streams.
        problem: After the iteration, what was damaged or missing in the data; None if nothing
            was noticed. What can be decoded is yielded nevertheless.
        time_base: The unit of the time stamps in seconds.
        pixel_aspect: Width of an upright pixel divided by its height.
        color: FFmpeg's numbers of the color primaries and the transfer characteristic.
    """

    def __init__(
        self, source: str, every: int = 1, start: float | None = None, end: float | None = None
    ):
        """Open a video and decode its first frame.

        Args:
            source: A file or a URL.
            every: Yield the frames whose number is a multiple of this.
            start: Skip frames before this time, in seconds from the first frame. Files are
                searched for it instead of decoded up to it; the number of the first frame after
                it is its time multiplied by the rate, which is exact if the rate is constant.
            end: Stop before the frame at this time, likewise.

        Raises:
            UserError: PyAV is missing, or `start` is not before `end`.
            DataError: The video cannot be opened, has no video stream or no frame that can be
                decoded.
        """
        self._av = import_av()
        self.source, self.every = source, every
        self._start, self._end = start or 0.0, math.inf if end is None else end
        if self._start >= self._end:
            raise UserError(f"{source}: the start, {start} s, must be before the end, {end} s")
        self._reformatter = importlib.import_module("av.video.reformatter").VideoReformatter()
        self.problem = None
        self._open()
        try:
            self._read_properties()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        """Yield the selected frames, then close the file.

        The pixels of each frame are a new array; no earlier frame is kept.

        Raises:
            UserError: No frame is selected, most often because `start` is after the end.
        """
        is_empty = True
        try:
            for number, ticks, decoded in self._timed_frames():
                time = float(ticks * self.time_base)
                if time >= self._end:
                    break
                self._time = time
                self._note_damage(decoded.is_corrupt)
                if time >= self._start and number % self.every == 0:
                    is_empty = False
                    yield Frame(number, time, self._to_rgb(decoded))
            else:
                self._check_end()
            self.problem = self._describe_problem()
            if is_empty:
                raise UserError(self._describe_nothing())
        finally:
            self.close()

    def _describe_nothing(self) -> str:
        damage = f" ({self.problem})" if self.problem else ""
        return (
            f"{self.source} has no frame in the part that is asked for: the last one before its "
            f"end is at {self._time:.2f} s{damage}; change the start, the end or the step"
        )

    # ----------------------------------------------------------------------------------- opening

    def _open(self) -> None:
        """Open the source and decode the first frame; the position is then after that frame."""
        self._damaged, self._failed, self._missing = [], None, None
        self._time = 0.0  # of the newest decoded frame
        self._reached = 0.0  # where the packets that were read end, in seconds of the file
        self._container = _open_container(self._av, self.source)
        try:
            self._stream = self._find_stream()
            self._stream.thread_type = "AUTO"
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                raise self._unreadable(
                    self._failed or "none of its frames can be decoded: the file is damaged"
                )
        except BaseException:
            self.close()
            raise

    def _find_stream(self):
        attached = importlib.import_module("av.stream").Disposition.attached_pic  # cover art
        for stream in self._container.streams.video:
            if stream.disposition & attached:
                continue
            if stream.codec_context is not None:
                return stream
            raise self._unreadable("PyAV has no decoder for its codec; convert it to H.264")
        raise self._unreadable("it has no video stream")

    def _unreadable(self, reason: object) -> DataError:
        return _unreadable(self.source, reason)

    def _read_properties(self) -> None:
        stream, frame = self._stream, self._first
        self.time_base = _fraction(stream.time_base)
        self.rate = _fraction(stream.average_rate) or _fraction(stream.guessed_rate)
        self._step = max(1, round(1 / (self.rate * self.time_base))) if self.rate else 1
        self._turns = round(frame.rotation / 90) % 4  # counterclockwise
        self._mirrored = _is_mirrored(frame)
        self._stored_size = frame.width, frame.height
        self.width, self.height = self._stored_size[:: -1 if self._turns % 2 else 1]
        aspect = _fraction(stream.codec_context.sample_aspect_ratio) or Fraction(1)
        self.pixel_aspect = 1 / aspect if self._turns % 2 else aspect
        self.color = stream.codec_context.color_primaries, stream.codec_context.color_trc
        self.total = self._estimate_total()

    def _estimate_total(self) -> int | None:
        duration = self._duration()
        if not self.rate or duration is None:
            return None
        numbers = [time * self.rate for time in (self._start, min(self._end, duration))]
        first, stop = (math.ceil(round(float(number), 3) / self.every) for number in numbers)
        return max(0, stop - first)

    def _duration(self) -> float | None:
        if self._stream.duration:
            return float(self._stream.duration * self.time_base)
        return self._container.duration / 1e6 if self._container.duration else None

    # ---------------------------------------------------------------------------------- decoding

    def _decode(self) -> Iterator:
        """Yield the frames from the present position; damage is counted, not raised."""
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets, None)
            except self._av.FFmpegError as error:
                self._failed = error
                packet = None
            if packet is None:
                break
            self._note_packet(packet)
            if packet.stream.index == self._stream.index:
                yield from self._decode_packet(packet)
        if self._failed:  # the frames that the decoder still holds
            yield from self._decode_packet(None)

    def _note_packet(self, packet) -> None:
        """Note how far the file was read, in all streams: the sound may end after the frames."""
        self._note_damage(packet.is_corrupt)
        if packet.pts is not None:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            self._reached = max(self._reached, float(end))

    def _decode_packet(self, packet) -> list:
        try:
            return self._stream.codec_context.decode(packet)
        except self._av.FFmpegError:
            self._note_damage(True)
            return []

    def _timed_frames(self) -> Iterator[tuple[int, int, object]]:
        """Yield (number, time since the first frame of the video in units of time_base, frame).

        Times that are missing or do not increase, as after a reset of the clock, are replaced by
        those of a constant rate.
        """
        origin, number, last = _time_stamp(self._first) or 0, 0, None
        for frame in self._seek(origin):
            ticks = _time_stamp(frame)
            ticks = None if ticks is None else ticks - origin
            if last is None and frame is not self._first and ticks:
                number = round(ticks * self.time_base * self.rate)
            if ticks is None or (last is not None and ticks <= last):
                ticks = 0 if last is None else last + self._step
            yield number, ticks, frame
            number, last = number + 1, ticks

    def _seek(self, origin: int) -> Iterator:
        """Yield frames from the first one or, if possible, from one shortly before `start`."""
        if self._start <= SEEK_MARGINS[0] or not (self.rate and self._duration()):
            return chain([self._first], self._decoded)
        for margin in SEEK_MARGINS:
            if self._start <= margin:
                break
            frame = self._seek_to(origin + int((self._start - margin) / self.time_base))
            if frame is None:
                break
            ticks = _time_stamp(frame)
            if ticks is not None and (ticks - origin) * self.time_base <= self._start:
                self._damaged = []  # frames that need those before the place that was found
                return chain([frame], self._decoded)
        self.close()
        self._open()
        return chain([self._first], self._decoded)

    def _seek_to(self, pts: int):
        """Return the first frame that can be decoded from a key frame before `pts`, or None."""
        try:
            self._container.seek(pts, stream=self._stream)
        except self._av.FFmpegError:  # not possible in this format, or on this server
            return None
        self._decoded = self._decode()
        return next(self._decoded, None)

    def _to_rgb(self, frame) -> np.ndarray:
        """Convert a decoded frame to upright RGB, uint8 `[height, width, 3]`."""
        width, height = self._stored_size
        colors = {"dst_color_range": FULL_RANGE}
        if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
            colors["src_colorspace"] = SWS_BT709 if is_hd(width, height) else SWS_BT601
        pixels = self._reformatter.reformat(frame, width, height, "rgb24", **colors).to_ndarray()
        if self._mirrored:
            pixels = pixels[::-1]
        return np.ascontiguousarray(np.rot90(pixels, self._turns))

    # ------------------------------------------------------------------------------------ damage

    def _note_damage(self, is_damaged: bool) -> None:
        if is_damaged:
            self._damaged.append(self._time)

    def _check_end(self) -> None:
        """Note whether the file ends before the time that its header states, or in a packet."""
        name, container = self._container.format.name, self._container
        size = container.size if name == "mpegts" else 0
        if size > 0 and all(size % packet for packet in TS_PACKETS):
            self._missing = "it ends inside a packet"
        stated = 0.0
        if any(word in name for word in STATES_DURATION) and container.duration:
            stated = ((container.start_time or 0) + container.duration) / 1e6
        elif name == "avi" and self.rate:  # FFmpeg shortens the duration of cut files
            stated = self._stream.frames / float(self.rate)
        if self._reached < stated - MISSING:
            self._missing = f"it ends at {self._reached:.2f} s of {stated:.2f} s"

    def _describe_problem(self) -> str | None:
        problems = []
        if self._failed:
            problems.append(f"reading stopped at {self._time:.2f} s: {explain(self._failed)}")
        if self._missing:
            problems.append(self._missing)
        if self._damaged:
            problems.append(
                f"damaged data, first at about {self._damaged[0]:.2f} s "
                f"(frames or packets: {len(self._damaged)})"
            )
        return "; ".join(problems) or None


def is_hd(width: int, height: int) -> bool:
    """Return whether colors of unspecified kind are those of HD (BT.709), not of SD (BT.601).

    The rule of mpv and other players. FFmpeg and OpenCV take BT.601 for all sizes.
    """
    return width >= 1280 or height > 576


def _fraction(value) -> Fraction | None:
    """Return a number of PyAV as Fraction, None if it is not set."""
    return Fraction(value.numerator, value.denominator) if value else None


def _time_stamp(frame) -> int | None:
    return frame.dts if frame.pts is None else frame.pts


def _is_mirrored(frame) -> bool:
    """Return whether a frame is shown flipped upside down, before it is turned."""
    try:
        matrix = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32).astype(float)
    except (KeyError, ValueError):  # ValueError: another kind of data, unknown to PyAV
        return False
    return matrix[0] * matrix[4] - matrix[1] * matrix[3] < 0


def _open_container(av: ModuleType, source: str):
    is_url = "://" in source
    options = {"timeout": TIMEOUT} if is_url else {}
    if int(av.__version__.split(".")[0]) < 19:  # later versions accept texts that are not UTF-8
        options["metadata_errors"] = "replace"
    try:
        # With "file:" a colon in the name of a file does not make it a URL.
        return av.open(source if is_url else f"file:{source}", **options)
    except av.FFmpegError as error:
        raise _unreadable(source, _why_not_opened(source, error)) from error


def _why_not_opened(source: str, error: Exception) -> object:
    if "://" in source or not Path(source).is_file():
        return error
    with Path(source).open("rb") as file:
        start = file.read(12)
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp":
        return (
            "the index of this MP4 is missing or damaged, which is often at its end: the recording "
            "or copy was not completed; copy it again or record to MKV"
        )
    return "it is damaged, or not a video in a supported format"


def _unreadable(source: str, reason: object) -> DataError:
    return DataError(
        f"{source} cannot be read as a video: {explain(reason)}",
        kind="video files that cannot be read",
    )


def explain(reason: object) -> str:
    """Return the text of an error of FFmpeg, or of another reason."""
    text = str(getattr(reason, "strerror", None) or reason)
    if text == "Immediate exit requested":  # of FFmpeg, after the time limit
        return f"no data for {TIMEOUT:.0f} s"
    return text
