"""The command line `dyhead SUBCOMMAND ...`, or `python -m dyhead SUBCOMMAND ...`.

A subcommand is a module with two functions, `add_arguments(parser) -> None` and `run(args) -> int`, which returns the
exit code. It is imported only when it is named, so that `dyhead --help` does not load PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dyhead.exit_codes import MEANINGS, telling

#: Subcommands by name: the module, and a line of help.
SUBCOMMANDS = {
    "train": ("dyhead.runs.command", "train and evaluate a detector, or evaluate one"),
    "predict": ("dyhead.prediction.command", "find objects in pictures and videos with a trained detector"),
    "visualize": ("dyhead.visualize.command", "draw what a trained DyHead does with pictures"),
    "export": (
        "dyhead.export.command",
        "write a trained detector to a file for ONNX Runtime, OpenVINO or PyTorch alone",
    ),
    "config": ("dyhead.config_page", "list the keys of the configuration with their defaults, values and meaning"),
    "convert": ("dyhead.checkpoints.command", "give another project's checkpoint this project's names"),
    "info": ("dyhead.info", "print versions, what was built, and why anything did not load"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; default: the process's.

    Returns:
        The exit code.

    Raises:
        SystemExit: the arguments are wrong (2), or help was asked for (0).
    """
    return telling(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> int:
    codes = "\n".join(f"  {code:<8}  {meaning}" for code, meaning in MEANINGS.items())
    parser = argparse.ArgumentParser(
        prog="dyhead",
        usage="dyhead [-h] SUBCOMMAND ...",
        description="Dynamic Head for any feature-pyramid detector.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The metavar's length is the room for the names: argparse forgets that these are indented.
    subparsers = parser.add_subparsers(title="subcommands", prog="dyhead", metavar="SUBCOMMAND ...", required=True)
    for name, (module_name, summary) in SUBCOMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = subparsers.add_parser(name, help=summary, description=description, allow_abbrev=False)
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)
