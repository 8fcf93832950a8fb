"""The runs of ``train_net.py`` on Detectron2: from the command line to a trained, evaluated, measured detector."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.config_files import Scalar, find_file, resolve
from dyhead.detectron2.checkpoint import Checkpointer
from dyhead.detectron2.config import check_annotations, check_values, ignore_not_honoured
from dyhead.detectron2.datasets import (
    check_classes,
    check_trainable,
    known_classes,
    name_keypoints,
    register_datasets,
)
from dyhead.detectron2.evaluation import check_panoptic, warn_of_panoptic
from dyhead.detectron2.report import report_results
from dyhead.detectron2.trainer import Trainer
from dyhead.evaluation.expected import check_expectations
from dyhead.evaluation.results import report_losses
from dyhead.progress import is_quiet
from dyhead.runs.output_dir import claimed, write_config
from dyhead.runs.preflight import check_run
from dyhead.runs.processes import launched, reporting
from dyhead.runs.record import Record, write_record

_log = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line: ``args.config_file`` with ``args.opts`` on Detectron2's defaults.

    A warning names keys that the detector does not read. Where there is no CUDA device, ``MODEL.DEVICE`` becomes "cpu",
    with a warning.

    Raises:
        ConfigError: the config cannot be read or used, see also :func:`dyhead.runs.preflight.check_run`.
    """
    cfg = add_dyhead_config(get_cfg())
    given = load_config(cfg, args.config_file, args.opts)
    check_values(cfg, args.num_gpus * args.num_machines)
    check_run(cfg, args)
    ignore_not_honoured(cfg, given)
    if "${" in cfg.OUTPUT_DIR:
        raise ConfigError(f"OUTPUT_DIR: Detectron2 expects a folder without ${{ in its name, got {cfg.OUTPUT_DIR!r}")
    if resolve(Scalar(cfg.OUTPUT_DIR), text=False, is_list=False) != cfg.OUTPUT_DIR:
        # Detectron2 writes it as YAML and reads it back, where 1e3 would be a number.
        cfg.OUTPUT_DIR = os.path.join(os.curdir, cfg.OUTPUT_DIR)
    _check_links(cfg, args)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train and evaluate, or with ``args.eval_only`` evaluate, as the command line says.

    Args:
        args: ``config_file``, ``opts`` (KEY VALUE ...), ``eval_only``, ``resume``, ``num_gpus``, ``num_machines``,
            ``machine_rank`` and ``dist_url`` of ``train_net.py``. Without CUDA, ``num_gpus`` is a number of processes.

    Returns:
        For each dataset of ``DATASETS.TEST`` its metrics (AP, AP50, ..., in percent; None where there are none); on
        machines other than that of rank 0 nothing.

    Raises:
        ConfigError, DataError: see :mod:`dyhead.config` and :mod:`dyhead.data`.
        Interrupted: a signal came during the training; a checkpoint is written.
    """
    cfg = setup(args)
    with claimed(cfg, args):
        _register(cfg, args)
        if args.num_gpus * args.num_machines == 1:
            _run(cfg, args)
        else:
            launched(lambda errors: _launch(cfg, args, errors), args, cfg.OUTPUT_DIR)
        if not cfg.DATASETS.TEST or args.machine_rank > 0:
            return {}
        with open(os.path.join(cfg.OUTPUT_DIR, "results.json"), encoding="utf-8") as file:
            return {report["dataset"]: report["metrics"] for report in json.load(file)["results"]}


def _launch(cfg: CfgNode, args: argparse.Namespace, errors: torch.multiprocessing.SimpleQueue) -> None:
    launch(
        _process,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args, errors),
    )


def _process(cfg: CfgNode, args: argparse.Namespace, errors: torch.multiprocessing.SimpleQueue) -> None:
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // args.num_gpus))
    reporting(errors, cfg.OUTPUT_DIR, lambda: _run(cfg, args))


def _run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process of a run."""
    _register(cfg, args)
    _setup_process(cfg, args)
    if comm.is_main_process():
        warn_of_panoptic(cfg)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        checkpointer.load(checkpointer.get_checkpoint_file() if args.resume else cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model)
        Trainer.test_augmented(cfg, model, results)
    else:
        trainer = Trainer(cfg)
        if args.resume and not trainer.checkpointer.has_checkpoint():
            _log.warning("--resume: %s holds no checkpoint yet; starting from MODEL.WEIGHTS", cfg.OUTPUT_DIR)
        trainer.resume_or_load(args.resume)
        if comm.is_main_process():
            write_config(cfg)
            write_record(cfg.OUTPUT_DIR, Record("detectron2", known_classes(cfg.DATASETS.TRAIN[0])))
        results = trainer.train()
        model = trainer.checkpointer.model
        trainer.test_augmented(cfg, model, results)
    if comm.is_main_process():
        if not args.eval_only:
            report_losses(cfg)
        report_results(cfg, model, results)


def _register(cfg: CfgNode, args: argparse.Namespace) -> None:
    names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ConfigError(f"DATASETS.{needed}: expected at least one dataset, got none")
    register_datasets(names, cfg.DATASETS.REGISTER, clip_boxes=cfg.DATASETS.CLIP_BOXES)
    check_classes(cfg, names)
    check_expectations(cfg, {name: MetadataCatalog.get(name).thing_classes for name in cfg.DATASETS.TEST})
    if cfg.MODEL.KEYPOINT_ON:
        name_keypoints(names)
    check_panoptic(cfg)
    check_annotations(cfg, () if args.eval_only else cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    if not args.eval_only:
        check_trainable(cfg)


def _setup_process(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Logs and the seed. A config.yaml that is there stays as it is: Detectron2 would replace it before it is known
    whether the run can go on, and in an evaluation."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    before = None
    if os.path.exists(path):
        with open(path, "rb") as file:
            before = file.read()
    if is_quiet():  # before default_setup, which says much, and does not set up again what is there
        for named in ({"name": "fvcore"}, {}):
            _hush(setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), **named))
    # It reads the config file again, to log it.
    default_setup(cfg, argparse.Namespace(**vars(args) | {"config_file": find_file(args.config_file)}))
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dyhead", abbrev_name="dyhead")
    if is_quiet():
        _hush(logger)
    if before is not None and comm.is_main_process():
        with open(path, "wb") as file:
            file.write(before)


def _hush(logger: logging.Logger) -> None:
    """Leave the terminal to warnings and errors; log.txt has everything."""
    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setLevel(logging.WARNING)


def _check_links(cfg: CfgNode, args: argparse.Namespace) -> None:
    if cfg.MODEL.DEVICE == "cpu" and args.num_gpus * args.num_machines > 1 and torch.cuda.is_available():
        raise ConfigError(
            "MODEL.DEVICE cpu with several processes: Detectron2 connects them through the GPUs where there are any; "
            "hide these with CUDA_VISIBLE_DEVICES=''"
        )
