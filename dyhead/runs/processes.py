"""Several processes on a machine: how they tell the one that started them why they ended."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, SimpleQueue

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.runs.interruption import Interrupted, Interruption
from dyhead.runs.machines import Watch
from dyhead.runs.output_dir import disk_faults_named

_Result = TypeVar("_Result")


def launched(launch: Callable[[SimpleQueue], _Result], args: argparse.Namespace, output_dir: str) -> _Result:
    """Call ``launch``, which starts this machine's processes and waits for them.

    Args:
        launch: takes the queue that the processes give to :func:`reporting`.
        args: ``num_machines``, ``machine_rank`` and ``dist_url`` of ``train_net.py``.
        output_dir: of the run.

    Returns:
        What ``launch`` returns.

    Raises:
        ConfigError, DataError, Interrupted: the first of a process, as it was.
        MachineLostError: another machine was lost.
        ConfigError: a process was killed from outside.
        KeyboardInterrupt: a second Ctrl-C, or one outside a training.
    """
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with Interruption(forward=True) as interruption, Watch(args, output_dir) as watch:
        try:
            result = launch(errors)
        except (ProcessExitedException, ProcessRaisedException) as error:
            if errors.empty():
                if interruption.requested is not None:
                    raise KeyboardInterrupt from None
                watch.raise_if_lost()
                if getattr(error, "signal_name", None) == "SIGKILL":
                    raise ConfigError(
                        f"process {error.error_index} of this machine was killed, as the system does when memory runs "
                        f"out; --resume goes on from the last checkpoint in OUTPUT_DIR {output_dir}"
                    ) from error
                raise
            raised = pickle.loads(errors.get())
            if not isinstance(raised, Interrupted):
                raise raised from None
        else:
            raised = None if errors.empty() else pickle.loads(errors.get())
    if raised is not None:
        raise raised
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


def check_same_start(start: int, output_dir: str) -> None:
    """Raise :class:`ConfigError`, in all processes, unless all of them begin at the iteration ``start``."""
    if not torch.distributed.is_initialized():
        return
    starts: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(starts, start)
    if len(set(starts)) > 1:
        raise ConfigError(
            f"--resume: expected an OUTPUT_DIR that all machines share, but the processes find checkpoints in "
            f"{output_dir} from which they would go on at iterations {', '.join(map(str, starts))}"
        )
