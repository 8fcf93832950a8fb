"""What a run leaves behind: one table, results.json and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from fvcore.common.config import CfgNode
from torch import nn

from dyhead.evaluation.results import Evaluated, report_evaluation
from dyhead.torchvision.data import EvaluationImages


def report_results(cfg: CfgNode, model: nn.Module, results: Sequence[Evaluated]) -> None:
    """See :func:`dyhead.evaluation.results.report_evaluation`.

    Args:
        cfg: the configuration.
        model: the detector, on its device; it ends up in evaluation mode.
        results: of :func:`dyhead.torchvision.evaluation.evaluate`, at least one.
    """

    def inputs(count: int) -> list[Any]:
        dataset = EvaluationImages(results[0].split, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT)
        return [dataset[i][0].to(cfg.MODEL.DEVICE) for i in range(min(count, len(dataset)))]

    report_evaluation(cfg, model, results, f"torchvision {torchvision.__version__}", inputs)
