"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn

from dyhead.config import ConfigError
from dyhead.data import CocoSplit
from dyhead.schedule import learning_rate_factor
from dyhead.torchvision.checkpoint import portable_state, save_checkpoint
from dyhead.torchvision.data import train_loader
from dyhead.torchvision.evaluation import Evaluated, evaluate
from dyhead.torchvision.logs import TrainingLog
from dyhead.torchvision.solver import build_optimizer, clip_gradients

_SAMPLING = 2  # random numbers of the model, apart from those of the data


class DivergedError(ConfigError, FloatingPointError):
    """A loss became infinite or NaN. The message names the iteration and the losses."""


class Autocast(MixedPrecision):
    """Fabric's mixed precision, but what goes into the model, such as boxes in pixels, is not rounded."""

    def convert_input(self, data: Any) -> Any:
        """Nothing."""
        return data


def train(
    fabric: Fabric,
    cfg: CfgNode,
    model: nn.Module,
    records: Sequence[dict[str, Any]],
    splits: Sequence[CocoSplit],
    seed: int,
    checkpoint: dict[str, Any] | None = None,
) -> list[Evaluated] | None:
    """Train a detector up to iteration ``SOLVER.MAX_ITER``, with checkpoints, logs and evaluations on the way.

    All random numbers in an iteration depend on the seed, the iteration and the device only, so that a run that is
    resumed goes on as the uninterrupted run would.

    Args:
        fabric: the devices and their precision, launched.
        cfg: the configuration.
        model: the detector, see :func:`dyhead.torchvision.build_model`; it ends up on its device.
        records: images to train on, see :func:`dyhead.torchvision.data.train_records`.
        splits: datasets to evaluate on every ``TEST.EVAL_PERIOD`` iterations.
        seed: not negative, the same in all processes.
        checkpoint: what :func:`dyhead.torchvision.checkpoint.save_checkpoint` wrote, to go on from; its weights are in
            the model already.

    Returns:
        The evaluation after the last iteration, if one was due, see :func:`evaluate`.

    Raises:
        DivergedError: a loss is infinite or NaN, on any device.
        DataError: an image is broken.
    """
    optimizer = build_optimizer(cfg, model)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    lr_factor = learning_rate_factor(cfg)
    on_devices, optimizer = fabric.setup(model, optimizer)
    precision = fabric.strategy.precision
    start = 0
    if checkpoint is not None:
        start = checkpoint["iteration"] + 1
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["grad_scaler"]:
            precision.load_state_dict(checkpoint["grad_scaler"])

    max_iter = cfg.SOLVER.MAX_ITER
    batches = train_loader(cfg, records, seed, start, rank=fabric.global_rank, world_size=fabric.world_size)
    results = None
    model.train()
    with TrainingLog(cfg.OUTPUT_DIR, start, max_iter) if fabric.is_global_zero else nullcontext() as log:
        for iteration, batch in zip(range(start, max_iter), batches, strict=False):
            torch.manual_seed(_sampling_seed(seed, iteration, fabric.global_rank))
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * lr_factor(iteration)

            losses = on_devices(*fabric.to_device(batch))
            losses["total_loss"] = sum(losses.values())
            values = fabric.all_reduce(torch.stack(list(losses.values())).detach().float(), reduce_op="mean")
            means = dict(zip(losses, values.tolist(), strict=True))
            _check_finite(iteration, means)
            fabric.backward(losses["total_loss"])
            if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
                precision.unscale_gradients(optimizer.optimizer)
                clip_gradients(cfg, [p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
            optimizer.zero_grad()

            if log is not None:
                log.iteration(iteration, means, optimizer.param_groups[0]["lr"])
                for name in _due_checkpoints(cfg, iteration):
                    content = {
                        "model": portable_state(model),
                        "optimizer": optimizer.state_dict(),
                        "grad_scaler": precision.state_dict(),
                        "iteration": iteration,
                        "dyhead": {"seed": seed, "optimizer": cfg.SOLVER.OPTIMIZER, "max_iter": max_iter},
                    }
                    save_checkpoint(cfg.OUTPUT_DIR, name, content)
            results = None
            if splits and cfg.TEST.EVAL_PERIOD > 0 and (iteration + 1) % cfg.TEST.EVAL_PERIOD == 0:
                results = evaluate(fabric, cfg, model, splits)
                if log is not None:
                    log.evaluation(iteration, results)
    return results


def _sampling_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence([_SAMPLING, *numbers]).generate_state(1, np.uint64)[0] >> 1)


def _check_finite(iteration: int, losses: dict[str, float]) -> None:
    if not all(map(math.isfinite, losses.values())):
        listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise DivergedError(
            f"iteration {iteration}: the loss is infinite or NaN ({listed}). "
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True; "
            "--resume goes on from the last checkpoint"
        )


def _due_checkpoints(cfg: CfgNode, iteration: int) -> list[str]:
    """Names of the checkpoints to write after an iteration: Detectron2's."""
    done = iteration + 1
    periodic = [f"model_{iteration:07d}.pth"] if done % cfg.SOLVER.CHECKPOINT_PERIOD == 0 else []
    return periodic + (["model_final.pth"] if done == cfg.SOLVER.MAX_ITER else [])
