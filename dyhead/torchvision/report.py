"""What a run leaves behind: one table, results.json and pictures."""

from __future__ import annotations

import logging
import os

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dyhead.data import CocoSplit
from dyhead.evaluation import (
    Report,
    Timing,
    count_flops,
    count_parameters,
    draw_predictions,
    format_table,
    measure,
    plot_losses,
    write_results,
)
from dyhead.evaluation.report import describe_machine
from dyhead.torchvision.data import EvaluationPictures
from dyhead.torchvision.training import Training

_log = logging.getLogger(__name__)


def report_results(cfg: CfgNode, training: Training) -> None:
    """Measure the detector, log one table, and write results.json and predictions.png into ``OUTPUT_DIR``.

    Speed, memory and multiply-adds are measured on the first pictures of the first test set (``TEST.BENCHMARK``), as
    the detector takes them; the predictions that are drawn are for that set, too.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    model = training.model.to(device).eval()
    first = training.splits[0]
    timing, gflops, size = _measure(cfg, model, device, first)
    reports = [
        Report(
            cfg.MODEL.META_ARCHITECTURE,
            split.info.name,
            training.results[split.info.name],
            count_parameters(model),
            timing if split is first else None,
            gflops if split is first else None,
            size if split is first else None,
            engine=f"torchvision {torchvision.__version__}",
            machine=describe_machine(device),
        )
        for split in training.splits
    ]
    write_results(reports, cfg.OUTPUT_DIR)
    draw_predictions(first, training.detections[first.info.name], os.path.join(cfg.OUTPUT_DIR, "predictions.png"))
    _log.info("Results:\n%s", format_table(reports))


def report_losses(cfg: CfgNode) -> None:
    """Draw losses.png from metrics.json, if there are any losses yet."""
    metrics = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
    if os.path.isfile(metrics):
        plot_losses(metrics, os.path.join(cfg.OUTPUT_DIR, "losses.png"))


def _measure(
    cfg: CfgNode, model: nn.Module, device: torch.device, split: CocoSplit
) -> tuple[Timing, float, tuple[int, int]]:
    """Speed, multiply-adds in billions and the (height, width) in pixels that these are for."""
    benchmark = cfg.TEST.BENCHMARK
    pictures = EvaluationPictures(split, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    images: list[Tensor] = []
    for index in range(min(benchmark.NUM_IMAGES, len(pictures))):
        image, _ = pictures.read(index)
        images.append(image.to(device))
    batches = [images[i : i + benchmark.BATCH_SIZE] for i in range(0, len(images), benchmark.BATCH_SIZE)]
    return measure(model, batches, device=device), count_flops(model, images[:1]), tuple(images[0].shape[-2:])
