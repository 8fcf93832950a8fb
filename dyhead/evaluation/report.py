"""The results of an evaluation: one table for people, one JSON file for programs."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dyhead.evaluation.benchmark import Timing
from dyhead.evaluation.coco import METRICS
from dyhead.files import replacing


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What speed depends on: the device's name, the number of PyTorch's threads, versions and system."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


@dataclass
class Report:
    """Results on one dataset.

    Attributes:
        model: name of what was evaluated (the meta-architecture, or the config file).
        dataset: its name.
        metrics: result of `evaluate_coco` for boxes.
        parameters: number of parameters.
        timing: result of `measure`, or None.
        gflops: result of `count_flops` for one image of `input_size`, or None.
        input_size: (height, width) in pixels of the image that `gflops` is for.
        engine: library that trained or ran it, with its version.
        machine: result of `describe_machine`.
        tasks: metrics in percent of what is evaluated beside boxes, by Detectron2's names: "segm", "keypoints", ...
    """

    model: str
    dataset: str
    metrics: dict[str, float]
    parameters: int
    timing: Timing | None = None
    gflops: float | None = None
    input_size: tuple[int, int] | None = None
    engine: str = ""
    machine: dict[str, Any] = field(default_factory=describe_machine)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def format_table(reports: Sequence[Report]) -> str:
    """One aligned plain-text table, one row per report, followed by how the columns were measured.

    Other tasks have a row of their own, `<dataset>/<task>`, and those without an AP a line below the table.
    """
    header = ["model", "dataset", *METRICS, "ms", "ms p95", "images/s", "MiB", "params (M)", "GFLOPs"]
    rows = [header]
    for r in reports:
        t = r.timing
        speed = (t.latency_ms, t.latency_p95_ms, t.images_per_second, t.memory_mib) if t else (None,) * 4
        numbers = [r.metrics.get(key) for key in METRICS] + list(speed)
        cells = [_number(n, 1) for n in numbers] + [_number(r.parameters / 1e6, 2), _number(r.gflops, 2)]
        rows.append([r.model, r.dataset, *cells])
        for task, metrics in r.tasks.items():
            if "AP" in metrics:
                average = [_number(metrics.get(key), 1) for key in METRICS]
                rows.append([r.model, f"{r.dataset}/{task}", *average, *["-"] * (len(header) - 2 - len(METRICS))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    for r in reports:
        for task, metrics in r.tasks.items():
            if "AP" not in metrics:  # classes have "-" in their names
                main = {key: value for key, value in metrics.items() if "-" not in key}
                numbers = ", ".join(f"{key} {_number(value, 1)}" for key, value in main.items())
                lines.append(f"{r.dataset}/{task}: {numbers}")
    return "\n".join(lines + list(dict.fromkeys(_note(r) for r in reports)))


def write_results(reports: Sequence[Report], output_dir: str | os.PathLike) -> str:
    """Writes `{"results": [a dict per report]}` to results.json in `output_dir`, NaN as null, and returns its path."""
    path = os.path.join(output_dir, "results.json")
    write_json({"results": [_jsonable(asdict(r)) for r in reports]}, path, indent=2)
    return path


def write_json(value: Any, path: str | os.PathLike, indent: int | None = None) -> None:
    """Writes a JSON file, as a whole or not at all.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is NaN or infinite.
    """
    with replacing(path, "w") as file:
        file.write(json.dumps(value, indent=indent, allow_nan=False) + "\n")  # faster than json.dump


def _note(r: Report) -> str:
    machine = [r.engine, f"torch {r.machine['torch']}", r.machine["device"], f"{r.machine['threads']} threads"]
    lines = ["; ".join(part for part in machine if part)]
    if r.timing:
        lines.append(f"ms and images/s: {r.timing.calls} calls of batch {r.timing.batch_size}")
        lines.append(f"MiB: {r.timing.memory_kind}")
    if r.input_size:
        lines.append(f"GFLOPs: multiply-adds for one image of {r.input_size[0]} x {r.input_size[1]} (height x width)")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    """The processor's name, with the numbers of its generation: virtual machines give many the same name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line]
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, value in lines}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= facts.keys():
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name
