"""The hard sigmoid of Eq. 3, with a gradient that leads back from its limits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyhead.ops.transforms import in_forward_mode


def hard_sigmoid(x: Tensor) -> Tensor:
    """``max(0, min(1, (x + 1) / 2))``, from which training finds back where it is 0 or 1.

    Its own derivative is 0 there, so that what was driven to a limit would stay, whatever the loss says: a level whose
    weight is 0 for every image would be lost. In the backward pass, therefore, x outside of [-1, 1] gets the gradient
    that it would have at the limit, if a step against it leads back, and else 0. Forward mode, torch.jit.script and
    torch.jit.trace have the function's own derivative.

    Args:
        x: of any shape.
    """
    if not torch.jit.is_scripting() and not torch.jit.is_tracing():  # alone: torch.jit.script leaves the branch out
        # torch.compile cannot trace in_forward_mode, and differentiates the code of _HardSigmoid.forward itself.
        reverse_mode = torch.compiler.is_compiling() or not in_forward_mode()
        return _HardSigmoid.apply(x) if reverse_mode else plain_hard_sigmoid(x)
    return plain_hard_sigmoid(x)


def plain_hard_sigmoid(x: Tensor) -> Tensor:
    """The same with its own derivative."""
    return ((x + 1) / 2).clamp(0, 1)


class _HardSigmoid(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return plain_hard_sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outward = (x < -1) & (gradient > 0) | (x > 1) & (gradient < 0)
        return (gradient / 2).masked_fill(outward, 0)
