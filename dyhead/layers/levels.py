"""Feature pyramids: splitting, checking and joining them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dyhead.ops.checks import as_integer, describe

if TYPE_CHECKING:
    #: Levels from fine to coarse, each (N, C, H_l, W_l): a dict by name ({"p3": ..., "p4": ...}), a list or a tuple.
    Pyramid = dict[str, Tensor] | list[Tensor] | tuple[Tensor, ...]
else:
    # What TorchScript, which evaluates annotations, has a type for: in torch.jit.script a pyramid is a dict.
    Pyramid = dict[str, Tensor]


class EagerPyramidModule(nn.Module):
    """A module that takes pyramids and that torch.jit.script cannot take."""

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script calls first; its own error would be about annotations."""
        raise RuntimeError(
            f"torch.jit.script: expected a module without {type(self).__name__}; "
            "torch.jit.trace and torch.export take it"
        )


def split_pyramid(pyramid: Pyramid, channels: int, round_up: bool = False, halved: bool = True) -> list[Tensor]:
    """The levels of ``pyramid`` as a list, after checking that they form a valid pyramid.

    Args:
        pyramid: levels from fine to coarse.
        channels: number of channels C that every level must have.
        round_up: a level of size n is followed by one of ceil(n / 2); otherwise by one of floor(n / 2) or ceil(n / 2).
        halved: whether that is asked for at all; otherwise a level is no larger than the one before it, and its height
            and width have one ratio to that one's, to a pixel.

    Raises:
        TypeError: not a dict, list or tuple of floating-point tensors of one dtype.
        ValueError: no levels; a level with different channels, batch size or device, or of another size than asked for.
            The message names the level, what was expected and what came.
    """
    if torch.jit.is_scripting():
        return _scripted_levels(pyramid, [channels], True)
    else:
        return _checked_levels(pyramid, [channels], True, round_up, halved)


def split_levels(pyramid: Pyramid, channels: list[int], shared: bool) -> list[Tensor]:
    """:func:`split_pyramid` for levels that have these channels each, or, if ``shared``, all the first of them.

    Levels need not be halved. There must be as many as channels, unless ``shared``.
    """
    if torch.jit.is_scripting():
        return _scripted_levels(pyramid, channels, shared)
    else:
        return _checked_levels(pyramid, channels, shared, round_up=False, halved=False)


def relative_strides(levels: list[Tensor]) -> list[float]:
    """The stride of every level over that of the first, from their sizes.

    A level that is half of the one before it, rounded either way, has twice its stride. Of others, the ratio of the
    strides is the whole number that explains the sizes to a pixel, if there is one, or else that of the sizes: both
    levels then cover the same part of the image.
    """
    strides = [1.0]
    for i in range(1, len(levels)):
        if torch.jit.is_scripting():
            strides.append(2 * strides[-1])
        else:
            strides.append(strides[-1] * _stride_ratio(levels[i - 1], levels[i]))
    return strides


def _scripted_levels(pyramid: dict[str, Tensor], channels: list[int], shared: bool) -> list[Tensor]:
    levels = list(pyramid.values())
    if not shared and len(levels) != len(channels):
        raise ValueError(f"pyramid: expected {len(channels)} levels, got {len(levels)}")
    for i, level in enumerate(levels):
        expected = channels[0 if shared else i]
        if level.dim() != 4 or level.shape[1] != expected:
            raise ValueError(f"pyramid: expected levels (N, {expected}, H, W), got {level.shape}")
    return levels


def _checked_levels(pyramid: Pyramid, channels: list[int], shared: bool, round_up: bool, halved: bool) -> list[Tensor]:
    if isinstance(pyramid, dict):
        names, levels = [repr(name) for name in pyramid], list(pyramid.values())
    elif isinstance(pyramid, (list, tuple)):
        names, levels = [str(i) for i in range(len(pyramid))], list(pyramid)
    else:
        raise TypeError(f"pyramid: expected a dict, list or tuple of levels, got {type(pyramid).__name__}")
    if not levels:
        raise ValueError("pyramid: expected at least one level, got none")
    if shared:
        channels = channels * len(levels)
    if len(levels) != len(channels):
        raise ValueError(f"pyramid: expected {len(channels)} levels, got {len(levels)}")

    for name, level, expected in zip(names, levels, channels, strict=True):
        if not isinstance(level, Tensor):
            raise TypeError(f"level {name}: expected a tensor, got {type(level).__name__}")
        if level.dim() != 4:
            raise ValueError(f"level {name}: expected 4 dimensions (N, C, H, W), got {tuple(level.shape)}")
        if not level.is_floating_point():
            raise TypeError(f"level {name}: expected a floating-point tensor, got {level.dtype}")
        if level.shape[1] != expected:
            raise ValueError(f"level {name}: expected {expected} channels, got {level.shape[1]}")
        if level.shape[2] < 1 or level.shape[3] < 1:
            raise ValueError(f"level {name}: expected a height and width of at least 1, got {_size(level)}")

    first = levels[0]
    for i in range(1, len(levels)):
        name, finer, level = names[i], levels[i - 1], levels[i]
        if level.shape[0] != first.shape[0]:
            raise ValueError(
                f"level {name}: expected batch size {first.shape[0]} as in level {names[0]}, got {level.shape[0]}"
            )
        if level.dtype != first.dtype:
            raise TypeError(f"level {name}: expected {first.dtype} as in level {names[0]}, got {level.dtype}")
        if level.device != first.device:
            raise ValueError(f"level {name}: expected device {first.device} as in level {names[0]}, got {level.device}")
        if not (_is_half(finer, level, round_up) or (not halved and _stride_ratio(finer, level) > 0)):
            how = "rounded up" if round_up else "rounded up or down" if halved else "height and width in one ratio"
            message = (
                f"level {name}: expected {'half' if halved else 'no more than'} the size of level {names[i - 1]} "
                f"({_size(finer)}), {how}, got {_size(level)}"
            )
            if level.shape[2] > finer.shape[2] and level.shape[3] > finer.shape[3]:
                message += "; levels run from fine to coarse"
            raise ValueError(message)
    return levels


def join_pyramid(levels: list[Tensor], like: Pyramid) -> Pyramid:
    """``levels`` in the container type of ``like``: a dict with the same keys in the same order, a list or a tuple."""
    if torch.jit.is_scripting():
        joined: dict[str, Tensor] = {}
        for i, name in enumerate(like.keys()):
            joined[name] = levels[i]
        return joined
    else:
        return _joined(levels, like)


def _joined(levels: list[Tensor], like: Pyramid) -> Pyramid:
    if isinstance(like, dict):
        return dict(zip(like, levels, strict=True))
    return tuple(levels) if isinstance(like, tuple) else levels


def mean_of_levels(levels: list[Tensor]) -> Tensor:
    """Global average pool of every level, (N, L, C)."""
    return torch.stack([level.mean(dim=(2, 3)) for level in levels], dim=1)


def to_channels_last(level: Tensor) -> Tensor:
    """``level`` in channels_last; not copied if it is already, nor under torch.func, whose vmap knows no layouts."""
    if _under_functorch():
        return level
    return level.contiguous(memory_format=torch.channels_last)


def in_memory_format_of(x: Tensor, like: Tensor) -> Tensor:
    """``x`` (N, C, H, W), in channels_last if ``like`` is; not copied if it is already, nor under torch.func."""
    if _under_functorch():
        return x
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def flat(x: Tensor, size: list[int]) -> Tensor:
    """The start of each image's memory, (N, C, H, W) in NCHW order, as (N, C, *size)."""
    n, c = x.shape[0], x.shape[1]
    return x.flatten(1)[:, : c * size[0] * size[1]].reshape(n, c, size[0], size[1])


def _under_functorch() -> bool:
    if torch.jit.is_scripting():
        return False
    else:
        return torch._C._are_functorch_transforms_active()


def check_integer(name: str, value: object, least: int = 1) -> int:
    """``value``, the argument called ``name``, as Python's integer.

    Raises:
        ValueError: it is no integer (bools and floats are not), below ``least``, or more than 32 bits hold.
    """
    integer = as_integer(value)
    if integer is None or not least <= integer < 2**31:
        raise ValueError(f"{name}: expected an integer from {least} to {2**31 - 1}, got {describe(value)}")
    return integer


def check_groups(name: str, groups: object, channels: int) -> int:
    """``groups``, the argument called ``name``, as Python's integer; ValueError unless it divides ``channels``."""
    integer = as_integer(groups)
    if integer is None or integer < 1 or channels % integer:
        raise ValueError(f"{name}: expected a divisor of the {channels} channels, got {describe(groups)}")
    return integer


def _is_half(finer: Tensor, level: Tensor, round_up: bool = False) -> bool:
    return all(
        level.shape[d] == (finer.shape[d] + 1) // 2 or (not round_up and level.shape[d] == finer.shape[d] // 2)
        for d in (2, 3)
    )


def _stride_ratio(finer: Tensor, level: Tensor) -> float:
    """See :func:`relative_strides`; 0 if the level is larger than the finer one, or its height or width relatively."""
    if _is_half(finer, level):
        return 2.0
    sizes = [(finer.shape[d], level.shape[d]) for d in (2, 3)]
    if any(coarse > fine for fine, coarse in sizes):
        return 0.0
    ratio = math.sqrt(sizes[0][0] * sizes[1][0] / (sizes[0][1] * sizes[1][1]))
    # What the ratio can be, had the level a pixel more or less.
    least = max(fine / (coarse + 1) for fine, coarse in sizes)
    most = min(fine / (coarse - 1) if coarse > 1 else math.inf for fine, coarse in sizes)
    if least > most:
        return 0.0
    whole = [float(n) for n in (round(ratio), math.ceil(least)) if least <= n <= most]
    return whole[0] if whole else ratio


def _size(level: Tensor) -> str:
    return f"{level.shape[2]} x {level.shape[3]}"
