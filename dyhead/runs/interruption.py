"""Ctrl-C, and the end of a job's time, during a training: the work so far is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 0.5  # seconds between two signals that are meant to be two: a group and its parent send one of each
_GRACE = 10  # seconds that a process which loads data goes on after SIGTERM


def leave_to_main_process(*_: Any) -> None:
    """In a process that loads data, leave it to the main process what a signal ends; a ``worker_init_fn``.

    A terminal and a scheduler send their signals to all processes, and the iteration that is to be finished may still
    need this one's images.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


class Interrupted(KeyboardInterrupt):
    """A signal ended a training.

    Args:
        number: of the signal.
        message: what was kept and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number, message)
        self.number = number
        self.message = message

    def __str__(self) -> str:
        return self.message

    def after(self, iteration: int, output_dir: str) -> Interrupted:
        """The same, saying that a checkpoint was written after an iteration, counted from 0."""
        return Interrupted(
            self.number,
            f"interrupted after iteration {iteration}; OUTPUT_DIR {output_dir} holds a checkpoint of it: the same "
            "command with --resume goes on",
        )


class Interruption:
    """Notes SIGINT (Ctrl-C) and SIGTERM (as schedulers send it) instead of stopping at once, while it is entered.

    A second signal, after half a second, stops at once, with ``KeyboardInterrupt``. Processes that are forked meanwhile
    leave SIGINT to this one. Does nothing outside the main thread, where Python handles no signals.

    Args:
        announce: whether to say on standard error what the first signal does.
        forward: whether to pass a signal on to this process's children, which have an ``Interruption`` of their own.

    Attributes:
        requested: number of the signal that came, or None.
    """

    def __init__(self, *, announce: bool = False, forward: bool = False) -> None:
        self.requested: int | None = None
        self._announce = announce
        self._forward = forward
        self._since = 0.0
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            # What is ignored, as in a job that a script runs in the background, stays so.
            numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While it is entered, and if a signal came before, :class:`Interrupted` is raised at once.

        For evaluations: nothing that a training has learned is lost with them.
        """
        self.raise_if(self.requested is not None)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def raise_if(self, interrupted: bool) -> None:
        """Raise :class:`Interrupted` where ``interrupted``, which may be another process's state, says so."""
        if interrupted:
            raise Interrupted(self.requested or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._forward:
            for child in multiprocessing.active_children():
                os.kill(child.pid, number)
        if self.requested is not None:
            if time.monotonic() > self._since + _AGAIN:
                raise KeyboardInterrupt
            return
        self.requested, self._since = number, time.monotonic()
        if self._at_once:
            raise Interrupted(number)
        if self._announce:
            # Not by logging: this may have come in the middle of another message.
            os.write(2, b"\nInterrupted: finishing the iteration and writing a checkpoint (again: stop at once)\n")
