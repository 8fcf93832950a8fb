"""Bars on long steps, and ``--quiet``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

_QUIET = "DYHEAD_QUIET"  # in the environment, so that processes that a run starts know, too


def is_quiet() -> bool:
    """Whether bars and messages are not wanted, but for warnings and errors."""
    return os.environ.get(_QUIET) == "1"


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Leave out bars and messages, if so wanted, here and in processes that are started."""
    before = os.environ.get(_QUIET)
    if wanted:
        os.environ[_QUIET] = "1"
    try:
        yield
    finally:
        os.environ.pop(_QUIET, None)
        if before is not None:
            os.environ[_QUIET] = before


def bar(description: str, total: int | None, *, initial: int = 0, leave: bool = False, hidden: bool = False) -> tqdm:
    """A bar on standard error, if that is a terminal.

    Args:
        description: what goes on.
        total: number of steps, if known.
        initial: steps that are done.
        leave: keep the bar on the screen when it is complete.
        hidden: show none, as in all but one of several processes.
    """
    hidden = hidden or is_quiet() or not sys.stderr.isatty()
    return tqdm(desc=description, total=total, initial=initial, leave=leave, disable=hidden, dynamic_ncols=True)
