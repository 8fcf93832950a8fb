"""The results of an evaluation: one table for people, one JSON file for programs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dyhead.evaluation.benchmark import Timing


def describe_machine(device: Any = "cpu") -> dict[str, Any]:
    """CPU or GPU name, torch version, number of threads."""
    raise NotImplementedError


@dataclass
class Report:
    """Results on one data set.

    Attributes:
        model: what was evaluated, in a word or two (the meta-architecture, or the config file's name).
        dataset: the data set's name.
        metrics: `evaluate_coco`'s.
        parameters: number of parameters.
        timing: `measure`'s, or None.
        gflops: `count_flops`'s, for one picture of `input_size`, or None.
        input_size: (height, width) in pixels of the picture that `gflops` is for.
        engine: library that trained or ran it, with its version.
        machine: `describe_machine`'s.
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


def format_table(reports: Sequence[Report]) -> str:
    """One aligned plain-text table, a row per report, and below it what the columns were measured on."""
    raise NotImplementedError


def write_results(reports: Sequence[Report], output_dir: str | os.PathLike) -> str:
    """Writes results.json into `output_dir` (NaN becomes null) and returns its path."""
    raise NotImplementedError
