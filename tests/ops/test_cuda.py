"""The CUDA kernels against the reference: on a GPU, and the same kernel bodies emulated on the CPU."""

import pytest
import torch

from dyhead.ops.reference import pyramid_deform_conv
from tests.ops.machines import machine
from tests.ops.shapes import CUDA_SHAPES, SHAPES

PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
# Of a product's operands: the largest error of rounding, relative to the value.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-9, "float16": 2.0**-11}


@pytest.fixture(name="place", scope="module", params=["emulation", pytest.param("cuda", marks=pytest.mark.cuda)])
def place_fixture(request):
    return machine(request.param)


@pytest.fixture(name="precision", params=PRECISIONS)
def precision_fixture(request):
    return request.param


def absolute(case):
    """A case of absolute values: its result and gradients are sums of all terms without their signs."""
    result = case.map(torch.Tensor.double)
    result.features = [feature.detach().abs().requires_grad_() for feature in result.features]
    result.weight, result.grad = result.weight.detach().abs().requires_grad_(), result.grad.abs()
    if result.bias is not None:
        result.bias = result.bias.detach().abs().requires_grad_()
    return result


def check(got, exact, terms, unit, name):
    """Both operands and the result are rounded once: at most 2 * unit of every term, and the result's own rounding."""
    own = torch.finfo(got.dtype).eps
    bound = (2.1 * unit + 4 * own) * terms + 0.51 * own * exact.abs() + 1e-30
    if got.dtype in (torch.float32, torch.float64):
        bound = bound + 60 * own * terms  # sums in another order
    error = (got.double() - exact).abs()
    assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.2f} times the bound"


@pytest.mark.parametrize("options", [*SHAPES, *CUDA_SHAPES], ids=str)
def test_result_is_the_references(options, precision, place, make_case):
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(**options, dtype=dtype)
    got = place.forward(case, allow_tf32=allow_tf32)
    exact = pyramid_deform_conv(*case.map(torch.Tensor.double).arguments()).detach()
    terms = pyramid_deform_conv(*absolute(case).arguments()).detach()
    assert got.dtype == dtype
    check(got, exact, terms, UNIT[precision], "result")
