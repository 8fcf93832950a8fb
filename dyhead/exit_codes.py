"""The exit codes of all commands, and what leads to them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

DONE, FAILED, MISUSED, INCOMPLETE = 0, 1, 2, 3

#: What `dyhead --help` says of them.
MEANINGS = {
    str(DONE): "done",
    str(FAILED): "an error, which standard error names: a config file, a key, weights, a dataset, a full disk",
    str(MISUSED): "the command line is wrong",
    str(INCOMPLETE): "done but for some inputs that could not be read, each named on standard error (predict)",
    "141": "what reads standard output, such as head, has closed it",
    "130, 143": "stopped by Ctrl-C or SIGTERM; a training has written a checkpoint, and --resume goes on from there",
}


def telling(action: Callable[[], int]) -> int:
    """Do something, and tell errors that a user can put right without a traceback; returns the exit code."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dyhead"):
            raise
        print(f"error: {package} is not installed: pip install 'dyhead[train]' has what commands need", file=sys.stderr)
        return FAILED
    except ValueError as error:
        from dyhead.checkpoints import CheckpointError  # not before: dyhead --help loads no PyTorch
        from dyhead.config_files import ConfigError
        from dyhead.data import DataError

        if not isinstance(error, (CheckpointError, ConfigError, DataError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as interrupted:
        print(str(interrupted) or "interrupted", file=sys.stderr)
        return 128 + getattr(interrupted, "number", signal.SIGINT)  # as shells do


def _is_output_closed() -> bool:
    """Whether who reads standard output has had enough, as `head` has; what is left to be written is then dropped."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
