"""How fast is deformable RoI pooling, compared with its definition, and RoIAlign with torchvision's?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Unavailable
from benchmarks.program import Benchmark, parser, run, size
from dyhead.ops import deform_roi_pool
from dyhead.ops.regions import define_deform_roi_pool

try:
    from torchvision.ops import roi_align
except ImportError:
    roi_align = None

# P3 and P4 of an image of 800 x 1333.
SIZES = [(100, 168), (50, 84)]
SAMPLES, GAMMA = 2, 0.1


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        mode: "forward" (without gradients) or "forward+backward".
        dtype: dtype of the map.
        size: (height, width) of the map.
        moved: whether cells are moved by offsets, which then have a gradient. torchvision has none.
        regions: number of regions; each is 7 to 28 pixels of the map long, as FPN gives them to a level.
        side: cells per side of a region.
        channels: of the map.
        threads: number of PyTorch's threads.
    """

    mode: str
    dtype: str
    size: tuple[int, int]
    moved: bool
    regions: int = 128
    side: int = 7
    channels: int = 256
    threads: int = 1


def build(case: Case, peer: str, device: torch.device) -> Callable[[], Any]:
    """Returns a function that runs `peer` in a case and returns the output, or its gradients."""
    torch.manual_seed(0)
    height, width = case.size
    x = torch.randn(1, case.channels, height, width, device=device).to(getattr(torch, case.dtype))
    center = torch.rand(case.regions, 2, device=device) * torch.tensor([width, height], device=device)
    extent = 7 + 21 * torch.rand(case.regions, 2, device=device)
    rois = torch.cat([center.new_zeros(case.regions, 1), center - extent / 2, center + extent / 2], 1)
    offset = torch.randn(case.regions, 2, case.side, case.side, device=device) if case.moved else None
    grad = torch.randn(case.regions, case.channels, case.side, case.side, device=device).to(x.dtype)
    kind, _, layout = peer.partition(", ")
    if kind == "torchvision" and case.moved:
        raise Unavailable("moves no cell")
    if kind == "torchvision" and (roi_align is None or case.dtype != "float32"):
        raise Unavailable("compared in float32, where torchvision is installed: half types would round its positions")
    if layout == "channels_last":
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))

    function = {"ours": deform_roi_pool, "definition": define, "torchvision": align}[kind]
    if case.mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, rois, offset, case.side)

        return forward
    leaves = [leaf.requires_grad_() for leaf in (x, offset) if leaf is not None]
    return lambda: torch.autograd.grad(function(x, rois, offset, case.side), leaves, grad)


def define(x: Tensor, rois: Tensor, offset: Tensor | None, side: int) -> Tensor:
    """The operator's definition in plain PyTorch."""
    return define_deform_roi_pool(x, rois, offset, side, 1.0, SAMPLES, GAMMA, True)


def align(x: Tensor, rois: Tensor, offset: Tensor | None, side: int) -> Tensor:
    """torchvision's RoIAlign."""
    return roi_align(x, rois, side, 1.0, SAMPLES, True)


BENCHMARK = Benchmark(
    name="regions",
    question="How fast is deformable RoI pooling, and RoIAlign as a case of it?",
    build=build,
    peers={
        "ours, channels_last": "dyhead.ops.deform_roi_pool on maps in channels_last",
        "ours, NCHW": "the same on contiguous maps",
        "definition": "the definition in plain PyTorch, dyhead.ops.regions.define_deform_roi_pool",
        "torchvision": "torchvision.ops.roi_align, where no cell is moved",
    },
    columns={
        "ours": ("ours, channels_last",),
        "ours NCHW": ("ours, NCHW",),
        "definition": ("definition",),
        "torchvision": ("torchvision",),
    },
    ratios=(("definition", "ours NCHW"), ("torchvision", "ours NCHW")),
    warm=lambda case, peer: replace(case, size=(4, 4), channels=4, regions=2),
    same=lambda case: ["ours, channels_last", "ours, NCHW", "definition", *([] if case.moved else ["torchvision"])],
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    options_of = parser(BENCHMARK)
    options_of.add_argument("--modes", nargs="+", choices=["forward", "forward+backward"], help="default: both")
    options_of.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    options_of.add_argument("--sizes", nargs="+", type=size, help="of the map; default: P3 and P4 of 800x1333")
    options_of.add_argument("--channels", type=int, default=256)
    options_of.add_argument("--regions", type=int, default=128)
    options_of.add_argument("--side", type=int, default=7, help="cells per side of a region")
    options = options_of.parse_args(argv)
    sizes = options.sizes or SIZES
    if options.quick:
        options.repeats, sizes, options.channels, options.regions = 3, options.sizes or [(7, 11)], 4, 3
    cases = [
        Case(mode, dtype, place, moved, options.regions, options.side, options.channels, options.threads)
        for mode, dtype, place, moved in product(
            options.modes or ["forward", "forward+backward"], options.dtype, sizes, [True, False]
        )
    ]
    return run(BENCHMARK, cases, options, argv)


if __name__ == "__main__":
    main()
