"""`shapes`: a detection set that the project draws itself; a fresh machine can train and evaluate with no download.

Every picture shows some shapes of random class, scale, rotation and colour, later ones over earlier ones. There are
three difficulties, each with a train and a val set: `shapes_easy_*`, `shapes_*` and `shapes_hard_*`; `SPECS` says what
they are. docs/shapes.md shows them.

Picture `i` of a set depends on nothing but the set's specification and `i`. What and where the objects are comes from
one stream of random numbers, colours and textures from another, so that the annotations are the same on every machine;
pixels may differ a little between versions of NumPy and Pillow.

    python -m dyhead.data.shapes shapes_train shapes_val              draws sets into the cache
    python -m dyhead.data.shapes shapes_hard_val --preview out.png    a sheet of some of its pictures, with boxes
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from dyhead.data.catalog import datasets_root
from dyhead.data.errors import DataError

DRAWING_VERSION = 1  # to be raised with every change that alters a picture or an annotation: caches are then drawn anew
_ATTEMPTS = 50  # places tried for an object before the picture goes without it


@dataclass(frozen=True)
class Spec:
    """What a set of pictures looks like. Lengths are in pixels, pairs are (lowest, highest).

    Attributes:
        seed: of the random numbers.
        pictures: how many.
        classes: keys of `_DISTANCES`; class i has the category id i + 1.
        side: width and height of a picture, each drawn by itself, in steps of 32.
        objects: how many are tried in a picture.
        size: diameter of the circle around an object, log-uniform.
        visible: the part of each object that the others and the border leave to be seen, at the least.
        contrast: distance in RGB (0 to 255) between an object's colour and what lies beneath it.
        textured: whether objects and background have textures.
        noise: standard deviation of the noise over the finished picture, of 255.
        suffix: ".png" (lossless) or ".jpg" (quality 90, colour not subsampled).
    """

    seed: int
    pictures: int
    classes: tuple[str, ...]
    side: tuple[int, int]
    objects: tuple[int, int]
    size: tuple[float, float]
    visible: float
    contrast: tuple[float, float]
    textured: bool
    noise: float
    suffix: str


_EASY = Spec(
    seed=1,
    pictures=600,
    classes=("circle", "triangle", "square"),
    side=(192, 192),
    objects=(1, 4),
    size=(24, 96),
    visible=1.0,
    contrast=(100, 255),
    textured=False,
    noise=0,
    suffix=".png",
)
_STANDARD = Spec(
    seed=3,
    pictures=3000,
    classes=("circle", "triangle", "square", "bar", "star", "cross", "ring", "crescent"),
    side=(320, 448),
    objects=(2, 14),
    size=(8, 200),
    visible=0.5,
    contrast=(60, 200),
    textured=True,
    noise=6,
    suffix=".jpg",
)
_HARD = replace(_STANDARD, seed=5, objects=(10, 30), size=(8, 128), visible=0.25, contrast=(30, 70), noise=12)

SPECS: dict[str, Spec] = {
    "shapes_easy_train": _EASY,
    "shapes_easy_val": replace(_EASY, seed=2, pictures=100),
    "shapes_train": _STANDARD,
    "shapes_val": replace(_STANDARD, seed=4, pictures=500),
    "shapes_hard_train": _HARD,
    "shapes_hard_val": replace(_HARD, seed=6, pictures=500),
}


# Shapes: signed distance to the outline, negative inside, of points (x, y); the circle around each shape has radius 1.


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y, np.abs(x) * 0.75**0.5 - y * 0.5) - 0.5


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.31), _box(x, y, 0.31, 0.95))


def _star(x: np.ndarray, y: np.ndarray, inner: float = 0.45) -> np.ndarray:
    # All ten edges fall onto one: from the tip (1, 0) to the inner corner at 36 degrees.
    tenth = np.pi / 5
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    angle = np.abs(angle - np.round(angle / (2 * tenth)) * (2 * tenth))
    along = np.array([inner * np.cos(tenth) - 1, inner * np.sin(tenth)])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return (radius * np.cos(angle) - 1) * normal[0] + radius * np.sin(angle) * normal[1]


_DISTANCES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "triangle": _triangle,
    "square": lambda x, y: _box(x, y, 0.5**0.5, 0.5**0.5),
    "bar": lambda x, y: _box(x, y, 0.95, 0.31),
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.775) - 0.225,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.75 - np.hypot(x - 0.5, y)),
}


@dataclass(frozen=True)
class _Object:
    """One object in place: its class, diameter, the window it fills in the picture, and its distances there."""

    kind: int
    size: float
    window: tuple[slice, slice]
    distance: np.ndarray  # pixels, at pixel centres, negative inside
    area: int  # pixels it would cover with nothing before it and no border


def _make_object(
    spec: Spec, kind: int, size: float, angle: float, x: float, y: float, shape: tuple[int, int]
) -> _Object:
    """An object with its centre at (x, y), cut to the picture's shape (height, width)."""
    radius = size / 2
    rows, columns = (np.arange(int(c - radius) - 2, int(c + radius) + 3) for c in (y, x))
    u, v = (columns[None, :] + 0.5 - x) / radius, (rows[:, None] + 0.5 - y) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    distance = radius * _DISTANCES[spec.classes[kind]](u * cos + v * sin, v * cos - u * sin)
    in_rows, in_columns = (rows >= 0) & (rows < shape[0]), (columns >= 0) & (columns < shape[1])
    first = max(rows[0], 0), max(columns[0], 0)
    window = slice(first[0], first[0] + in_rows.sum()), slice(first[1], first[1] + in_columns.sum())
    return _Object(kind, size, window, distance[in_rows][:, in_columns], int((distance <= 0).sum()))


def _place(spec: Spec, index: int) -> tuple[list[_Object], np.ndarray, np.ndarray]:
    """Decides what is where in a picture.

    Returns:
        objects: from the back to the front.
        owner: (height, width), at each pixel the index of the object seen there, or -1.
        seen: at each object the number of its pixels that are seen.
    """
    # Only `random()` is used: unlike NumPy's other distributions it is the bare generator, the same in all versions.
    uniform = np.random.Generator(np.random.PCG64([spec.seed, index, 0])).random

    def integer(low: int, high: int) -> int:
        return low + int(uniform() * (high - low + 1))

    height, width = (32 * integer(spec.side[0] // 32, spec.side[1] // 32) for _ in range(2))
    owner = np.full((height, width), -1, dtype=np.int32)
    objects: list[_Object] = []
    seen = np.zeros(0, dtype=np.int64)
    for _ in range(integer(*spec.objects)):
        kind = integer(0, len(spec.classes) - 1)
        size = spec.size[0] * (spec.size[1] / spec.size[0]) ** uniform()
        angle = 2 * np.pi * uniform()
        margin = size * (spec.visible - 0.5)  # half an object may be seen: its centre may lie on the border
        for _ in range(_ATTEMPTS):
            x, y = (margin + uniform() * (side - 2 * margin) for side in (width, height))
            new = _make_object(spec, kind, size, angle, x, y, (height, width))
            inside = new.distance <= 0
            beneath = owner[new.window][inside]
            left = seen - np.bincount(beneath[beneath >= 0], minlength=len(objects))
            left = np.append(left, inside.sum())
            if all(n >= spec.visible * o.area for n, o in zip(left, [*objects, new], strict=True)):
                owner[new.window][inside] = len(objects)
                objects.append(new)
                seen = left
                break
    return objects, owner, seen


def draw(spec: Spec, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draws picture `index` of a set.

    Returns:
        picture: uint8 array (height, width, 3), RGB.
        annotations: a dict per object in COCO's form, without ids: category_id, bbox [x, y, width, height], area and
            segmentation (compressed RLE) of the part that is seen, iscrowd 0, and two of our own: size, the diameter in
            pixels of the circle around the whole object, and visibility, the part of its pixels that is seen.
            A pixel belongs to an object if its centre does.
    """
    objects, owner, seen = _place(spec, index)
    annotations = []
    for i, o in enumerate(objects):
        mask = owner == i
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        annotations.append(
            {
                "category_id": o.kind + 1,
                "bbox": [int(n) for n in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)],
                "area": int(seen[i]),
                "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
                "iscrowd": 0,
                "size": round(float(o.size), 2),
                "visibility": round(int(seen[i]) / o.area, 3),
            }
        )
    return _paint(spec, index, objects, owner.shape), annotations


def _paint(spec: Spec, index: int, objects: list[_Object], shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([spec.seed, index, 1]))
    layers, tints = [np.ones(shape, dtype=np.float32)], [rng.uniform(0, 255, 3)]
    if spec.textured:
        layers.append(_texture(rng, shape))
        tints.append(0.6 * (rng.uniform(0, 255, 3) - tints[0]))
        for cell in (64, 16, 4):
            layers.append(_value_noise(rng, shape, cell) - np.float32(0.5))
            tints.append(rng.uniform(-60, 60, 3))
    picture = np.stack(layers, axis=-1) @ np.array(tints, dtype=np.float32)
    for o in objects:
        region = picture[o.window]
        cover = np.clip(0.5 - o.distance, 0, 1).astype(np.float32)  # anti-aliased over one pixel
        beneath = np.tensordot(cover, region, 2) / cover.sum()
        colour = _contrasting(rng, beneath, spec.contrast)
        if spec.textured:
            # The second colour keeps away from the ground too, or half of a striped object would vanish in it.
            second = beneath + (colour - beneath) * rng.uniform(0.6, 1.0) + rng.uniform(-0.7, 0.7, 3) * spec.contrast[0]
            colour = colour + _texture(rng, region.shape[:2])[:, :, None] * (second - colour)
        region += cover[:, :, None] * (colour.astype(np.float32) - region)
    if spec.noise:
        picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(spec.noise)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


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


# The cache


def prepare(name: str, root: str | os.PathLike) -> tuple[str, str]:
    """Draws a set into its cache, the folder `shapes` below `root`, unless it is there.

    The folder's name carries a digest of the specification and of the drawing version, so that a changed set is drawn
    anew; it appears only when it is complete, so that an interrupted drawing leaves no half set behind.

    Returns:
        The annotation file and the folder of the pictures.

    Raises:
        DataError: the name is not one of `SPECS`, or the folder cannot be written.
    """
    if name not in SPECS:
        raise DataError(f"shapes: expected one of {', '.join(SPECS)}, got '{name}'")
    spec = SPECS[name]
    described = json.dumps({"drawing_version": DRAWING_VERSION, **asdict(spec)}, indent=1)
    digest = hashlib.sha256(described.encode()).hexdigest()[:10]
    parent = os.path.join(root, "shapes")
    folder = os.path.join(parent, f"{name}-{digest}")
    if not os.path.isdir(folder):
        try:
            os.makedirs(parent, exist_ok=True)
            with _lock(os.path.join(parent, f".{name}.lock")):
                if not os.path.isdir(folder):
                    _draw_set(name, spec, described, folder)
        except OSError as error:
            raise DataError(
                f"data set '{name}' is drawn into {os.path.abspath(parent)}, which failed ({error}); "
                "set DETECTRON2_DATASETS to a folder that can be written and has some space (300 MB are enough)"
            ) from error
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _draw_set(name: str, spec: Spec, described: str, folder: str) -> None:
    temporary = f"{folder}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    os.makedirs(os.path.join(temporary, "images"))
    try:
        images, annotations = [], []
        for index in _progress(name, spec.pictures):
            picture, found = draw(spec, index)
            image = {
                "id": index + 1,
                "file_name": f"{index + 1:06d}{spec.suffix}",
                "height": picture.shape[0],
                "width": picture.shape[1],
            }
            # quality and subsampling concern JPEG only
            path = os.path.join(temporary, "images", image["file_name"])
            Image.fromarray(picture).save(path, quality=90, subsampling=0)
            images.append(image)
            annotations += [{"id": len(annotations) + i, "image_id": image["id"], **a} for i, a in enumerate(found, 1)]
        categories = [{"id": i, "name": c, "supercategory": "shape"} for i, c in enumerate(spec.classes, 1)]
        data = {
            "info": {"description": f"{name}, drawn by dyhead"},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        with open(os.path.join(temporary, "annotations.json"), "w", encoding="utf-8") as file:
            json.dump(data, file)
        with open(os.path.join(temporary, "spec.json"), "w", encoding="utf-8") as file:
            file.write(described)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process, which our lock could not hold off, was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Lets one process draw while others wait. Where locks do not work they all draw, and the first to finish wins."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _progress(name: str, total: int) -> Iterator[int]:
    """Counts to `total` and says so on stderr: a running line on a terminal, else one line before and one after."""
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    for i in range(total):
        if i == 0 or (start and i % 10 == 0):
            print(f"{start}drawing {name}: {i:5} of {total} pictures", end=end, file=sys.stderr, flush=True)
        yield i
    print(f"{start}drawing {name}: {total:5} of {total} pictures", file=sys.stderr, flush=True)


# The command line


def contact_sheet(names: list[str], columns: int = 4, cell: int = 240) -> Image.Image:
    """The first pictures of some sets with their boxes, a set a row, each picture within `cell` pixels."""
    sheet = Image.new("RGB", (columns * cell, len(names) * cell), "white")
    for row, spec in enumerate(SPECS[name] for name in names):
        for column in range(columns):
            picture, annotations = draw(spec, column)
            scale = (cell - 4) / max(picture.shape[:2])
            small = Image.fromarray(picture).resize([round(n * scale) for n in picture.shape[1::-1]])
            pen = ImageDraw.Draw(small)
            for a in annotations:
                x, y, width, height = (n * scale for n in a["bbox"])
                pen.rectangle((x - 1, y - 1, x + width, y + height), outline="white")
                name = spec.classes[a["category_id"] - 1]
                if pen.textlength(name) + 4 < width:  # on a smaller box it would hide the object
                    pen.text((x + 3, y + 1), name, "white", stroke_width=1, stroke_fill="black")
            sheet.paste(small, (column * cell + 2, row * cell + 2))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(prog="python -m dyhead.data.shapes", description="Draws the shapes data sets.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=SPECS, help=", ".join(SPECS))
    parser.add_argument("--root", help="folder of the data sets (default: $DETECTRON2_DATASETS, or datasets)")
    parser.add_argument("--preview", metavar="FILE", help="draw only a sheet of their first pictures")
    options = parser.parse_args(arguments)
    if options.preview:
        contact_sheet(options.names).save(options.preview)
        print(options.preview)
        return
    for name in options.names:
        print(*prepare(name, options.root or datasets_root()))


if __name__ == "__main__":
    main()
