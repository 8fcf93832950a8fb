"""``dyhead export``: a trained detector in a file that runs without this project."""

from __future__ import annotations

import argparse
import json
import os
import re

from dyhead.exit_codes import DONE, telling
from dyhead.export.files import FORMATS, OPSETS, check_path, export
from dyhead.export.graph import OUTPUTS
from dyhead.prediction import load_detector
from dyhead.prediction.arguments import add_detector_arguments, add_overrides
from dyhead.progress import quiet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Write a trained detector to a file for other runtimes. Its ending says which: "
        + ", ".join(f"{ending} ({kind})" for ending, (kind, _) in FORMATS.items())
        + "; see docs/export.md."
    )
    add_detector_arguments(parser, device=False)
    parser.add_argument("out", metavar="OUT", help="the file to write; it must not be there yet")
    parser.add_argument(
        "--output",
        choices=list(OUTPUTS),
        default="detections",
        help="; ".join(f"{name}: {text}" for name, text in OUTPUTS.items()),
    )
    parser.add_argument("--batch", type=_batch, default=1, metavar="N", help="images of a batch, or any (default: 1)")
    parser.add_argument(
        "--size",
        type=_size,
        default=None,
        metavar="HEIGHTxWIDTH",
        help="of the images that the network sees, or any (default), in multiples of what it pads images to",
    )
    parser.add_argument("--opset", type=int, choices=OPSETS, default=19, help="of ONNX (default: 19)")
    parser.add_argument(
        "--plain", action="store_true", help=".pt2: PyTorch's own operators alone, slower, without dyhead's library"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    with quiet(args.quiet):
        return telling(lambda: _export(args))


def _export(args: argparse.Namespace) -> int:
    out = os.path.expanduser(args.out)
    check_path(out)
    detector = load_detector(args.detector, args.weights, opts=args.opts, device="cpu", engine=args.engine)
    cfg = detector.cfg
    metadata = {
        "classes": json.dumps(list(detector.classes.names)),
        "channels": cfg.INPUT.FORMAT,
        "pixel_mean": json.dumps(list(cfg.MODEL.PIXEL_MEAN)),
        "short_side": str(cfg.INPUT.MIN_SIZE_TEST),
        "long_side_at_most": str(cfg.INPUT.MAX_SIZE_TEST),
    }
    graph = export(
        detector.model,
        out,
        output=args.output,
        batch=args.batch,
        size=args.size,
        opset=args.opset,
        plain=args.plain,
        metadata=metadata,
    )
    if not args.quiet:
        print(f"in   images (N, 3, H, W), float32, 0 to 255, {cfg.INPUT.FORMAT}")
        if args.size is None:
            print(f"     H and W are multiples of {graph.multiple} above {graph.coarsest_stride}")
        print(f"out  {', '.join(graph.names)}: {OUTPUTS[args.output]}")
        print(f"written to {out}")
    return DONE


def _batch(text: str) -> int | None:
    if text == "any":
        return None
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, or any, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int] | None:
    if text == "any":
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 800x1344, or any, got {text!r}")
    return int(match[1]), int(match[2])
