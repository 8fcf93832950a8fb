"""How fast is the head? DyHead's blocks on our operator, compared with the same modules on torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.composition import composition
from benchmarks.program import Benchmark, parser, pyramid_sizes, run, size
from dyhead.layers import DyHead

EAGER = {"ours": ("ours",), "composition": ("composition",)}
COMPILED = {"ours, compiled": ("ours, compiled",), "composition, compiled": ("composition, compiled",)}
RATIOS = (("ours, compiled", "ours"), ("composition, compiled", "ours, compiled"), ("composition", "ours"))
PEERS = {
    "ours": "dyhead.layers as they are, levels in channels_last",
    "composition": "the same modules on torchvision.ops.deform_conv2d and plain PyTorch, levels in NCHW",
    "ours, compiled": "ours under torch.compile",
    "composition, compiled": "the composition under torch.compile",
}


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        block: "paper" or "released".
        mode: "inference", or "training": forward, backward, and a step of SGD.
        size: (height, width) of the finest level.
        dtype: "float32", or "bfloat16" by autocast.
        levels: number of levels of the pyramid.
        channels: channels of every level.
        batch: number of images.
        blocks: number of stacked blocks.
        threads: number of PyTorch's threads.
    """

    block: str
    mode: str
    size: tuple[int, int]
    dtype: str = "float32"
    levels: int = 5
    channels: int = 256
    batch: int = 1
    blocks: int = 6
    threads: int = 1


def build(case: Case, peer: str, device: torch.device) -> Callable[[], Any]:
    """One inference or training step of the head on random levels."""
    torch.manual_seed(0)
    head = DyHead(case.channels, case.blocks, block=case.block).to(device)
    # Zero-initialised offsets would read at whole pixels. Levels have variance 1, so offsets deviate by 2 pixels.
    for name, module in head.named_modules():
        if name.endswith("offset"):
            nn.init.normal_(module.weight, std=2 / (9 * case.channels) ** 0.5)
    sizes = pyramid_sizes(case.size, case.levels)
    levels = [torch.randn(case.batch, case.channels, *place, device=device) for place in sizes]
    kind, _, compiled = peer.partition(", ")
    if kind == "ours":
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
    step = torch.compile(head) if compiled else head
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")

    if case.mode == "inference":

        def infer() -> list[Tensor]:
            with composition(kind == "composition"), torch.no_grad(), autocast:
                return step(levels)

        return infer

    levels = [level.requires_grad_() for level in levels]  # in a detector the backbone needs gradients
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-6)

    def train() -> None:
        with composition(kind == "composition"):
            with autocast:
                loss = sum(level.float().square().mean() for level in step(levels))
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        for level in levels:
            level.grad = None

    return train


def warm(case: Case, peer: str) -> Case:
    """The case that runs before memory is measured: one small block; compiled code is specialised to one size."""
    return case if peer.endswith("compiled") else replace(case, size=(4, 4), levels=2, channels=16, blocks=1)


def choose_peers(benchmark: Benchmark, compiled: bool) -> Benchmark:
    """Drops the compiled peers unless they are requested: compiling takes minutes."""
    return benchmark if compiled else replace(benchmark, peers={peer: benchmark.peers[peer] for peer in EAGER})


BENCHMARK = Benchmark(
    name="block",
    question="How fast are six DyHead blocks, in inference and in a training step?",
    build=build,
    peers=PEERS,
    columns=EAGER | COMPILED,
    ratios=RATIOS,
    warm=warm,
    # The paper's block samples levels where the composition samples resized levels.
    same=lambda case: list(PEERS) if (case.block, case.mode) == ("released", "inference") else [],
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    options_of = parser(BENCHMARK)
    options_of.set_defaults(repeats=9, seconds=120)
    options_of.add_argument("--blocks", nargs="+", choices=["paper", "released"], default=["paper", "released"])
    options_of.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference", "training"])
    options_of.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    options_of.add_argument("--sizes", nargs="+", type=size, default=[(100, 168)], help="of the finest level")
    options_of.add_argument("--batch", type=int, default=1)
    options_of.add_argument("--compile", action="store_true", help="under torch.compile as well")
    options = options_of.parse_args(argv)
    shape = {}
    if options.quick:
        options.repeats, options.sizes, shape = 3, [(8, 9)], {"levels": 2, "channels": 16, "blocks": 1}
    cases = [
        Case(block, mode, place, dtype, batch=options.batch, threads=options.threads, **shape)
        for block, dtype, mode, place in product(options.blocks, options.dtype, options.modes, options.sizes)
    ]
    return run(choose_peers(BENCHMARK, options.compile), cases, options, argv)


if __name__ == "__main__":
    main()
