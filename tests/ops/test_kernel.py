"""The compiled operator against the reference, over shapes, types and offsets that are unkind to a kernel."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyhead import _C
from dyhead.ops.reference import pyramid_deform_conv
from tests.ops.shapes import SHAPES

operator = torch.ops.dyhead.pyramid_deform_conv2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_result_and_gradients_are_the_references(options, dtype, make_case):
    case = make_case(**options)
    expected, expected_grads = case.run(pyramid_deform_conv)
    result, grads = case.map(lambda tensor: tensor.to(dtype)).run(operator)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result.double(), expected, **tolerance)
    # A float32 position close to a pixel centre may fall to its other side, where the offset's gradient differs, so the
    # float32 gradients are compared with the reference in float32.
    if dtype == torch.float32:
        _, expected_grads = case.map(lambda tensor: tensor.to(dtype)).run(pyramid_deform_conv)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = max(1.0, expected_grad.abs().max().item()) if expected_grad.numel() else 1.0
        torch.testing.assert_close(grad / scale, expected_grad / scale, **tolerance)


# Products of bfloat16 as the instruction set has them need samples rounded to it, and take subnormal values for 0.
PRODUCTS_OF_BFLOAT16 = _C.build_info()["cpu_path"] == "avx512_bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", SHAPES[:-1], ids=str)
def test_half_types_round_once(options, dtype, make_case):
    """The error is that of rounding the exact result, which any half-precision run has at least.

    Where samples are rounded, too, the result and the gradient of the weight have more: at most half a unit in the last
    place of every sample, which is 2^-9 of the sum of all terms without their signs.
    """
    case = make_case(**options, dtype=dtype)
    result, grads = case.run(operator)
    exact, exact_grads = case.map(torch.Tensor.double).run(pyramid_deform_conv)
    unsigned = case.map(torch.Tensor.double)
    unsigned.features = [feature.detach().abs().requires_grad_() for feature in unsigned.features]
    unsigned.weight, unsigned.grad = unsigned.weight.detach().abs().requires_grad_(), unsigned.grad.abs()
    terms, term_grads = unsigned.run(pyramid_deform_conv)
    names = [f"features[{i}]" for i in range(len(case.features))] + [
        name for name in ("offset", "weight", "bias", "mask", "level_weight") if getattr(case, name) is not None
    ]
    everything = zip(["result", *names], [result, *grads], [exact, *exact_grads], [terms, *term_grads], strict=True)
    for name, got, best, total in everything:
        wanted = dtype if got.dtype == dtype else torch.float32
        rounding = (best.to(wanted).double() - best).abs().max()
        noise = 1e-5 * best.abs().max()  # of float32 sums
        if PRODUCTS_OF_BFLOAT16 and dtype == torch.bfloat16 and name in ("result", "weight"):
            rounding = rounding + 2**-9 * total.abs()
        assert ((got.double() - best).abs() <= 1.01 * rounding + noise).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 96], ids=["scalar", "vector"])
def test_half_values_are_read_exactly(channels, dtype):
    """All values that a half type has, subnormal ones too, go through a weight of one unchanged."""
    values = torch.arange(2**16).to(torch.uint16).view(dtype)
    # Infinities pass only where no other channel multiplies them with a weight of zero.
    values = values[~values.isnan()] if channels == 1 else values[values.isfinite()]
    feature = values[: len(values) // channels * channels].view(-1, channels, 1, 1)
    weight = torch.eye(channels).to(dtype).view(1, channels, channels, 1, 1)
    offset = torch.zeros(len(feature), 2, 1, 1)
    result = operator([feature], offset, weight, None, None, None, True, None, [1, 1], [0, 0], [1, 1])
    if PRODUCTS_OF_BFLOAT16 and dtype == torch.bfloat16:
        feature = torch.where(feature.abs() < torch.finfo(dtype).tiny, 0, feature)
    assert torch.equal(result, feature)


def test_gradcheck_of_every_input(make_case, device):
    case = make_case(channels=4, out_channels=2, groups=2, offset_groups=2, size=(1, 3), levels=((2, 6), (1, 3)),
                     kernel=(1, 2), spread=0.7, device=device)  # fmt: skip
    levels = len(case.features)

    def function(*tensors):
        features, (offset, weight, bias, mask, level_weight) = list(tensors[:levels]), tensors[levels:]
        return operator(features, offset, weight, bias, mask, level_weight, *case.geometry)

    # A CUDA device adds up the features' gradient in any order: two runs differ in the last digits.
    assert torch.autograd.gradcheck(function, case.tensors(), nondet_tol=1e-12 if device == "cuda" else 0.0)


def test_only_needed_gradients_are_computed(make_case):
    case = make_case()
    _, expected = case.run(operator)
    detached = case.map(lambda tensor: tensor)
    arguments = detached.arguments()
    backward = torch.ops.dyhead._pyramid_deform_conv2d_backward
    for needs in itertools.product([False, True], repeat=6):
        features, *others = backward(case.grad, *arguments, list(needs))
        grads = [*(features or [None] * 3), *(grad if grad.numel() else None for grad in others)]
        needed = [*[needs[0]] * 3, *needs[1:]]
        for grad, expected_grad, need in zip(grads, expected, needed, strict=True):
            assert (grad is not None) == need
            if need:
                torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_unreachable_positions_read_zero_and_have_no_gradient(dtype, make_case):
    case = make_case(dtype=dtype, spread=1.0)
    bad = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, 2.0**63, -(2.0**62), 1e6, -1e6]
    )
    offset = case.offset.detach().clone()
    flat = offset.view(-1)
    hit = torch.randperm(flat.numel())[: flat.numel() // 2]
    flat[hit] = bad[torch.arange(len(hit)) % len(bad)].to(offset.dtype)
    case.offset = offset.requires_grad_()
    result, grads = case.run(operator)
    expected, expected_grads = case.run(pyramid_deform_conv)
    assert result.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    offset_grad = grads[len(case.features)].view(-1)
    assert not offset_grad[hit].any()
    if dtype != torch.bfloat16:  # rounding is tested elsewhere
        tolerance = {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close([result, *grads], [expected, *expected_grads], **tolerance)


def test_pixels_outside_the_map_are_zero_even_next_to_infinities():
    feature = torch.full((1, 20, 1, 1), float("inf"), dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([-1.5, 0.0], dtype=torch.float64).view(1, 2, 1, 1).requires_grad_()
    weight = torch.ones(1, 1, 20, 1, 1, dtype=torch.float64)
    for function in (operator, pyramid_deform_conv):
        result = function([feature], offset, weight, None, None, None, True, None, [1, 1], [0, 0], [1, 1])
        grads = torch.autograd.grad(result, [feature, offset])
        assert result.item() == 0
        assert not grads[0].any()
        assert not grads[1].any()


def test_far_positions_keep_their_precision():
    """Pixel 3,000,001 of a level: float32 holds it, but not its normalised coordinate to a pixel's accuracy."""
    width = 3_000_002
    feature = torch.zeros(1, 1, 1, width)
    feature[..., -1] = 1
    offset = torch.zeros(1, 2, 1, width)
    weight = torch.ones(1, 1, 1, 1, 1)
    result = operator([feature], offset, weight, None, None, None, True, None, [1, 1], [0, 0], [1, 1])
    assert torch.equal(result, feature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_in_channels_last_out(dtype, make_case):
    case = make_case(dtype=dtype, channels=32, out_channels=8)
    last = case.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    result, grads = last.run(operator)
    expected, expected_grads = case.run(operator)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads[:3])
    assert all(grad.is_contiguous() for grad in expected_grads)
    torch.testing.assert_close([result, *grads], [expected, *expected_grads], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 200, "out_channels": 70, "size": (20, 21), "levels": ((40, 42), (20, 21))},
        # Much to do for what grows with output channels only: packing, the gradient of the bias.
        {"channels": 2, "out_channels": 256, "size": (100, 101), "levels": ((100, 101),)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(options, dtype, make_case):
    case = make_case(**options, dtype=dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            result, grads = case.run(operator)
            runs.append([result, *grads])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_runs_when_deterministic_algorithms_are_asked_for(make_case):
    case = make_case()
    expected = case.run(operator)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(case.run(operator), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("path", [path for path in _C.build_info()["cpu_paths"] if path != _C.build_info()["cpu_path"]])
def test_lesser_instruction_sets_give_the_same(path):
    """The tests above run on the machine's best instruction set; PyTorch's own variable asks for a lesser one."""
    order = _C.build_info()["cpu_paths"]
    if order.index(path) > order.index(_C.build_info()["cpu_path"]):
        pytest.skip(f"this machine has no {path}")
    names = (
        "(references and float32) or half or asked_for or compiled_is_the_definition or (first_of_equal and compiled)"
    )
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in ("test_border.py", "test_regions.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": path, "DYHEAD_EXPECTED_PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_instruction_set_is_the_one_asked_for():
    expected = os.environ.get("DYHEAD_EXPECTED_PATH")
    assert expected in (None, _C.build_info()["cpu_path"])
