"""``dyhead train``, which is train_net.py too: trains and evaluates a detector, on Detectron2 or on torchvision."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from dyhead.config_files import find_file
from dyhead.exit_codes import DONE, telling
from dyhead.progress import quiet
from dyhead.runs.engines import ENGINES, check_installed, choose_engine

_DESCRIPTION = (
    "Train a detector with DyHead and evaluate it, or evaluate one. Runs on Detectron2 where it is installed and on "
    "torchvision otherwise; --engine chooses."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command: Detectron2's own, ``--engine`` and ``--quiet``."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--config-file",
        type=os.path.expanduser,
        metavar="FILE",
        help="YAML file, or the name of one that comes with this package (dyhead config --files); required",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate and measure MODEL.WEIGHTS; no training")
    parser.add_argument("--engine", choices=["auto", *ENGINES], default="auto")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only; log.txt has the rest")
    parser.add_argument("--num-gpus", type=int, default=1, help="devices per machine (processes where there is no GPU)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, 0 to NUM_MACHINES - 1")
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + os.getuid() % 2**14}",
        help="address of the machine of rank 0, tcp://HOST:PORT",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys, last")
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Errors are for :func:`dyhead.exit_codes.telling`."""
    if args.config_file is None:
        args.refuse("--config-file is required" + (", before the first KEY VALUE" if args.opts else ""))
    # On CPUs oneDNN compiles a kernel for every shape of every convolution and keeps 1024 of them, too few for a
    # detector whose images come in many sizes: then it compiles in every iteration.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    logging.raiseExceptions = False  # a log.txt that a full disk does not take neither ends a run nor buries its words
    with quiet(args.quiet):
        return _run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of train_net.py; returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return telling(lambda: run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    engine = choose_engine(args.engine)
    if not args.quiet:
        print(f"Engine: {engine}" + (" (--engine chooses)" if args.engine == "auto" else ""), flush=True)
        if find_file(args.config_file) != args.config_file:
            print(f"Config file: {find_file(args.config_file)}", flush=True)
    check_installed(engine)
    if engine == "detectron2":
        from dyhead.detectron2 import main as train
    else:
        from dyhead.torchvision import main as train
    del args.refuse  # what several processes are given can be pickled
    train(args)
    return DONE
