"""Pictures of results: predictions beside the ground truth, and loss curves."""

import colorsys
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dyhead.data.coco import CocoSplit
from dyhead.data.images import read_image

_SIDE = 320  # pixels: the longer side of each picture on the sheet
_GAP = 8
_HEAD = 22


def draw_predictions(
    split: CocoSplit,
    detections: Iterable[dict[str, Any]],
    png_path: str | os.PathLike,
    *,
    count: int = 8,
    score_threshold: float = 0.3,
) -> None:
    """Draws some pictures of a data set in pairs, ground truth left, predictions right.

    Args:
        split: the data set; `count` pictures are taken, evenly spread over it.
        detections: COCO's result dicts, as for `evaluate_coco`; those of other pictures are ignored.
        png_path: file to write.
        score_threshold: detections below are not drawn.
    """
    count = min(count, len(split.records))
    chosen = [split.records[i * len(split.records) // count] for i in range(count)]
    found = defaultdict(list)
    for d in detections:
        if d["score"] >= score_threshold:
            found[d["image_id"]].append(d)
    classes = {category: i for i, category in enumerate(split.category_ids)}

    columns = 2 if count > 1 else 1  # of pairs
    rows = -(-count // columns)
    pair = 2 * _SIDE + 3 * _GAP
    sheet = Image.new("RGB", (columns * pair, _HEAD + rows * (_SIDE + _GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column in range(columns):
        left = column * pair + _GAP
        pen.text((left, 3), "ground truth", "black", font)
        pen.text((left + _SIDE + _GAP, 3), f"predictions, score >= {score_threshold:g}", "black", font)
    for i, record in enumerate(chosen):
        truth = [(a["bbox"], a["category_id"], "") for a in record["annotations"] if not a["iscrowd"]]
        predicted = [
            ([x, y, x + w, y + h], classes[d["category_id"]], f" {d['score']:.2f}")
            for d in sorted(found[record["image_id"]], key=lambda d: d["score"])  # the surest on top
            for x, y, w, h in [d["bbox"]]
        ]
        picture = Image.fromarray(read_image(record["file_name"], size=(record["height"], record["width"])))
        x, y = (i % columns) * pair + _GAP, _HEAD + (i // columns) * (_SIDE + _GAP)
        sheet.paste(_with_boxes(picture, truth, split.class_names), (x, y))
        sheet.paste(_with_boxes(picture, predicted, split.class_names), (x + _SIDE + _GAP, y))
    sheet.save(png_path)


def plot_losses(metrics_json: str | os.PathLike, png_path: str | os.PathLike) -> None:
    """Plots the losses in a metrics.json over iterations: total_loss and each loss_*.

    The file holds one JSON dict a line, as Detectron2 writes it. Lines without an iteration or a loss (those of
    evaluations) and a last line cut short are passed over; where a resumed run repeats an iteration, its later line
    counts.

    Raises:
        ValueError: the file holds no losses.
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
    figure.savefig(png_path)


def _with_boxes(
    picture: Image.Image, boxes: Sequence[tuple[Sequence[float], int, str]], names: list[str]
) -> Image.Image:
    """A copy fitted into the sheet's cell, with boxes (x0, y0, x1, y1 in pixels of the picture), classes and scores."""
    scale = _SIDE / max(picture.size)
    small = picture.resize([max(1, round(n * scale)) for n in picture.size])
    pen, font = ImageDraw.Draw(small), ImageFont.load_default(11)
    for box, class_index, score in boxes:
        corners = [v * scale for v in box]
        colour = _colour(class_index)
        pen.rectangle(corners, outline="black", width=3)
        pen.rectangle(corners, outline=colour, width=1 if scale < 1 else 2)
        text = names[class_index] + score
        width, height = pen.textbbox((0, 0), text, font)[2:]
        x = min(max(corners[0], 0), max(small.width - width - 2, 0))
        y = corners[1] - height - 1 if corners[1] > height else min(corners[3], small.height - height - 2)
        pen.rectangle((x, y, x + width + 2, y + height), fill="black")
        pen.text((x + 1, y - 1), text, colour, font)
    return small


def _colour(index: int) -> tuple[int, ...]:
    """Colours far apart for any number of classes: steps of the golden ratio around the colour circle."""
    return tuple(np.multiply(255, colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55, 1.0)).astype(int).tolist())
