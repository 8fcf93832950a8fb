#!/usr/bin/env python
"""Train and evaluate a detector with DyHead: ``python train_net.py --config-file FILE [options] [KEY VALUE ...]``.

Runs on Detectron2 where it is installed and on torchvision otherwise; ``--engine`` chooses.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys

from dyhead.checkpoints import CheckpointError
from dyhead.config import ConfigError
from dyhead.data import DataError


def argument_parser() -> argparse.ArgumentParser:
    """The command line, Detectron2's own plus ``--engine``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config-file", type=os.path.expanduser, metavar="FILE", help="YAML file, see configs/; required"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate and measure MODEL.WEIGHTS; no training")
    parser.add_argument("--engine", choices=["auto", "detectron2", "torchvision"], default="auto")
    parser.add_argument("--num-gpus", type=int, default=1, help="devices per machine (processes where there is no GPU)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, 0 to NUM_MACHINES - 1")
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + os.getuid() % 2**14}",
        help="address of the machine of rank 0, tcp://HOST:PORT",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys, last")
    return parser


def choose_engine(name: str) -> str:
    """The engine to run on: ``name``, or for ``auto`` Detectron2 where it is installed, else torchvision."""
    if name != "auto":
        return name
    return "detectron2" if importlib.util.find_spec("detectron2") else "torchvision"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.config_file is None:
        parser.error("--config-file is required" + (", before the first KEY VALUE" if args.opts else ""))
    engine = choose_engine(args.engine)
    print(f"Engine: {engine}" + (" (--engine chooses)" if args.engine == "auto" else ""), flush=True)
    logging.raiseExceptions = False  # a log.txt that a full disk does not take neither ends a run nor buries its words
    try:
        if engine == "detectron2":
            if not importlib.util.find_spec("detectron2"):
                raise ConfigError(
                    "--engine detectron2: Detectron2 is not installed; "
                    "pip install 'git+https://github.com/facebookresearch/detectron2.git', or --engine torchvision"
                )
            from dyhead.detectron2 import main as run
        else:
            from dyhead.torchvision import main as run
        run(args)
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupted:
        print(str(interrupted) or "interrupted", file=sys.stderr)
        return 128 + getattr(interrupted, "number", signal.SIGINT)  # as shells do
    return 0


if __name__ == "__main__":
    sys.exit(main())
