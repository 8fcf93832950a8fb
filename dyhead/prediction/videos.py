"""Frames of videos, by PyAV or OpenCV, whichever is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from dyhead.data import DataError


def library() -> str:
    """ "av" or "cv2".

    Raises:
        DataError: neither is installed.
    """
    for name in ("av", "cv2"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise DataError("videos need PyAV or OpenCV: pip install av")


class Video:
    """A video to read.

    Args:
        path: the file.

    Attributes:
        rate: frames a second.
        length: number of frames as the file says; None where it does not.

    Raises:
        DataError: neither library is installed, or the file is no video. Names the file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._library = library()
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if not os.path.isfile(path):
            raise DataError(f"{path}: the video does not exist")
        rate, length = (self._open_av if self._library == "av" else self._open_cv2)()
        self.rate = Fraction(rate).limit_denominator(1001) if 0 < rate < 1000 else Fraction(25)
        self.length = length if length > 0 else None

    def frames(self) -> Iterator[np.ndarray]:
        """Frames (H, W, 3) uint8, RGB, upright.

        Raises:
            DataError: the file is broken. Frames before that have come.
        """
        return self._frames_av() if self._library == "av" else self._frames_cv2()

    def _open_av(self) -> tuple[float, int]:
        import av

        try:
            self._file = av.open(self._path)
            self._stream = self._file.streams.video[0]
        except (av.FFmpegError, IndexError, OSError) as error:
            raise DataError(f"{self._path}: the video cannot be read ({error})") from error
        self._stream.thread_type = "AUTO"
        return self._stream.average_rate or 0, self._stream.frames

    def _frames_av(self) -> Iterator[np.ndarray]:
        import av

        count = 0
        with self._file:
            try:
                for frame in self._file.decode(self._stream):
                    pixels = frame.to_ndarray(format="rgb24")
                    yield np.ascontiguousarray(np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90)))
                    count += 1
            except (av.FFmpegError, OSError) as error:
                raise DataError(f"{self._path}: the video is broken after {count} frames ({error})") from error
        if not count:
            raise DataError(f"{self._path}: the video has no frames that can be read")

    def _open_cv2(self) -> tuple[float, int]:
        import cv2

        self._file = cv2.VideoCapture(self._path)
        if not self._file.isOpened():
            raise DataError(f"{self._path}: the video cannot be read (OpenCV does not know its kind)")
        return self._file.get(cv2.CAP_PROP_FPS), int(self._file.get(cv2.CAP_PROP_FRAME_COUNT))

    def _frames_cv2(self) -> Iterator[np.ndarray]:
        count = 0
        try:
            while True:
                there, pixels = self._file.read()
                if not there:
                    break
                yield np.ascontiguousarray(pixels[:, :, ::-1])
                count += 1
        finally:
            self._file.release()
        if not count:
            raise DataError(f"{self._path}: the video has no frames that can be read")


class VideoWriter:
    """Writes an MP4, which appears when it is complete.

    Args:
        path: the file.
        rate: frames a second.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str, rate: Fraction) -> None:
        self.path, self._rate = path, rate
        self._partial = f"{path}.partial.mp4"
        self._file: Any = None
        self._library = library()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._file is None:
            return
        if self._library == "av":
            for packet in self._stream.encode():
                self._file.mux(packet)
            self._file.close()
        else:
            self._file.release()
        os.replace(self._partial, self.path)

    def write(self, frame: Image.Image) -> None:
        """Add a frame, RGB, in the size of the first. Odd sides, which the format does not have, lose a pixel."""
        if self._file is None:
            self._first, self._size = frame.size, tuple(max(2, side - side % 2) for side in frame.size)
            self._open(*self._size)
        fits = frame.crop((0, 0, *self._size)) if frame.size == self._first else frame.resize(self._size)
        pixels = np.asarray(fits)
        if self._library == "av":
            import av

            for packet in self._stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                self._file.mux(packet)
        else:
            self._file.write(np.ascontiguousarray(pixels[:, :, ::-1]))

    def _open(self, width: int, height: int) -> None:
        if self._library == "av":
            import av

            self._file = av.open(self._partial, "w", format="mp4")
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._file.add_stream(codec, rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        else:
            import cv2

            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._file = cv2.VideoWriter(self._partial, code, float(self._rate), (width, height))
            if not self._file.isOpened():
                self._file = None
                raise OSError(f"OpenCV cannot write the video {self.path}")
