"""DyHead in a tower that fuses language and vision, as GLIP's, FIBER's and DesCo's do.

    python glip_tower.py [checkpoint of GLIP]

Their own block needs a CUDA operator that current PyTorch versions do not compile. In GLIP's `VLDyHead`, replace

    dyhead_tower.append(DyConv(channels, channels, conv_func=..., use_dyrelu=..., ...))

by the `append` below, and load the blocks' weights by `load_blocks`; everything else of its checkpoint stays.
"""

import sys

import torch
from torch import nn

from dyhead.checkpoints import convert, read_state
from dyhead.layers import DyHead, VisionLanguageDyHead

CHANNELS = 256


class Fusion(nn.Module):
    """Stands for GLIP's VLFuse: adds a projection of the mean text feature to every level."""

    def __init__(self, channels: int, language: int) -> None:
        super().__init__()
        self.project = nn.Linear(language, channels)

    def forward(self, inputs: dict) -> dict:
        text = self.project(inputs["lang"]["hidden"].mean(dim=1))
        return {**inputs, "visual": [level + text[:, :, None, None] for level in inputs["visual"]]}


def build(num_blocks: int, channels: int = CHANNELS) -> nn.Sequential:
    """A tower of a fusion and a DyHead block in turn; the blocks are computed again in the backward pass."""
    tower = []
    for _ in range(num_blocks):
        tower.append(Fusion(channels, 768))
        tower.append(VisionLanguageDyHead(DyHead(channels, 1, block="released", use_checkpoint=True)))
    return nn.Sequential(*tower)


def load_blocks(tower: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The DyHead blocks of a GLIP checkpoint into those of a tower, in their order."""
    converted = convert(state).state
    for i, layer in enumerate(m for m in tower.modules() if isinstance(m, VisionLanguageDyHead)):
        prefix = f"backbone.dyhead.blocks.{i}."
        block = {key.removeprefix(prefix): value for key, value in converted.items() if key.startswith(prefix)}
        layer.head.blocks[0].load_state_dict(block)


def main() -> None:
    tower = build(num_blocks=6 if len(sys.argv) > 1 else 2)
    if len(sys.argv) > 1:
        load_blocks(tower, read_state(sys.argv[1]))
    levels = [torch.randn(1, CHANNELS, size, size, requires_grad=True) for size in (16, 8, 4)]
    out = tower({"visual": levels, "lang": {"hidden": torch.randn(1, 12, 768), "masks": torch.ones(1, 12)}})
    sum(level.mean() for level in out["visual"]).backward()
    print([tuple(level.shape) for level in out["visual"]], list(out["lang"]))


if __name__ == "__main__":
    main()
