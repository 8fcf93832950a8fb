"""The runs of ``train_net.py`` on torchvision: from the command line to a trained, evaluated, measured detector."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import platform
import random
import sys
from collections.abc import Sequence
from urllib.parse import urlparse

import lightning.pytorch as L
import torch
import torchvision
from fvcore.common.config import CfgNode
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

import dyhead
from dyhead import data
from dyhead.config import ConfigError, check_num_classes, load_config
from dyhead.data import CocoSplit, DataError
from dyhead.preflight import check_run
from dyhead.torchvision.checkpoint import Checkpoints, last_checkpoint, load_weights, read_checkpoint
from dyhead.torchvision.config import check_values, dump, get_cfg, warn_not_honoured
from dyhead.torchvision.data import DetectionLoader, evaluation_loader, load_splits, load_train, train_records
from dyhead.torchvision.detectors import build_model
from dyhead.torchvision.logs import Metrics, Progress, silence_lightning, start_logging, stop_logging
from dyhead.torchvision.report import report_losses, report_results
from dyhead.torchvision.training import Training

_log = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen configuration of a command line: ``args.config_file`` with ``args.opts`` on Detectron2's defaults.

    Nothing is written. One warning names the keys that cannot be honoured. Where there is no CUDA device,
    ``MODEL.DEVICE`` becomes "cpu", with a warning.

    Raises:
        ConfigError: the configuration cannot be read or used; ``OUTPUT_DIR`` holds a run that is not to be continued;
            weights that are asked for are not there; more devices than there are.
    """
    cfg = get_cfg()
    given = load_config(cfg, args.config_file, args.opts)
    check_values(cfg)
    warn_not_honoured(cfg, given)
    check_run(cfg, args)
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
    start_logging(None)
    try:
        cfg = setup(args)
        if args.machine_rank == 0:
            try:
                os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
                start_logging(cfg.OUTPUT_DIR)
            except OSError as error:
                raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: cannot be written to ({error})") from error
            _log_environment(cfg, args)
        data.register_from_config(cfg.DATASETS.REGISTER)
        if args.num_gpus * args.num_machines == 1:
            _run(cfg, args, rank=0)
        else:
            for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
                data.get(name)  # drawn once, if need be, not by each process
            _launch(cfg, args)
    except Exception:
        _log.debug("The run ended with an error", exc_info=True)  # for log.txt; the caller tells the user
        raise
    finally:
        stop_logging()
    if not cfg.DATASETS.TEST or args.machine_rank > 0:
        return {}
    with open(os.path.join(cfg.OUTPUT_DIR, "results.json"), encoding="utf-8") as file:
        return {report["dataset"]: report["metrics"] for report in json.load(file)["results"]}


def _launch(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Run this machine's processes and raise the first error of the kinds a user can cause, as it was."""
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    try:
        torch.multiprocessing.spawn(_process, (cfg, args, errors), nprocs=args.num_gpus)
    except torch.multiprocessing.ProcessExitedException:
        if errors.empty():
            raise
        raise pickle.loads(errors.get()) from None


def _process(
    local_rank: int, cfg: CfgNode, args: argparse.Namespace, errors: torch.multiprocessing.SimpleQueue
) -> None:
    url = urlparse(args.dist_url)
    os.environ.update(
        MASTER_ADDR=url.hostname,
        MASTER_PORT=str(url.port),
        NODE_RANK=str(args.machine_rank),
        LOCAL_RANK=str(local_rank),
    )
    if cfg.MODEL.DEVICE == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // args.num_gpus))
    rank = args.machine_rank * args.num_gpus + local_rank
    if rank == 0:
        start_logging(cfg.OUTPUT_DIR)
    else:
        silence_lightning()
    data.register_from_config(cfg.DATASETS.REGISTER)
    try:
        _run(cfg, args, rank)
    except (ConfigError, DataError) as error:
        errors.put(pickle.dumps(error))
        # Not through Python's end: the other processes may wait for this one for ever.
        os._exit(1)


def _run(cfg: CfgNode, args: argparse.Namespace, rank: int) -> None:
    """The process of this rank, of all processes on all machines."""
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    (_evaluate if args.eval_only else _train)(cfg, args, rank)


def _train(cfg: CfgNode, args: argparse.Namespace, rank: int) -> None:
    train, test = load_train(cfg), load_splits(cfg.DATASETS.TEST)
    for split in (*train, *test):
        check_num_classes(cfg, split.info.name, split.class_names)
    records = train_records(train, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)

    checkpoint = last_checkpoint(cfg.OUTPUT_DIR) if args.resume else None
    seed, start = _seed_and_start(cfg, checkpoint)
    torch.manual_seed(seed)
    model = build_model(cfg)
    if checkpoint is not None:
        load_weights(model, checkpoint, strict=True)  # lightning's own error would be of no use
        _log.info("Resuming %s after %d iterations", checkpoint, start)
    else:
        if args.resume:
            _log.warning("--resume: %s holds no checkpoint yet; starting from MODEL.WEIGHTS", cfg.OUTPUT_DIR)
        if cfg.MODEL.WEIGHTS:
            load_weights(model, cfg.MODEL.WEIGHTS, strict=False)
    if rank == 0:
        with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w", encoding="utf-8") as file:
            file.write(dump(cfg))
        _log.info(
            "Training on %d pictures, seed %d: %s",
            len(records), seed, ", ".join(f"{s.info.name} ({len(s.class_names)} classes)" for s in train),
        )  # fmt: skip

    training = Training(cfg, model, records, test, seed, start)
    terminal = sys.stderr.isatty()
    trainer = _trainer(
        cfg,
        args,
        [
            Metrics(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, quiet=terminal),
            Checkpoints(cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER),
            Progress(start, cfg.SOLVER.MAX_ITER, enabled=terminal),
        ],
    )
    loaders = _test_loaders(cfg, args, test, rank)
    periodic = loaders if cfg.TEST.EVAL_PERIOD > 0 and loaders else None
    trainer.fit(training, val_dataloaders=periodic, ckpt_path=checkpoint)
    if rank == 0:
        report_losses(cfg)
    if loaders:
        if training.evaluated_at != cfg.SOLVER.MAX_ITER:
            trainer.validate(training, loaders, verbose=False)
        if rank == 0:
            report_results(cfg, training)


def _evaluate(cfg: CfgNode, args: argparse.Namespace, rank: int) -> None:
    test = load_splits(cfg.DATASETS.TEST)
    if not test:
        raise ConfigError("DATASETS.TEST: expected at least one data set to evaluate on, got none")
    for split in test:
        check_num_classes(cfg, split.info.name, split.class_names)
    model = build_model(cfg)
    load_weights(model, (last_checkpoint(cfg.OUTPUT_DIR) if args.resume else None) or cfg.MODEL.WEIGHTS, strict=True)
    training = Training(cfg, model, [], test, seed=0)
    trainer = _trainer(cfg, args, [Progress(0, 0, enabled=sys.stderr.isatty())])
    trainer.validate(training, _test_loaders(cfg, args, test, rank), verbose=False)
    if rank == 0:
        report_results(cfg, training)


def _trainer(cfg: CfgNode, args: argparse.Namespace, callbacks: list[L.Callback]) -> L.Trainer:
    device = torch.device(cfg.MODEL.DEVICE)
    cuda = device.type == "cuda"
    several = args.num_gpus * args.num_machines > 1
    return L.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=[device.index] if cuda and device.index is not None else args.num_gpus,
        num_nodes=args.num_machines,
        strategy=DDPStrategy(
            process_group_backend="nccl" if cuda else "gloo",
            # Statistics are of each device's own batch, and evaluation has no common pace to copy them in.
            broadcast_buffers=False,
        )
        if several
        else "auto",
        plugins=[LightningEnvironment()],
        precision=("16-mixed" if cuda else "bf16-mixed") if cfg.SOLVER.AMP.ENABLED else "32-true",
        max_steps=cfg.SOLVER.MAX_ITER,
        max_epochs=-1,
        val_check_interval=cfg.TEST.EVAL_PERIOD or None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=cfg.CUDNN_BENCHMARK,
        default_root_dir=cfg.OUTPUT_DIR,
    )


def _test_loaders(
    cfg: CfgNode, args: argparse.Namespace, splits: Sequence[CocoSplit], rank: int
) -> list[DetectionLoader]:
    world_size = args.num_gpus * args.num_machines
    return [evaluation_loader(cfg, split, rank=rank, world_size=world_size) for split in splits]


def _seed_and_start(cfg: CfgNode, checkpoint: str | None) -> tuple[int, int]:
    """The seed of the run and the iterations that it has done."""
    seed = cfg.SEED if cfg.SEED >= 0 else random.SystemRandom().randrange(2**31)
    if checkpoint is None:
        return seed, 0
    content = read_checkpoint(checkpoint)
    ours = content.get("dyhead")
    if ours is None or "global_step" not in content:
        raise ConfigError(f"--resume: {checkpoint} is no checkpoint of a training on torchvision; set MODEL.WEIGHTS")
    if ours["optimizer"] != cfg.SOLVER.OPTIMIZER:
        raise ConfigError(
            f"SOLVER.OPTIMIZER: expected {ours['optimizer']!r}, with which {checkpoint} was trained, got "
            f"{cfg.SOLVER.OPTIMIZER!r}"
        )
    return (seed if cfg.SEED >= 0 else ours["seed"]), content["global_step"]


def _log_environment(cfg: CfgNode, args: argparse.Namespace) -> None:
    device = torch.device(cfg.MODEL.DEVICE)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    _log.info(
        "dyhead %s, torchvision %s, lightning %s, torch %s, Python %s",
        dyhead.__version__, torchvision.__version__, L.__version__, torch.__version__, platform.python_version(),
    )  # fmt: skip
    _log.info("%s (%s), %d threads; writing to %s", device, name, torch.get_num_threads(), cfg.OUTPUT_DIR)
    _log.debug("Command line: %s", args)
    _log.debug("Configuration:\n%s", dump(cfg))
