"""Reads images of any kind that Pillow opens, as 8-bit colour, upright. Errors name the file."""

import logging
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from dyhead.data.errors import DataError

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281  # TIFF tags
_LARGE = 10**8  # pixels of an image that is not read only to say exactly how it is not as large as expected
_DARK = 64  # of 255: two of the upper bits or more are not used
_log = logging.getLogger(__name__)
_lock, _readers, _limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS
_warned = mmap.mmap(-1, 1)  # shared with the worker processes that are forked from this one


def read_image(path: str | os.PathLike, format: str = "RGB", *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads one image.

    Grey, palette, CMYK and 16-bit images become 8-bit colour, transparency is dropped, the EXIF orientation is applied,
    and an animation yields its first frame.

    16 bits keep their upper 8. If a grey image's file says that fewer bits are used (a 12-bit TIFF, TIFF's
    MaxSampleValue, PNG's sBIT), the upper 8 of those are kept; 32-bit integers up to 255 stay as they are. Other images
    that leave the upper bits unused come out dark; one warning names the first of them.

    Pillow's limit to the number of pixels, which is against broken and hostile files, does not hold where `size` says
    what is to be expected.

    Args:
        path: the file.
        format: order of the channels, "RGB" or "BGR".
        size: (height, width) in pixels that the image must have according to its annotations.

    Returns:
        uint8 array (height, width, 3), writable and contiguous.

    Raises:
        DataError: the file is missing, is not an image, is truncated, has another size, or its values are not integers
            of 0 to 65535. Names the file.
        ValueError: an unknown `format`.
    """
    if format not in ("RGB", "BGR"):
        raise ValueError(f'format: expected "RGB" or "BGR", got {format!r}')
    name = os.fspath(path)
    if not os.path.isfile(path) and os.path.exists(path):  # to open a pipe would wait for ever
        raise DataError(f"{name}: the image cannot be read (it is not a file)")
    try:
        # Pillow maps a file that it opens itself into memory, and then reads a TIFF that lies on its side wrongly.
        with open(path, "rb") as file, _limit_lifted(size is not None), Image.open(file) as image:
            if size is not None and sorted(image.size) != sorted(size) and image.width * image.height > _LARGE:
                raise DataError(_other_size(name, image.size, size))
            tiff = image.format == "TIFF"
            turned = _tag(image, _ORIENTATION) if tiff else 1
            deep = image.mode.startswith("I") or ";16" in str(image.tile)
            image.load()
            left = 1 if tiff else _orientation(image)  # Pillow turns TIFFs itself
            upright = image.transpose(_UPRIGHT[left]) if left > 1 else image
            if image.mode.startswith("I"):  # Pillow's own conversion would clip it to white
                grey, bits = _grey(image, np.asarray(upright), file)
                pixels = np.repeat(grey[:, :, None], 3, axis=2)
            elif image.mode == "F":
                raise ValueError("expected 8 or 16 bits per channel, got floating point; convert it to integers")
            else:
                upright.info.pop("transparency", None)  # or Pillow advises to keep it
                pixels, bits = np.array(upright.convert("RGB")), 16
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: the image does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: the image cannot be read (it is of no kind that Pillow knows)") from error
    except Exception as error:  # Pillow's decoders raise many kinds; each must name the file.
        raise DataError(f"{name}: the image cannot be read ({type(error).__name__}: {error})") from error
    if size is not None and pixels.shape[:2] != tuple(size):
        turned = max(turned, left)
        before = turned > 4 and pixels.shape[1::-1] == tuple(size)
        hint = f"; it is before its EXIF orientation {turned} is applied" if before else ""
        raise DataError(_other_size(name, pixels.shape[1::-1], size) + hint)
    if deep and bits == 16 and pixels.max() < _DARK:
        _warn_of_dark(name, pixels.max())
    return pixels if format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def _other_size(name: str, found: tuple[int, int], expected: tuple[int, int]) -> str:
    """What to say of an image of (width, height) `found` and (height, width) `expected`."""
    return (
        f"{name}: the image is {found[0]} x {found[1]} pixels (width x height), its annotations say {expected[1]} x "
        f"{expected[0]}"
    )


@contextmanager
def _limit_lifted(lifted: bool) -> Iterator[None]:
    """With or without Pillow's limit to the number of pixels."""
    global _readers, _limit
    if not lifted:
        yield
        return
    with _lock:
        if _readers == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS = _limit


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where it cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow's parser raises many kinds on tags that are not as they should be
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _grey(image: Image.Image, grey: np.ndarray, file: BinaryIO) -> tuple[np.ndarray, int]:
    """The upper 8 of the bits that a grey image of 16 or 32 bits uses, and how many these are.

    Args:
        image: as it was loaded.
        grey: its values, upright.
        file: where it came from.
    """
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ValueError(f"expected 8 or 16 bits per channel, got values from {low} to {high}")
    stored, used = 32 if image.mode == "I" else 16, 0
    if image.format == "TIFF":
        stored = _tag(image, _BITS_PER_SAMPLE)
        used = _tag(image, _MAX_SAMPLE_VALUE).bit_length() or stored
    elif image.format in ("PNG", "PPM"):
        stored = 16  # for Pillow has made the most of PPM's range; of PNG, older releases say "I"
        used = _png_significant_bits(file) if image.format == "PNG" else 16
        # PNG wants values scaled to 16 bits, which leaves the bits below empty, but not all writers know.
        if 0 < used < 16 and not np.any(grey & ((1 << 16 - used) - 1)):
            used = 16
    if not 0 < used < 16 or high >> used:
        used = 8 if stored == 32 and high < 256 else 16
    return (grey >> max(used - 8, 0)).astype(np.uint8), used


def _tag(image: Image.Image, tag: int) -> int:
    """A whole number of a TIFF, 0 where there is none."""
    value = image.tag_v2.get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else 0


def _png_significant_bits(file: BinaryIO) -> int:
    """What the chunk sBIT of a grey PNG says, which Pillow reads past; 0 without one."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            break
        if kind == b"sBIT":
            return (file.read(1) or b"\0")[0]
        file.seek(length + 4, os.SEEK_CUR)
    return 0


def _warn_of_dark(name: str, brightest: int) -> None:
    if not _warned[0]:
        _warned[0] = 1
        _log.warning(
            "%s: of the image's 16 bits or more the upper 8 are kept, but it hardly uses these: its brightest value "
            "becomes %d of 255. Unless it is meant to be dark, convert such images: multiply the values so that they "
            "reach 65535, or store 8 bits",
            name.encode(errors="backslashreplace").decode(), brightest,
        )  # fmt: skip


def resized(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Height and width of an image whose shorter edge becomes ``shortest``, or its longer one ``longest``, if less.

    In pixels, rounded as Detectron2 does, but at least 1. ``shortest`` 0 leaves the size as it is.
    """
    if shortest == 0:
        return height, width
    # In Detectron2's order, because halves are rounded, and whether it is one may hang on the last bit.
    scale = shortest / min(height, width)
    height, width = (shortest, scale * width) if height < width else (scale * height, shortest)
    if max(height, width) > longest:
        scale = longest / max(height, width)
        height, width = height * scale, width * scale
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))
