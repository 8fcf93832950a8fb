"""`python -m benchmarks.document`: writes the tables of benchmarks/results into docs/performance.md.

A table is between a line `<!-- table: FILE WHAT KEY=VALUE ... -->` and a line `<!-- end -->`, where FILE is in
benchmarks/results, WHAT is `machine`, `ms`, `mib`, `bounds`, `goals`, or for the counts of
`benchmarks.additions` `command` or `additions`, and KEY=VALUE selects cases by their fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import additions
from benchmarks.operator import Case, least_bytes
from benchmarks.program import RESULTS, markdown, number, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
_TABLE = re.compile(r"(<!-- table: (?P<words>.+?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Goal:
    """A target.

    Attributes:
        what: description.
        benchmark: the benchmark that measures it.
        case: the fields of its case.
        ratio: "A / B", as the benchmark names it, or its inverse.
        quantity: "time" or "memory".
        goal, limit: the desired and the required value.
    """

    what: str
    benchmark: str
    case: dict[str, Any]
    ratio: str
    quantity: str
    goal: float
    limit: float


_SIZE = {"size": [100, 168], "channels": 256, "batch": 1}
_FORWARD = _SIZE | {"mode": "forward", "dtype": "float32", "levels": 1}
_PAPER = _SIZE | {"block": "paper", "mode": "training", "dtype": "float32", "blocks": 6}
_RELEASED = _PAPER | {"block": "released"}
_GOALS = [
    Goal("forward", "operator", _FORWARD, "ours / dense", "time", 1.2, 1.43),
    Goal("forward+backward", "operator", _FORWARD | {"mode": "forward+backward"}, "ours / dense", "time", 1.5, 2.5),
    Goal("forward, bfloat16", "operator", _FORWARD | {"dtype": "bfloat16"}, "ours / dense", "time", 1.5, 2.5),
    Goal("forward, three levels", "operator", _FORWARD | {"levels": 3}, "torchvision / ours", "time", 12, 9),
    Goal("training step of six blocks, paper's", "block", _PAPER, "composition / ours", "time", 10, 6),
    Goal("training step of six blocks, released", "block", _RELEASED, "composition / ours", "time", 10, 6),
    Goal("memory of that step, paper's", "block", _PAPER, "ours / composition", "memory", 0.5, 0.7),
    Goal("memory of that step, released", "block", _RELEASED, "ours / composition", "memory", 0.5, 0.7),
]


def fill(text: str) -> str:
    """`text` with every table regenerated from its JSON file."""
    return _TABLE.sub(lambda match: f"{match[1]}\n{_section(match['words'].split())}\n\n{match[4]}", text)


def _section(words: list[str]) -> str:
    file, what, *choices = words
    result = _read(file)
    wanted = dict(choice.split("=") for choice in choices)

    def keep(case: dict[str, Any]) -> bool:
        return all(_text(case[key]) in text.split(",") for key, text in wanted.items())

    if what == "machine":
        return _machine(result)
    if what == "command":
        return f"    {result['command']}\n\n{result['date']}"
    if what == "additions":
        return additions.table(result)
    if what == "bounds":
        return _bounds(result, keep)
    if what == "goals":
        return _goals(file)
    return table(result, what, keep)


def _machine(result: dict[str, Any]) -> str:
    """The machine and the command that produced a result."""
    machine = result["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v != "not installed")
    runs = [values["runs"] for row in result["cases"] for values in row["measured"].values()]
    others = [row["others"] for row in result["cases"] if row["others"] is not None]
    noise = (
        f"; other processes kept {number(min(others))} to {number(max(others))} CPUs busy meanwhile" if others else ""
    )
    return "\n".join(
        [
            f"    {result['command']}",
            "",
            f"{result['date']}; {machine['device']}, {machine['cpus']} CPUs, {machine['threads']} threads; "
            f"{machine['system']}; {packages}; operator: "
            f"{machine['operator']['built by']}, {machine['operator']['instructions']}; "
            f"{min(runs)} to {max(runs)} runs per case{noise}.",
        ]
    )


def _bounds(result: dict[str, Any], keep: Callable[[dict], bool]) -> str:
    """The unavoidable arithmetic and memory traffic and the cost of sampling, beside the measured times."""
    head = ["mode", "dtype", "levels", "size", "GFLOP", "dense GFLOP/s", "ours GFLOP/s", "least MiB", "copy ms"]
    lines = [[*head, "sampling ms", "dense ms", "ours ms"]]
    for row in result["cases"]:
        if not keep(row["case"]):
            continue
        case = Case(**row["case"])
        passes = 1 if case.mode == "forward" else 3  # output; gradients of the samples and of the weights
        gflop = passes * 2 * case.multiply_adds / 1e9
        peers = ("copy", "sampling", row["fastest"]["dense"], row["fastest"]["ours"])
        copy, sampling, dense, ours = (row["measured"].get(peer, {}).get("ms", {}).get("median") for peer in peers)
        values = [gflop, 1e3 * gflop / dense, 1e3 * gflop / ours, least_bytes(case) / 2**20]
        values += [copy, sampling, dense, ours]
        lines.append([case.mode, case.dtype, str(case.levels), _text(case.size), *map(number, values)])
    return markdown(lines, left=4)


def _goals(file: str) -> str:
    """Targets and measured values. `file` is the operator's; the block's has the corresponding name."""
    lines = [["C = 256, finest level 100x168", "ratio", "measured", "goal", "limit"]]
    for goal in _GOALS:
        for row in _read(file.replace("operator", goal.benchmark))["cases"]:
            if all(row["case"][key] == value for key, value in goal.case.items()):
                lines.append([goal.what, goal.ratio, *map(number, (_ratio(row, goal), goal.goal, goal.limit))])
    return markdown(lines, left=2)


def _ratio(row: dict[str, Any], goal: Goal) -> float:
    top, bottom = goal.ratio.split(" / ")
    inverse = goal.ratio not in row["ratios"]
    value = row["ratios"][f"{bottom} / {top}" if inverse else goal.ratio][goal.quantity]
    value = value["median"] if goal.quantity == "time" else value
    return 1 / value if inverse else value


def _read(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def main() -> None:
    """Rewrites the document."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Written to {DOCUMENT}")


if __name__ == "__main__":
    main()
