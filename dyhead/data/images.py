"""Reads pictures: any kind Pillow opens, as 8-bit colour, upright; a picture that is broken is named."""

import os

import numpy as np
from PIL import Image, ImageOps

from dyhead.data.errors import DataError

_ORIENTATION = 0x0112  # the EXIF tag


def read_image(path: str | os.PathLike, format: str = "RGB", *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads one picture.

    Grey, palette, CMYK and 16-bit pictures become 8-bit colour (16 bits keep their upper 8), transparency is dropped,
    the EXIF orientation is applied, and of an animation the first picture is taken.

    Args:
        path: the file.
        format: order of the channels, "RGB" or "BGR".
        size: (height, width) in pixels that the picture must have, as its annotations say.

    Returns:
        uint8 array (height, width, 3), writable and contiguous.

    Raises:
        DataError: the file is missing, is no picture, is truncated, or has another size. The file is named.
    """
    if format not in ("RGB", "BGR"):
        raise ValueError(f'format: expected "RGB" or "BGR", got {format!r}')
    try:
        with Image.open(path) as image:
            stored = image.height, image.width
            turned = image.getexif().get(_ORIENTATION, 1)
            picture = _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(f"{os.fspath(path)}: the picture does not exist") from error
    except Exception as error:  # Pillow's decoders raise many kinds; each must come out with the file's name.
        raise DataError(f"{os.fspath(path)}: the picture cannot be read ({type(error).__name__}: {error})") from error
    if size is not None and picture.shape[:2] != tuple(size):
        hint = f"; as stored, before its EXIF orientation {turned}, it does" if stored == tuple(size) else ""
        raise DataError(
            f"{os.fspath(path)}: the picture is {picture.shape[1]} x {picture.shape[0]} pixels (width x height), "
            f"its annotations say {size[1]} x {size[0]}{hint}"
        )
    return picture if format == "RGB" else np.ascontiguousarray(picture[:, :, ::-1])


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"expected 8 or 16 bits a channel, got values from {grey.min()} to {grey.max()}")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits a channel, got floating point")
    return np.array(image.convert("RGB"))
