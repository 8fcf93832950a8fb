"""Border alignment: the compiled operator and the definition in plain PyTorch against slow loops and the originals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dyhead.ops import backend, border_align
from dyhead.ops.border import define_border_align
from tests.ops.borders import BORDER_SHAPES, gradient_loop, make_borders, maxima_loop, put_far

operator = torch.ops.dyhead.border_align
backward = torch.ops.dyhead._border_align_backward
both = pytest.mark.parametrize("function", [operator, define_border_align], ids=["compiled", "definition"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("pool_size", [1, 4, 10])
def test_equals_the_originals(function, pool_size):
    """Numbers of cvpods' kernel, whose boxes lie inside the map, some of them points or lines on its edge."""
    record = np.load(Path(__file__).parent / "originals" / "border_align.npz")
    x, boxes = torch.from_numpy(record["x"]).double().requires_grad_(), torch.from_numpy(record["boxes"])
    upstream, values, index, gradient = (
        torch.from_numpy(record[f"{pool_size}.{name}"]) for name in ("upstream", "values", "index", "gradient")
    )
    result, points = function(x, boxes, pool_size)
    torch.testing.assert_close(result, values, rtol=0, atol=1e-13)
    assert torch.equal(points, index)
    got = torch.autograd.grad(result, x, upstream)[0]
    torch.testing.assert_close(got, gradient.double(), rtol=1e-6, atol=1e-6)  # stored in float32


@both
@pytest.mark.parametrize("options", [{}, {"pool_size": 1}, {"channels": 9, "size": (1, 4), "pool_size": 4}], ids=str)
def test_equals_a_loop(function, options):
    x, boxes, pool_size = make_borders(**options)
    values, index = maxima_loop(x, boxes, pool_size)
    result, points = function(x.requires_grad_(), boxes, pool_size)
    torch.testing.assert_close(result, values)
    assert torch.equal(points, index)
    grad = torch.randn_like(values)
    got = torch.autograd.grad(result, x, grad)[0]
    torch.testing.assert_close(got, gradient_loop(grad, x, boxes, index, pool_size))


def test_by_hand():
    """A map 0 1 2 / 3 4 5 of every border, and the box from its middle column to half a pixel beyond the last."""
    x = torch.arange(6.0).view(1, 1, 2, 3).expand(1, 4, 2, 3).clone().requires_grad_()
    boxes = torch.tensor([1.0, 0.0, 2.5, 1.0]).view(1, 4, 1, 1)
    result = border_align(x, boxes, 2)
    # Columns 1, 1.75, 2.5 and rows 0, 0.5, 1. Top: 1, 1.75, 1 (half of 2). Left: 1, 2.5, 4. Bottom: 2.5 (half of 5),
    # 4.75, 4. Right: 2.5 (half of 5), 1.75, 1.
    assert result.flatten().tolist() == [1.75, 4.0, 4.75, 2.5]
    result.sum().backward()
    expected = (
        [[0, 0.25, 0.75], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0]],
        [[0, 0, 0], [0, 0.25, 0.75]],
        [[0, 0, 0], [0, 0, 0.5]],
    )
    assert x.grad[0].tolist() == [[list(map(float, row)) for row in plane] for plane in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", BORDER_SHAPES, ids=str)
def test_compiled_is_the_definition(options, dtype):
    """Half types are rounded once; a wrong point would show in a value or, in float64, by itself."""
    x, boxes, pool_size = make_borders(**options, dtype=dtype)
    values, index = operator(x, boxes, pool_size)
    expected, expected_index = define_border_align(x.double(), boxes.double(), pool_size)
    assert values.dtype == dtype
    assert index.dtype == torch.uint8
    rounding, sums = (1e-12, 1e-12) if dtype == torch.float64 else (0.51 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(values.double(), expected, rtol=rounding, atol=sums)
    if dtype == torch.float64:
        assert torch.equal(index, expected_index)
    # The way back from any points.
    index, grad = torch.randint_like(index, pool_size + 1), torch.randn_like(values)
    gradient = backward(grad, x, boxes, index, pool_size)
    assert gradient.dtype == dtype
    if values.numel() < 5000:
        expected = gradient_loop(grad, x, boxes, index, pool_size)
        torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=10 * sums)


def test_gradcheck(device):
    x, boxes, pool_size = make_borders(channels=2, size=(2, 3), grid=(2, 1), pool_size=3)
    x, boxes = x.to(device).requires_grad_(), boxes.to(device)
    nondeterminism = 1e-12 if device == "cuda" else 0.0
    assert torch.autograd.gradcheck(lambda x: border_align(x, boxes, pool_size), x, nondet_tol=nondeterminism)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_points_read_nothing(function, dtype):
    x, boxes, pool_size = make_borders(channels=5, grid=(6, 7), pool_size=4, dtype=dtype)
    boxes = put_far(boxes)
    assert not boxes.isfinite().all()
    values, _ = maxima_loop(x.float(), boxes, pool_size)
    result, points = function(x.requires_grad_(), boxes, pool_size)
    torch.testing.assert_close(result.double(), values, rtol=torch.finfo(dtype).eps, atol=1e-5)
    grad = torch.randn_like(result)
    got = torch.autograd.grad(result, x, grad)[0]
    expected = gradient_loop(grad, x, boxes, points, pool_size)
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@both
def test_pixels_outside_the_map_are_zero_even_next_to_infinities(function):
    x = torch.full((1, 80, 1, 1), torch.inf, dtype=torch.float64, requires_grad=True)
    result, _ = function(x, torch.tensor([-1.5, 0.0, -1.25, 0.0], dtype=torch.float64).view(1, 4, 1, 1), 2)
    assert not result.any()
    assert not torch.autograd.grad(result.sum(), x)[0].any()


def test_points_beyond_a_border_read_nothing_foreign():
    """The raw operator for gradients takes any numbers of points."""
    x, boxes, pool_size = make_borders(channels=20)
    index = torch.full((2, 80, 3, 4), 255, dtype=torch.uint8)
    grad = torch.ones(2, 80, 3, 4, dtype=torch.float64)
    expected = gradient_loop(grad, x, boxes, index, pool_size)
    torch.testing.assert_close(backward(grad, x, boxes, index, pool_size), expected)


@both
def test_first_of_equal_points_and_of_those_that_are_no_numbers(function):
    boxes = torch.tensor([0.0, 0.0, 4.0, 0.0]).view(1, 4, 1, 1)
    # A pixel that counts nothing, beside a point on another's centre, makes it NaN all the same.
    rows = torch.tensor([[1.0, 3.0, 0.0, 3.0, 2.0], [0.0] * 5, [1.0, 5.0, 6.0, torch.nan, 2.0]])
    for values, first, back in zip(rows, (1, 0, 2), (1, 0, 1), strict=True):
        x = values.repeat(4 * 19, 1).view(1, -1, 1, 5)
        result, index = function(x, boxes, 4)
        top, left, bottom, right = index.view(4, 19)
        assert result.view(4, 19)[0].isnan().all() == values.isnan().any()
        # Bottom begins at the other end; left and right are a point of the map each.
        assert [set(side.tolist()) for side in (top, left, bottom, right)] == [{first}, {0}, {back}, {0}]


def test_boxes_are_constants():
    x, boxes, pool_size = make_borders()
    for name in ("compiled", "reference"):
        with backend(name):
            assert not border_align(x, boxes.clone().requires_grad_(), pool_size).requires_grad
            result = border_align(x.clone().requires_grad_(), boxes.clone().requires_grad_(), pool_size)
            assert result.requires_grad
            tangent = torch.func.jvp(lambda boxes: border_align(x, boxes, pool_size), (boxes,), (boxes,))[1]
            assert not tangent.any()


def test_boxes_may_be_of_a_narrower_type():
    x, boxes, pool_size = make_borders(dtype=torch.bfloat16)
    narrow = boxes.half()
    assert torch.equal(border_align(x, narrow, pool_size), border_align(x, narrow.float(), pool_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (0, 2)], ids=str)
def test_channels_last_in_channels_last_out(dtype, grid):
    x, boxes, pool_size = make_borders(channels=16, grid=grid, dtype=dtype)
    results = [operator(leaf, boxes, pool_size) for leaf in (x, last(x))]
    grad = torch.randn_like(results[0][0])
    grads = [backward(grad, leaf, boxes, results[0][1], pool_size) for leaf in (x, last(x))]
    for contiguous, channels_last in ([result[0] for result in results], grads):
        assert contiguous.is_contiguous()
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(contiguous, channels_last)
    assert torch.equal(results[0][1], results[1][1])


def test_any_strides():
    x, boxes, pool_size = make_borders(channels=8)
    expected, index = operator(x, boxes, pool_size)
    wide = torch.stack([x, x], 4)[..., 0]
    turned = boxes.transpose(2, 3).contiguous().transpose(2, 3)
    grad = torch.randn((), dtype=expected.dtype).expand_as(expected)
    assert torch.equal(operator(wide, turned, pool_size)[0], expected)
    results = [
        backward(g, w, b, i, pool_size)
        for g, w, b, i in [(grad.contiguous(), x, boxes, index), (grad, wide, turned, index.contiguous())]
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    x, boxes, pool_size = make_borders(channels=80, size=(12, 13), grid=(40, 41), dtype=dtype)
    grad = torch.randn(2, 320, 40, 41).to(dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            values, index = operator(x, boxes, pool_size)
            runs.append((values, index, backward(grad, x, boxes, index, pool_size)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"size": (1, 1), "grid": (1, 1)}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(options, layout, device):
    x, boxes, pool_size = make_borders(**options)
    x, boxes = x.to(device).contiguous(memory_format=layout), boxes.to(device)
    torch.library.opcheck(operator.default, (x.clone(memory_format=torch.preserve_format).requires_grad_(), boxes, 10))
    values, index = operator(x, boxes, pool_size)
    torch.library.opcheck(backward.default, (torch.randn_like(values), x, boxes, index, pool_size))


def test_compiles_once_for_many_sizes(device):
    def function(x, boxes):
        return border_align(x.relu(), boxes * 0.5).tanh()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for size, grid in [((9, 11), (13, 7)), ((14, 23), (6, 15)), ((31, 5), (8, 22))]:
        x, boxes, _ = make_borders(size=size, grid=grid, dtype=torch.float32)
        x, boxes = x.to(device).requires_grad_(), boxes.to(device)
        results = [f(x, boxes) for f in (compiled, function)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*[torch.autograd.grad(result.square().sum(), x) for result in results])
    assert counter.frame_count == 1


def test_autocast_leaves_types_as_they_are(device):
    x, boxes, pool_size = make_borders(dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        for name in ("compiled", "reference"):
            with backend(name):
                assert border_align(x.to(device), boxes.to(device), pool_size).dtype == torch.float32
                half = border_align(x.to(device).bfloat16(), boxes.to(device), pool_size)
                assert half.dtype == torch.bfloat16


def test_vmap_over_maps_and_boxes():
    (x, boxes, pool_size), (y, others, _) = make_borders(), make_borders(seed=1)
    maps, grids = torch.stack([x, y], 1), torch.stack([boxes, others], 3)
    align = torch.func.vmap(lambda x, boxes: border_align(x, boxes, pool_size), in_dims=(1, 3))
    expected = [border_align(*pair, pool_size) for pair in ((x, boxes), (y, others))]
    torch.testing.assert_close(align(maps, grids), torch.stack(expected))
    only_boxes = torch.func.vmap(lambda boxes: border_align(x, boxes, pool_size), in_dims=3)(grids)
    torch.testing.assert_close(only_boxes[1], border_align(x, others, pool_size))


def test_second_derivatives_name_the_reference():
    x, boxes, pool_size = make_borders()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(border_align(x, boxes, pool_size).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives: expected the functions of dyhead\.ops\.reference"):
        grad.sum().backward()
    with backend("reference"):
        (grad,) = torch.autograd.grad(border_align(x, boxes, pool_size).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].any()


def test_tells_shapes_without_data():
    x, boxes, pool_size = make_borders(grid=(2, 9))
    assert border_align(x.to("meta"), boxes.to("meta"), pool_size).shape == (2, 12, 2, 9)


x, boxes, _ = make_borders(dtype=torch.float32)
WRONG = [
    ("x: expected a tensor, got 3", (3, boxes, 10)),
    ("boxes: expected a tensor, got None", (x, None, 10)),
    ("x: expected float64, float32, bfloat16 or float16, got (torch.int64|Long)", (x.long(), boxes, 10)),
    (r"x: expected \(N, C, H, W\) with at least one channel and one pixel, got \(2, 12, 5\)", (x[..., 0], boxes, 10)),
    (r"x: expected \(N, C, H, W\) with at least .*, got \(2, 12, 0, 7\)", (x[:, :, :0], boxes, 10)),
    (r"x: expected a multiple of 4 channels, as many for every border, got \(2, 11, 5, 7\)", (x[:, 1:], boxes, 10)),
    (r"boxes: expected \(2, 4, H, W\), got \(2, 3, 3, 4\)", (x, boxes[:, 1:], 10)),
    (r"boxes: expected \(2, 4, H, W\), got \(1, 4, 3, 4\)", (x, boxes[1:], 10)),
    (r"boxes: expected \(2, 4, H, W\), got \(2, 4, 3\)", (x, boxes[..., 0], 10)),
    ("boxes: expected torch.float32 or a narrower floating type, got torch.float64", (x, boxes.double(), 10)),
    ("boxes: expected torch.float32 or a narrower floating type, got torch.int64", (x, boxes.long(), 10)),
    ("boxes: expected cpu, got meta", (x, boxes.to("meta"), 10)),
    ("pool_size: expected an integer from 1 to 255, got 0", (x, boxes, 0)),
    ("pool_size: expected an integer from 1 to 255, got 256", (x, boxes, 256)),
    ("pool_size: expected an integer from 1 to 255, got 10.0", (x, boxes, 10.0)),
    ("pool_size: expected an integer from 1 to 255, got True", (x, boxes, True)),
]


@pytest.mark.parametrize(("message", "arguments"), WRONG, ids=[message for message, _ in WRONG])
@pytest.mark.parametrize("name", ["compiled", "reference"])
def test_wrong_arguments_are_named(name, message, arguments):
    with backend(name), pytest.raises(RuntimeError, match=f"^{message}"):
        border_align(*arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_raw_operators_check_for_themselves(device):
    x, boxes, pool_size = (t.to(device) if isinstance(t, torch.Tensor) else t for t in make_borders())
    values, index = operator(x, boxes, pool_size)
    with pytest.raises(RuntimeError, match="pool_size: expected an integer from 1 to 255, got -1"):
        operator(x, boxes, -1)
    with pytest.raises(RuntimeError, match=r"boxes: expected torch\.float64, got torch\.float32"):
        operator(x, boxes.float(), pool_size)
    with pytest.raises(RuntimeError, match=r"x: expected a multiple of 4 channels"):
        operator(x[:, 1:], boxes, pool_size)
    if device == "meta":
        return
    for name, wrong in [("grad", values[:1]), ("grad", values.float()), ("index", index[1:]), ("index", index.int())]:
        arguments = {"grad": values, "x": x, "boxes": boxes, "index": index, "pool_size": pool_size, name: wrong}
        with pytest.raises(RuntimeError, match=f"^{name}: expected "):
            backward(**arguments)
