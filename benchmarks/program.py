"""Shared by the benchmark programs: options, the loop over cases, JSON and tables."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Build, in_fresh_process, peak_memory, sample_times, summary, wait_for_rest
from dyhead import info
from dyhead.evaluation import describe_machine

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "torchvision", "openvino", "onnxruntime")


@dataclass(frozen=True)
class Benchmark:
    """A question and the peers that are compared.

    Attributes:
        name: name of the program and of its result files.
        question: the question, as a sentence.
        build: see `benchmarks.measure.Build`.
        peers: description of every peer, by name.
        columns: the table's columns; each shows the fastest of its peers.
        ratios: the table's last columns: (numerator, denominator), both columns.
        warm: the case that runs before the memory of a peer's case is measured: a small one, or the case itself.
        same: peers whose results must be equal in a case.
    """

    name: str
    question: str
    build: Build
    peers: dict[str, str]
    columns: dict[str, tuple[str, ...]]
    ratios: tuple[tuple[str, str], ...]
    warm: Callable[[Any, str], Any]
    same: Callable[[Any], list[str]] = field(default=lambda case: [])


def parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The options that all programs share."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description=benchmark.question,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of PyTorch's threads")
    result.add_argument("--repeats", type=int, default=25, help="maximum number of rounds per case")
    result.add_argument(
        "--seconds", type=float, default=60, help="seconds after which no new round of a case starts (three always run)"
    )
    result.add_argument(
        "--wait", type=float, default=0, help="maximum seconds to wait before each case until other processes are idle"
    )
    result.add_argument("--no-memory", dest="memory", action="store_false", help="measure time only")
    result.add_argument("--quick", action="store_true", help="tiny sizes and few rounds, to check that it runs")
    result.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/NAME-MACHINE.json)")
    return result


def size(text: str) -> tuple[int, int]:
    """ "100x168" as (100, 168)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 100x168, got {text!r}")
    return int(match[1]), int(match[2])


def pyramid_sizes(finest: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Sizes of a pyramid's levels, each half of the previous one, rounded up."""
    return [tuple(-(-side // 2**level) for side in finest) for level in range(levels)]


def run(
    benchmark: Benchmark,
    cases: Sequence[Any],
    options: argparse.Namespace,
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures all cases, prints the tables and writes the JSON file (after each case, so that no result is lost).

    Args:
        benchmark: the benchmark.
        cases: dataclasses of plain values, whose fields label the rows; all have `threads` and `dtype`.
        options: result of `parser`.
        argv: the arguments, to be recorded; default: the process's.

    Returns:
        What was written.
    """
    output = output_path(benchmark, options)
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": benchmark.name,
        "question": benchmark.question,
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{benchmark.name}", *(sys.argv[1:] if argv is None else argv)]
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_machine(options.device)
        | {
            "threads": options.threads,
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "operator": {key.strip(): text for key, text in info.collect().items() if key.strip() in _OPERATOR},
            "packages": {name: _version(name) for name in _PACKAGES},
        },
        "peers": benchmark.peers,
        "columns": benchmark.columns,
        "ratios": benchmark.ratios,
        "skipped": {},
        "cases": [],
    }
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {_label(asdict(case))}", file=sys.stderr, flush=True)
        row, skipped = _measure(benchmark, case, options)
        for peer, reason in skipped.items():
            if reason not in result["skipped"].get(peer, []):
                print(f"{peer}: {reason}", file=sys.stderr, flush=True)
                result["skipped"].setdefault(peer, []).append(reason)
        result["cases"].append(row)
        write(result, output)
    print(tables(_rounded(result)))  # as they are made from the file
    print(f"Written to {output}")
    return result


_OPERATOR = ("CPU operator", "built by", "instructions", "CUDA operator")


def _measure(benchmark: Benchmark, case: Any, options: argparse.Namespace) -> tuple[dict, dict]:
    shown = {peer for peers in benchmark.columns.values() for peer in peers}
    place = {"device": options.device, "threads": case.threads}
    wait_for_rest(options.wait)
    samples, skipped, others = in_fresh_process(
        sample_times,
        benchmark.build,
        case,
        list(benchmark.peers),
        **place,
        repeats=options.repeats,
        seconds=options.seconds,
        same=benchmark.same(case),
        tolerance=2e-2 if case.dtype != "float32" else 1e-4 if options.device == "cpu" else 2e-3,  # TF32
    )
    measured = {}
    for peer, seconds in samples.items():
        measured[peer] = {"ms": summary([1e3 * s for s in seconds]), "runs": len(seconds)}
        if options.memory and peer in shown:
            warm = benchmark.warm(case, peer)
            measured[peer]["mib"] = in_fresh_process(peak_memory, benchmark.build, case, peer, warm, **place)
    fastest = {
        column: min(there, key=lambda peer: measured[peer]["ms"]["median"])
        for column, peers in benchmark.columns.items()
        if (there := [peer for peer in peers if peer in measured])
    }
    ratios = {}
    for top, bottom in benchmark.ratios:
        if top in fastest and bottom in fastest:
            # Per round, so that slow phases of the machine, which affect both, cancel out.
            a, b = fastest[top], fastest[bottom]
            ratio = {"time": summary([x / y for x, y in zip(samples[a], samples[b], strict=True)])}
            if measured[a].get("mib") is not None and measured[b].get("mib"):
                ratio["memory"] = measured[a]["mib"] / measured[b]["mib"]
            ratios[f"{top} / {bottom}"] = ratio
    row = {"case": asdict(case), "measured": measured, "fastest": fastest, "ratios": ratios, "others": others}
    return row, skipped


def tables(result: dict[str, Any]) -> str:
    """The result as text: what all cases have in common, a table of times, and one of memory if measured."""
    rows = result["cases"]
    same = {key for key in rows[0]["case"] if len({str(row["case"][key]) for row in rows}) == 1}
    machine = result["machine"]
    heading = [
        result["question"],
        f"{machine['device']}, {machine['threads']} threads, {', '.join(_versions(machine['packages']))}",
        _label({key: rows[0]["case"][key] for key in rows[0]["case"] if key in same}),
    ]
    parts = ["\n".join(line for line in heading if line), "Milliseconds:\n\n" + table(result, "ms")]
    if any("mib" in values for row in rows for values in row["measured"].values()):
        parts.append("MiB at the peak:\n\n" + table(result, "mib"))
    return "\n\n".join(parts) + "\n"


def table(result: dict[str, Any], quantity: str, keep: Callable[[dict], bool] = lambda case: True) -> str:
    """One aligned Markdown table: the fields in which cases differ, one column per peer, then the ratios.

    Args:
        result: result of `run`.
        quantity: "ms" (medians) or "mib".
        keep: selects cases by their fields.
    """
    rows = [row for row in result["cases"] if keep(row["case"])]
    fields = [key for key in rows[0]["case"] if len({str(row["case"][key]) for row in rows}) > 1]
    columns = [column for column in result["columns"] if any(column in row["fastest"] for row in rows)]
    ratios = [f"{top} / {bottom}" for top, bottom in result["ratios"]]
    ratios = [ratio for ratio in ratios if any(ratio in row["ratios"] for row in rows)]
    lines = [[*fields, *columns, *ratios]]
    for row in rows:
        cells = [_text(row["case"][key]) for key in fields]
        for column in columns:
            values = row["measured"].get(row["fastest"].get(column), {})
            cells.append(number(values.get("ms", {}).get("median") if quantity == "ms" else values.get("mib")))
        for ratio in ratios:
            values = row["ratios"].get(ratio, {})
            cells.append(number(values.get("time", {}).get("median") if quantity == "ms" else values.get("memory")))
        lines.append(cells)
    return markdown(lines, left=len(fields))


def markdown(lines: Sequence[Sequence[str]], left: int) -> str:
    """An aligned Markdown table of rows of cells, the header first; the first `left` columns are aligned left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    text = [[p(cell, width) for p, cell, width in zip(pad, line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])


def codes(texts: Iterable[str]) -> str:
    """Texts as code in Markdown, one after the other."""
    return ", ".join(map(code, texts))


def code(text: str) -> str:
    """A text as code in Markdown."""
    return f"`{text}`"


def number(value: float | None) -> str:
    """Three significant digits; "-" for no value."""
    if value is None or not math.isfinite(value):
        return "-"
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def output_path(benchmark: Benchmark, options: argparse.Namespace) -> Path:
    """The path of the JSON file."""
    return options.output or RESULTS / f"{benchmark.name}-{machine_name(options)}.json"


def machine_name(options: argparse.Namespace) -> str:
    """The device's name, in a form for file names."""
    name = describe_machine(options.device)["device"].split(": ", 1)[1]
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {options.threads} threads".lower()).strip("-")


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _label(case: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in case.items())


def _versions(packages: dict[str, str]) -> list[str]:
    return [f"{name} {version}" for name, version in packages.items() if version != "not installed"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(result: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)  # never a partial file


def _rounded(value: Any) -> Any:
    """Rounds to five significant digits, more than any value here deserves."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
