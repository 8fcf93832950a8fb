"""Several processes on a machine: how they tell the one that started them why they ended."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, SimpleQueue

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.runs.interruption import Interrupted, Interruption
from dyhead.runs.output_dir import disk_faults_named

_Result = TypeVar("_Result")


def launched(launch: Callable[[SimpleQueue], _Result]) -> _Result:
    """Call ``launch``, which starts this machine's processes and waits for them.

    Args:
        launch: takes the queue that the processes give to :func:`reporting`.

    Returns:
        What ``launch`` returns.

    Raises:
        ConfigError, DataError, Interrupted: the first of a process, as it was.
        KeyboardInterrupt: a second Ctrl-C, or one outside a training.
    """
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with Interruption(forward=True) as interruption:
        try:
            result = launch(errors)
        except (ProcessExitedException, ProcessRaisedException):
            if errors.empty():
                if interruption.requested is not None:
                    raise KeyboardInterrupt from None
                raise
        if not errors.empty():
            raise pickle.loads(errors.get()) from None
    return result


def reporting(errors: SimpleQueue, output_dir: str, run: Callable[[], _Result]) -> _Result | None:
    """Call ``run`` in one of several processes, and put the errors that a user can cause into ``errors``."""
    try:
        with disk_faults_named(output_dir):
            return run()
    except Interrupted as interrupted:
        # All processes end this way, in the same iteration, and none before the checkpoint is written.
        errors.put(pickle.dumps(interrupted))
        return None
    except (ConfigError, DataError) as error:
        errors.put(pickle.dumps(error))
        # Not through Python's end: the other processes may wait for this one for ever.
        os._exit(1)
