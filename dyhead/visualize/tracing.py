"""What happens inside the blocks of a Dynamic Head while a detector looks at an image.

C channels, L levels, K = 9 taps, G offset groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyhead.layers import DyHead, DyHeadBlock, ReleasedDyHeadBlock
from dyhead.layers.levels import Pyramid, split_pyramid
from dyhead.layers.released import TAPS


@dataclass(frozen=True)
class BlockTrace:
    """One block on the first image of a batch.

    Attributes:
        maps: levels (C, H_l, W_l) by what they come from: "input", and "scale-aware", "spatial-aware", "task-aware"
            after each attention that there is; the released block, whose attentions cannot be told apart, has
            "output".
        weights: (L,), how the scale-aware attention weighs the levels, 0 to 1; None: it does not, or for each sampled
            level anew.
        offsets: for each level (G, K, 2, H_l, W_l), the steps y, x of each tap in pixels of that level; None: there is
            no spatial-aware attention. Of the released block, those on the same level.
        importances: for each level (G, K, H_l, W_l), 0 to 1.
    """

    maps: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: Tensor | None = None
    offsets: list[Tensor] | None = None
    importances: list[Tensor] | None = None


@dataclass(frozen=True)
class Trace:
    """A whole Dynamic Head on the first image of a batch.

    Attributes:
        levels: names of the levels, as ``p3``, or their numbers where the pyramid has no names.
        blocks: the blocks in their order.
    """

    levels: list[str]
    blocks: list[BlockTrace]


@contextmanager
def traced(model: nn.Module) -> Iterator[list[Trace]]:
    """Within it, each batch that goes through the model's Dynamic Head adds a trace.

    Raises:
        ValueError: the model has no :class:`dyhead.layers.DyHead`, or several.
    """
    heads = [module for module in model.modules() if isinstance(module, DyHead)]
    if len(heads) != 1:
        raise ValueError(f"expected a model with one DyHead, got one with {len(heads) or 'none'}")
    traces: list[Trace] = []

    def look(head: nn.Module, arguments: tuple[Pyramid]) -> None:
        pyramid = arguments[0]
        names = pyramid if isinstance(pyramid, dict) else map(str, range(len(pyramid)))
        traces.append(Trace(list(names), _blocks(head, pyramid)))

    handle = heads[0].register_forward_pre_hook(look)
    try:
        yield traces
    finally:
        handle.remove()


@torch.no_grad()
def _blocks(head: DyHead, pyramid: Pyramid) -> list[BlockTrace]:
    levels, traces = [level[:1] for level in split_pyramid(pyramid, head.channels)], []
    for block in head.blocks:
        traces.append(_TRACED[type(block)](block, levels))
        levels = block(levels)
    return traces


def _paper(block: DyHeadBlock, levels: list[Tensor]) -> BlockTrace:
    maps, weight, offsets, importances = {"input": levels}, None, None, None
    if block.scale_attention is not None:
        weight = block.scale_attention(levels)
        maps["scale-aware"] = [level * weight[:, i, None, None, None] for i, level in enumerate(levels)]
    if (spatial := block.spatial_attention) is not None:
        of_levels = weight.unbind(1) if weight is not None else [None] * len(levels)
        pairs = [spatial.offset_and_mask(level, own) for level, own in zip(levels, of_levels, strict=True)]
        offsets, importances = _by_group(pairs, spatial.offset_groups)
        maps["spatial-aware"] = spatial(levels, weight)
    if block.task_attention is not None:
        maps["task-aware"] = block.task_attention(list(maps.values())[-1])
    maps = {name: [level[0] for level in own] for name, own in maps.items()}
    return BlockTrace(maps, None if weight is None else weight[0], offsets, importances)


def _released(block: ReleasedDyHeadBlock, levels: list[Tensor]) -> BlockTrace:
    pairs = []
    for level in levels:
        numbers = block.offset(level)
        pairs.append((numbers[:, : 2 * TAPS], numbers[:, 2 * TAPS :].sigmoid()))
    offsets, importances = _by_group(pairs, 1)
    maps = {"input": [level[0] for level in levels], "output": [level[0] for level in block(levels)]}
    return BlockTrace(maps, None, offsets, importances)


def _by_group(pairs: list[tuple[Tensor, Tensor]], groups: int) -> tuple[list[Tensor], list[Tensor]]:
    offsets = [offset[0].unflatten(0, (groups, TAPS, 2)) for offset, _ in pairs]
    return offsets, [mask[0].unflatten(0, (groups, TAPS)) for _, mask in pairs]


_TRACED: dict[type, Callable[[nn.Module, list[Tensor]], BlockTrace]] = {
    DyHeadBlock: _paper,
    ReleasedDyHeadBlock: _released,
}


def sampled(trace: BlockTrace, level: int, stride: int, y: int, x: int) -> tuple[Tensor, Tensor]:
    """Where a pixel of a level reads from, in pixels of the image, and how much each place counts.

    Args:
        trace: of a block with offsets.
        level: index of the level.
        stride: of that level, in pixels of the image.
        y, x: the pixel.

    Returns:
        (G * K, 2), x and y, and (G * K,), the importances, 0 to 1.
    """
    steps = trace.offsets[level][..., y, x].reshape(-1, 2)  # y, x
    grid = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).repeat(len(steps) // TAPS, 1).to(steps)
    places = (torch.tensor([y, x]).to(steps) + 0.5 + grid + steps) * stride
    return places.flip(1), trace.importances[level][..., y, x].reshape(-1)
