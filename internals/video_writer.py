"""Write videos with the time stamps of those that were read, by PyAV."""

import importlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from internals.errors import RunError
from internals.video import (
    BT601,
    BT709,
    LIMITED_RANGE,
    SWS_BT601,
    SWS_BT709,
    UNSPECIFIED,
    Frame,
    VideoReader,
    explain,
    import_av,
    is_hd,
)

# Quality and speed of the written videos; without B-frames a fragment starts at its first frame.
ENCODERS = {
    "libx264": {"crf": "20", "preset": "veryfast", "bf": "0"},
    "mpeg4": {"qscale": "3"},
}
LOWEST_RATE = Fraction(1, 10_000)  # frames per second
# The standard of MPEG-4 part 2 has 16 bits for the denominator of the time base.
MPEG4_TIME_BASE = Fraction(1, 60_000)


class VideoWriter:
    """Write frames of a video as H.264 in MP4, without sound; a context manager.

    The time stamps, and with them rate and duration, are those of the frames that were read,
    counted from the first one that is written; the last frame lasts as long as the one before.
    Pixels have the shape of the input's. A run that ends with an exception leaves a file with all
    frames that were written; one that is killed, a file that can be played up to some seconds
    before. If no frame is written, there is no file.
    """

    def __init__(self, file: Path, reader: VideoReader):
        """Prepare writing; the file is created, or overwritten, with the first frames.

        Args:
            file: With the suffix .mp4.
            reader: Where the frames come from.
        """
        self._av = import_av()
        self.file, self._reader = file, reader
        self._stream = None  # is added when the size is known
        self._first, self._last = None, None  # time stamps
        self._reformatter = importlib.import_module("av.video.reformatter").VideoReformatter()
        # The file grows by fragments that can be played; closing makes it an ordinary MP4.
        options = {"movflags": "hybrid_fragmented"}
        self._container = self._av.open(f"file:{file}", "w", format="mp4", options=options)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Write what the encoder holds and the index, also after an exception."""
        try:
            self.close()
        except RunError:
            if kind is None:  # else it has most often the same reason, such as a full disk
                raise

    def write(self, pixels: np.ndarray, frame: Frame) -> None:
        """Encode a picture.

        Args:
            pixels: uint8 `[H, W, 3]`, RGB. The size may differ from that of the video, and must
                not change. Odd sizes are padded by a pixel at the right and bottom, as players
                need even ones.
            frame: Whose time stamp it gets.

        Raises:
            RunError: The file cannot be written.
        """
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if self._stream is None:
            self._add_stream(picture.width, picture.height)
        size = self._stream.width, self._stream.height
        assert (picture.width, picture.height) == size, f"{self.file}: the size has changed"
        picture = self._reformatter.reformat(
            picture,
            format="yuv420p",
            dst_colorspace=SWS_BT709 if is_hd(*size) else SWS_BT601,
            dst_color_range=LIMITED_RANGE,
        )
        self._set_time(picture, frame)
        self._encode(picture)

    def close(self) -> None:
        """Write what the encoder holds and the index."""
        try:
            if self._last is not None:
                self._encode(None)
        finally:
            self._last = None
            self._close_container()

    def _add_stream(self, width: int, height: int) -> None:
        name = next(name for name in ENCODERS if name in self._av.codecs_available)
        # Nominal; FFmpeg crashes with very low ones.
        rate = max((self._reader.rate or Fraction(25)) / self._reader.every, LOWEST_RATE)
        self._stream = self._container.add_stream(name, rate=rate, options=ENCODERS[name])
        context, time_base = self._stream.codec_context, self._reader.time_base
        if self._reader.rate:
            # Matroska's milliseconds are no multiple of most rates: then take slightly less.
            step = 1 / self._reader.rate
            time_base = step / math.ceil(step / time_base)
        is_too_fine = name == "mpeg4" and time_base.denominator >= 1 << 16
        # Of the pictures; that of the stream is another as soon as the file is created.
        self._time_base = MPEG4_TIME_BASE if is_too_fine else time_base
        self._stream.time_base = context.time_base = self._time_base
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.sample_aspect_ratio = self._reader.pixel_aspect
        # The pixels are converted to the matrix that players take for this size, whatever the
        # flags; primaries and transfer stay as they are, as no pixel was converted.
        kind = BT709 if is_hd(width, height) else BT601
        context.colorspace, context.color_range = kind, LIMITED_RANGE
        primaries, transfer = self._reader.color
        context.color_primaries = kind if primaries in (0, UNSPECIFIED) else primaries
        context.color_trc = kind if transfer in (0, UNSPECIFIED) else transfer
        # Else the last frame would last as long as the mean one.
        context.flags |= importlib.import_module("av.codec.context").Flags.frame_duration

    def _set_time(self, picture, frame: Frame) -> None:
        ticks = round(self._exact_time(frame.time) / self._time_base)
        if self._first is None:
            rate = self._stream.codec_context.framerate
            self._first, self._last = ticks, -max(1, round(1 / (rate * self._time_base)))
        picture.pts = max(ticks - self._first, self._last + 1)
        picture.duration = picture.pts - self._last
        picture.time_base, self._last = self._time_base, picture.pts

    def _exact_time(self, time: float) -> float | Fraction:
        """Return the time of a frame without the rounding of the input's time stamps.

        Otherwise the rate of a file with rounded ones would be slightly another.
        """
        rate = self._reader.rate
        if rate is None:
            return time
        regular = round(time * rate) / rate
        return regular if abs(regular - time) <= 0.6 * self._reader.time_base else time

    def _encode(self, picture) -> None:
        try:
            self._container.mux(self._stream.encode(picture))
        except self._av.FFmpegError as error:
            raise self._error(error) from error

    def _close_container(self) -> None:
        try:
            self._container.close()
        except self._av.FFmpegError as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> RunError:
        return RunError(f"{self.file} cannot be written: {explain(error)}")
