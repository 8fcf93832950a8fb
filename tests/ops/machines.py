"""Where the CUDA kernels run in tests: on a GPU, or emulated on the CPU (csrc/emulation)."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.ops import emulation


@dataclass
class Machine:
    """The operators of a device, on arguments that live on the CPU."""

    device: str
    operators: SimpleNamespace

    def forward(self, case, *, allow_tf32=False) -> Tensor:
        with torch.no_grad():
            moved = case.map(lambda tensor: tensor.to(self.device))
            return self.operators.pyramid_deform_conv2d(*moved.arguments(), allow_tf32).cpu()

    def backward(self, case, *, needs=(True,) * 6, allow_tf32=False, deterministic=False) -> list[Tensor | None]:
        """Gradients of all tensors of a case, in the order of `Case.tensors`; None for those not needed."""
        with torch.no_grad():
            moved = case.map(lambda tensor: tensor.to(self.device))
            features, *others = self.operators._pyramid_deform_conv2d_backward(
                moved.grad, *moved.arguments(), list(needs), allow_tf32, deterministic
            )
        grads = [grad.cpu() for grad in features] if needs[0] else [None] * len(case.features)
        tensors = (case.offset, case.weight, case.bias, case.mask, case.level_weight)
        for grad, tensor, needed in zip(others, tensors, needs[1:], strict=True):
            if tensor is not None:
                grads.append(grad.cpu() if needed else None)
        return grads


def machine(name: str) -> Machine:
    """The machine "emulation" or "cuda"."""
    if name == "emulation":
        emulation.load()
        return Machine("cpu", torch.ops.dyhead_emulated)
    return Machine("cuda", torch.ops.dyhead)
