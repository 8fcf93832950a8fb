"""``dyhead predict``: what a trained detector finds in pictures and videos, as JSON and as pictures."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from dyhead.config import ConfigError, detector_node, get
from dyhead.data import DataError, read_image
from dyhead.evaluation.report import write_json
from dyhead.exit_codes import DONE, INCOMPLETE
from dyhead.files import replacing
from dyhead.prediction.arguments import add_detector_arguments, add_overrides
from dyhead.prediction.detector import Detections, Detector, load_detector
from dyhead.prediction.inputs import Input, find_inputs
from dyhead.prediction.videos import Video, VideoWriter
from dyhead.progress import bar, quiet

_log = logging.getLogger(__name__)
_DRAWN_AS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Find objects in pictures and videos. OUT/detections.json has COCO's result dicts, OUT/images.json the "
        "pictures (or frames) and classes that their ids stand for, both as pycocotools reads them; in OUT/pictures "
        "are the pictures with what was found. A picture that cannot be read is named and left out."
    )
    add_detector_arguments(parser)
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="a picture, a video, a folder, or a pattern such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--out", metavar="OUT", default="predictions", help="a new folder (default: %(default)s)")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="leave out what has a lower score; 0: nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="pictures at a time (default: %(default)s)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON files only")
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    with quiet(args.quiet):
        return _predict(args)


@dataclass
class _Results:
    """What has been found so far."""

    images: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    broken: int = 0

    def add(self, image: dict[str, Any], found: Detections) -> None:
        height, width = found.image.shape[:2]
        number = len(self.images) + 1
        self.images.append({"id": number, **image, "height": height, "width": width})
        self.detections += found.coco(number)

    def skip(self, error: DataError) -> None:
        self.broken += 1
        tqdm.write(f"left out: {error}", file=sys.stderr)


def _predict(args: argparse.Namespace) -> int:
    if not 0 <= args.score_threshold <= 1:
        raise ConfigError(f"--score-threshold: expected 0 to 1, got {args.score_threshold}")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {args.batch_size}")
    inputs = find_inputs(args.inputs)
    args.out = os.path.expanduser(args.out)
    check_out(args.out)
    detector = load_detector(args.detector, args.weights, opts=args.opts, device=args.device, engine=args.engine)
    _check_threshold(detector, args.score_threshold)
    results = _Results()
    try:
        os.makedirs(args.out, exist_ok=True)
        try:
            _detect(args, detector, inputs, results)
        finally:  # also after Ctrl-C: what is done is kept
            _write(args.out, detector, results)
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written to ({error})") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{detector.cfg.MODEL.DEVICE} is out of memory; lower --batch-size: {error}") from error
    if not args.quiet:
        counts = {"pictures": len(results.images), "detections": len(results.detections), "left out": results.broken}
        print(f"{args.out}: {', '.join(f'{what} {count}' for what, count in counts.items())}")
    return INCOMPLETE if results.broken else DONE


def check_out(folder: str) -> None:
    """Raises ConfigError unless a folder is new or empty."""
    try:
        if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise ConfigError(f"--out {folder}: expected a new or empty folder; nothing in it is overwritten")
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written to ({error})") from error


def _check_threshold(detector: Detector, threshold: float) -> None:
    node = detector_node(detector.cfg)
    key = f"{node}.SCORE_THRESH_TEST"
    if node and 0 < threshold < get(detector.cfg, key):
        _log.warning(
            "--score-threshold %g: the detector gives nothing below %s %g; lower it with --opts %s %g",
            threshold, key, get(detector.cfg, key), key, threshold,
        )  # fmt: skip


def _detect(args: argparse.Namespace, detector: Detector, inputs: list[Input], results: _Results) -> None:
    pictures, videos = ([each for each in inputs if each.video == video] for video in (False, True))
    if pictures:
        with bar("predict", len(pictures)) as progress:
            for batch in _batches(pictures, args.batch_size, results, progress):
                found = detector([pixels for _, pixels in batch], **_options(args))
                for (picture, _), each in zip(batch, found, strict=True):
                    results.add({"file_name": picture.path}, each)
                    if not args.no_pictures:
                        _draw(each, os.path.join(args.out, "pictures", picture.name))
    for video in videos:
        try:
            _detect_in_video(args, detector, video, results)
        except DataError as error:
            results.skip(error)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"score_threshold": args.score_threshold, "batch_size": args.batch_size}


def _batches(pictures: list[Input], size: int, results: _Results, progress: tqdm) -> Iterator[list[tuple[Input, Any]]]:
    batch = []
    for picture in pictures:
        try:
            batch.append((picture, read_image(picture.path)))
        except DataError as error:
            results.skip(error)
        if len(batch) == size:
            yield batch
            batch = []
        progress.update()
    if batch:
        yield batch


def _draw(found: Detections, path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    kind = _DRAWN_AS.get(os.path.splitext(path)[1].lower())
    with replacing(path if kind else f"{path}.png") as file:
        found.draw().save(file, kind or "PNG", **({"quality": 90} if kind == "JPEG" else {}))


def _detect_in_video(args: argparse.Namespace, detector: Detector, video: Input, results: _Results) -> None:
    source = Video(video.path)
    with ExitStack() as stack:
        progress = stack.enter_context(bar(video.name, source.length))
        frames = stack.enter_context(closing(source.frames()))
        writer = None
        if not args.no_pictures:
            path = os.path.join(args.out, "pictures", video.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            path = path if path.lower().endswith(".mp4") else f"{path}.mp4"
            writer = stack.enter_context(VideoWriter(path, source.rate))
        number, batch = 0, []

        def finish() -> None:
            nonlocal number
            for found in detector(batch, **_options(args)):
                results.add({"file_name": video.path, "frame": number}, found)
                if writer is not None:
                    writer.write(found.draw())
                number += 1
                progress.update()
            batch.clear()

        broken = None
        try:
            for frame in frames:
                batch.append(frame)
                if len(batch) == args.batch_size:
                    finish()
        except DataError as error:  # what came before it counts
            broken = error
        finish()
        if broken is not None:
            raise broken


def _write(folder: str, detector: Detector, results: _Results) -> None:
    parts = {"keypoints": list(detector.classes.keypoints), "skeleton": []} if detector.classes.keypoints else {}
    categories = [
        {"id": i, "name": name, **parts} for i, name in zip(detector.classes.ids, detector.classes.names, strict=True)
    ]
    write_json({"images": results.images, "categories": categories}, os.path.join(folder, "images.json"))
    write_json(results.detections, os.path.join(folder, "detections.json"))
