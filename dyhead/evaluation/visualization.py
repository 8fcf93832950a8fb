"""Predictions beside the ground truth, and loss curves, as images."""

import colorsys
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from dyhead.data.coco import Classes, CocoSplit
from dyhead.data.images import read_image
from dyhead.evaluation import lettering
from dyhead.evaluation.coco import as_rle
from dyhead.files import replacing

_SIDE = 320  # pixels: the longer side of each image on the sheet
_SHORT = 48  # pixels: what its shorter side is filled up to, so that there is room for a label
_GAP = 8
_HEAD = 22
_LETTERS = 11  # pixels: size of a label's letters
_log = logging.getLogger(__name__)


def draw_predictions(
    split: CocoSplit,
    detections: Iterable[dict[str, Any]],
    png_path: str | os.PathLike,
    *,
    count: int = 8,
    score_threshold: float = 0.3,
) -> None:
    """Draws some images of a dataset in pairs, ground truth on the left and predictions on the right.

    Masks and keypoints are drawn where objects and predictions have them.

    Names of classes are drawn in any script that there is a font for. Where there is none, a class has its number, from
    0, and its name with escapes; a warning says so once.

    Args:
        split: the dataset; `count` images are taken, evenly spread over it.
        detections: COCO's result dicts, as for `evaluate_coco`; those of other images are ignored.
        png_path: file to write.
        score_threshold: detections with lower scores are not drawn.
    """
    count = min(count, len(split.records))
    chosen = [split.records[i * len(split.records) // count] for i in range(count)]
    found = defaultdict(list)
    for d in detections:
        if d["score"] >= score_threshold:
            found[d["image_id"]].append(d)
    classes = {category: i for i, category in enumerate(split.category_ids)}
    names = _drawable(tuple(split.class_names))

    pairs = []
    for record in chosen:
        truth = [(a["bbox"], a["category_id"], "", a) for a in record["annotations"] if not a["iscrowd"]]
        predicted = _predicted(found[record["image_id"]], classes)
        image = Image.fromarray(read_image(record["file_name"], size=(record["height"], record["width"])))
        pairs.append([_with_boxes(_with_masks(image, objects), objects, names) for objects in (truth, predicted)])

    columns = min(2, max(1, count))  # of pairs
    rows = [pairs[i : i + columns] for i in range(0, count, columns)]
    heights = [max(image.height for pair in row for image in pair) + _GAP for row in rows]
    sheet = Image.new("RGB", (columns * 2 * (_SIDE + _GAP) + _GAP, _HEAD + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(2 * columns):
        title = f"predictions, score >= {score_threshold:g}" if column % 2 else "ground truth"
        lettering.write(pen, _GAP + column * (_SIDE + _GAP), 3, title, "black", 13)
    y = _HEAD
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(image for pair in row for image in pair):
            sheet.paste(image, (_GAP + column * (_SIDE + _GAP), y))
        y += height
    with replacing(png_path) as file:
        sheet.save(file, "PNG")


def draw_detections(image: np.ndarray, detections: Iterable[dict[str, Any]], known: Classes) -> Image.Image:
    """A picture of an image, in its size, with what was detected in it.

    Args:
        image: (H, W, 3) uint8, RGB.
        detections: COCO's result dicts of this image, masks and keypoints with them.
        known: the classes.
    """
    drawn = _predicted(detections, {category: i for i, category in enumerate(known.ids)})
    picture = _with_masks(Image.fromarray(image), drawn)
    letters = max(_LETTERS, round(max(picture.size) / 60))
    _draw_boxes(picture, drawn, _drawable(tuple(known.names)), 1.0, letters)
    return picture


def plot_losses(metrics_json: str | os.PathLike, png_path: str | os.PathLike) -> None:
    """Plots the losses in a metrics.json, total_loss and each loss_*, over iterations.

    Raises:
        ValueError: the file holds no losses.
    """
    curves = read_losses(metrics_json)
    if not curves:
        raise ValueError(f"{os.fspath(metrics_json)}: expected lines with iteration and total_loss or loss_*, got none")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key in sorted(curves, key=lambda key: (key != "total_loss", key)):
        iterations = sorted(curves[key])
        values = [curves[key][i] for i in iterations]
        total = key == "total_loss"
        axes.plot(iterations, values, label=key, color="black" if total else None, linewidth=1.6 if total else 1.0)
    axes.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(png_path) as file:
        figure.savefig(file, format="png")


def read_losses(metrics_json: str | os.PathLike) -> dict[str, dict[int, float]]:
    """The losses in a metrics.json: for total_loss and each loss_*, its value by iteration.

    The file holds one JSON dict per line, as Detectron2 writes it. Lines without an iteration or a loss (those of
    evaluations) and a truncated last line are skipped; where a resumed run repeats an iteration, the later line counts.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    with open(metrics_json, encoding="utf-8") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            for key, value in entry.items():
                if "iteration" in entry and (key == "total_loss" or key.startswith("loss_")):
                    curves[key][entry["iteration"]] = value
    return curves


@cache
def _drawable(class_names: tuple[str, ...]) -> list[str]:
    """How pictures call the classes; a warning, once, names those that there is no font for."""
    names, without_font = [], []
    for i, name in enumerate(class_names):
        shown, missing = lettering.readable(name)
        names.append(f"{i}: {shown}" if missing else shown)
        if missing:
            without_font.append(name)
    if without_font:
        _log.warning(
            "No font has all letters of the name of %d classes, the first %r: in pictures these are written as their "
            "number and their name with escapes. Install fonts for them, say with pip install 'dyhead[fonts]'",
            len(without_font), without_font[0],
        )  # fmt: skip
    return names


_Drawn = tuple[Sequence[float], int, str, dict[str, Any]]  # box, class, score, and what masks and keypoints are in


def _predicted(detections: Iterable[dict[str, Any]], classes: Mapping[Any, int]) -> list[_Drawn]:
    """COCO's result dicts, the most confident last: it is drawn on top. ``classes``: by category id."""
    return [
        ([x, y, x + w, y + h], classes[d["category_id"]], f" {d['score']:.2f}", d)
        for d in sorted(detections, key=lambda d: d["score"])
        for x, y, w, h in [d["bbox"]]
    ]


def _with_masks(image: Image.Image, objects: Sequence[_Drawn]) -> Image.Image:
    """The image, with masks as a tint of it where there are any."""
    if not any("segmentation" in entry for *_, entry in objects):
        return image
    from pycocotools import mask as coco_masks

    pixels = np.asarray(image).astype(np.float32)
    for _, class_index, _, entry in objects:
        if "segmentation" in entry:
            mask = coco_masks.decode(as_rle(entry["segmentation"], image.height, image.width)).astype(bool)
            pixels[mask] += 0.45 * (np.float32(_colour(class_index)) - pixels[mask])
    return Image.fromarray(pixels.round().astype(np.uint8))


def _with_boxes(image: Image.Image, boxes: Sequence[_Drawn], names: list[str]) -> Image.Image:
    """A copy that fits the sheet's cell, with boxes (x0, y0, x1, y1 in pixels of the image), classes and scores."""
    scale = _SIDE / max(image.size)
    resized = image.resize([max(1, round(n * scale)) for n in image.size])
    small = Image.new("RGB", [max(_SHORT, n) for n in resized.size], "lightgrey")
    small.paste(resized)
    _draw_boxes(small, boxes, names, scale, _LETTERS)
    return small


def _draw_boxes(picture: Image.Image, boxes: Sequence[_Drawn], names: list[str], scale: float, letters: int) -> None:
    """Draw boxes, what they are, and keypoints.

    Args:
        picture: what to draw on.
        boxes: in pixels of the image.
        names: of the classes.
        scale: pixels of the picture in one of the image.
        letters: size of the letters, in pixels.
    """
    pen, line, far = ImageDraw.Draw(picture), max(2, letters // 6), 2 * max(picture.size)
    labels, taken = [], []
    for box, class_index, score, entry in boxes:
        x0, y0, x1, y1 = (min(max(v * scale, -9), far) for v in box)  # Pillow draws what cannot be seen, too
        x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
        colour = _colour(class_index)
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black")
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
        points = np.reshape(entry.get("keypoints", ()), (-1, 3))
        for u, v, shown in points.tolist():  # in the truth, the third number is 0 where there is no point
            if shown > 0:
                u, v = (min(max((n + 0.5) * scale, -9), far) for n in (u, v))
                pen.ellipse((u - line, v - line, u + line, v + line), fill=colour, outline="black")
        room = picture.width - 2 - lettering.measured(score, letters)[0]
        labels.append((lettering.elided(names[class_index], room, letters) + score, colour, (x0, y0, x1, y1)))
    for text, colour, box in reversed(labels):  # the most confident has the choice of places
        width, height = lettering.measured(text, letters)
        x, y = _free_place(box, (width + 2, height + 2), picture.size, taken)
        taken.append((x, y, x + width + 2, y + height + 2))
        pen.rectangle((x, y, x + width + 1, y + height + 1), fill="black")
        lettering.write(pen, x + 1, y, text, colour, letters)


def _free_place(
    box: Sequence[float], size: tuple[int, int], picture: tuple[int, int], taken: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Upper left corner of a label of this size at a box, where it covers the least of other labels.

    Args:
        box: (x0, y0, x1, y1) in pixels of the picture, as all here.
        size: (width, height) of the label.
        picture: (width, height).
        taken: where labels are.
    """
    x0, y0, x1, y1 = box
    width, height = size
    left, right = x0, x1 - width
    # Above the box, below it, inside at the top and bottom, then beside it, line by line.
    places = [(x, y) for y in (y0 - height, y1 + 1, y0, y1 - height) for x in (left, right)]
    lines = [y for i in range(8) for y in (y0 + i * height, y1 - (i + 1) * height)]
    places += [(x, y) for y in lines for x in (x1 + 1, x0 - width)]
    room = picture[0] - width, picture[1] - height
    best, least = (0.0, 0.0), math.inf
    for place in places:
        x, y = (min(max(value, 0), max(most, 0)) for value, most in zip(place, room, strict=True))
        covered = sum(
            max(0, min(x + width, x_max) - max(x, x_min)) * max(0, min(y + height, y_max) - max(y, y_min))
            for x_min, y_min, x_max, y_max in taken
        )
        if covered < least:
            best, least = (x, y), covered
    return best


def _colour(index: int) -> tuple[int, ...]:
    """Colours far apart for any number of classes: steps of the golden ratio around the colour circle."""
    return tuple(np.multiply(255, colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55, 1.0)).astype(int).tolist())
