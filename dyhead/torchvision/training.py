"""The training loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn

from dyhead.data import CocoSplit
from dyhead.evaluation.results import Evaluated
from dyhead.runs.averaging import TRAINED, weight_average
from dyhead.runs.batches import parts
from dyhead.runs.divergence import check_finite
from dyhead.runs.interruption import Interrupted, Interruption
from dyhead.runs.precise_bn import update_statistics, wants_statistics
from dyhead.runs.processes import check_same_start
from dyhead.runs.schedule import learning_rate_factor
from dyhead.runs.seeds import seed_sampling
from dyhead.torchvision.checkpoint import load_state, load_states, portable_state, save_checkpoint
from dyhead.torchvision.data import DetectionLoader, train_loader
from dyhead.torchvision.evaluation import evaluate
from dyhead.torchvision.logs import TrainingLog


class Autocast(MixedPrecision):
    """Fabric's mixed precision, but what goes into the model, such as boxes in pixels, is not rounded."""

    def convert_input(self, data: Any) -> Any:
        """Nothing."""
        return data


def train(
    fabric: Fabric,
    cfg: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    records: Sequence[dict[str, Any]],
    splits: Sequence[CocoSplit],
    seed: int,
    checkpoint: dict[str, Any] | None = None,
    *,
    keypoints: Sequence[str] = (),
) -> list[Evaluated] | None:
    """Train a detector up to iteration ``SOLVER.MAX_ITER``, with checkpoints, logs and evaluations on the way.

    All random numbers in an iteration depend on the seed, the iteration and the device only, so that a run that is
    resumed goes on as the uninterrupted run would.

    Args:
        fabric: the devices and their precision, launched.
        cfg: the configuration.
        model: the detector, see :func:`dyhead.torchvision.build_model`; it ends up on its device, with ``SOLVER.EMA``
            with the averages for weights.
        optimizer: of :func:`dyhead.runs.optimizer.build_optimizer`.
        records: images to train on, see :func:`dyhead.data.train_records`.
        splits: datasets to evaluate on every ``TEST.EVAL_PERIOD`` iterations.
        seed: not negative, the same in all processes.
        checkpoint: of :func:`dyhead.torchvision.checkpoint.read_resumable`, to go on from; its weights are in the model
            already, and its optimizer's state is made for ``optimizer``.
        keypoints: names of the datasets' keypoints.

    Returns:
        The evaluation after the last iteration, if one was due, see :func:`evaluate`.

    Raises:
        DivergedError: a loss is infinite or NaN, on any device.
        ConfigError: the state of the loss scaling is none, a checkpoint cannot be written, or the processes have
            different ones to go on from.
        DataError: an image is broken.
        Interrupted: a signal came; a checkpoint is written.
    """
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    lr_factor = learning_rate_factor(cfg)
    on_devices, optimizer = fabric.setup(model, optimizer)
    precision = fabric.strategy.precision
    start = 0
    if checkpoint is not None:
        start = checkpoint["iteration"] + 1
        load_states(checkpoint, optimizer, precision)
    check_same_start(start, cfg.OUTPUT_DIR)
    average = weight_average(cfg, model)
    precise = wants_statistics(cfg, model)
    if checkpoint is not None and TRAINED in checkpoint:
        load_state(model, checkpoint[TRAINED], checkpoint["path"])

    def save(name: str, iteration: int) -> None:
        weights = {"model": portable_state(model)}
        if average is not None:
            weights = {"model": portable_state(model, average.state), TRAINED: weights["model"]}
        content = {
            **weights,
            "optimizer": optimizer.state_dict(),
            "grad_scaler": precision.state_dict(),
            "iteration": iteration,
            "dyhead": {"seed": seed},
        }
        save_checkpoint(cfg.OUTPUT_DIR, name, content)

    def batches_from(start: int) -> DetectionLoader:
        shares = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        return train_loader(cfg, records, seed, start, keypoints=keypoints, **shares)

    max_iter, count = cfg.SOLVER.MAX_ITER, cfg.SOLVER.ACCUMULATE
    results = None
    model.train()
    with (
        TrainingLog(cfg.OUTPUT_DIR, start, max_iter) if fabric.is_global_zero else nullcontext() as log,
        Interruption(announce=fabric.is_global_zero) as interruption,
    ):
        # After the handler of signals, which its workers inherit.
        for iteration, batch in zip(range(start, max_iter), batches_from(start), strict=False):
            seed_sampling(seed, iteration, fabric.global_rank)
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * lr_factor(iteration)

            losses: dict[str, Tensor] = {}
            for i, (images, targets) in enumerate(zip(*(parts(each, count) for each in batch), strict=True)):
                # The devices' gradients are put together once, when they have all parts.
                with fabric.no_backward_sync(on_devices, enabled=i + 1 < count):
                    found = on_devices(*fabric.to_device((images, targets)))
                    found = {name: loss / count for name, loss in found.items()}
                    fabric.backward(sum(found.values()))
                losses = {name: loss.detach() + losses.get(name, 0) for name, loss in found.items()}
            losses["total_loss"] = sum(losses.values())
            stop = losses["total_loss"].new_tensor(interruption.requested is not None)
            values = torch.stack([*losses.values(), stop]).float()
            *means, stop = fabric.all_reduce(values, reduce_op="mean").tolist()
            means = dict(zip(losses, means, strict=True))
            check_finite(iteration, means)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(iteration)

            is_due = cfg.TEST.EVAL_PERIOD > 0 and (iteration + 1) % cfg.TEST.EVAL_PERIOD == 0
            if precise and (is_due or iteration + 1 == max_iter):
                following = batches_from(iteration + 1)
                update_statistics(cfg, model, following, lambda batch: model(*fabric.to_device(batch)))

            if log is not None:
                log.iteration(iteration, means, optimizer.param_groups[0]["lr"])
                for name in _due_checkpoints(cfg, iteration):
                    save(name, iteration)
            results = None
            try:
                # Several processes stop after the same iteration, the next one if need be.
                interruption.raise_if(stop > 0 or (fabric.world_size == 1 and interruption.requested is not None))
                if splits and is_due:
                    with interruption.at_once(), average.applied() if average else nullcontext():
                        results = evaluate(fabric, cfg, model, splits)
                    if log is not None:
                        log.evaluation(iteration, results)
            except Interrupted as interrupted:
                if log is not None:
                    save(_periodic(iteration), iteration)
                raise interrupted.after(iteration, cfg.OUTPUT_DIR) from None
    if average is not None:
        average.apply()
    return results


def _due_checkpoints(cfg: CfgNode, iteration: int) -> list[str]:
    """Names of the checkpoints to write after an iteration: Detectron2's."""
    done = iteration + 1
    periodic = [_periodic(iteration)] if done % cfg.SOLVER.CHECKPOINT_PERIOD == 0 else []
    return periodic + (["model_final.pth"] if done == cfg.SOLVER.MAX_ITER else [])


def _periodic(iteration: int) -> str:
    return f"model_{iteration:07d}.pth"
