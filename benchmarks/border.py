"""How fast is border alignment, compared with its definition and with a composition on grid_sample?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.program import Benchmark, parser, run, size
from dyhead.ops import border_align
from dyhead.ops.border import define_border_align

# P4 to P6 of an image of 800 x 1333, and a small map.
SIZES = [(50, 84), (25, 42), (13, 21), (16, 16)]
# Pixels from a cell to a side of its box, at most: FCOS gives a level objects of up to 8 pixels to a side.
REACH = 8


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        mode: "forward" (without gradients) or "forward+backward".
        dtype: dtype of the map.
        size: (height, width) of the map and of the grid of boxes.
        channels: channels of a border.
        pool_size: parts of a border.
        batch: number of images.
        threads: number of PyTorch's threads.
    """

    mode: str
    dtype: str
    size: tuple[int, int]
    channels: int = 256
    pool_size: int = 10
    batch: int = 1
    threads: int = 1


def build(case: Case, peer: str, device: torch.device) -> Callable[[], Any]:
    """Returns a function that runs `peer` in a case and returns the output, or its gradient."""
    torch.manual_seed(0)
    height, width = case.size
    x = torch.randn(case.batch, 4 * case.channels, height, width, device=device).to(getattr(torch, case.dtype))
    center = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")).to(device)
    reach = REACH * torch.rand(case.batch, 4, height, width, device=device)
    corners = torch.cat([center - reach[:, :2], center + reach[:, 2:]], 1)
    # As BorderDet does.
    limits = torch.tensor([width - 1, height - 1] * 2, device=device).view(4, 1, 1)
    boxes = torch.minimum(corners.clamp(min=0), limits)

    grad = torch.randn_like(x)
    kind, _, layout = peer.partition(", ")
    if layout == "channels_last":
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    function = {"ours": border_align, "definition": define, "grid_sample": compose}[kind]
    if case.mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, boxes, case.pool_size)

        return forward
    x.requires_grad_()
    return lambda: torch.autograd.grad(function(x, boxes, case.pool_size), x, grad)


def define(x: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
    """The operator's definition in plain PyTorch."""
    return define_border_align(x, boxes, pool_size)[0]


def compose(x: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
    """Border alignment by a call of grid_sample for each border, whose samples are all in memory."""
    height, width = x.shape[2:]
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    along = torch.linspace(0, 1, pool_size + 1, device=x.device).view(1, -1, 1, 1)
    across, down = x1 + (x2 - x1) * along, y1 + (y2 - y1) * along
    # The last two run back, for the first of equal points to be the same.
    points = [(across, y1), (x1, down), (across.flip(1), y2), (x2, down.flip(1))]
    results = []
    for group, (columns, rows) in zip(x.chunk(4, 1), points, strict=True):
        # In grid_sample's coordinates -1 and 1 are the first and the last pixel.
        places = [2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1]
        grid = torch.stack(torch.broadcast_tensors(*places), -1).flatten(2, 3).to(x.dtype)
        samples = functional.grid_sample(group, grid, align_corners=True)  # (N, C, P + 1, H * W)
        results.append(samples.max(2).values.unflatten(2, boxes.shape[2:]))
    return torch.cat(results, 1)


BENCHMARK = Benchmark(
    name="border",
    question="How fast is border alignment of C channels a border, a box for every pixel?",
    build=build,
    peers={
        "ours, channels_last": "dyhead.ops.border_align on maps in channels_last",
        "ours, NCHW": "the same on contiguous maps",
        "definition": "the definition in plain PyTorch, dyhead.ops.border.define_border_align",
        "grid_sample": "torch.nn.functional.grid_sample for every border, and max",
    },
    columns={
        "ours": ("ours, channels_last",),
        "ours NCHW": ("ours, NCHW",),
        "definition": ("definition",),
        "grid_sample": ("grid_sample",),
    },
    ratios=(("definition", "ours NCHW"), ("grid_sample", "ours NCHW")),
    warm=lambda case, peer: replace(case, size=(4, 4), channels=4),
    # grid_sample's coordinates are coarser: a point may change, and with it all of a gradient.
    same=lambda case: ["ours, channels_last", "ours, NCHW"] + (["definition"] if case.mode == "forward" else []),
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    options_of = parser(BENCHMARK)
    options_of.add_argument("--modes", nargs="+", choices=["forward", "forward+backward"], help="default: both")
    options_of.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    options_of.add_argument("--sizes", nargs="+", type=size, help="of the map; default: P4 to P6 of 800x1333, 16x16")
    options_of.add_argument("--channels", type=int, default=256, help="of a border")
    options_of.add_argument("--pool-size", type=int, default=10)
    options_of.add_argument("--batch", type=int, default=1)
    options = options_of.parse_args(argv)
    sizes = options.sizes or SIZES
    if options.quick:
        options.repeats, sizes, options.channels = 3, options.sizes or [(7, 11)], 4
    cases = [
        Case(mode, dtype, place, options.channels, options.pool_size, options.batch, options.threads)
        for mode, dtype, place in product(options.modes or ["forward", "forward+backward"], options.dtype, sizes)
    ]
    return run(BENCHMARK, cases, options, argv)


if __name__ == "__main__":
    main()
