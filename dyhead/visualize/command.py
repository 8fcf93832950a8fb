"""``dyhead visualize``: pictures of what a trained DyHead does with images, and one HTML page of them."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dyhead.config import ConfigError
from dyhead.data import CocoSplit, get, load, read_image, register_from_config, resized
from dyhead.evaluation import draw_predictions
from dyhead.exit_codes import DONE, telling
from dyhead.files import replacing, write_text
from dyhead.prediction.arguments import add_detector_arguments, add_overrides
from dyhead.prediction.command import check_out
from dyhead.prediction.detector import Detections, Detector, load_detector
from dyhead.prediction.inputs import find_inputs
from dyhead.progress import bar, quiet
from dyhead.visualize.page import Section, page
from dyhead.visualize.pictures import draw_maps, draw_sampling, draw_weights, level_for
from dyhead.visualize.tracing import Trace, traced

_log = logging.getLogger(__name__)

_MAPS = (
    "Rows are levels of the pyramid, columns the input of the block and what each attention makes of it. Bright is "
    "where the root of the mean square over channels is large; each map has its own scale, whose ends stand above it. "
    "The scale-aware attention multiplies a whole level by one number; the spatial-aware one gathers from three levels "
    "what lies at the sampled places; the task-aware one switches channels on and off."
)
_SAMPLING = (
    "Where the spatial-aware attention reads, block by block. Squares: the nine places of a plain convolution. Dots: "
    "where it reads instead, larger and brighter the more it counts; each is read on the level itself, the next finer "
    "and the next coarser one. The white cross is the pixel whose result this is. Below, the places of all pixels in "
    "the box."
)
_WEIGHTS = (
    "Each dot is the weight that the scale-aware attention gives a level in one image, by the size of the objects in "
    "that image; lines are fitted by least squares. Levels that matter more for images of large objects rise."
)
_PREDICTIONS = "What was annotated, on the left, and beside it what the detector finds."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Draw what a trained DyHead does: maps after each attention, where it samples, how it weighs levels, and "
        "predictions beside the ground truth. OUT has the pictures, and index.html with all of them."
    )
    add_detector_arguments(parser)
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="pictures, folders or patterns; default: --dataset")
    parser.add_argument("--dataset", metavar="NAME", help="whose images to take (default: the first of DATASETS.TEST)")
    parser.add_argument("--out", metavar="OUT", default="visualization", help="a new folder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=50, metavar="N", help="images, at most (default: %(default)s)")
    parser.add_argument(
        "--details",
        type=int,
        default=3,
        metavar="N",
        help="images whose maps and places are drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--pixel", type=int, nargs=2, metavar=("X", "Y"), help="of the image; default: the center of the surest object"
    )
    parser.add_argument("--level", metavar="NAME", help="such as p4; default: the one that suits the object's size")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="SCORE", help="of objects (default: %(default)s)"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    with quiet(args.quiet):
        return telling(lambda: _visualize(args))


@dataclass(frozen=True)
class Seen:
    """An image, what the head did with it, and what was found.

    Attributes:
        name: of its file.
        pixels: the image as the detector saw it, (h, w, 3) uint8, RGB.
        scale: pixels of that image in one of the file's.
        trace: of the head.
        found: by the detector, in pixels of the file's image.
    """

    name: str
    pixels: np.ndarray
    scale: float
    trace: Trace
    found: Detections

    @property
    def boxes(self) -> Tensor:
        """(D, 4), in pixels of the image that the detector saw."""
        return self.found.boxes * self.scale


def _visualize(args: argparse.Namespace) -> int:
    for name, low in (("count", 1), ("details", 0)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name}: expected at least {low}, got {getattr(args, name)}")
    args.out = os.path.expanduser(args.out)
    check_out(args.out)
    detector = load_detector(args.detector, args.weights, opts=args.opts, device=args.device, engine=args.engine)
    split = None if args.inputs else _split(args.dataset, detector)
    if split is None:
        files = [each.path for each in find_inputs(args.inputs) if not each.video]
    else:
        files = [record["file_name"] for record in split.records]
    step = max(1, -(-len(files) // args.count))
    chosen = range(0, len(files), step)
    try:
        os.makedirs(args.out, exist_ok=True)
        seen = list(_look(detector, [files[i] for i in chosen], args.score_threshold))
        sections = _draw(args, seen)
        if split is not None:
            sections.append(_draw_truth(args, split, chosen, seen))
        title = f"DyHead in {detector.cfg.MODEL.META_ARCHITECTURE}"
        introduction = (
            f"{len(seen)} images, {len(seen[0].trace.blocks)} blocks, weights of {args.weights or args.detector}."
        )
        write_text(os.path.join(args.out, "index.html"), page(title, introduction, sections))
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written to ({error})") from error
    if not args.quiet:
        print(f"{len(sections)} pictures and index.html in {args.out}")
    return DONE


def _split(name: str | None, detector: Detector) -> CocoSplit:
    datasets = detector.cfg.DATASETS
    name = name or next(iter(datasets.TEST), None)
    if name is None:
        raise ConfigError("--dataset: expected the name of a dataset, or pictures, as DATASETS.TEST is empty")
    register_from_config(datasets.REGISTER)
    return load(get(name), clip_boxes=datasets.CLIP_BOXES)


def _look(detector: Detector, files: Sequence[str], threshold: float) -> Iterator[Seen]:
    """What the head does with each image."""
    options = detector.cfg.INPUT
    for file in _with_bar(files):
        pixels = read_image(file)
        try:
            with traced(detector.model) as traces:
                found = detector(pixels, score_threshold=threshold)
        except ValueError as error:
            raise ConfigError(f"MODEL.NECKS: {error}") from error
        size = resized(*pixels.shape[:2], options.MIN_SIZE_TEST, options.MAX_SIZE_TEST)
        smaller = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
        yield Seen(os.path.basename(file), np.asarray(smaller), size[1] / pixels.shape[1], traces[0], found)


def _with_bar(files: Sequence[str]) -> Iterator[str]:
    with bar("visualize", len(files)) as progress:
        for file in files:
            yield file
            progress.update()


def _draw(args: argparse.Namespace, seen: Sequence[Seen]) -> list[Section]:
    sections, blocks = [], seen[0].trace.blocks
    with_objects = [each for each in seen if len(each.found)]
    if len(with_objects) > 1 and blocks and all(block.weights is not None for block in blocks):
        sizes = [_median_size(each.boxes) for each in with_objects]
        figure = draw_weights([each.trace for each in with_objects], sizes)
        sections.append(_save(args.out, "weights", figure, "How levels are weighed", _WEIGHTS))
    for number, each in enumerate([*with_objects, *(e for e in seen if not len(e.found))][: args.details], 1):
        if any(block.offsets is not None for block in blocks):
            box, pixel = _place(args, each)
            level = args.level or level_for(each.trace.levels, box or (0, 0, 64, 64))
            if level not in each.trace.levels:
                raise ConfigError(f"--level: expected one of {', '.join(each.trace.levels)}, got {level!r}")
            figure = draw_sampling(each.pixels, each.trace, level, pixel, box)
            title = f"{each.name}: where {level} is sampled"
            sections.append(_save(args.out, f"sampling-{number}", figure, title, _SAMPLING))
        for block in range(len(blocks)):
            title = f"{each.name}: block {block + 1}"
            figure = draw_maps(each.pixels, each.trace, block)
            sections.append(_save(args.out, f"maps-{number}-block-{block + 1}", figure, title, _MAPS))
    return sections


def _place(args: argparse.Namespace, seen: Seen) -> tuple[list[float] | None, tuple[int, int]]:
    """The box of the surest object, or None, and the pixel to look at, in pixels of the image that was seen."""
    height, width = seen.pixels.shape[:2]
    box = seen.boxes[0].tolist() if len(seen.found) else None
    if args.pixel is not None:
        pixel = tuple(int(p * seen.scale) for p in args.pixel)
        if not (0 <= pixel[0] < width and 0 <= pixel[1] < height):
            size = "x".join(map(str, seen.found.image.shape[1::-1]))
            raise ConfigError(
                f"--pixel: expected one of the {size} of {seen.name}, got {args.pixel[0]} {args.pixel[1]}"
            )
        return box, pixel
    if box is None:
        return None, (width // 2, height // 2)
    center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return box, tuple(min(max(int(c), 0), side - 1) for c, side in zip(center, (width, height), strict=True))


def _median_size(boxes: Tensor) -> float:
    return float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt().median())


def _draw_truth(args: argparse.Namespace, split: CocoSplit, chosen: Sequence[int], seen: Sequence[Seen]) -> Section:
    records = [split.records[i] for i in chosen]
    found: list[dict[str, Any]] = []
    for record, each in zip(records, seen, strict=True):
        found += each.found.coco(record["image_id"])
    path = Path(args.out) / "predictions.png"
    part = CocoSplit(split.info, split.class_names, split.category_ids, records)
    draw_predictions(part, found, path, score_threshold=args.score_threshold)
    return Section("Predictions beside the ground truth", path, _PREDICTIONS)


def _save(folder: str, name: str, figure: Figure, title: str, caption: str) -> Section:
    path = Path(folder) / f"{name}.png"
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return Section(title, path, caption)
