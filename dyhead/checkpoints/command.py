"""``dyhead convert``: a checkpoint of any project that is known, with this project's keys."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

from dyhead.checkpoints.convert import SOURCES, Conversion, convert
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import shown
from dyhead.checkpoints.saving import write_checkpoint
from dyhead.checkpoints.state import read_state

_NAMED = 20  # so many keys that are left over for the same reason are listed, the rest is counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Write the weights of a checkpoint under this project's keys, for MODEL.WEIGHTS of either engine. "
        f"Sources: {'; '.join(source.name for source in SOURCES)}."
    )
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint: a .pth, .pt, .pkl or .safetensors file")
    parser.add_argument("out", metavar="OUT", help="the file to write; it must not be there yet")


def run(args: argparse.Namespace) -> int:
    """Convert ``args.source`` to ``args.out`` and print what became of its keys; returns the exit code, 0 or 1."""
    try:
        if os.path.lexists(args.out):
            raise CheckpointError(f"{args.out}: exists and is not overwritten")
        conversion = convert(read_state(args.source), f"checkpoint {args.source}")
        if not conversion.state:
            raise CheckpointError(f"checkpoint {args.source}: none of its keys has a counterpart here")
        write_checkpoint(args.out, {"model": conversion.state, "source": conversion.source})
    except CheckpointError as error:
        print(f"dyhead convert: {error}", file=sys.stderr)
        return 1
    print(_report(conversion, args))
    return 0


def _report(conversion: Conversion, args: argparse.Namespace) -> str:
    counts = {
        "source": conversion.source,
        "keys": len(conversion.renamed) + len(conversion.dropped) + len(conversion.left_over),
        "renamed": sum(theirs != ours for theirs, ours in conversion.renamed.items()),
        "kept": sum(theirs == ours for theirs, ours in conversion.renamed.items()),
        "dropped": len(conversion.dropped),
        "left over": len(conversion.left_over),
        "added": len(conversion.added),
        "written": f"{len(conversion.state)} tensors to {args.out}",
    }
    width = max(map(len, counts))
    lines = [f"{name:<{width}}  {value}" for name, value in counts.items()]
    for title, keys in (("dropped", conversion.dropped), ("added", conversion.added)):
        lines += [f"{title}, {reason}: {count}" for reason, count in Counter(keys.values()).items()]
    lines += [f"note: {conversion.note}"] if conversion.note else []
    for reason in dict.fromkeys(conversion.left_over.values()):
        keys = [key for key, why in conversion.left_over.items() if why == reason]
        lines += [f"left over, {reason}:", *(f"  {shown(key)}" for key in keys[:_NAMED])]
        lines += [f"  and {len(keys) - _NAMED} more"] if len(keys) > _NAMED else []
    return "\n".join(lines)
