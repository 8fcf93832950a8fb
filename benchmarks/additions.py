"""How many atomic additions to main memory does the features' gradient take on a CUDA device? Counted by emulation."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.program import RESULTS, markdown, number, size
from tests.ops import emulation

TAPS = 9


def corners(offset: Tensor, scale: float, level: tuple[int, int]) -> int:
    """How many of the four pixels around each sample of a level lie in it: additions of one channel without windows.

    Args:
        offset: (1, 2 * 9, H, W).
        scale: stride of the output over the level's.
        level: (height, width) of the level.
    """
    h, w = offset.shape[2:]
    steps = offset.unflatten(1, (TAPS, 2))[0].double()
    taps = torch.arange(TAPS)
    rows = torch.arange(h)[:, None] + (taps // 3 - 1)[:, None, None] + steps[:, 0]
    columns = torch.arange(w)[None] + (taps % 3 - 1)[:, None, None] + steps[:, 1]
    inside = torch.ones(4, TAPS, h, w, dtype=torch.bool)
    for axis, (positions, length) in enumerate(zip((rows, columns), level, strict=True)):
        places = scale * (positions + 0.5) - 0.5
        first, reached = torch.floor(places), (places > -1) & (places < length)
        for corner in range(4):
            pixel = first + (corner // 2 if axis == 0 else corner % 2)
            inside[corner] &= reached & (pixel >= 0) & (pixel < length)
    return int(inside.sum())


def count(output: tuple[int, int], channels: int, scale: float, deviation: float) -> dict[str, Any]:
    """Additions of one channel, with windows and without, for random offsets."""
    torch.manual_seed(0)
    level = tuple(int(scale * side) for side in output)
    offset = deviation * torch.randn(1, 2 * TAPS, *output)
    features = torch.randn(1, channels, *level).bfloat16()
    weight = torch.randn(1, 8, channels, 3, 3).bfloat16()
    grad = torch.randn(1, 8, *output).bfloat16()
    operators = torch.ops.dyhead_emulated
    operators.take_additions()
    operators._pyramid_deform_conv2d_backward(
        *(grad, [features], offset, weight, None, None, None, True, [scale], [1, 1], [0, 0], [1, 1]),
        *([True, *[False] * 5], False, False),
    )
    added = operators.take_additions() / channels
    without = corners(offset, scale, level)
    return {"scale": scale, "deviation": deviation, "without": without, "with": added, "ratio": without / added}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of a result of `main`: a row for each deviation, three columns for each scale."""
    cases, pixels = result["cases"], result["size"][0] * result["size"][1]
    scales = list(dict.fromkeys(case["scale"] for case in cases))
    head = [f"scale {scale:g}: {what}" for scale in scales for what in ("corners", "added", "ratio")]
    lines = [["deviation", *head]]
    for deviation in dict.fromkeys(case["deviation"] for case in cases):
        row = {case["scale"]: case for case in cases if case["deviation"] == deviation}
        cells = [(row[s]["without"] / pixels, row[s]["with"] / pixels, row[s]["ratio"]) for s in scales]
        lines.append([f"{deviation:g}", *(number(value) for cell in cells for value in cell)])
    return markdown(lines, left=1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.additions",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", type=size, default=(64, 96), help="of the output")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 0.5])
    parser.add_argument("--deviations", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0, 16.0], help="of offsets")
    parser.add_argument("--output", type=Path, default=RESULTS / "additions-emulated.json", help="JSON file")
    options = parser.parse_args(argv)
    emulation.load()
    result = {
        "benchmark": "additions",
        "question": __doc__,
        "command": shlex.join(["python", "-m", "benchmarks.additions", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "size": options.size,
        "channels": options.channels,
        "cases": [
            count(options.size, options.channels, scale, deviation)
            for scale in options.scales
            for deviation in options.deviations
        ],
    }
    print(table(result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {options.output}")
    return result


if __name__ == "__main__":
    main()
