"""Draws one image of a set and its annotations.

Image `i` of a set depends on nothing but the set's specification and `i`. One stream of random numbers decides what and
where the objects are, another their colours and textures: the annotations are the same on every machine, while pixels
may differ slightly between versions of NumPy and Pillow.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dyhead.data.shapes.outlines import DISTANCES
from dyhead.data.shapes.specification import Spec

DRAWING_VERSION = 2  # raise it with every change that alters an image or an annotation: sets on disk are then redrawn
KEYPOINTS = ("center", "top", "right", "bottom", "left")  # of the visible part
_ATTEMPTS = 50  # positions tried for an object before the image goes without it


@dataclass(frozen=True)
class _Object:
    """An object in place: its class, diameter, window in the image, and the distances to its outline there."""

    kind: int
    size: float
    window: tuple[slice, slice]
    distance: np.ndarray  # pixels, at pixel centres, negative inside
    area: int  # pixels it would cover if nothing hid it or cut it off


def _make_object(
    spec: Spec, kind: int, size: float, angle: float, x: float, y: float, shape: tuple[int, int]
) -> _Object:
    """An object with its centre at (x, y), clipped to the image's shape (height, width)."""
    radius = size / 2
    rows, columns = (np.arange(int(c - radius) - 2, int(c + radius) + 3) for c in (y, x))
    u, v = (columns[None, :] + 0.5 - x) / radius, (rows[:, None] + 0.5 - y) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    distance = radius * DISTANCES[spec.classes[kind]](u * cos + v * sin, v * cos - u * sin)
    in_rows, in_columns = (rows >= 0) & (rows < shape[0]), (columns >= 0) & (columns < shape[1])
    first = max(rows[0], 0), max(columns[0], 0)
    window = slice(first[0], first[0] + in_rows.sum()), slice(first[1], first[1] + in_columns.sum())
    return _Object(kind, size, window, distance[in_rows][:, in_columns], int((distance <= 0).sum()))


def _place(spec: Spec, index: int) -> tuple[list[_Object], np.ndarray, np.ndarray]:
    """Decides what is where in an image.

    Returns:
        objects: from the back to the front.
        owner: (height, width), the index of the object visible at each pixel, or -1.
        visible: for each object, the number of its visible pixels.
    """
    # Only `random()` is used: unlike NumPy's other distributions it is the bare generator and the same in all versions.
    uniform = np.random.Generator(np.random.PCG64([spec.seed, index, 0])).random

    def integer(low: int, high: int) -> int:
        return low + int(uniform() * (high - low + 1))

    height, width = (32 * integer(spec.side[0] // 32, spec.side[1] // 32) for _ in range(2))
    owner = np.full((height, width), -1, dtype=np.int32)
    objects: list[_Object] = []
    visible = np.zeros(0, dtype=np.int64)
    for _ in range(integer(*spec.objects)):
        kind = integer(0, len(spec.classes) - 1)
        size = spec.size[0] * (spec.size[1] / spec.size[0]) ** uniform()
        angle = 2 * np.pi * uniform()
        margin = size * (spec.visible - 0.5)  # if half an object must be visible, its centre may lie on the border
        for _ in range(_ATTEMPTS):
            x, y = (margin + uniform() * (side - 2 * margin) for side in (width, height))
            new = _make_object(spec, kind, size, angle, x, y, (height, width))
            inside = new.distance <= 0
            beneath = owner[new.window][inside]
            left = visible - np.bincount(beneath[beneath >= 0], minlength=len(objects))
            left = np.append(left, inside.sum())
            if all(n >= spec.visible * o.area for n, o in zip(left, [*objects, new], strict=True)):
                owner[new.window][inside] = len(objects)
                objects.append(new)
                visible = left
                break
    return objects, owner, visible


def draw(spec: Spec, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draws image `index` of a set.

    Returns:
        image: uint8 array (height, width, 3), RGB.
        annotations: a dict per object in COCO's form, without ids: category_id, bbox [x, y, width, height], area and
            segmentation (compressed RLE) and keypoints (`KEYPOINTS`) of the visible part, iscrowd 0, and two of our
            own: size, the diameter in pixels of the circle around the whole object, and visibility, the fraction of its
            pixels that is visible. A pixel belongs to an object if its centre does. If the set has whole objects, bbox
            and area are those of all that lies inside the image, and visible_bbox is the visible part's box.
    """
    from pycocotools import mask as rle  # here, so that dyhead.data needs it only to draw

    objects, owner, visible = _place(spec, index)
    annotations = []
    for i, o in enumerate(objects):
        mask = owner == i
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        box, area, own = _box(mask), int(visible[i]), {}
        if spec.whole:
            whole = np.zeros_like(mask)
            whole[o.window] = o.distance <= 0
            box, area, own = _box(whole), int(whole.sum()), {"visible_bbox": box}
        annotations.append(
            {
                "category_id": o.kind + 1,
                "bbox": box,
                "area": area,
                "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
                "keypoints": [v for x, y in _keypoints(mask) for v in (x, y, 2)],
                "num_keypoints": len(KEYPOINTS),
                "iscrowd": 0,
                "size": round(float(o.size), 2),
                "visibility": round(int(visible[i]) / o.area, 3),
                **own,
            }
        )
    return _paint(spec, index, objects, owner.shape), annotations


def _box(mask: np.ndarray) -> list[int]:
    """The box [x, y, width, height] around a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(n) for n in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]


def _keypoints(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where the `KEYPOINTS` of a mask are: x and y of pixels. Of several that are outermost it is the middle one."""
    rows, columns = np.nonzero(mask)
    points = [(round(columns.mean()), round(rows.mean()))]
    for outermost in (rows == rows[0], columns == columns.max(), rows == rows[-1], columns == columns.min()):
        along = np.flatnonzero(outermost)
        middle = along[len(along) // 2]
        points.append((int(columns[middle]), int(rows[middle])))
    return points


def _paint(spec: Spec, index: int, objects: list[_Object], shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([spec.seed, index, 1]))
    layers, tints = [np.ones(shape, dtype=np.float32)], [rng.uniform(0, 255, 3)]
    if spec.textured:
        layers.append(_texture(rng, shape))
        tints.append(0.6 * (rng.uniform(0, 255, 3) - tints[0]))
        for cell in (64, 16, 4):
            layers.append(_value_noise(rng, shape, cell) - np.float32(0.5))
            tints.append(rng.uniform(-60, 60, 3))
    image = np.stack(layers, axis=-1) @ np.array(tints, dtype=np.float32)
    for o in objects:
        region = image[o.window]
        cover = np.clip(0.5 - o.distance, 0, 1).astype(np.float32)  # anti-aliased over one pixel
        beneath = np.tensordot(cover, region, 2) / cover.sum()
        colour = _contrasting(rng, beneath, spec.contrast)
        if spec.textured:
            # The second colour contrasts with the ground too, or half of a striped object would vanish.
            second = beneath + (colour - beneath) * rng.uniform(0.6, 1.0) + rng.uniform(-0.7, 0.7, 3) * spec.contrast[0]
            colour = colour + _texture(rng, region.shape[:2])[:, :, None] * (second - colour)
        region += cover[:, :, None] * (colour.astype(np.float32) - region)
    if spec.noise:
        image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(spec.noise)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _contrasting(rng: np.random.Generator, ground: np.ndarray, contrast: tuple[float, float]) -> np.ndarray:
    """A colour whose distance from `ground` lies in `contrast`, or the farthest of those tried."""
    best, farthest = ground, -1.0
    for _ in range(50):
        direction = rng.standard_normal(3)
        colour = np.clip(ground + direction / np.linalg.norm(direction) * rng.uniform(*contrast), 0, 255)
        distance = np.linalg.norm(colour - ground)
        if distance > farthest:
            best, farthest = colour, distance
        if distance >= contrast[0]:
            return colour
    return best


def _texture(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A pattern of values from 0 to 1: stripes, checks, a gradient, noise, or nothing."""
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros(shape, dtype=np.float32)
    if kind == 1:
        return _value_noise(rng, shape, int(rng.integers(2, 9)))
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == 2:
        return (u - u.min()) / max(float(np.ptp(u)), 1.0)
    wave = 2 * np.pi / np.exp(rng.uniform(np.log(5), np.log(32)))  # period 5 to 32 pixels
    value = np.sin(u * wave) if kind == 3 else np.sin(u * wave) * np.sin(v * wave)
    return np.clip(0.5 + 2 * value, 0, 1)


def _value_noise(rng: np.random.Generator, shape: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise from 0 to 1: random values on a grid of `cell` pixels, interpolated."""
    grid = rng.random((shape[0] // cell + 2, shape[1] // cell + 2), dtype=np.float32)
    wide = Image.fromarray(grid).resize((grid.shape[1] * cell, grid.shape[0] * cell), Image.Resampling.BILINEAR)
    return np.asarray(wide)[: shape[0], : shape[1]]
