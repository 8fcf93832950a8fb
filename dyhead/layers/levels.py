"""Feature pyramids: splitting, checking and joining them."""

from __future__ import annotations

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


def split_pyramid(pyramid: Pyramid, channels: int, round_up: bool = False) -> list[Tensor]:
    """The levels of ``pyramid`` as a list, after checking that they form a valid pyramid.

    Args:
        pyramid: levels from fine to coarse.
        channels: number of channels C that every level must have.
        round_up: a level of size n is followed by one of ceil(n / 2); otherwise by one of floor(n / 2) or ceil(n / 2).

    Raises:
        TypeError: not a dict, list or tuple of floating-point tensors of one dtype.
        ValueError: no levels; a level with different channels, batch size or device, or not half the size of the
            previous level. The message names the level, what was expected and what came.
    """
    if torch.jit.is_scripting():
        return _scripted_levels(pyramid, channels)
    else:
        return _checked_levels(pyramid, channels, round_up)


def _scripted_levels(pyramid: dict[str, Tensor], channels: int) -> list[Tensor]:
    levels = list(pyramid.values())
    for level in levels:
        if level.dim() != 4 or level.shape[1] != channels:
            raise ValueError(f"pyramid: expected levels (N, {channels}, H, W), got {level.shape}")
    return levels


def _checked_levels(pyramid: Pyramid, channels: int, round_up: bool) -> list[Tensor]:
    if isinstance(pyramid, dict):
        names, levels = [repr(name) for name in pyramid], list(pyramid.values())
    elif isinstance(pyramid, (list, tuple)):
        names, levels = [str(i) for i in range(len(pyramid))], list(pyramid)
    else:
        raise TypeError(f"pyramid: expected a dict, list or tuple of levels, got {type(pyramid).__name__}")
    if not levels:
        raise ValueError("pyramid: expected at least one level, got none")

    for name, level in zip(names, levels, strict=True):
        if not isinstance(level, Tensor):
            raise TypeError(f"level {name}: expected a tensor, got {type(level).__name__}")
        if level.dim() != 4:
            raise ValueError(f"level {name}: expected 4 dimensions (N, C, H, W), got {tuple(level.shape)}")
        if not level.is_floating_point():
            raise TypeError(f"level {name}: expected a floating-point tensor, got {level.dtype}")
        if level.shape[1] != channels:
            raise ValueError(f"level {name}: expected {channels} channels, got {level.shape[1]}")
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
        if not all(_is_half(level.shape[d], finer.shape[d], round_up) for d in (2, 3)):
            rounding = "rounded up" if round_up else "rounded up or down"
            message = (
                f"level {name}: expected half the size of level {names[i - 1]} ({_size(finer)}), {rounding}, "
                f"got {_size(level)}"
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


def _is_half(size: int, of: int, round_up: bool) -> bool:
    return size == (of + 1) // 2 or (not round_up and size == of // 2)


def _size(level: Tensor) -> str:
    return f"{level.shape[2]} x {level.shape[3]}"
