"""The operator inside PyTorch: opcheck, compilation, export, autocast, second derivatives."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dyhead.ops import deform_conv2d, pyramid_deform_conv2d

operator = torch.ops.dyhead.pyramid_deform_conv2d
backward = torch.ops.dyhead._pyramid_deform_conv2d_backward


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "scales": [2.0, 1.0, 0.5]},
        {"mask": False, "bias": False, "level_weight": False, "groups": 2, "offset_groups": 3, "out_channels": 4},
    ],
    ids=str,
)
def test_opcheck(options, make_case, device):
    torch.library.opcheck(operator.default, make_case(device=device, **options).arguments())


@pytest.mark.parametrize("needs", [[True] * 6, [True, False] * 3, [False] * 6], ids=str)
def test_opcheck_of_the_backward_operator(needs, make_case, device):
    case = make_case(device=device)

    def detached(value):
        if isinstance(value, list):
            return [detached(item) for item in value]
        return value.detach() if isinstance(value, torch.Tensor) else value

    torch.library.opcheck(backward.default, (case.grad, *map(detached, case.arguments()), needs))


def test_opcheck_with_channels_last(make_case, device):
    case = make_case(device=device).map(
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    )
    torch.library.opcheck(operator.default, case.arguments())


def test_opcheck_of_the_convolution_geometry(make_case, device):
    case = make_case(device=device, levels=((5, 7),), level_weight=False)
    case.geometry = (False, None, [1, 1], [1, 1], [1, 1])
    torch.library.opcheck(operator.default, case.arguments())


def test_compiles_once_for_many_sizes(make_case, device):
    def function(features, offset, weight, bias, mask, level_weight, *geometry):
        features = [feature * 2 for feature in features]
        return pyramid_deform_conv2d(features, offset, weight, bias, mask.sigmoid(), level_weight).relu()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    # No size of the first equals another or a number of channels, which the compiler would take for the same symbol.
    for size in ((21, 27), (12, 13), (16, 10), (33, 20)):
        levels = [(2 * size[0], 2 * size[1]), size, ((size[0] + 1) // 2, (size[1] + 1) // 2)]
        case = make_case(device=device, size=size, levels=levels, dtype=torch.float32)
        compare = {"rtol": 1e-3, "atol": 1e-3} if device == "cuda" else {}  # TF32, and sums in any order
        torch.testing.assert_close(case.run(compiled), case.run(function), **compare)
    assert counter.frame_count == 1


def test_compiles_numbers_that_are_computed_from_sizes():
    def function(input, offset, weight, like):
        tap = like.shape[0]
        scales = [input.shape[2] / offset.shape[2]]
        wide = pyramid_deform_conv2d([input], offset, weight[None], dilation=(tap, 1), scales=scales)
        return wide + deform_conv2d(input, offset, weight, padding=tap, dilation=tap)

    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for tap in (2, 3):
        arguments = torch.randn(2, 4, 9, 10), torch.randn(2, 18, 9, 10), torch.randn(5, 4, 3, 3), torch.zeros(tap)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_compiled_autograd(make_case):
    case = make_case(dtype=torch.float32)
    expected = case.run(operator)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        operator(*case.arguments()).backward(case.grad)
    torch.testing.assert_close([tensor.grad for tensor in case.tensors()], expected[1])


def test_compiles_the_drop_in_with_inductor(monkeypatch):
    monkeypatch.setenv("CI", "true")  # where Inductor refuses operators that have a decomposition as well
    torch.manual_seed(0)
    input, weight = torch.randn(1, 4, 9, 8, requires_grad=True), torch.randn(4, 4, 3, 3)
    offset = torch.randn(1, 18, 9, 8)

    def function(input, offset, weight):
        return deform_conv2d(input.relu(), offset, weight, padding=1).tanh()

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(input, offset, weight), function(input, offset, weight))


def test_exports_with_dynamic_sizes(make_case, device):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(2, 5, 6, 3, 3))

        def forward(self, features, offset, mask):
            return pyramid_deform_conv2d(features, offset, self.weight, None, mask, scales=(2.0, 1.0))

    layer = Layer().to(device)
    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    size = {2: height, 3: width}

    def inputs(height, width):
        case = make_case(
            device=device, size=(height, width), levels=((2 * height, 2 * width), (height, width)), dtype=torch.float32
        )
        return case.features, case.offset, case.mask

    shapes = ([{2: 2 * height, 3: 2 * width}, size], size, size)
    program = torch.export.export(layer, inputs(7, 11), dynamic_shapes=shapes)
    assert any(node.target is operator.default for node in program.graph.nodes)
    for case in (inputs(7, 11), inputs(4, 6)):
        torch.testing.assert_close(program.module()(*case), layer(*case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_values_and_keeps_positions(dtype, make_case, device):
    case = make_case(device=device, dtype=torch.float32)
    cast = case.map(lambda tensor: tensor)
    with torch.autocast(device, dtype):
        result, grads = cast.run(operator)
    half = [feature.to(dtype) for feature in case.features]
    expected = operator(half, case.offset, case.weight.to(dtype), case.bias.to(dtype), case.mask, case.level_weight,
                        *case.geometry)  # fmt: skip
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    # Gradients come back in the types of the parameters.
    assert all(grad.dtype == torch.float32 for grad in grads)
    # On a GPU, features' gradients are added up in any order, and rounded.
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-2}
    torch.testing.assert_close(grads, list(torch.autograd.grad(expected, case.tensors(), case.grad)), **tolerance)


def test_autocast_takes_what_its_convolutions_return():
    """Half offsets from a convolution under autocast, float32 features from a normalisation."""
    torch.manual_seed(0)
    feature = torch.randn(1, 4, 6, 6)
    offsets, weight = torch.nn.Conv2d(4, 18, 3, padding=1), torch.randn(1, 4, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        offset = offsets(feature)
        assert offset.dtype == torch.bfloat16
        result = pyramid_deform_conv2d([feature], offset, weight)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert offsets.weight.grad.isfinite().all()


def test_autocast_leaves_float64_alone(make_case, device):
    case = make_case(device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(operator(*case.arguments()), case.run(operator)[0])


def test_autocast_compiles(make_case, device):
    case = make_case(device=device, dtype=torch.float32)

    def function(*arguments):
        with torch.autocast(device, torch.bfloat16):
            return operator(*arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case.arguments()), function(*case.arguments()))


def test_second_derivatives_name_the_reference(make_case, device):
    case = make_case(device=device)
    (grad,) = torch.autograd.grad(operator(*case.arguments()).sum(), case.offset, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives: expected the functions of dyhead\.ops\.reference"):
        grad.sum().backward()


def test_no_gradient_is_recorded_without_need(make_case, device):
    case = make_case(device=device)
    with torch.no_grad():
        assert not operator(*case.arguments()).requires_grad
    assert operator(*case.arguments()).requires_grad
