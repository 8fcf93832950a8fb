"""The runs of ``train_net.py`` on torchvision: from the command line to a trained, evaluated, measured detector."""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import random
from typing import Any
from urllib.parse import urlparse

import lightning
import torch
import torchvision
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DDPStrategy

import dyhead
from dyhead import data
from dyhead.config import ConfigError, check_num_classes, load_config
from dyhead.evaluation.expected import check_expectations
from dyhead.evaluation.results import Evaluated, report_losses
from dyhead.runs.optimizer import build_optimizer, resumed_state
from dyhead.runs.output_dir import claimed, write_config
from dyhead.runs.precision import autocast_dtype
from dyhead.runs.preflight import check_run
from dyhead.runs.processes import launched, reporting
from dyhead.runs.record import Record, write_record
from dyhead.torchvision.checkpoint import last_checkpoint, load_weights, read_resumable
from dyhead.torchvision.config import check_values, get_cfg, ignore_not_honoured
from dyhead.torchvision.data import load_splits, load_train
from dyhead.torchvision.detectors import build_model
from dyhead.torchvision.evaluation import evaluate, evaluate_augmented
from dyhead.torchvision.logs import log_to_file, start_logging, stop_logging
from dyhead.torchvision.report import report_results
from dyhead.torchvision.training import Autocast, train

_log = logging.getLogger(__name__)

# What Fabric calls mixed precision.
_MIXED = {torch.float16: "16-mixed", torch.bfloat16: "bf16-mixed"}

Metrics = dict[str, dict[str, float | None]]


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen configuration of a command line: ``args.config_file`` with ``args.opts`` on Detectron2's defaults.

    Nothing is written. One warning names the keys that cannot be honoured. Where there is no CUDA device,
    ``MODEL.DEVICE`` becomes "cpu", with a warning.

    Raises:
        ConfigError: the configuration cannot be read or used; weights that are asked for are not there; more devices
            than there are.
    """
    cfg = get_cfg()
    given = load_config(cfg, args.config_file, args.opts)
    check_values(cfg)
    check_run(cfg, args)
    ignore_not_honoured(cfg, given)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> Metrics:
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
    start_logging()
    try:
        cfg = setup(args)
        with claimed(cfg, args):
            if args.machine_rank == 0:
                log_to_file(cfg.OUTPUT_DIR)
                _log_environment(cfg, args)
            data.register_from_config(cfg.DATASETS.REGISTER)
            fabric = _fabric(cfg, args)
            if fabric.world_size == 1:
                return fabric.launch(_run, cfg, args)
            for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
                data.get(name)  # drawn once, if need be, not by each process
            return _launch(fabric, cfg, args)
    except Exception:
        _log.debug("The run ended with an error", exc_info=True)  # for log.txt; the caller tells the user
        raise
    finally:
        stop_logging()


def _fabric(cfg: CfgNode, args: argparse.Namespace) -> Fabric:
    device = torch.device(cfg.MODEL.DEVICE)
    cuda, dtype = device.type == "cuda", autocast_dtype(cfg)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    strategy = "auto"
    if args.num_gpus * args.num_machines > 1:
        strategy = DDPStrategy(
            start_method="spawn",
            process_group_backend="nccl" if cuda else "gloo",
            # Statistics are of each device's own batch, and evaluation has no common pace to copy them in.
            broadcast_buffers=False,
        )
    return Fabric(
        accelerator="gpu" if cuda else "cpu",
        devices=[device.index] if device.index is not None else args.num_gpus,
        num_nodes=args.num_machines,
        strategy=strategy,
        plugins=[
            LightningEnvironment(),  # whatever cluster this machine may be part of: the command line says what runs
            *([Autocast(_MIXED[dtype], device.type)] if dtype else []),
        ],
    )


def _launch(fabric: Fabric, cfg: CfgNode, args: argparse.Namespace) -> Metrics:
    """Run this machine's processes."""
    url = urlparse(args.dist_url)
    os.environ.update(MASTER_ADDR=url.hostname, MASTER_PORT=str(url.port), NODE_RANK=str(args.machine_rank))
    threads = max(1, torch.get_num_threads() // args.num_gpus)
    return launched(lambda errors: fabric.launch(_process, cfg, args, threads, errors), args, cfg.OUTPUT_DIR)


def _process(
    fabric: Fabric,
    cfg: CfgNode,
    args: argparse.Namespace,
    threads: int,
    errors: torch.multiprocessing.SimpleQueue,
) -> Metrics | None:
    """One of several processes."""
    torch.set_num_threads(threads)
    if fabric.is_global_zero:
        start_logging()
        log_to_file(cfg.OUTPUT_DIR)
    else:
        logging.getLogger("dyhead").addHandler(logging.NullHandler())  # what all find is told once
    data.register_from_config(cfg.DATASETS.REGISTER)
    return reporting(errors, cfg.OUTPUT_DIR, lambda: _run(fabric, cfg, args))


def _run(fabric: Fabric, cfg: CfgNode, args: argparse.Namespace) -> Metrics:
    """The process of one device, of all devices on all machines."""
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    model, results = (_evaluate if args.eval_only else _train)(fabric, cfg, args)
    if not results:
        return {}
    report_results(cfg, model, results)
    return {
        result.split.info.name: {key: None if math.isnan(value) else value for key, value in result.metrics.items()}
        for result in results
    }


def _train(fabric: Fabric, cfg: CfgNode, args: argparse.Namespace) -> tuple[torch.nn.Module, list[Evaluated]]:
    training_splits, test = load_train(cfg), load_splits(cfg, cfg.DATASETS.TEST)
    for split in (*training_splits, *test):
        check_num_classes(cfg, split.info.name, split.class_names)
    check_expectations(cfg, {split.info.name: split.class_names for split in test})
    records = data.train_records(
        training_splits,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
    )

    checkpoint = last_checkpoint(cfg.OUTPUT_DIR) if args.resume else None
    resumed = read_resumable(cfg, checkpoint) if checkpoint else None
    seed = fabric.broadcast(_seed(cfg, resumed))  # machines may have drawn different ones
    torch.manual_seed(seed)
    model = build_model(cfg)
    if checkpoint:
        load_weights(model, checkpoint, strict=True)
        _log.info("Resuming %s after %d iterations", checkpoint, resumed["iteration"] + 1)
    else:
        if args.resume:
            _log.warning("--resume: %s holds no checkpoint yet; starting from MODEL.WEIGHTS", cfg.OUTPUT_DIR)
        if cfg.MODEL.WEIGHTS:
            load_weights(model, cfg.MODEL.WEIGHTS, strict=False)
    optimizer = build_optimizer(cfg, model)
    if resumed:
        resumed["optimizer"] = resumed_state(optimizer, resumed["optimizer"], checkpoint)
    if fabric.is_global_zero:
        write_config(cfg)
        first = training_splits[0]
        write_record(
            cfg.OUTPUT_DIR,
            Record("torchvision", data.Classes(first.class_names, first.category_ids, first.keypoint_names)),
        )
        names = ", ".join(f"{split.info.name} ({len(split.class_names)} classes)" for split in training_splits)
        _log.info("Training on %d images, seed %d: %s", len(records), seed, names)

    keypoints = training_splits[0].keypoint_names
    results = train(fabric, cfg, model, optimizer, records, test, seed, resumed, keypoints=keypoints)
    if fabric.is_global_zero:
        report_losses(cfg)
    if results is None and test:
        results = evaluate(fabric, cfg, model, test)
    evaluate_augmented(fabric, cfg, model, test, results or [])
    return model, results or []


def _evaluate(fabric: Fabric, cfg: CfgNode, args: argparse.Namespace) -> tuple[torch.nn.Module, list[Evaluated]]:
    test = load_splits(cfg, cfg.DATASETS.TEST)
    if not test:
        raise ConfigError("DATASETS.TEST: expected at least one dataset to evaluate on, got none")
    for split in test:
        check_num_classes(cfg, split.info.name, split.class_names)
    check_expectations(cfg, {split.info.name: split.class_names for split in test})
    model = build_model(cfg)
    load_weights(model, (last_checkpoint(cfg.OUTPUT_DIR) if args.resume else None) or cfg.MODEL.WEIGHTS, strict=True)
    results = evaluate(fabric, cfg, model.to(fabric.device), test)
    evaluate_augmented(fabric, cfg, model, test, results)
    return model, results


def _seed(cfg: CfgNode, resumed: dict[str, Any] | None) -> int:
    if cfg.SEED >= 0:
        return cfg.SEED
    return resumed["dyhead"]["seed"] if resumed else random.SystemRandom().randrange(2**31)


def _log_environment(cfg: CfgNode, args: argparse.Namespace) -> None:
    device = torch.device(cfg.MODEL.DEVICE)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    _log.info(
        "dyhead %s, torchvision %s, lightning %s, torch %s, Python %s",
        dyhead.__version__, torchvision.__version__, lightning.__version__, torch.__version__,
        platform.python_version(),
    )  # fmt: skip
    _log.info("%s (%s), %d threads; writing to %s", device, name, torch.get_num_threads(), cfg.OUTPUT_DIR)
    _log.debug("Command line: %s", args)
    _log.debug("Configuration:\n%s", cfg.dump())
