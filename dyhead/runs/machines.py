"""Several machines: when one is lost, the others end within a minute and say which it was.

Otherwise they would wait for its share of the gradients: until the connection is found closed, which names nobody, or,
where a machine hangs or the network is cut, for half an hour.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import platform
import threading
import time
from contextlib import suppress
from datetime import timedelta
from urllib.parse import urlparse

from torch import distributed

from dyhead.config import ConfigError

_log = logging.getLogger(__name__)

_BEAT = 1.0  # seconds between signs of life
_SILENCE = 40.0  # seconds without one after which a machine is lost
_SILENCE_AFTER_ERROR = 10.0  # the same where something has gone wrong already
_START = 1800.0  # seconds that the machine of rank 0 may be late, as long as Detectron2 waits
_DONE, _FAILED = b"done", b"failed"
_LOST = "dyhead/lost"
# How PyTorch is told that its processes find their store, which they meet at, where it is already.
_STORE_IS_THERE = "TORCHELASTIC_USE_AGENT_STORE"


class MachineLostError(ConfigError):
    """A machine ended, or does not answer any more, before the run was over.

    Args:
        rank: of the machine, as ``--machine-rank`` says.
        name: its host name, if it has said it.
        output_dir: of the run.
    """

    def __init__(self, rank: int, name: str, output_dir: str) -> None:
        super().__init__(rank, name, output_dir)
        self.rank, self.name, self.output_dir = rank, name, output_dir

    def __str__(self) -> str:
        return (
            f"the machine of rank {self.rank}{f' ({self.name})' if self.name else ''} has ended or does not answer; "
            f"its own output may say why. The same commands with --resume go on from the last checkpoint in OUTPUT_DIR "
            f"{self.output_dir}"
        )


class Watch:
    """Signs of life of the machines of a run to each other, while it is entered; of one machine, nothing.

    It belongs into the process that starts those of the devices: it has no other work, and outlives them. They meet at
    its store (PyTorch's ``TCPStore``), which the machine of rank 0 has at ``--dist-url``. When a machine is lost, the
    processes that this one has started are killed, since nothing else may end them.

    Args:
        args: ``num_machines``, ``machine_rank`` and ``dist_url`` of ``train_net.py``.
        output_dir: of the run.

    Raises:
        ConfigError: on entering: the address is not one of this machine, of rank 0, or is in use.
    """

    def __init__(self, args: argparse.Namespace, output_dir: str) -> None:
        url = urlparse(args.dist_url)
        self._host, self._port = url.hostname, url.port
        self._rank, self._machines = args.machine_rank, args.num_machines
        self._output_dir, self._silence = output_dir, _SILENCE
        self._last: dict[int, tuple[bytes, float]] = {}  # signs of the others that are alive, and when they came
        self._names: dict[int, str] = {}
        self._answered: float | None = None  # when the store did so last
        self._status, self._ended = b"", threading.Event()
        self._lost: MachineLostError | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
        if self._machines == 1:
            return self
        self._store = self._serve() if self._rank == 0 else None
        self._environment = {key: os.environ.get(key) for key in (_STORE_IS_THERE, "MASTER_ADDR", "MASTER_PORT")}
        os.environ.update({_STORE_IS_THERE: "True", "MASTER_ADDR": self._host, "MASTER_PORT": str(self._port)})
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        threading.Thread(target=self._judge, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._machines == 1:
            return
        for key, value in self._environment.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        self._status = _DONE if kind is None else _FAILED
        self._ended.set()
        # The store goes with the machine of rank 0, which therefore waits for what the others have still to say.
        self._beating.join(_SILENCE if self._rank == 0 and kind is None else 5 * _BEAT)
        self._store = None

    def raise_if_lost(self) -> None:
        """Raise :class:`MachineLostError` if one is lost, also if that is about to show; for after an error."""
        if self._machines == 1:
            return
        self._silence = _SILENCE_AFTER_ERROR
        deadline = time.monotonic() + self._silence + 5 * _BEAT
        while self._lost is None and self._last and time.monotonic() < deadline:
            time.sleep(_BEAT / 10)
        if self._lost is not None:
            raise self._lost

    def _serve(self) -> distributed.TCPStore:
        try:
            patience = timedelta(seconds=_SILENCE)
            return distributed.TCPStore(self._host, self._port, None, True, patience, wait_for_workers=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"--dist-url {self._host}:{self._port}: expected a free port of the machine of rank 0 ({reason})"
            ) from error

    def _beat(self) -> None:
        """Give signs of life, and look for those of the others, until the run ends; in a thread of its own."""
        store = self._store
        try:
            if store is None:
                patience = timedelta(seconds=_START)
                store = distributed.TCPStore(self._host, self._port, None, False, patience, wait_for_workers=False)
            store.set(self._key("name", self._rank), platform.node())
            count = 0
            while not self._ended.is_set():
                count += 1
                store.set(self._key("sign", self._rank), str(count))
                self._look(store)
                self._ended.wait(_BEAT)
            self._look(store)
            store.set(self._key("sign", self._rank), self._status)
            while self._rank == 0 and self._status == _DONE and self._last:
                self._look(store)
                time.sleep(_BEAT / 10)
            if self._rank == 0 and self._status == _FAILED:
                time.sleep(3 * _BEAT)  # for the others to see why
        except RuntimeError:  # the store is gone
            if self._answered is not None and not self._ended.is_set():
                self._lose(0)

    def _look(self, store: distributed.TCPStore) -> None:
        if self._lost is not None:  # the others need not find out by themselves
            store.set(_LOST, str(self._lost.rank))
        elif store.check([_LOST]) and int(store.get(_LOST)) != self._rank:
            self._lose(int(store.get(_LOST)))
        for rank in range(self._machines):
            if rank == self._rank or not store.check([self._key("sign", rank)]):
                continue
            sign = store.get(self._key("sign", rank))
            self._names.setdefault(rank, store.get(self._key("name", rank)).decode())
            if sign == _DONE:
                self._last.pop(rank, None)
            elif sign == _FAILED:
                self._lose(rank)
            elif self._last.get(rank, (b"",))[0] != sign:
                self._last[rank] = sign, time.monotonic()
        self._answered = time.monotonic()

    def _judge(self) -> None:
        """Look for silence, in a thread that waits for no answer; while it was itself stopped there was none."""
        before = time.monotonic()
        while self._lost is None and not self._ended.wait(_BEAT):
            now = time.monotonic()
            if now - before > 5 * _BEAT:
                self._answered = self._answered and now
                for rank, (sign, _) in list(self._last.items()):
                    self._last[rank] = sign, now
            before = now
            if self._answered is not None and now - self._answered > self._silence:
                self._lose(0)
            for rank, (_, since) in list(self._last.items()):
                if now - since > self._silence:
                    self._lose(rank)

    def _lose(self, rank: int) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = MachineLostError(rank, self._names.get(rank, ""), self._output_dir)
        for child in multiprocessing.active_children():
            with suppress(OSError):
                child.kill()

    @staticmethod
    def _key(what: str, rank: int) -> str:
        return f"dyhead/{what}/{rank}"
