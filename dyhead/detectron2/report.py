"""What a run leaves behind: one table, results.json and drawings."""

from __future__ import annotations

from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from dyhead.detectron2.datasets import NamingMapper
from dyhead.evaluation.results import report_evaluation


def report_results(cfg: CfgNode, model: nn.Module, results: dict[str, Any]) -> None:
    """See :func:`dyhead.evaluation.results.report_evaluation`.

    Args:
        cfg: the run's config.
        model: the detector, not wrapped in DistributedDataParallel; it ends up in evaluation mode.
        results: what :meth:`dyhead.detectron2.Trainer.test` returns.
    """
    names = cfg.DATASETS.TEST
    if not names:
        return
    evaluated = [(results if len(names) == 1 else results[name]).evaluated for name in names]

    def inputs(count: int) -> list[Any]:
        mapper = NamingMapper(cfg, is_train=False)
        return [mapper(record) for record in DatasetCatalog.get(names[0])[:count]]

    report_evaluation(cfg, model, evaluated, f"detectron2 {detectron2.__version__}", inputs)
