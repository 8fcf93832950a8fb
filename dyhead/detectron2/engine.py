"""The runs of ``train_net.py`` on Detectron2: from the command line to a trained, evaluated, measured detector."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dyhead.config import ConfigError, add_dyhead_config, load_config, num_classes
from dyhead.data import DataError
from dyhead.detectron2.checkpoint import Checkpointer
from dyhead.detectron2.datasets import check_classes, register_datasets
from dyhead.detectron2.report import report_results
from dyhead.detectron2.trainer import Trainer
from dyhead.evaluation import plot_losses

_log = logging.getLogger(__name__)

# Keys of Detectron2's that are not read although one might think so, by meta-architecture.
_NOT_HONOURED = {
    "DyHeadFCOS": {"VIS_PERIOD", "TEST.AUG.ENABLED"},
    "DyHeadRetinaNet": {"MODEL.RETINANET.NUM_CONVS", "MODEL.RETINANET.NORM", "TEST.AUG.ENABLED"},
    "DyHeadRCNN": {"TEST.AUG.ENABLED"},
}


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line: ``args.config_file`` with ``args.opts`` on Detectron2's defaults.

    A warning names keys that the detector does not read. Where there is no CUDA device, ``MODEL.DEVICE`` becomes "cpu",
    with a warning.

    Raises:
        ConfigError: the config cannot be read or used.
    """
    cfg = add_dyhead_config(get_cfg())
    given = load_config(cfg, args.config_file, args.opts)
    num_classes(cfg)  # the meta-architecture is one of ours
    ignored = sorted(given & _NOT_HONOURED[cfg.MODEL.META_ARCHITECTURE])
    if ignored:
        _log.warning("%s does not honour %s", cfg.MODEL.META_ARCHITECTURE, ", ".join(ignored))
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE: expected cpu, cuda or cuda:NUMBER, got {cfg.MODEL.DEVICE!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        _log.warning("MODEL.DEVICE is %s, but there is no CUDA device; running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train and evaluate, or with ``args.eval_only`` evaluate, as the command line says.

    Args:
        args: ``config_file``, ``opts`` (KEY VALUE ...), ``eval_only``, ``resume``, ``num_gpus``, ``num_machines``,
            ``machine_rank`` and ``dist_url`` of ``train_net.py``. Without CUDA, ``num_gpus`` is a number of processes.

    Returns:
        For each data set of ``DATASETS.TEST`` its metrics (AP, AP50, ..., in percent; None where there are none); on
        machines other than that of rank 0 nothing.

    Raises:
        ConfigError, DataError: see :mod:`dyhead.config` and :mod:`dyhead.data`.
    """
    cfg = setup(args)
    _check_processes(cfg, args)
    _check_output_dir(cfg, args)
    _check_weights(cfg, args)
    _register(cfg, args)
    if args.num_gpus * args.num_machines == 1:
        _run(cfg, args)
    else:
        _launch(cfg, args)
    if not cfg.DATASETS.TEST or args.machine_rank > 0:
        return {}
    with open(os.path.join(cfg.OUTPUT_DIR, "results.json"), encoding="utf-8") as file:
        return {report["dataset"]: report["metrics"] for report in json.load(file)["results"]}


def _launch(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Run this machine's processes and raise the first error of the kinds a user can cause, as it was."""
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    try:
        launch(
            _process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args, errors),
        )
    except torch.multiprocessing.ProcessExitedException:
        if errors.empty():
            raise
        raise pickle.loads(errors.get()) from None


def _process(cfg: CfgNode, args: argparse.Namespace, errors: torch.multiprocessing.SimpleQueue) -> None:
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // args.num_gpus))
    try:
        _run(cfg, args)
    except (ConfigError, DataError) as error:
        errors.put(pickle.dumps(error))
        # Not through Python's end: the other processes may wait for this one for ever.
        os._exit(1)


def _run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process of a run."""
    _register(cfg, args)
    _setup_process(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        checkpointer.load(checkpointer.get_checkpoint_file() if args.resume else cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        if args.resume and not trainer.checkpointer.has_checkpoint():
            _log.warning("--resume: %s holds no checkpoint yet; starting from MODEL.WEIGHTS", cfg.OUTPUT_DIR)
        trainer.resume_or_load(args.resume)
        results = trainer.train()
        model = trainer.checkpointer.model
    if comm.is_main_process():
        report_results(cfg, model, results)
        if not args.eval_only:
            plot_losses(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), os.path.join(cfg.OUTPUT_DIR, "losses.png"))


def _register(cfg: CfgNode, args: argparse.Namespace) -> None:
    names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ConfigError(f"DATASETS.{needed}: expected at least one data set, got none")
    register_datasets(names, cfg.DATASETS.REGISTER)
    check_classes(cfg, names)


def _setup_process(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Logs, the seed, and config.yaml, which an evaluation leaves as the training wrote it."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    trained_with = None
    if args.eval_only and os.path.exists(path):
        with open(path, "rb") as file:
            trained_with = file.read()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dyhead", abbrev_name="dyhead")
    if trained_with is not None and comm.is_main_process():
        with open(path, "wb") as file:
            file.write(trained_with)


def _check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    processes = args.num_gpus * args.num_machines
    device = torch.device(cfg.MODEL.DEVICE).type
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError(
            f"--num-gpus and --num-machines: expected at least 1, got {args.num_gpus} and {args.num_machines}"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(f"--machine-rank: expected 0 to {args.num_machines - 1}, got {args.machine_rank}")
    if device == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus: expected at most {torch.cuda.device_count()}, the GPUs here, got {args.num_gpus}"
        )
    if device == "cpu" and processes > 1 and torch.cuda.is_available():
        raise ConfigError(
            "MODEL.DEVICE cpu with several processes: Detectron2 connects them through the GPUs where there are any; "
            "hide these with CUDA_VISIBLE_DEVICES=''"
        )
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of the {processes} processes, got {cfg.SOLVER.IMS_PER_BATCH}"
        )


def _check_output_dir(cfg: CfgNode, args: argparse.Namespace) -> None:
    if args.resume or args.eval_only:
        return
    for name in ("last_checkpoint", "metrics.json"):
        if os.path.exists(os.path.join(cfg.OUTPUT_DIR, name)):
            raise ConfigError(
                f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run already ({name}): continue it with --resume, or set another "
                "OUTPUT_DIR"
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
    local = urlparse(weights)._replace(query="").geturl()
    if weights and "://" not in weights and not os.path.isfile(local):
        raise ConfigError(f"MODEL.WEIGHTS {weights}: no such file")
