"""What commands that use a trained detector have in common on their command lines."""

from __future__ import annotations

import argparse

from dyhead.runs.engines import ENGINES


def add_detector_arguments(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """The detector, first, and the options that say how it is loaded; ``device``: also where it runs."""
    parser.add_argument("detector", metavar="DETECTOR", help="OUTPUT_DIR of a training, or a config file")
    parser.add_argument(
        "--weights", metavar="FILE", help="default: OUTPUT_DIR's last checkpoint, or the config file's MODEL.WEIGHTS"
    )
    if device:
        parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER (default: MODEL.DEVICE)")
    parser.add_argument(
        "--engine", choices=["auto", *ENGINES], default="auto", help="default: the one that trained, if it is installed"
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only, and no bar")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Overrides of the configuration: the last argument, since all that follows belongs to it."""
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides of config keys, last"
    )
