"""Names of Swin, its authors' and mmdetection's, and how the latter orders what it merges."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from dyhead.checkpoints.pyramid import BOTTOM_UP
from dyhead.checkpoints.source import Row

#: What follows from the size of the windows.
POSITIONS = (r".+\.relative_position_index", "numbers that follow from the size of the windows")


def authors_swin(prefix: str) -> list[Row]:
    """The names of its authors' detectors, which Detectron2 has, too, under ``prefix``, a regular expression."""
    return [
        Row(prefix + r"patch_embed\.(.+)", _network(r"patch_embed.\1")),
        Row(prefix + r"layers\.(\d+)\.blocks\.(.+)", _network(r"layers_\1.blocks.\2")),
        *_merging(prefix + r"layers\.", {"norm": None, "reduction": None}),
        *_output_norms(prefix),
    ]


def mmdetection_swin(prefix: str) -> list[Row]:
    """The names of mmdetection, under ``prefix``, a regular expression."""
    block = prefix + r"stages\.(\d+)\.blocks\.(\d+)\."
    return [
        Row(prefix + r"patch_embed\.projection\.(.+)", _network(r"patch_embed.proj.\1")),
        Row(prefix + r"patch_embed\.norm\.(.+)", _network(r"patch_embed.norm.\1")),
        Row(block + r"(norm[12]\..+)", _network(r"layers_\1.blocks.\2.\3")),
        Row(block + r"attn\.w_msa\.(.+)", _network(r"layers_\1.blocks.\2.attn.\3")),
        Row(block + r"ffn\.layers\.0\.0\.(.+)", _network(r"layers_\1.blocks.\2.mlp.fc1.\3")),
        Row(block + r"ffn\.layers\.1\.(.+)", _network(r"layers_\1.blocks.\2.mlp.fc2.\3")),
        *_merging(prefix + r"stages\.", {"norm": _by_place, "reduction": _by_place}),
        *_output_norms(prefix),
    ]


def _network(name: str) -> str:
    return f"{BOTTOM_UP}timm.network.{name}"


def _merging(stages: str, values: dict[str, Callable[[Tensor], Tensor] | None]) -> list[Row]:
    """What merges four pixels into one: theirs at the end of a stage, timm's at the start of the next one."""

    def next_stage(match: re.Match) -> str:
        return _network(f"layers_{int(match[1]) + 1}.downsample.{match[2]}")

    return [Row(rf"{stages}(\d+)\.downsample\.({part}\..+)", next_stage, change) for part, change in values.items()]


def _output_norms(prefix: str) -> list[Row]:
    return [Row(prefix + r"norm([0-3])\.(.+)", lambda m: f"{BOTTOM_UP}timm.norms.res{int(m[1]) + 2}.{m[2]}")]


def _by_place(x: Tensor) -> Tensor:
    """Numbers (..., 4C) of four pixels' channels, channel after channel, as pixel after pixel.

    mmdetection has the four pixels of a channel row by row; Swin's authors, and timm, column by column.
    """
    pixels = x.unflatten(-1, (-1, 2, 2))  # (..., C, rows, columns)
    return pixels.movedim(-3, -1).transpose(-3, -2).flatten(-3)
