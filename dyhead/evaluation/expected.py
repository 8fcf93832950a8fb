"""``TEST.EXPECTED_RESULTS``: what a run must reach, [[task, metric, value, tolerance], ...] as in Detectron2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fvcore.common.config import CfgNode

from dyhead.config import ConfigError, meta_architectures
from dyhead.evaluation.coco import TASKS

#: Ends the name of a task that is evaluated with test-time augmentation, ``TEST.AUG``, too.
WITH_TTA = "_TTA"

_KEY = "TEST.EXPECTED_RESULTS"
_OTHER_TASKS = ("sem_seg", "panoptic_seg")  # of Detectron2's own detectors; their metrics are their evaluators'


def check_expectations(cfg: CfgNode, classes: Mapping[str, Sequence[str]] | None = None) -> None:
    """Check before a run that its expected results are of its test sets and have the names of metrics.

    The task is "bbox", or what else the run evaluates: "segm", "keypoints", "sem_seg", "bbox_TTA". Where there are
    several test sets, it follows the name of one, "name/bbox", and the name alone means its boxes.

    Args:
        cfg: the configuration.
        classes: names of the classes of each test set, where they are known.

    Raises:
        ConfigError: another task, or a metric that is none.
    """
    for dataset, task, metric, _, _ in _expectations(cfg):
        metrics = TASKS.get(task.removesuffix(WITH_TTA))
        if metrics is None or metric in metrics:
            continue
        if not metric.startswith("AP-"):
            raise ConfigError(f"{_KEY}: expected the metric {', '.join(metrics)} or AP-<class>, got {metric!r}")
        if classes is not None and metric.removeprefix("AP-") not in classes[dataset]:
            some = ", ".join(classes[dataset][:8]) + (", ..." if len(classes[dataset]) > 8 else "")
            raise ConfigError(
                f"{_KEY}: expected AP-<class> with a class of dataset {dataset!r} ({some}), got {metric!r}"
            )


def configured_tasks(cfg: CfgNode) -> list[str]:
    """What the configured detector finds beside boxes: "segm", "keypoints"."""
    return [task for task, key in (("segm", "MASK_ON"), ("keypoints", "KEYPOINT_ON")) if cfg.MODEL[key]]


def check_expected_results(cfg: CfgNode, metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Check the metrics of an evaluation, by dataset and task; every one that is not as expected is named.

    Raises:
        ConfigError: a result differs from what is expected by more than the tolerance, or is not defined.
    """
    faults = []
    for dataset, task, metric, value, tolerance in _expectations(cfg):
        found = metrics[dataset].get(task, {}).get(metric, math.nan)
        if not abs(found - value) <= tolerance:
            got = f"got {found:.4f}" if math.isfinite(found) else "but it has no such result"
            of = "" if task == "bbox" else f" of {task}"
            faults.append(f"expected {metric}{of} of {value:g} +- {tolerance:g} on dataset '{dataset}', {got}")
    if faults:
        raise ConfigError(f"{_KEY}: {'; '.join(faults)}")


def _expectations(cfg: CfgNode) -> Iterator[tuple[str, str, str, float, float]]:
    """The dataset, task, metric, value and tolerance of each."""
    names = cfg.DATASETS.TEST
    known = ["bbox", *configured_tasks(cfg)]
    known += [f"{task}{WITH_TTA}" for task in known if cfg.TEST.AUG.ENABLED]
    known += _OTHER_TASKS if cfg.MODEL.META_ARCHITECTURE not in meta_architectures() else ()
    tasks = {f"{name}/{task}": (name, task) for name in names for task in known}
    tasks |= {name: (name, "bbox") for name in names}
    if len(names) == 1:
        tasks |= {task: (names[0], task) for task in known}
    for task, metric, value, tolerance in cfg.TEST.EXPECTED_RESULTS:
        if task not in tasks:
            expected = " or ".join(map(repr, known))
            if len(names) > 1:
                expected = f"one of the test sets, {', '.join(map(repr, names))}"
            raise ConfigError(
                f"{_KEY}: expected as the task {expected if names else 'none without a test set'}, got {task!r}"
            )
        yield *tasks[task], metric, value, tolerance
