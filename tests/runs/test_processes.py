"""Processes of a run: how they end, and that they begin alike."""

import argparse

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from dyhead.config import ConfigError
from dyhead.runs.processes import check_same_start, launched

ONE_MACHINE = argparse.Namespace(num_machines=1, machine_rank=0, dist_url="tcp://127.0.0.1:1")


def test_a_process_that_the_system_killed_is_told():
    def launch(errors):
        torch.multiprocessing.spawn(kill_itself, nprocs=1)

    with pytest.raises(ConfigError, match=r"process 0 of this machine was killed, .*memory.*--resume.*OUTPUT_DIR out"):
        launched(launch, ONE_MACHINE, "out")


def kill_itself(rank):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_what_nobody_expected_stays_as_it_is():
    def launch(errors):
        raise ProcessExitedException("ended", 0, 1, 3)

    with pytest.raises(ProcessExitedException):
        launched(launch, ONE_MACHINE, "out")


def test_machines_that_do_not_share_the_folder_are_refused(monkeypatch):
    check_same_start(5, "out")  # of one process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(into, value):
        into[:] = [value, 5]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    check_same_start(5, "out")
    with pytest.raises(ConfigError, match=r"--resume: expected an OUTPUT_DIR that all machines share.*out .* 0, 5"):
        check_same_start(0, "out")
