"""What evaluations leave in OUTPUT_DIR, under both engines: detections, the table, results.json and drawings."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from dyhead.config import ConfigError, detector_node, get
from dyhead.data import CocoSplit
from dyhead.evaluation.benchmark import count_flops, count_parameters, measure
from dyhead.evaluation.coco import LIMIT, evaluate_coco
from dyhead.evaluation.expected import check_expected_results
from dyhead.evaluation.report import Report, describe_machine, format_table, write_json, write_results
from dyhead.evaluation.visualization import draw_predictions, plot_losses

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """What came out on one dataset.

    Attributes:
        split: the dataset.
        metrics: of the boxes, those of :func:`dyhead.evaluation.evaluate_coco`.
        detections: COCO's result dicts of all images.
        tasks: the metrics of what else is evaluated, by Detectron2's names: "segm", "keypoints", "sem_seg", ...
    """

    split: CocoSplit
    metrics: dict[str, float]
    detections: list[dict[str, Any]]
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate_detections(
    split: CocoSplit,
    detections: list[dict[str, Any]],
    output_dir: str,
    truth: dict[str, Any] | None = None,
    *,
    tasks: Sequence[str] = (),
    sigmas: Sequence[float] = (),
) -> Evaluated:
    """Write the detections of a dataset, see :func:`detections_file`, and compute their AP.

    A file that cannot be written is named in a warning: the AP is not lost with it.

    Args:
        split: the dataset.
        detections: COCO's result dicts of all its images.
        output_dir: ``OUTPUT_DIR``.
        truth: the annotations in COCO's format, where the dataset has no file of them.
        tasks: what is evaluated beside the boxes, "segm" or "keypoints".
        sigmas: see :func:`dyhead.evaluation.evaluate_coco`.
    """
    file = detections_file(output_dir, split.info.name)
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        write_json(detections, file)
    except (OSError, ValueError) as error:
        _log.warning("%s: the detections cannot be written (%s)", file, error)
    truth = split.info if truth is None else truth
    others = {task: evaluate_coco(truth, detections, task, sigmas=sigmas) for task in tasks}
    return Evaluated(split, evaluate_coco(truth, detections), detections, others)


def check_weights(model: nn.Module) -> None:
    """Refuse to evaluate a model that has diverged: what it gives would be reported as an AP of 0.

    Raises:
        ConfigError: a weight is NaN or infinite; names the first.
    """
    state = model.state_dict()
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ConfigError(
            f"the model cannot be evaluated: {len(broken)} of {len(state)} tensors hold NaN or infinity, the first is "
            f"{broken[0]}. After a training: lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True"
        )


def detections_file(output_dir: str, dataset: str) -> str:
    """Where the detections on a dataset are, as COCO's result dicts: inference/<dataset>/coco_instances_results.json.

    What a folder's name cannot hold, such as "/", is escaped as in URLs.
    """
    folder = re.sub(r'[\x00-\x1f\x7f"%*/:<>?\\|]', lambda match: f"%{ord(match[0]):02X}", dataset)
    if folder.strip(". ") == "":  # the folder itself, or the one above it
        folder = "".join(f"%{ord(letter):02X}" for letter in folder)
    encoded = folder.encode(errors="surrogatepass")
    if len(encoded) > 200:  # bytes; file systems allow 255
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        folder = f"{encoded[:180].decode(errors='ignore')}-{digest}"
    return os.path.join(output_dir, "inference", folder, "coco_instances_results.json")


def report_evaluation(
    cfg: CfgNode, model: nn.Module, results: Sequence[Evaluated], engine: str, inputs: Callable[[int], list[Any]]
) -> None:
    """Write results.json and predictions.png into ``OUTPUT_DIR``, measure the detector, and log one table.

    Speed, memory and multiply-adds are measured on the first images of the first test set (``TEST.BENCHMARK``); the
    predictions that are drawn are for that set, too. results.json is there before: what then goes wrong is a warning.

    Args:
        cfg: the configuration.
        model: the detector, on its device; it ends up in evaluation mode.
        results: of each test set, at least one.
        engine: library that ran it, with its version.
        inputs: a number of images to the first ones of the first test set, as the model takes them: tensors
            (3, H, W), or dicts with one as "image".

    Raises:
        ConfigError: results.json cannot be written, or the results are not ``TEST.EXPECTED_RESULTS``.
    """
    model.eval()
    machine = describe_machine(cfg.MODEL.DEVICE)
    reports = [
        Report(
            cfg.MODEL.META_ARCHITECTURE,
            result.split.info.name,
            result.metrics,
            count_parameters(model),
            engine=engine,
            machine=machine,
            tasks=result.tasks,
        )
        for result in results
    ]
    try:
        file = write_results(reports, cfg.OUTPUT_DIR)
    except OSError as error:
        _log.info("Results:\n%s", format_table(reports))
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: results.json cannot be written ({error})") from error
    first = results[0]
    if cfg.TEST.BENCHMARK.NUM_IMAGES:
        _attempt("Measuring the detector", lambda: _measure(cfg, model, reports[0], inputs))
        _attempt(f"Writing what was measured into {file}", lambda: write_results(reports, cfg.OUTPUT_DIR))
    _log.info("Results:\n%s", format_table(reports))
    _warn_of_limits(cfg, results)
    picture = os.path.join(cfg.OUTPUT_DIR, "predictions.png")
    _attempt(f"Drawing {picture}", lambda: draw_predictions(first.split, first.detections, picture))
    check_expected_results(cfg, {report.dataset: {"bbox": report.metrics} | report.tasks for report in reports})


def report_losses(cfg: CfgNode) -> None:
    """Draw losses.png from metrics.json, if there are any losses yet; what goes wrong is a warning."""
    metrics, picture = (os.path.join(cfg.OUTPUT_DIR, name) for name in ("metrics.json", "losses.png"))
    if os.path.isfile(metrics):
        _attempt(f"Drawing {picture}", lambda: plot_losses(metrics, picture))


def _attempt(what: str, action: Callable[[], Any]) -> None:
    """Do what an evaluation's results are not to be lost to."""
    try:
        action()
    except Exception as error:
        _log.warning("%s failed: %s: %s", what, type(error).__name__, error)


def _measure(cfg: CfgNode, model: nn.Module, report: Report, inputs: Callable[[int], list[Any]]) -> None:
    benchmark = cfg.TEST.BENCHMARK
    images = inputs(benchmark.NUM_IMAGES)
    batches = [images[i : i + benchmark.BATCH_SIZE] for i in range(0, len(images), benchmark.BATCH_SIZE)]
    report.timing = measure(model, batches, device=torch.device(cfg.MODEL.DEVICE))
    report.gflops = count_flops(model, images[:1])
    image = images[0]["image"] if isinstance(images[0], dict) else images[0]
    report.input_size = tuple(image.shape[-2:])


def _warn_of_limits(cfg: CfgNode, results: Sequence[Evaluated]) -> None:
    """Say what a metric is worth where one might take it for another."""
    node, kept = detector_node(cfg), cfg.TEST.DETECTIONS_PER_IMAGE
    key = f"{node}.SCORE_THRESH_TEST"
    threshold = f"{key} ({get(cfg, key)}: only higher scores count)" if node else "the least score of a detection"
    crowded = [f"TEST.DETECTIONS_PER_IMAGE is {kept}"] if kept > LIMIT else []
    for result in results:
        split, dataset = result.split, result.split.info.name
        if math.isnan(result.metrics["AP"]):
            _log.warning(
                "Dataset '%s' has no annotated objects, so that there is no AP; the detections are in %s",
                dataset, detections_file(cfg.OUTPUT_DIR, dataset),
            )  # fmt: skip
        elif not result.detections:
            _log.warning(
                "Dataset '%s': there are no detections, so that AP is 0. Look at %s and at "
                "the weights: are they those of MODEL.WEIGHTS that you mean, and trained for long enough?",
                dataset, threshold,
            )  # fmt: skip
        count = {r["image_id"]: sum(not a["iscrowd"] for a in r["annotations"]) for r in split.records}
        fullest = max(count, key=count.get, default=None)
        if count and count[fullest] > LIMIT:
            crowded.append(f"image {fullest} of dataset '{dataset}' has {count[fullest]} objects")
    if crowded:
        _log.warning(
            "AP counts at most the %d best detections of a class in an image, and a detector gives at most "
            "TEST.DETECTIONS_PER_IMAGE of all classes: %s", LIMIT, "; ".join(crowded),
        )  # fmt: skip
