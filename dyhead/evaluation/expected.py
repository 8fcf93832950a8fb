"""``TEST.EXPECTED_RESULTS``: what a run must reach, [[task, metric, value, tolerance], ...] as in Detectron2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fvcore.common.config import CfgNode

from dyhead.config import ConfigError
from dyhead.evaluation.coco import METRICS

_KEY = "TEST.EXPECTED_RESULTS"


def check_expectations(cfg: CfgNode, classes: Mapping[str, Sequence[str]] | None = None) -> None:
    """Check before a run that its expected results are of its test sets and have the names of metrics.

    The task is "bbox" or, where there are several test sets, the name of one, also as "name/bbox".

    Args:
        cfg: the configuration.
        classes: names of the classes of each test set, where they are known.

    Raises:
        ConfigError: another task, or a metric that is none.
    """
    for dataset, metric, _, _ in _expectations(cfg):
        if metric in METRICS:
            continue
        if not metric.startswith("AP-"):
            raise ConfigError(f"{_KEY}: expected the metric {', '.join(METRICS)} or AP-<class>, got {metric!r}")
        if classes is not None and metric.removeprefix("AP-") not in classes[dataset]:
            some = ", ".join(classes[dataset][:8]) + (", ..." if len(classes[dataset]) > 8 else "")
            raise ConfigError(
                f"{_KEY}: expected AP-<class> with a class of dataset {dataset!r} ({some}), got {metric!r}"
            )


def check_expected_results(cfg: CfgNode, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Check the metrics of an evaluation, by dataset; every one that is not as expected is named.

    Raises:
        ConfigError: a result differs from what is expected by more than the tolerance, or is not defined.
    """
    faults = []
    for dataset, metric, value, tolerance in _expectations(cfg):
        found = metrics[dataset].get(metric, math.nan)
        if not abs(found - value) <= tolerance:
            got = f"got {found:.4f}" if math.isfinite(found) else "but it has no such result"
            faults.append(f"expected {metric} of {value:g} +- {tolerance:g} on dataset '{dataset}', {got}")
    if faults:
        raise ConfigError(f"{_KEY}: {'; '.join(faults)}")


def _expectations(cfg: CfgNode) -> Iterator[tuple[str, str, float, float]]:
    """The dataset, metric, value and tolerance of each."""
    names = cfg.DATASETS.TEST
    tasks = {f"{name}/bbox": name for name in names} | {name: name for name in names}
    if len(names) == 1:
        tasks["bbox"] = names[0]
    for task, metric, value, tolerance in cfg.TEST.EXPECTED_RESULTS:
        if task not in tasks:
            expected = "'bbox'" if len(names) == 1 else f"one of the test sets, {', '.join(map(repr, names))}"
            raise ConfigError(
                f"{_KEY}: expected as the task {expected if names else 'none without a test set'}, got {task!r}"
            )
        yield tasks[task], metric, value, tolerance
