"""Where do the CUDA operator and six blocks spend their time? Each kernel's share, beside the device's limits."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import block
from benchmarks.operator import Case, build, least_bytes
from benchmarks.program import RESULTS, markdown, number, size
from dyhead.evaluation import describe_machine

_SHOWN = 20  # kernels of a training step, of hundreds


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Mean milliseconds of one call on the device."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def roofs(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """The limits of any kernel: the rates of a large matrix product, a copy, and atomic additions of rows of floats."""
    edge, rows, channels = 8192, 2**18, 256
    left, right = (torch.randn(edge, edge, device="cuda").to(dtype) for _ in range(2))
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    values, index = torch.ones(rows, channels, device="cuda"), torch.randint(rows // 8, (rows,), device="cuda")
    sums = torch.zeros(rows // 8, channels, device="cuda")

    def add() -> None:
        sums.index_add_(0, index, values)

    return {
        "product, TFLOP/s": 2e-9 * edge**3 / milliseconds(lambda: left @ right, repeats),
        "copy, GB/s": 2e-6 * source.numel() / milliseconds(lambda: target.copy_(source), repeats),
        "atomic additions, GB/s": 4e-6 * values.numel() / milliseconds(add, repeats),
    }


def kernels(call: Callable[[], Any], repeats: int) -> tuple[dict[str, float], float]:
    """Milliseconds of each kernel in one call, by name, the longest first, and how many launches there are in all."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    times = {event.key: event.self_device_time_total / 1e3 / repeats for event in events}
    launches = sum(event.count for event in events if event.self_device_time_total > 0) / repeats
    return dict(sorted(times.items(), key=lambda item: -item[1])), launches


def short(name: str) -> str:
    """A kernel's name without the parts common to all of ours."""
    for part in ("void ", "dyhead::cuda::run_kernel<", "dyhead::cuda::", "c10::"):
        name = name.replace(part, "")
    return name.split(">(")[0][:60]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    kinds = ["paper", "released"]
    parser.add_argument("--blocks", nargs="*", choices=kinds, default=kinds, help="of which to train six")
    parser.add_argument("--levels", nargs="+", type=int, choices=[1, 3], default=[1, 3])
    parser.add_argument("--size", type=size, default=(100, 168), help="of the output")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    if options.blocks and options.dtype == "float16":
        parser.error("--dtype float16: expected no --blocks, which are trained in float32 or bfloat16")
    bounds = roofs(getattr(torch, options.dtype), options.repeats)
    result = {"benchmark": "kernels", "machine": describe_machine("cuda"), "roofs": bounds, "cases": []}
    print("\n".join(f"{name}: {number(value)}" for name, value in bounds.items()))
    for levels in options.levels:
        case = Case("forward+backward", options.dtype, levels, options.size, options.channels, options.batch)
        times, launches = kernels(build(case, "ours, channels_last", torch.device("cuda")), options.repeats)
        passes = 3  # the forward pass, and twice its products in the backward pass
        floors = {
            "products": 2e-9 * passes * case.multiply_adds / bounds["product, TFLOP/s"],
            "bytes": 1e-6 * least_bytes(case) / bounds["copy, GB/s"],
            # With windows (docs/performance.md), about 256 for each channel, level and patch of 8 x 8 pixels.
            "additions": 1e-6 * 4 * 256 * case.batch * levels * case.channels
            * math.ceil(options.size[0] / 8) * math.ceil(options.size[1] / 8) / bounds["atomic additions, GB/s"],
        }  # fmt: skip
        result["cases"].append({"case": asdict(case), "floors, ms": floors, "kernels, ms": times, "launches": launches})
        rows = [*_rows(times), *((f"floor: {k}", number(v)) for k, v in floors.items())]
        print(f"\n{levels} levels, forward and backward:\n\n{markdown(rows, left=1)}")
    for name in options.blocks:
        case = block.Case(name, "training", options.size, options.dtype, channels=options.channels, batch=options.batch)
        call = block.build(case, "ours", torch.device("cuda"))
        times, launches = kernels(call, max(1, options.repeats // 4))
        step = milliseconds(call, max(1, options.repeats // 4))
        measured = {"step, ms": step, "kernels, ms": times, "launches": launches}
        result["cases"].append({"case": asdict(case)} | measured)
        rows = [*_rows(times, _SHOWN), (f"a step, with what lies between {launches:.0f} launches", number(step))]
        print(f"\ntraining step of six blocks ({name}):\n\n{markdown(rows, left=1)}")
    output = options.output or RESULTS / "kernels.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _rows(times: dict[str, float], most: int | None = None) -> list[tuple[str, str]]:
    shown = list(times.items())[:most]
    left = sum(times.values()) - sum(time for _, time in shown)
    rows = [("kernel", "ms"), *((short(name), number(time)) for name, time in shown)]
    return [*rows, *([("others", number(left))] if most else []), ("all", number(sum(times.values())))]


if __name__ == "__main__":
    main()
