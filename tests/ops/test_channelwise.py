"""Statistics of channels and the maximum of two affine maps, compiled, against NumPy and plain PyTorch."""

import numpy as np
import pytest
import torch

from dyhead.ops import backend, channelwise
from dyhead.ops.channelwise import affine_maximum, channel_statistics
from tests.ops.maps import MAP_SHAPES, make_maps


@pytest.mark.parametrize("options", MAP_SHAPES, ids=str)
def test_statistics_are_mean_and_variance(options):
    x = make_maps(**{**options, "count": 1})[0][0]
    values = x.detach().numpy()
    expected = np.stack([values.mean((2, 3)), values.var((2, 3))], axis=1)
    np.testing.assert_allclose(channel_statistics(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_variance_survives_a_large_mean():
    """The mean of squares minus the square of the mean would lose all digits in float32."""
    x = torch.randn(1, 3, 40, 50) + torch.tensor([0.0, 1e3, 1e4])[:, None, None]
    expected = x.double().var(dim=(2, 3), correction=0)
    torch.testing.assert_close(channel_statistics(x)[:, 1].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", MAP_SHAPES, ids=str)
def test_maximum_and_gradients_are_the_definitions(options):
    xs, slopes, intercepts = make_maps(**options)
    inputs = [*xs, slopes, intercepts]
    result, expected = (f(xs, slopes, intercepts) for f in (affine_maximum, channelwise.define_affine_maximum))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(result)
    grads, expected_grads = (torch.autograd.grad(out, inputs, grad) for out in (result, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-11)


def test_maximum_is_the_larger_map():
    x = torch.tensor([-2.0, 3.0]).view(1, 1, 1, 2)
    slopes, intercepts = torch.tensor([[[[1.0]], [[-2.0]]]]), torch.tensor([[[0.5], [1.0]]])
    assert affine_maximum([x], slopes, intercepts).flatten().tolist() == [5.0, 3.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype):
    xs, slopes, intercepts = make_maps(3, channels=70, dtype=dtype)
    wide = [x.detach().double() for x in xs]
    expected = channelwise.define_affine_maximum(wide, slopes.double(), intercepts.double())
    result = affine_maximum(xs, slopes, intercepts)
    assert result.dtype == dtype
    half_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(result.double(), expected, rtol=1.01 * half_unit, atol=2e-6)
    statistics = channel_statistics(xs[0])
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics.double(), channel_statistics(wide[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_are_rounded_once(dtype):
    """Terms that cancel (a map with a large mean) must not be rounded before they are added."""
    xs, slopes, intercepts = make_maps(2, size=(30, 20), dtype=dtype)
    x = (xs[0].detach() + 50).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for statistic in (0, 1):
        (grad,) = torch.autograd.grad(channel_statistics(x)[:, statistic].sum(), x)
        (expected,) = torch.autograd.grad(channelwise.define_channel_statistics(wide)[:, statistic].sum(), wide)
        torch.testing.assert_close(grad.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    inputs, wides = [*xs, slopes, intercepts], [t.detach().double().requires_grad_() for t in [*xs, slopes, intercepts]]
    result = affine_maximum(xs, slopes, intercepts)
    expected = channelwise.define_affine_maximum(wides[:2], *wides[2:])
    grad = torch.randn_like(result)
    grads = torch.autograd.grad(result, inputs, grad)
    expected_grads = torch.autograd.grad(expected, wides, grad.double())
    for got, best in zip(grads, expected_grads, strict=True):
        assert (got.double() - best).abs().max() <= torch.finfo(got.dtype).eps * best.abs().max() * 1.01 + 1e-4


def test_gradcheck():
    xs, slopes, intercepts = make_maps(2, size=(2, 3))
    assert torch.autograd.gradcheck(lambda *t: affine_maximum(t[:2], *t[2:]), (*xs, slopes, intercepts))
    assert torch.autograd.gradcheck(channel_statistics, xs[:1])


def test_nan_and_ties_are_those_of_torch_maximum():
    x = torch.tensor([float("nan"), 0.0, 1.0, -1.0, float("inf")]).view(1, 1, 1, 5).requires_grad_()
    slopes, intercepts = torch.tensor([[[[1.0]], [[-1.0]]]]), torch.zeros(1, 2, 1)
    result, expected = affine_maximum([x], slopes, intercepts), torch.maximum(x, -x)
    torch.testing.assert_close(result, expected, equal_nan=True)
    for out in (result, expected):
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.flatten().tolist() == [0.0, 0.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("last", [False, True])
def test_results_have_the_inputs_layout(last):
    xs, slopes, intercepts = make_maps(2, last=last)
    result = affine_maximum(xs, slopes, intercepts)
    grads = torch.autograd.grad(result.sum(), xs)
    for tensor in (result, *grads):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == last
        assert tensor.is_contiguous() == (not last)


def test_same_bits_for_any_number_of_threads():
    xs, slopes, intercepts = make_maps(2, channels=256, size=(80, 100), dtype=torch.float32)  # work for 16 threads
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            result = affine_maximum(xs, slopes, intercepts)
            grads = torch.autograd.grad(result.square().sum(), [*xs, slopes, intercepts])
            runs.append([result, *grads, channel_statistics(xs[0])])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    "options", [*MAP_SHAPES[:2], MAP_SHAPES[5], {"dtype": torch.bfloat16, "size": (1, 1)}], ids=str
)
def test_opcheck(options):
    xs, slopes, intercepts = make_maps(**options)
    torch.library.opcheck(torch.ops.dyhead.affine_maximum.default, (xs, slopes, intercepts))
    torch.library.opcheck(torch.ops.dyhead.channel_statistics.default, (xs[0],))


def test_compiles(monkeypatch):
    monkeypatch.setenv("CI", "true")  # where Inductor refuses operators that have a decomposition as well
    xs, slopes, intercepts = make_maps(1, dtype=torch.float32)

    def function(x):
        return affine_maximum([x * 2], slopes, intercepts) * channel_statistics(x)[:, 0, :, None, None]

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(xs[0]), function(xs[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda xs, s, i: ([], s, i), "xs: expected at least one map, got an empty list"),
        (lambda xs, s, i: ([xs[0], xs[1][..., :3]], s, i), r"xs\[1\]: expected \(2, 5, 4, 7\), got \(2, 5, 4, 3\)"),
        (lambda xs, s, i: ([xs[0], xs[1].float()], s, i), r"xs\[1\]: expected torch.float64, got torch.float32"),
        (lambda xs, s, i: ([x[0] for x in xs], s, i), r"xs\[0\]: expected \(N, C, H, W\)"),
        (lambda xs, s, i: (xs, s[:, :, :1], i), r"slopes: expected \(2, 2, 2, 5\), got \(2, 2, 1, 5\)"),
        (lambda xs, s, i: (xs, s, i[:1]), r"intercepts: expected \(2, 2, 5\), got \(1, 2, 5\)"),
        (lambda xs, s, i: (xs, s.float(), i), "slopes: expected torch.float64, got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    xs, slopes, intercepts = make_maps()
    arguments = change([x.detach() for x in xs], slopes.detach(), intercepts.detach())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.affine_maximum(*arguments)
    if arguments[1].dtype == torch.float64:  # the definition takes any type
        with pytest.raises(RuntimeError, match=message):
            channelwise.define_affine_maximum(*arguments)


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda xs, s, i: affine_maximum(xs[0], s, i), r"xs: expected a list of .*, got Tensor \(2, 5, 4, 7\)"),
        (lambda xs, s, i: affine_maximum(dict(enumerate(xs)), s, i), "xs: expected a list of at least one map, got {0"),
        (lambda xs, s, i: affine_maximum([], s, i), "xs: expected at least one map, got an empty list"),
        (lambda xs, s, i: affine_maximum([xs[0], None], s, i), r"xs\[1\]: expected a tensor, got None"),
        (lambda xs, s, i: affine_maximum(xs, None, i), "slopes: expected a tensor, got None"),
        (lambda xs, s, i: affine_maximum(xs, s, 1.0), "intercepts: expected a tensor, got 1.0"),
        (lambda xs, s, i: affine_maximum([x.int() for x in xs], s, i), r"xs\[0\]: expected float64, float32, "),
        (lambda xs, s, i: channel_statistics(None), "x: expected a tensor, got None"),
        (lambda xs, s, i: channel_statistics(xs[0][0]), r"x: expected \(N, C, H, W\) with .*, got \(5, 4, 7\)"),
        (lambda xs, s, i: channel_statistics(xs[0][:, :0]), r"x: expected \(N, C, H, W\) with .*, got \(2, 0, 4, 7\)"),
        (lambda xs, s, i: channel_statistics(xs[0].long()), "x: expected float64, float32, bfloat16 or float16, got "),
        (lambda xs, s, i: channel_statistics(xs[0][0].to("meta")), r"x: expected \(N, C, H, W\) with .*, got \(5"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_public_functions_are_named(function, message, name):
    with backend(name), pytest.raises(RuntimeError, match=f"^{message}"):
        function(*make_maps())


def test_second_derivatives_say_what_has_them():
    xs, slopes, intercepts = make_maps(1)
    (grad,) = torch.autograd.grad(affine_maximum(xs, slopes, intercepts).square().sum(), xs, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
