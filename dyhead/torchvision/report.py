"""What a run leaves behind: one table, results.json and drawings."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import nn

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
from dyhead.torchvision.data import EvaluationImages
from dyhead.torchvision.evaluation import Evaluated

_log = logging.getLogger(__name__)


def report_results(cfg: CfgNode, model: nn.Module, results: Sequence[Evaluated]) -> None:
    """Measure the detector, log one table, and write results.json and predictions.png into ``OUTPUT_DIR``.

    Speed, memory and multiply-adds are measured on the first images of the first test set (``TEST.BENCHMARK``), as
    the detector takes them; the predictions that are drawn are for that set, too.

    Args:
        cfg: the configuration.
        model: the detector, on its device; it ends up in evaluation mode.
        results: of :func:`dyhead.torchvision.evaluation.evaluate`, at least one.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    model.eval()
    first = results[0]
    timing, gflops, size = _measure(cfg, model, device, first.split)
    reports = [
        Report(
            cfg.MODEL.META_ARCHITECTURE,
            result.split.info.name,
            result.metrics,
            count_parameters(model),
            timing if result is first else None,
            gflops if result is first else None,
            size if result is first else None,
            engine=f"torchvision {torchvision.__version__}",
            machine=describe_machine(device),
        )
        for result in results
    ]
    write_results(reports, cfg.OUTPUT_DIR)
    draw_predictions(first.split, first.detections, os.path.join(cfg.OUTPUT_DIR, "predictions.png"))
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
    dataset = EvaluationImages(split, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
    images = [dataset[i][0].to(device) for i in range(min(benchmark.NUM_IMAGES, len(dataset)))]
    batches = [images[i : i + benchmark.BATCH_SIZE] for i in range(0, len(images), benchmark.BATCH_SIZE)]
    return measure(model, batches, device=device), count_flops(model, images[:1]), tuple(images[0].shape[-2:])
