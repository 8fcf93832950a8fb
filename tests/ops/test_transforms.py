"""The operators in forward mode and under torch.func, compared with central differences, loops and definitions."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dyhead.ops import backend, border_align, channelwise, deform_conv2d, deform_roi_pool, pyramid_deform_conv2d
from tests.ops.borders import make_borders
from tests.ops.maps import make_maps
from tests.ops.regions import make_regions


def convolution():
    def function(input, offset, weight, bias, mask):
        return deform_conv2d(input, offset, weight, bias, stride=(2, 1), padding=1, mask=mask)

    return function, random((2, 4, 5, 4), (2, 36, 3, 4), (2, 2, 3, 3), (2,), (2, 18, 3, 4))


def pyramid():
    def function(fine, coarse, offset, weight, bias, mask, level_weight):
        return pyramid_deform_conv2d([fine, coarse], offset, weight, bias, mask, level_weight)

    shapes = (1, 2, 6, 4), (1, 2, 3, 2), (1, 18, 3, 2), (2, 3, 2, 3, 3), (3,), (1, 9, 3, 2), (1, 2)
    return function, random(*shapes)


def raw():
    """The operator itself, without the public function."""
    _, arguments = pyramid()

    def function(fine, coarse, *others):
        settings = True, None, [1, 1], [0, 0], [1, 1]
        return torch.ops.dyhead.pyramid_deform_conv2d([fine, coarse], *others, *settings)

    return function, arguments


def statistics():
    return channelwise.channel_statistics, random((2, 3, 4, 5))


def maximum():
    (x, y), slopes, intercepts = make_maps()
    arguments = tuple(tensor.detach() for tensor in (x, y, slopes, intercepts))
    return lambda x, y, *others: channelwise.affine_maximum([x, y], *others), arguments


def borders():
    x, boxes, _ = make_borders(channels=2, grid=(2, 2))
    return lambda x: border_align(x, boxes, 4), (x,)


def regions():
    x, rois, offset, *_ = make_regions(channels=2, size=(6, 8), side=2)
    return lambda x, offset: deform_roi_pool(x, rois, offset, 2, 0.125, aligned=False), (x, offset)


def random(*shapes):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


OPERATORS = [convolution, pyramid, raw, statistics, maximum, borders, regions]


@pytest.fixture(params=OPERATORS, ids=lambda make: make.__name__)
def operator(request):
    """A function of tensors, and tensors for it."""
    return request.param()


@pytest.fixture
def tangents(operator):
    torch.manual_seed(1)
    return tuple(torch.randn_like(tensor) for tensor in operator[1])


def every(arguments):
    return tuple(range(len(arguments)))


def loss(function):
    return lambda *arguments: function(*arguments).square().sum()


def define(compute, *arguments):
    """What `compute` gives for the definitions in plain PyTorch."""
    with backend("reference"):
        return compute(*arguments)


class Calls(TorchDispatchMode):
    """Collects the names of dyhead's compiled operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dyhead":
            self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


class TestForwardMode:
    def differences(self, function, arguments, tangents, step=1e-6):
        def at(sign):
            return function(*(a + sign * step * t for a, t in zip(arguments, tangents, strict=True)))

        return (at(1) - at(-1)) / (2 * step)

    def test_jvp(self, operator, tangents):
        function, arguments = operator
        result, tangent = torch.func.jvp(function, arguments, tangents)
        expected = self.differences(function, arguments, tangents)
        assert expected.abs().max() > 1
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result, function(*arguments))

    def test_one_tangent(self, operator, tangents):
        function, arguments = operator
        for i, tangent in enumerate(tangents):
            others = [torch.zeros_like(t) for t in tangents]
            others[i] = tangent
            with forward_ad.dual_level():
                dual = [a if i != j else forward_ad.make_dual(a, tangent) for j, a in enumerate(arguments)]
                got = forward_ad.unpack_dual(function(*dual)).tangent
            torch.testing.assert_close(got, self.differences(function, arguments, others), rtol=1e-6, atol=1e-6)

    def test_jacfwd_and_linearize(self, operator, tangents):
        function, arguments = operator
        _, expected = torch.func.jvp(function, arguments, tangents)
        torch.testing.assert_close(torch.func.linearize(function, *arguments)[1](*tangents), expected)
        last = len(arguments) - 1
        forward, reverse = (jac(function, argnums=last)(*arguments) for jac in (torch.func.jacfwd, torch.func.jacrev))
        torch.testing.assert_close(forward, reverse)

    def test_without_gradients(self, operator, tangents):
        function, arguments = operator
        with torch.no_grad():
            _, tangent = torch.func.jvp(function, arguments, tangents)
        assert tangent.abs().max() > 0

    def test_of_values_in_half_precision(self):
        function, arguments = convolution()
        arguments = tuple(tensor.bfloat16() for tensor in arguments)
        _, tangent = torch.func.jvp(function, arguments, arguments)
        _, expected = torch.func.jvp(function, *[tuple(tensor.double() for tensor in arguments)] * 2)
        assert tangent.dtype == torch.bfloat16
        torch.testing.assert_close(tangent.double(), expected, rtol=1e-2, atol=0.1)

    def test_of_a_compiled_function(self):
        function, arguments = convolution()
        expected = torch.func.jvp(function, arguments, arguments)

        def tangent(*arguments):
            return torch.func.jvp(function, arguments, arguments)

        torch._dynamo.reset()
        compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), expected)

    @pytest.mark.parametrize("make", [convolution, maximum])
    def test_tangents_of_a_gradient_are_refused(self, make):
        function, arguments = make()
        arguments = [a.requires_grad_() for a in arguments]
        result = function(*arguments)
        one = torch.ones_like(result)
        with forward_ad.dual_level():
            torch.autograd.grad(result, arguments, one, retain_graph=True)
            with pytest.raises(RuntimeError, match=r"second derivatives: expected the functions of dyhead\.ops\.ref"):
                torch.autograd.grad(result, arguments, forward_ad.make_dual(one, one))


class TestReverseMode:
    def test_grad_runs_the_compiled_operators(self, operator):
        function, arguments = operator
        grad = torch.func.grad(loss(function), argnums=every(arguments))
        with Calls() as calls:
            got = grad(*arguments)
        assert calls.names
        torch.testing.assert_close(got, define(grad, *arguments))

    def test_jacrev(self, operator):
        function, arguments = operator
        jacobian = torch.func.jacrev(lambda *a: function(*a).flatten()[:7], argnums=every(arguments))
        torch.testing.assert_close(jacobian(*arguments), define(jacobian, *arguments))

    @pytest.mark.parametrize("transform", ["hessian", "reverse twice", "forward twice", "reverse over forward"])
    def test_second_derivatives_run_the_definition(self, operator, transform):
        function, arguments = operator
        outer, inner = {
            "hessian": (torch.func.jacfwd, torch.func.jacrev),
            "reverse twice": (torch.func.jacrev, torch.func.jacrev),
            "forward twice": (torch.func.jacfwd, torch.func.jacfwd),
            "reverse over forward": (torch.func.jacrev, torch.func.jacfwd),
        }[transform]
        last = len(arguments) - 1
        derivative = outer(inner(loss(function), argnums=last), argnums=last)
        got = derivative(*arguments)
        assert got.abs().max() > 0
        torch.testing.assert_close(got, define(derivative, *arguments))

    def test_autograd_around_torch_func_is_not_lost(self, operator):
        """Values that torch.func computes on the way still have gradients of the autograd outside."""
        function, arguments = operator
        arguments = [a.clone().requires_grad_() for a in arguments]

        def value(*arguments):
            return torch.func.grad_and_value(loss(function))(*arguments)[1]

        got = torch.autograd.grad(value(*arguments), arguments)
        torch.testing.assert_close(got, torch.autograd.grad(loss(function)(*arguments), arguments))

    def test_batched_gradients_name_what_to_use(self):
        function, arguments = convolution()
        with pytest.raises(RuntimeError, match=r"no batched gradients .*: expected torch\.func\.vmap or"):
            torch.autograd.functional.jacobian(lambda x: function(x, *arguments[1:]), arguments[0], vectorize=True)


class TestVmap:
    def mapped(self, arguments, which, size=3):
        """The arguments with a dimension of `size` put into some, anywhere, and the place of each."""
        torch.manual_seed(2)
        stacked, dims = [], []
        for i, (tensor, maps) in enumerate(zip(arguments, which, strict=True)):
            dim = (i + sum(which)) % (tensor.dim() + 1) if maps else None
            dims.append(dim)
            many = [tensor * (1 + 0.1 * n) for n in range(size)]
            stacked.append(torch.stack(many, dim) if maps else tensor)
        return stacked, tuple(dims)

    def loop(self, function, arguments, dims, size=3):
        results = [
            function(*(a if d is None else a.select(d, n) for a, d in zip(arguments, dims, strict=True)))
            for n in range(size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results)
        return tuple(map(torch.stack, zip(*results, strict=True)))

    def test_all_combinations(self, operator):
        function, arguments = operator
        for which in itertools.product([False, True], repeat=len(arguments)):
            if any(which):
                stacked, dims = self.mapped(arguments, which)
                got = torch.func.vmap(function, in_dims=dims)(*stacked)
                torch.testing.assert_close(got, self.loop(function, stacked, dims))

    def test_gradients_of_single_images(self, operator):
        function, arguments = operator
        which = [i % 2 == 0 for i in every(arguments)]
        stacked, dims = self.mapped(arguments, which)
        grad = torch.func.grad(loss(function), argnums=every(arguments))
        with Calls() as calls:
            got = torch.func.vmap(grad, in_dims=dims)(*stacked)
        assert calls.names
        torch.testing.assert_close(got, self.loop(grad, stacked, dims))

    def test_gradient_of_mapped_function(self, operator):
        function, arguments = operator
        stacked, dims = self.mapped(arguments, [True] * len(arguments))
        many = [torch.func.vmap(function, in_dims=dims), lambda *a: self.loop(function, a, dims)]
        got, expected = (torch.func.grad(loss(f), argnums=every(arguments))(*stacked) for f in many)
        torch.testing.assert_close(got, expected)

    def test_within_vmap(self):
        function, (input, offset, *others) = convolution()
        offsets = offset * torch.linspace(0, 1, 6, dtype=offset.dtype).view(2, 3, 1, 1, 1, 1)
        got = torch.func.vmap(torch.func.vmap(lambda offset: function(input, offset, *others)))(offsets)
        for i, j in itertools.product(range(2), range(3)):
            torch.testing.assert_close(got[i, j], function(input, offsets[i, j], *others))

    def test_under_autocast(self):
        function, arguments = convolution()
        stacked = [torch.stack([a.float(), 2 * a.float()]) for a in arguments]
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.func.vmap(function)(*stacked)
            expected = torch.stack([function(*(a[n] for a in stacked)) for n in range(2)])
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected)

    def test_of_nothing(self, operator):
        function, arguments = operator
        for i, argument in enumerate(arguments):
            dims = tuple(0 if i == j else None for j in every(arguments))
            none = [a if i != j else argument.expand(0, *a.shape) for j, a in enumerate(arguments)]
            assert torch.func.vmap(function, in_dims=dims)(*none).shape == (0, *function(*arguments).shape)

    def test_of_images_without_any(self):
        function, (input, offset, weight, bias, mask) = convolution()
        got = torch.func.vmap(function, in_dims=(0, 0, None, None, 0))(
            *(t.expand(3, *t.shape)[:, :0] for t in (input, offset)), weight, bias, mask.expand(3, *mask.shape)[:, :0]
        )
        assert got.shape == (3, 0, 2, 3, 4)
