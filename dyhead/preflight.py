"""Checks that both engines make before a run starts, so that it does not fail late."""

from __future__ import annotations

import argparse
import logging
import os
from urllib.parse import urlparse

import torch
from fvcore.common.config import CfgNode

from dyhead.config import ConfigError
from dyhead.evaluation.expected import check_expectations

_log = logging.getLogger(__name__)

# What starts programs several times: variables of the number of processes and of this one's rank. Slurm's are those of
# srun: a script that sbatch runs once has SLURM_NTASKS, too.
_LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check that a configuration and a command line suit this machine.

    Nothing is written. Where there is no CUDA device, ``MODEL.DEVICE`` becomes "cpu" in ``cfg``, with a warning.

    Args:
        cfg: the configuration, not frozen.
        args: ``eval_only``, ``resume``, ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url`` of
            ``train_net.py``. Without CUDA, ``num_gpus`` is the number of processes.

    Raises:
        ConfigError: an invalid device; more devices than there are; a batch that they cannot share equally; a
            launcher that starts more processes than ``args`` says; weights that are needed and missing; expected
            results of what is not evaluated.
    """
    _check_device(cfg)
    _check_processes(cfg, args)
    _check_launcher(args)
    _check_weights(cfg, args)
    check_expectations(cfg)


def _check_device(cfg: CfgNode) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"MODEL.DEVICE: expected cpu, cuda or cuda:NUMBER, got {cfg.MODEL.DEVICE!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        _log.warning("MODEL.DEVICE is %s, but there is no CUDA device; running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"


def _check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    for flag in ("num_gpus", "num_machines"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(args, flag)}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank: expected 0 to {args.num_machines - 1}, got {args.machine_rank}")
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        there = torch.cuda.device_count() if device.index is None else 1
        if args.num_gpus > there:
            raise ConfigError(f"--num-gpus: expected at most {there} with MODEL.DEVICE {device}, got {args.num_gpus}")
    processes = args.num_gpus * args.num_machines
    if processes > 1:
        url = urlparse(args.dist_url)
        if url.scheme != "tcp" or not url.port:
            raise ConfigError(f"--dist-url: expected tcp://HOST:PORT, got {args.dist_url}")
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of the {processes} devices, got {cfg.SOLVER.IMS_PER_BATCH}"
        )


def _check_launcher(args: argparse.Namespace) -> None:
    """Each process that a launcher starts would be a whole run of its own, all into one ``OUTPUT_DIR``."""
    for name, size_key, rank_key in _LAUNCHERS:
        try:
            size, rank = int(os.environ[size_key]), int(os.environ[rank_key])
        except (KeyError, ValueError):
            continue
        if size > 1 and (size, rank) != (args.num_machines, args.machine_rank):
            raise ConfigError(
                f"this is process {rank} of the {size} that {name} started ({size_key}={size}), and train_net.py "
                "starts the processes of a machine itself; run it once, with --num-gpus for the number of devices, or "
                "once on each of several machines, with --num-machines and --machine-rank, too"
            )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    if args.resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    if args.eval_only and args.resume:
        raise ConfigError(f"--eval-only --resume: OUTPUT_DIR {cfg.OUTPUT_DIR} holds no checkpoint")
    if args.eval_only and not weights:
        raise ConfigError("--eval-only: set MODEL.WEIGHTS to a checkpoint, or take OUTPUT_DIR's last one with --resume")
    # Detectron2 takes file names that end in "?matching_heuristics=True".
    if weights and "://" not in weights and not os.path.isfile(urlparse(weights)._replace(query="").geturl()):
        raise ConfigError(f"MODEL.WEIGHTS {weights}: no such file")
