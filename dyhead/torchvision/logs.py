"""What a run says and leaves behind while it trains: lines on the terminal, log.txt, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

_PERIOD = 20  # iterations between two lines, as in Detectron2
_log = logging.getLogger(__name__)
_handlers: list[logging.Handler] = []


def start_logging(output_dir: str | None) -> None:
    """Let the project's messages go to the terminal and, given a folder, to its log.txt; lightning's own be silent.

    What was said before the folder was known is written to log.txt first.

    Args:
        output_dir: folder of log.txt, which is appended to; it must be there.
    """
    said = [record for handler in _handlers if isinstance(handler, _Memory) for record in handler.records]
    stop_logging()
    terminal = _Terminal()
    terminal.setLevel(logging.INFO)
    if output_dir is None:
        second = _Memory()
    else:
        second = logging.FileHandler(os.path.join(output_dir, "log.txt"), encoding="utf-8")
    _handlers.extend((terminal, second))
    logger = logging.getLogger("dyhead")
    logger.setLevel(logging.DEBUG)
    for handler in _handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))
        logger.addHandler(handler)
    for record in said:
        second.handle(record)
    silence_lightning()


class _Terminal(logging.Handler):
    """Standard output, without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # as in logging's own handlers: a closed terminal does not end a run
            self.handleError(record)


class _Memory(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def stop_logging() -> None:
    """Close log.txt and give the terminal back."""
    logger = logging.getLogger("dyhead")
    while _handlers:
        handler = _handlers.pop()
        logger.removeHandler(handler)
        handler.close()


def silence_lightning() -> None:
    """Keep lightning's advertisements, and its hints at options that are chosen here on purpose, off the terminal."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*`validation_step` but have no `val_dataloader`.*",
        ".*Trainer already configured with model summary.*",
        ".*GPU available but not used.*",
        ".*has length of 0.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*`broadcast_buffers` is deprecated.*",  # its successor is not in all versions of PyTorch that are supported
    ):
        warnings.filterwarnings("ignore", message=message)


class Metrics(L.Callback):
    """Losses, learning rate and results in metrics.json, in TensorBoard's files and as lines of the log.

    A line of metrics.json is a JSON dict in Detectron2's form: iteration (from 0), the mean losses since the last
    line, lr, time (seconds an iteration) and eta_seconds; or iteration and the results of an evaluation, bbox/AP and
    so on. It is complete on the disk at once; a resumed run appends.

    Args:
        output_dir: where to.
        max_iter: number of iterations.
        quiet: keep the lines off the terminal; they go to log.txt anyway.
    """

    def __init__(self, output_dir: str, max_iter: int, *, quiet: bool) -> None:
        self.output_dir = output_dir
        self.max_iter = max_iter
        self.level = logging.DEBUG if quiet else logging.INFO
        self._window: list[dict[str, float]] = []
        self._clock = 0.0
        self._board: SummaryWriter | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Open TensorBoard's file and start the clock."""
        if trainer.is_global_zero:
            self._board = SummaryWriter(self.output_dir)
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        """Note an iteration, and write when a line is due."""
        now = time.perf_counter()
        self._window.append(module.losses | {"time": now - self._clock})
        self._clock = now
        done = trainer.global_step
        if done % _PERIOD and done != self.max_iter:
            return
        means = {key: sum(entry[key] for entry in self._window) / len(self._window) for key in self._window[0]}
        self._window.clear()
        if not trainer.is_global_zero:
            return
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        eta = means["time"] * (self.max_iter - done)
        self._write({"iteration": done - 1, "eta_seconds": eta, "lr": lr, **means})
        losses = "  ".join(f"{key} {value:.4f}" for key, value in means.items() if "loss" in key)
        _log.log(
            self.level, "iteration %d/%d  %s  lr %.3g  %.3f s/iter  ETA %s",
            done, self.max_iter, losses, lr, means["time"], _duration(eta),
        )  # fmt: skip

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the results of an evaluation during training; its time does not count."""
        self._clock = time.perf_counter()
        if trainer.is_global_zero and trainer.state.fn == "fit":
            results = module.results
            for name, metrics in results.items():
                prefix = "bbox/" if len(results) == 1 else f"{name}/bbox/"
                entry = {f"{prefix}{key}": value for key, value in metrics.items() if value == value}  # no NaN
                self._write({"iteration": trainer.global_step - 1, **entry})
                _log.info("iteration %d/%d  AP %.2f on %s", trainer.global_step, self.max_iter, metrics["AP"], name)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write(self, entry: dict[str, float]) -> None:
        with open(os.path.join(self.output_dir, "metrics.json"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")
        for key, value in entry.items():
            if key != "iteration":
                self._board.add_scalar(key, value, entry["iteration"])
        self._board.flush()


class Progress(L.Callback):
    """Progress bars of training, with loss, learning rate and the time that is left, and of evaluation.

    Args:
        start: iterations that are done.
        max_iter: number of iterations.
        enabled: show them; on a terminal, that is.
    """

    def __init__(self, start: int, max_iter: int, *, enabled: bool) -> None:
        self.start = start
        self.max_iter = max_iter
        self.enabled = enabled
        self._training: tqdm | None = None
        self._evaluation: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Open the bar."""
        self._training = self._bar(trainer, "training", self.max_iter, self.start)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        """Move it on."""
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._training.set_postfix_str(f"loss {module.losses['total_loss']:.3f}, lr {lr:.2g}", refresh=False)
        self._training.update()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Open a second bar."""
        self._evaluation = self._bar(trainer, "evaluation", _total(trainer.num_val_batches), leave=False)

    def on_validation_batch_end(self, *args: Any) -> None:
        """Move it on."""
        self._evaluation.update()

    def on_validation_epoch_end(self, *args: Any) -> None:
        """Close it."""
        self._evaluation.close()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Close what is open, also after an error."""
        for bar in (self._training, self._evaluation):
            if bar is not None:
                bar.close()

    def _bar(self, trainer: L.Trainer, title: str, total: int, initial: int = 0, *, leave: bool = True) -> tqdm:
        disable = not (self.enabled and trainer.is_global_zero)
        return tqdm(desc=title, total=total, initial=initial, disable=disable, leave=leave, dynamic_ncols=True)


def _total(batches: int | Sequence[int]) -> int:
    return sum(batches) if isinstance(batches, (list, tuple)) else batches


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
