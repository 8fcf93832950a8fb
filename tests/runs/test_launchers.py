"""Processes that another launcher started."""

import argparse

import pytest

from dyhead.config import ConfigError
from dyhead.runs.preflight import check_run
from dyhead.torchvision import get_cfg


def check(monkeypatch, environment, **flags):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    defaults = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "eval_only": False, "resume": False}
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    check_run(cfg, argparse.Namespace(**(defaults | flags), dist_url="tcp://127.0.0.1:29500"))


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        ("torchrun", {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}),
        ("srun", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}),
        ("Open MPI", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}),
        ("MPI", {"PMI_SIZE": "2", "PMI_RANK": "1"}),
    ],
)
def test_their_processes_are_not_runs_of_their_own(monkeypatch, launcher, environment):
    with pytest.raises(ConfigError, match=rf"process 1 of the 2 that {launcher} started.*--num-gpus"):
        check(monkeypatch, environment)
    check(monkeypatch, environment, num_machines=2, machine_rank=1)  # one on each machine, each told its rank
    with pytest.raises(ConfigError, match="--machine-rank"):
        check(monkeypatch, environment, num_machines=2, machine_rank=0)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # in a script of sbatch, which runs once
        {"WORLD_SIZE": "many", "RANK": "0"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_one_process_is_a_run(monkeypatch, environment):
    check(monkeypatch, environment)
