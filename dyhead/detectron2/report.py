"""What a run leaves behind: the table of results, results.json and predictions.png in OUTPUT_DIR."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from dyhead import data
from dyhead.detectron2.datasets import NamingMapper, registered_split
from dyhead.evaluation import (
    Report,
    Timing,
    count_flops,
    count_parameters,
    draw_predictions,
    evaluate_coco,
    format_table,
    measure,
    write_results,
)
from dyhead.evaluation.report import describe_machine

_log = logging.getLogger(__name__)


def report_results(cfg: CfgNode, model: nn.Module, results: dict[str, Any]) -> None:
    """Measure ``model``, log one table, and write results.json and predictions.png.

    Speed, memory and multiply-adds are measured on images of the first test set (``TEST.BENCHMARK``), as the model
    takes them.

    Args:
        cfg: the run's config.
        model: the detector, not wrapped in DistributedDataParallel.
        results: what Detectron2's ``DefaultTrainer.test`` returns.
    """
    names = cfg.DATASETS.TEST
    if len(names) == 1:
        results = {names[0]: results}
    model.eval()
    reports = []
    for name in names:
        detections = _detections(cfg, name)
        timing, gflops, size = _measure(cfg, model, name) if name == names[0] else (None, None, None)
        metrics = results[name]["bbox"] if detections else evaluate_coco(MetadataCatalog.get(name).json_file, [])
        reports.append(
            Report(
                cfg.MODEL.META_ARCHITECTURE,
                name,
                dict(metrics),
                count_parameters(model),
                timing,
                gflops,
                size,
                engine=f"detectron2 {detectron2.__version__}",
                machine=describe_machine(cfg.MODEL.DEVICE),
            )
        )
        if name == names[0] and name in data.names():
            split = registered_split(name) or data.load(data.get(name))
            draw_predictions(split, detections, os.path.join(cfg.OUTPUT_DIR, "predictions.png"))
    if reports:
        write_results(reports, cfg.OUTPUT_DIR)
        _log.info("Results:\n%s", format_table(reports))


def _detections(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """What the evaluator has written, as COCO's result dicts."""
    with open(os.path.join(cfg.OUTPUT_DIR, "inference", name, "coco_instances_results.json")) as file:
        return json.load(file)


def _measure(cfg: CfgNode, model: nn.Module, name: str) -> tuple[Timing | None, float | None, tuple[int, int] | None]:
    """Speed, multiply-adds (billions) and the (height, width) they are for, of the first images of a dataset."""
    benchmark = cfg.TEST.BENCHMARK
    mapper = NamingMapper(cfg, is_train=False)
    inputs = [mapper(record) for record in DatasetCatalog.get(name)[: benchmark.NUM_IMAGES]]
    if not inputs:
        return None, None, None
    size = benchmark.BATCH_SIZE
    batches = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    timing = measure(model, batches, device=torch.device(cfg.MODEL.DEVICE))
    return timing, count_flops(model, inputs[:1]), tuple(inputs[0]["image"].shape[-2:])
