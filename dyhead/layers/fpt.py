"""The Feature Pyramid Transformer: every level sees itself, the coarser and the finer ones. Experimental."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dyhead.layers.conv_norm import NORMS, ConvNorm
from dyhead.layers.levels import (
    EagerPyramidModule,
    Pyramid,
    check_groups,
    check_integer,
    join_pyramid,
    split_pyramid,
)

#: What :class:`GroundingTransformer` compares cells by.
SIMILARITIES = ("dot", "softmax", "distance")


class FPT(EagerPyramidModule):
    """The Feature Pyramid Transformer (Zhang et al., ECCV 2020). Experimental: nobody has published weights of it.

    For each level l, fine to coarse,

        out_l = conv3x3([ST(x_l), GT(x_l, x_h) of every coarser level h, RT(x_l, x_k) of every finer level k, x_l])

    with :class:`SelfTransformer`, :class:`GroundingTransformer` and :class:`RenderingTransformer`, each with weights of
    its own. The authors' three modules run, and these compute the same; their network as a whole does not run. Their
    stride of 2 fits one octave, here it is that of the gap.

    The self transformer's cost is quadratic in the cells of a level: a quarter of them squared.

    Args:
        channels: channels C of every level, in and out.
        num_levels: levels L of the pyramid.
        parts, dropout: of the self transformers.
        similarity: of the grounding transformers.
        norm: "BN" or "SyncBN", in all transformers. Where it has a single value of each channel, in training, such as
            the mean over a level of the only image, its running statistics take the batch's place.

    Raises:
        ValueError: a number that is no integer or out of its range, parts that do not divide the channels, or an
            unknown name.

    Example:
        >>> import torch
        >>> pyramid = {"p3": torch.randn(2, 16, 15, 16), "p4": torch.randn(2, 16, 8, 8)}
        >>> out = FPT(16, num_levels=2)(pyramid)
        >>> tuple(out["p3"].shape), tuple(out["p4"].shape)
        ((2, 16, 15, 16), (2, 16, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        parts: int = 2,
        similarity: Literal["dot", "softmax", "distance"] = "dot",
        dropout: float = 0.1,
        norm: Literal["BN", "SyncBN"] = "BN",
    ) -> None:
        super().__init__()
        self.channels = channels = check_integer("channels", channels)
        num_levels = check_integer("num_levels", num_levels)
        names = [name for name in NORMS if name != "FrozenBN"]
        if norm not in names:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, names))}, got {norm!r}")

        def level(number: int) -> _Level:
            coarser = num_levels - 1 - number
            return _Level(
                SelfTransformer(channels, parts=parts, dropout=dropout, norm=norm),
                [GroundingTransformer(channels, similarity=similarity, norm=norm) for _ in range(coarser)],
                [RenderingTransformer(channels, octaves=number - finer, norm=norm) for finer in range(number)],
                channels,
            )

        self.levels = nn.ModuleList(map(level, range(num_levels)))

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Args:
            pyramid: ``num_levels`` levels (N, C, H_l, W_l), each half the size of the one before it, rounded up.

        Raises:
            TypeError, ValueError: not a valid pyramid, or one of other levels. Names what was expected and what came.
        """
        levels = split_pyramid(pyramid, self.channels, round_up=True)
        if len(levels) != len(self.levels):
            raise ValueError(f"pyramid: expected {len(self.levels)} levels, got {len(levels)}")
        return join_pyramid([level(i, levels) for i, level in enumerate(self.levels)], pyramid)


class SelfTransformer(nn.Module):
    """Every cell of a level adds what it sees in the whole level, averaged to half its size.

    The channels of q and k, of one 1x1 convolution, are split into P parts, each with a softmax of its own:

        y_i = sum_p pi_p softmax_j(q_i^p . k_j^p / sqrt(C)) v_j,    pi = softmax_p(W mean_i(q_i)),

    and x + norm(conv1x1(y)) comes out. With several heads, each of them is such a y of C / ``heads`` channels.

    Args:
        channels: channels C of the level.
        heads, parts: see above.
        dropout: of what a cell sees, in training, part by part.
        norm: a name of :data:`dyhead.layers.conv_norm.NORMS`.

    Raises:
        ValueError: heads and parts that do not divide the channels; a dropout that is no probability below 1.
    """

    def __init__(
        self, channels: int, *, heads: int = 1, parts: int = 2, dropout: float = 0.1, norm: str = "BN"
    ) -> None:
        super().__init__()
        self.heads = check_groups("heads", heads, channels)
        self.parts = check_groups("parts", parts, channels // heads)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability from 0 to below 1, got {dropout}")
        self.dropout = dropout
        self.query_key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.mixture = nn.Linear(channels // heads, parts, bias=False) if parts > 1 else None
        self.out = ConvNorm(channels, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """A level (N, C, H, W) to the same shape."""
        small = functional.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        query, key = self.query_key(x), self.query_key(small)
        width = query.shape[1] // self.heads
        # (N, heads * parts, cells, channels), where v is every part's.
        q, k = (_cells(maps, self.heads * self.parts) for maps in (query, key))
        v = _cells(self.value(small), self.heads).repeat_interleave(self.parts, dim=1)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=width**-0.5)
        if self.mixture is not None:
            mean = query.mean(dim=(2, 3)).unflatten(1, (self.heads, width))
            shares = self.mixture(mean).softmax(dim=2)  # (N, heads, parts)
            seen = (seen.unflatten(1, (self.heads, self.parts)) * shares[..., None, None]).sum(dim=2)
        return x + self.out(seen.transpose(2, 3).reshape(x.shape))


class GroundingTransformer(nn.Module):
    """What every cell of a fine level sees in a coarse one.

    With q of the fine level, k and v of the coarse one and its J cells, each by a 1x1 convolution, the y_i are

        "dot":       sum_j (q_i . k_j) v_j / J, as in the authors' code. Its cost is linear: (sum_j v_j k_j') q_i / J
        "softmax":   sum_j softmax_j(q_i . k_j) v_j
        "distance":  sum_j softmax_j(-|q_i - k_j|^2) v_j, as in the paper

    and norm(conv1x1(y)) comes out, which starts at 0.

    Args:
        channels: channels C of both levels; q, k and v have half as many.
        similarity: see above.
        norm: a name of :data:`dyhead.layers.conv_norm.NORMS`.

    Raises:
        ValueError: an unknown similarity.
    """

    def __init__(self, channels: int, *, similarity: str = "dot", norm: str = "BN") -> None:
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity: expected one of {', '.join(map(repr, SIMILARITIES))}, got {similarity!r}")
        inner = max(channels // 2, 1)
        self.similarity = similarity
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = ConvNorm(inner, channels, 1, norm, bias=True)
        nn.init.zeros_(self.out.norm.weight)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Levels (N, C, H, W) and (N, C, H', W') to (N, C, H, W)."""
        q, k, v = _cells(self.query(fine)), _cells(self.key(coarse)), _cells(self.value(coarse))
        if self.similarity == "dot":
            seen = q @ ((k / k.shape[2]).transpose(2, 3) @ v)
        elif self.similarity == "softmax":
            seen = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:  # |q|^2 is the same for all cells of the coarse level
            squares = k.square().sum(dim=3)[:, :, None].expand(-1, -1, q.shape[2], -1)
            seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=-squares.to(q.dtype), scale=2.0)
        return self.out(seen.transpose(2, 3).reshape(len(fine), -1, *fine.shape[2:]))


class RenderingTransformer(nn.Module):
    """A coarse level with the detail of a finer one.

        ReLU(norm(conv3x3(fine), strided) + norm(conv3x3(coarse)) * ReLU(norm(conv1x1(mean(fine)))))

    Args:
        channels: channels C of both levels.
        octaves: how many times the coarse level is half as large.
        norm: a name of :data:`dyhead.layers.conv_norm.NORMS`.
    """

    def __init__(self, channels: int, *, octaves: int = 1, norm: str = "BN") -> None:
        super().__init__()
        self.down = ConvNorm(channels, channels, 3, norm, stride=2**octaves)
        self.coarse = ConvNorm(channels, channels, 3, norm)
        self.gate = ConvNorm(channels, channels, 1, norm)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Levels (N, C, H', W') and (N, C, H, W) to (N, C, H', W')."""
        gate = self.gate(fine.mean(dim=(2, 3), keepdim=True)).relu()
        return (self.down(fine) + self.coarse(coarse) * gate).relu()


class _Level(nn.Module):
    """What becomes of one level."""

    def __init__(
        self,
        itself: SelfTransformer,
        grounding: list[GroundingTransformer],
        rendering: list[RenderingTransformer],
        channels: int,
    ) -> None:
        super().__init__()
        self.itself = itself
        self.grounding = nn.ModuleList(grounding)  # of the coarser levels, fine to coarse
        self.rendering = nn.ModuleList(rendering)  # of the finer levels, fine to coarse
        self.fuse = nn.Conv2d((2 + len(grounding) + len(rendering)) * channels, channels, 3, padding=1)
        nn.init.kaiming_uniform_(self.fuse.weight, a=1)
        nn.init.zeros_(self.fuse.bias)

    def forward(self, number: int, levels: list[Tensor]) -> Tensor:
        x = levels[number]
        maps = [
            self.itself(x),
            *(ground(x, coarse) for ground, coarse in zip(self.grounding, levels[number + 1 :], strict=True)),
            *(render(x, fine) for render, fine in zip(self.rendering, levels[:number], strict=True)),
            x,
        ]
        return self.fuse(torch.cat([each.to(x.dtype) for each in maps], dim=1))


def _cells(maps: Tensor, groups: int = 1) -> Tensor:
    """(N, C, H, W) to (N, groups, H * W, C / groups)."""
    return maps.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
