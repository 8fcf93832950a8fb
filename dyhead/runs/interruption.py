"""Ctrl-C, and the end of a job's time, during a training: the work so far is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_to_main_process(*_: Any) -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes, in one that loads data; a ``worker_init_fn``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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

    The same signal a second time stops at once, with ``KeyboardInterrupt``. Processes that are forked meanwhile leave
    SIGINT to this one. Does nothing outside the main thread, where Python handles no signals.

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
        self._at_once = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
        if self.requested == number:
            raise KeyboardInterrupt
        first = self.requested is None
        self.requested = number
        if self._forward:
            # As SIGTERM also where it is SIGINT, which a terminal sends to the children, too: not twice the same.
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)
        if self._at_once:
            raise Interrupted(number)
        if first and self._announce:
            # Not by logging: this may have come in the middle of another message.
            os.write(2, b"\nInterrupted: finishing the iteration and writing a checkpoint (again: stop at once)\n")
