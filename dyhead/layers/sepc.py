"""Scale-equalizing pyramid convolution: a stack of pyramid convolutions, then features for classes and for boxes."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from dyhead.layers.levels import (
    EagerPyramidModule,
    Pyramid,
    check_integer,
    join_pyramid,
    split_pyramid,
    to_channels_last,
)
from dyhead.layers.pconv import LevelConv, PConv, SampledPConv, build_norm, normalize

#: What the blocks of :class:`SEPC` may be.
CONVS = ("plain", "deformable", "sampled")
#: What may follow them.
TASK_CONVS = ("none", "plain", "deformable")


class TaskLevel(NamedTuple):
    """A level where the tasks have features of their own, each (N, C, H, W)."""

    classes: Tensor
    boxes: Tensor


class SEPC(EagerPyramidModule):
    """Scale-equalizing pyramid convolution (Wang et al., CVPR 2020): pyramid convolutions, then one for each task.

    ``num_blocks`` pyramid convolutions (:class:`PConv`) are followed on every level by two 3x3 convolutions with bias,
    norm and ReLU: one computes what classes are predicted from, one what boxes are predicted from.

    ================  ============  ==============  ======
    in the paper      ``conv``      ``task_convs``  norm
    ================  ============  ==============  ======
    PConv             "plain"       "plain"         ""
    PConv with iBN    "plain"       "plain"         "BN"
    SEPC-lite         "plain"       "deformable"    "BN"
    SEPC              "deformable"  "deformable"    "BN"
    ================  ============  ==============  ======

    Args:
        channels: channels C of every level, in and out.
        num_blocks: pyramid convolutions, each with weights of its own.
        conv: what they are: "plain", "deformable" on all levels but the finest, or "sampled", :class:`SampledPConv`,
            which is another function.
        task_convs: the convolutions of the two tasks: "plain", "deformable" on all levels but the finest, or "none",
            with which the result is one pyramid for both.
        norm: after each block, and after each task's convolutions: "", "BN" or "SyncBN" over the pixels of all levels
            together, see :class:`PConv`.
        task_padding: of the tasks' convolutions. The published code has 0, by mistake as its author says: levels then
            lose two rows and columns, and the feature of cell (i, j) is centered on (i + 1, j + 1); weights that were
            trained so need it. A level of fewer than 3 pixels is first padded to 3, at its end, with zeros.

    Raises:
        ValueError: a number that is no integer or out of its range; an unknown name; ``task_padding`` without
            convolutions to pad.

    Example:
        >>> import torch
        >>> pyramid = {"p3": torch.randn(2, 64, 15, 16), "p4": torch.randn(2, 64, 8, 8)}
        >>> out = SEPC(64, num_blocks=1)(pyramid)
        >>> tuple(out["p3"].classes.shape), tuple(out["p4"].boxes.shape)
        ((2, 64, 15, 16), (2, 64, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        num_blocks: int = 4,
        *,
        conv: Literal["plain", "deformable", "sampled"] = "deformable",
        task_convs: Literal["none", "plain", "deformable"] = "deformable",
        norm: Literal["", "BN", "SyncBN"] = "BN",
        task_padding: int = 1,
    ) -> None:
        super().__init__()
        channels = check_integer("channels", channels)
        num_blocks = check_integer("num_blocks", num_blocks, least=0)
        task_padding = check_integer("task_padding", task_padding, least=0)
        for name, value, values in (("conv", conv, CONVS), ("task_convs", task_convs, TASK_CONVS)):
            if value not in values:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {value!r}")
        if task_padding > 1 or (task_convs == "none" and task_padding != 1):
            expected = "0 or 1" if task_padding > 1 else "1 with task_convs 'none', which pads nothing"
            raise ValueError(f"task_padding: expected {expected}, got {task_padding}")

        def block() -> nn.Module:
            if conv == "sampled":
                return SampledPConv(channels, norm=norm)
            return PConv(channels, deformable=conv == "deformable", norm=norm)

        self.channels = channels
        self.round_up = conv != "sampled"
        self.blocks = nn.ModuleList(block() for _ in range(num_blocks))
        self.class_conv = self.box_conv = self.class_norm = self.box_norm = None
        if task_convs != "none":
            deformable = task_convs == "deformable"
            self.class_conv = LevelConv(channels, padding=task_padding, deformable=deformable)
            self.box_conv = LevelConv(channels, padding=task_padding, deformable=deformable)
            self.class_norm, self.box_norm = build_norm(norm, channels), build_norm(norm, channels)

    def forward(self, pyramid: Pyramid) -> Pyramid | dict[str, TaskLevel] | list[TaskLevel] | tuple[TaskLevel, ...]:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind.

        Args:
            pyramid: levels (N, C, H_l, W_l), each half the size of the one before it, rounded up (with ``conv``
                "sampled": either way).

        Returns:
            Levels of the same shapes (N, C, H_l, W_l), each a :class:`TaskLevel`, or a tensor with ``task_convs``
            "none". With ``task_padding`` 0 height and width are two less, but at least 1.

        Raises:
            TypeError, ValueError: not a valid pyramid. Names the level, what was expected and what came.
        """
        # The operator's native layout; converted here once, if needed.
        levels = split_pyramid(pyramid, self.channels, round_up=self.round_up)
        levels = [to_channels_last(level) for level in levels]
        for block in self.blocks:
            levels = block(levels)
        if self.class_conv is not None:
            classes = _of_task(self.class_conv, self.class_norm, levels)
            boxes = _of_task(self.box_conv, self.box_norm, levels)
            levels = [TaskLevel(*of_tasks) for of_tasks in zip(classes, boxes, strict=True)]
        return join_pyramid(levels, pyramid)


def _of_task(conv: LevelConv, norm: nn.Module | None, levels: list[Tensor]) -> list[Tensor]:
    if not conv.padding:
        levels = [
            functional.pad(level, [0, max(3 - level.shape[3], 0), 0, max(3 - level.shape[2], 0)]) for level in levels
        ]
    out = normalize(norm, [conv(level, i) for i, level in enumerate(levels)])
    return [level.relu() for level in out]
