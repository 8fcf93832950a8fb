"""Reads images of any kind that Pillow opens, as 8-bit colour, upright. Errors name the file."""

import os

import numpy as np
from PIL import Image, ImageOps

from dyhead.data.errors import DataError

_ORIENTATION = 0x0112  # the EXIF tag


def read_image(path: str | os.PathLike, format: str = "RGB", *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads one image.

    Grey, palette, CMYK and 16-bit images become 8-bit colour (16 bits keep their upper 8), transparency is dropped,
    the EXIF orientation is applied, and an animation yields its first frame.

    Args:
        path: the file.
        format: order of the channels, "RGB" or "BGR".
        size: (height, width) in pixels that the image must have according to its annotations.

    Returns:
        uint8 array (height, width, 3), writable and contiguous.

    Raises:
        DataError: the file is missing, is not an image, is truncated, or has another size. Names the file.
        ValueError: an unknown `format`.
    """
    if format not in ("RGB", "BGR"):
        raise ValueError(f'format: expected "RGB" or "BGR", got {format!r}')
    try:
        with Image.open(path) as image:
            stored = image.height, image.width
            turned = image.getexif().get(_ORIENTATION, 1)
            pixels = _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(f"{os.fspath(path)}: the image does not exist") from error
    except Exception as error:  # Pillow's decoders raise many kinds; each must name the file.
        raise DataError(f"{os.fspath(path)}: the image cannot be read ({type(error).__name__}: {error})") from error
    if size is not None and pixels.shape[:2] != tuple(size):
        hint = f"; it is before its EXIF orientation {turned} is applied" if stored == tuple(size) else ""
        raise DataError(
            f"{os.fspath(path)}: the image is {pixels.shape[1]} x {pixels.shape[0]} pixels (width x height), "
            f"its annotations say {size[1]} x {size[0]}{hint}"
        )
    return pixels if format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"expected 8 or 16 bits per channel, got values from {grey.min()} to {grey.max()}")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits per channel, got floating point")
    return np.array(image.convert("RGB"))
