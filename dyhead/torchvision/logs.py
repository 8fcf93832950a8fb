"""What a run says and leaves behind while it trains: lines on the terminal, log.txt, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from logging.handlers import MemoryHandler
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dyhead.evaluation.results import Evaluated
from dyhead.progress import bar, is_quiet

_PERIOD = 20  # iterations between two lines, as in Detectron2
_log = logging.getLogger(__name__)
_handlers: list[logging.Handler] = []

# Fabric's remarks on devices, which the command line chose. On import, because a process that Fabric starts makes them
# before it does anything of this project's.
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
# The successor of this argument is not in all versions of PyTorch that are supported.
warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")


def start_logging() -> None:
    """Send the project's messages to the terminal, and keep them for the log.txt that :func:`log_to_file` opens."""
    _add(_Terminal(logging.WARNING if is_quiet() else logging.INFO))
    _add(MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize))


def log_to_file(output_dir: str) -> None:
    """Append the project's messages, the earlier ones of this run first, to log.txt in a folder, which must exist."""
    file = logging.FileHandler(os.path.join(output_dir, "log.txt"), encoding="utf-8")
    memory = _handlers.pop()
    _add(file)
    memory.setTarget(file)
    logging.getLogger("dyhead").removeHandler(memory)
    memory.close()


def stop_logging() -> None:
    """Close log.txt and give the terminal back."""
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger("dyhead").removeHandler(handler)
        handler.close()


def _add(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))
    _handlers.append(handler)
    logger = logging.getLogger("dyhead")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)


class _Terminal(logging.Handler):
    """Standard output, without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # as in logging's own handlers: a closed terminal does not end a run
            self.handleError(record)


class TrainingLog:
    """Losses, learning rate and results of a training in metrics.json, TensorBoard's files, and lines of the log.

    A line of metrics.json is a JSON dict in Detectron2's form: iteration (from 0), the mean losses since the last
    line, lr, time (seconds an iteration) and eta_seconds; or iteration and the results of an evaluation, bbox/AP and
    so on. It is complete on the disk at once; a resumed run appends. On a terminal a progress bar takes the place of
    the lines, which go to log.txt anyway.

    Args:
        output_dir: where to.
        start: iterations that are done.
        max_iter: number of iterations.
    """

    def __init__(self, output_dir: str, start: int, max_iter: int) -> None:
        terminal = sys.stderr.isatty()
        self.output_dir = output_dir
        self.max_iter = max_iter
        self._level = logging.DEBUG if terminal else logging.INFO
        self._board: SummaryWriter | None = SummaryWriter(output_dir)
        self._bar = bar("training", max_iter, initial=start, leave=True)
        self._window: list[dict[str, float]] = []
        self._clock = time.perf_counter()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def iteration(self, iteration: int, losses: dict[str, float], lr: float) -> None:
        """Note the losses, with their sum as total_loss, of an iteration, and write when a line is due."""
        now = time.perf_counter()
        self._window.append(losses | {"time": now - self._clock})
        self._clock = now
        self._bar.set_postfix_str(f"loss {losses['total_loss']:.3f}, lr {lr:.2g}", refresh=False)
        self._bar.update()
        done = iteration + 1
        if done % _PERIOD and done != self.max_iter:
            return
        means = {key: sum(entry[key] for entry in self._window) / len(self._window) for key in self._window[0]}
        self._window.clear()
        eta = means["time"] * (self.max_iter - done)
        self._write({"iteration": iteration, "eta_seconds": eta, "lr": lr, **means})
        listed = "  ".join(f"{key} {value:.4f}" for key, value in means.items() if "loss" in key)
        _log.log(
            self._level, "iteration %d/%d  %s  lr %.3g  %.3f s/iter  ETA %s",
            done, self.max_iter, listed, lr, means["time"], timedelta(seconds=round(eta)),
        )  # fmt: skip

    def evaluation(self, iteration: int, results: Sequence[Evaluated]) -> None:
        """Write the results of an evaluation after an iteration; its time does not count."""
        self._clock = time.perf_counter()
        for result in results:
            name = result.split.info.name
            prefix = "bbox/" if len(results) == 1 else f"{name}/bbox/"
            known = {f"{prefix}{key}": value for key, value in result.metrics.items() if value == value}  # no NaN
            self._write({"iteration": iteration, **known})
            ap = result.metrics["AP"]
            said = "no AP" if math.isnan(ap) else f"AP {ap:.2f}"
            _log.info("iteration %d/%d  %s on %s", iteration + 1, self.max_iter, said, name)

    def _write(self, entry: dict[str, float]) -> None:
        with open(os.path.join(self.output_dir, "metrics.json"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")
        if self._board is None:
            return
        try:
            for key, value in entry.items():
                if key != "iteration":
                    self._board.add_scalar(key, value, entry["iteration"])
            self._board.flush()
        except Exception as error:  # no reason to lose a run: metrics.json has the same numbers
            _log.warning("TensorBoard's files are not written any more (%s: %s)", type(error).__name__, error)
            self._board = None
