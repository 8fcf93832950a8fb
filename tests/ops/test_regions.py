"""Deformable RoI pooling: the compiled operator and the definition against torchvision's RoIAlign and slow loops."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.ops import roi_align

from dyhead.ops import backend, deform_roi_pool
from dyhead.ops.regions import define_deform_roi_pool
from tests.ops.borders import put_far
from tests.ops.regions import GAMMA, REGION_SHAPES, gradients_loop, make_regions, pooled_loop

operator = torch.ops.dyhead.deform_roi_pool
backward = torch.ops.dyhead._deform_roi_pool_backward
both = pytest.mark.parametrize("function", [operator, define_deform_roi_pool], ids=["compiled", "definition"])
BACKENDS = pytest.mark.parametrize("name", ["compiled", "reference"])
CONVENTIONS = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "published"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_without_offsets_it_is_aligned_roi_align(function, samples):
    x, rois, *numbers = make_regions(side=4, samples=samples, moved=False)
    expected = roi_align(x, rois, 4, 0.125, samples, True)
    torch.testing.assert_close(function(x, rois, *numbers), expected)


@both
@CONVENTIONS
@pytest.mark.parametrize("options", [{}, {"samples": 1}, {"samples": 5, "side": 1}, {"size": (1, 4)}], ids=str)
def test_equals_slow_loops(function, options, aligned):
    x, rois, offset, *numbers = make_regions(**options, aligned=aligned)
    for shift in (offset, 30 * offset):  # near the map and far from it
        out = function(x.requires_grad_(), rois, shift.requires_grad_(), *numbers)
        torch.testing.assert_close(out, pooled_loop(x, rois, shift, *numbers))
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, shift), grad)
        torch.testing.assert_close(got, gradients_loop(grad, x, rois, shift, *numbers))


def test_by_hand():
    """A map 0 1 2 3 / 4 5 6 7 and a region of its four pixels on the left, in one cell of one sample."""
    x = torch.arange(8.0).view(1, 1, 2, 4).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, 2, 2]])
    offset = torch.tensor([5.0, -2.0]).view(1, 2, 1, 1).requires_grad_()
    # The sample is at (0.5, 0.5); 5 tenths of the width 2 to the right, and 2 tenths of the height 2 up: (1.5, 0.1).
    out = deform_roi_pool(x, rois, offset, 1, 1.0, 1)
    assert out.item() == pytest.approx(1.9)
    out.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[[0, 0.45, 0.45, 0], [0, 0.05, 0.05, 0]]]]))
    # A pixel to the right is 1 more, a pixel down 4; a unit of the offset is 0.2 pixels.
    torch.testing.assert_close(offset.grad.flatten(), torch.tensor([0.2, 0.8]))
    # As published the far corner is (3, 3), the size 3, and the sample at the cell's upper left: (-0.5, -0.5), which is
    # read as (0, 0), and with the offset at (1, -1.1), which is not read.
    assert deform_roi_pool(x, rois, None, 1, 1.0, 1, aligned=False).item() == 0
    assert deform_roi_pool(x + 1, rois, None, 1, 1.0, 1, aligned=False).item() == 1
    assert deform_roi_pool(x + 1, rois, offset, 1, 1.0, 1, aligned=False).item() == 0
    down = torch.tensor([5.0, 2.5]).view(1, 2, 1, 1)  # to (1, 0.25)
    assert deform_roi_pool(x, rois, down, 1, 1.0, 1, aligned=False).item() == 2


def test_published_corners_are_rounded_away_from_zero():
    x = torch.arange(8.0).view(1, 1, 1, 8)
    for left, rounded in ((0.5, 1), (1.5, 2), (2.5, 3), (1.49, 1), (-0.5, -1)):
        got, want = (
            deform_roi_pool(x, torch.tensor([[0.0, first, 0, 6, 0]]), None, 1, 1.0, 2, aligned=False)
            for first in (left, rounded)
        )
        assert torch.equal(got, want)


def test_an_offset_of_all_cells_moves_the_region():
    x, rois, offset, *_ = make_regions()
    moved = rois.clone()
    moved[:, 1:] += 0.2 * torch.tensor([1.0, -0.5]).repeat(2) * (rois[:, 3:] - rois[:, 1:3]).repeat(1, 2)
    offset[:, 0], offset[:, 1] = 1.0, -0.5
    got, want = deform_roi_pool(x, rois, offset, 3, 0.125, gamma=0.2), deform_roi_pool(x, moved, None, 3, 0.125)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CONVENTIONS
@pytest.mark.parametrize("options", REGION_SHAPES, ids=str)
def test_compiled_is_the_definition(options, aligned, dtype):
    """Half types are rounded once."""
    x, rois, offset, *numbers = make_regions(**options, aligned=aligned, dtype=dtype)
    tensors = [x.double(), rois.double(), None if offset is None else offset.double()]
    leaves = [tensor.requires_grad_() for tensor in (tensors[0], tensors[2]) if tensor is not None]
    expected = define_deform_roi_pool(*tensors, *numbers)
    out = operator(x, rois, offset, *numbers)
    assert out.dtype == dtype
    rounding, sums = (1e-12, 1e-12) if dtype == torch.float64 else (0.51 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=sums)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(expected, leaves, grad.double())
    got = backward(grad, x, rois, offset, *numbers, [True, True])
    assert [each.dtype for each in got] == [dtype, rois.dtype]
    torch.testing.assert_close(got[0].double(), expected[0], rtol=rounding, atol=10 * sums)
    if offset is None:
        assert got[1].shape == (0,)
    else:
        torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-4 if sums > 1e-6 else 1e-10, atol=30 * sums)


def test_positions_on_the_edge_of_what_is_read_count():
    """Samples at -1/2 exactly, which steps of 1/7 or 2/7 that are rounded to float32 would miss."""
    x = torch.rand(1, 2, 7, 9).add(1)
    sides = [(-3, 7), (-3, 14)]
    rois = torch.tensor([[0.0, left, 1, left + side - 1, 7] for left, side in sides])
    numbers = 7, 1.0, 7, 0.1, False
    expected = pooled_loop(x, rois, None, *numbers)
    for function in (operator, define_deform_roi_pool):
        out = function(x, rois, None, *numbers).double()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@CONVENTIONS
def test_gradcheck(aligned, device):
    x, rois, offset, *numbers = make_regions(channels=2, size=(4, 5), side=2, aligned=aligned)
    x, rois, offset = (tensor.to(device) for tensor in (x, rois, offset))
    leaves = x.requires_grad_(), offset.requires_grad_()
    nondeterminism = 1e-12 if device == "cuda" else 0.0
    check = torch.autograd.gradcheck
    assert check(lambda x, offset: operator(x, rois, offset, *numbers), leaves, nondet_tol=nondeterminism)


def test_only_what_is_asked_for_is_computed():
    x, rois, offset, *numbers = make_regions()
    grad = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    full = backward(grad, x, rois, offset, *numbers, [True, True])
    for needs in ([True, False], [False, True], [False, False]):
        for got, wanted, needed in zip(backward(grad, x, rois, offset, *numbers, needs), full, needs, strict=True):
            assert torch.equal(got, wanted if needed else wanted.new_empty(0))
    result = operator(x, rois, offset.requires_grad_(), *numbers)
    assert torch.equal(torch.autograd.grad(result, offset, grad)[0], full[1])


@BACKENDS
@CONVENTIONS
def test_hostile_regions_and_offsets_read_nothing_and_have_no_gradient(name, aligned):
    far = [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31)]
    x = torch.rand(1, 2, 4, 5).add(1).requires_grad_()
    rois = torch.tensor([[0, 0, 0, 4, 4.0]]).repeat(5 * len(far) + 2, 1)
    for i, value in enumerate(far):
        for place in range(5):
            rois[5 * i + place, place] = value
    rois[-2, 0], rois[-1, 0] = 1, -1  # images that are not there
    offset = torch.zeros(len(rois) + len(far), 2, 3, 3)
    for i, value in enumerate(far):
        offset[len(rois) + i, i % 2] = value
    rois = torch.cat([rois, torch.tensor([[0, 0, 0, 4, 4.0]]).repeat(len(far), 1)])
    offset.requires_grad_()
    with backend(name):
        out = deform_roi_pool(x, rois, offset, 3, aligned=aligned)
        grads = torch.autograd.grad(out.sum(), (x, offset))
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    # No numbers and infinities anywhere, others where the image stands.
    nothing = [*range(15), *range(15, 35, 5), 35, 36, *range(37, 37 + len(far))]
    assert not out[nothing].any()
    assert not grads[1][nothing].any()
    clean = deform_roi_pool(x, torch.tensor([[0, 0, 0, 4, 4.0]]), None, 3, aligned=aligned)
    assert clean.all()


@both
@CONVENTIONS
@pytest.mark.parametrize("channels", [3, 20])
def test_far_regions_and_offsets_are_the_definitions(function, channels, aligned):
    x, rois, offset, *numbers = make_regions(channels=channels, count=40, aligned=aligned, dtype=torch.float32)
    for seed in range(3):
        torch.manual_seed(seed)
        far_rois, far_offset = put_far(rois), put_far(offset)
        out = function(x.requires_grad_(), far_rois, far_offset.requires_grad_(), *numbers)
        torch.testing.assert_close(out.double(), pooled_loop(x, far_rois, far_offset, *numbers), rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, far_offset), grad)
        for each, expected in zip(got, gradients_loop(grad, x, far_rois, far_offset, *numbers), strict=True):
            torch.testing.assert_close(each.double(), expected, rtol=1e-3, atol=1e-3)


@both
@CONVENTIONS
def test_a_unit_of_the_offset_that_overflows_reads_nothing(function, aligned):
    x, offset = torch.ones(1, 1, 3, 3, requires_grad=True), torch.zeros(2, 2, 1, 1, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 1e30, 2], [0, 0, 0, 2, 2]])
    out = function(x, rois, offset, 1, 1.0, 1, 1e20, aligned)
    assert out.flatten().tolist() == [0.0, 1.0]
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (x, offset)))
    # Without an offset there is no such unit.
    assert function(x, rois[1:], None, 1, 1.0, 1, 1e300, aligned).item() == 1


@both
def test_what_counts_nothing_is_zero_even_next_to_infinities(function):
    x = torch.full((1, 20, 2, 2), torch.inf, requires_grad=True)
    rois = torch.tensor([[0.0, 9, 9, 12, 12], [1, 0, 0, 2, 2], [0, math.nan, 0, 2, 2]])
    out = function(x, rois, None, 2, 1.0, 2, 0.1, True)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_a_side_beyond_a_floats_precision_is_read_to_its_end():
    """2^24 + 4 pixels, the last of which is at 2^24 + 3: a float knows that as 2^24 + 4."""
    x = torch.ones(1, 1, 1, 2**24 + 4, requires_grad=True)
    rois = torch.tensor([[0.0, 2**24 + 2, 0, 2**24 + 6, 1]])
    out = operator(x, rois, None, 1, 1.0, 1, 0.1, True)
    assert out.item() == 1
    assert torch.autograd.grad(out.sum(), x)[0][..., -1].item() == 1


def test_positions_may_be_of_a_narrower_type():
    x, rois, offset, side, *_ = make_regions(dtype=torch.bfloat16)
    rois, offset = rois.half(), offset.bfloat16()
    assert torch.equal(deform_roi_pool(x, rois, offset, side), deform_roi_pool(x, rois.float(), offset.float(), side))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"side": 1}, {"count": 0}], ids=str)
@both
def test_channels_last_in_channels_last_out(function, options, dtype):
    x, rois, offset, *numbers = make_regions(channels=16, **options, dtype=dtype)
    results = [function(leaf, rois, offset, *numbers) for leaf in (x, last(x))]
    grad = torch.randn_like(results[0])
    grads = [backward(grad, leaf, rois, offset, *numbers, [True, False])[0] for leaf in (x, last(x))]
    for contiguous, channels_last in (results, grads):
        assert contiguous.is_contiguous()
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(contiguous, channels_last)


def test_any_strides():
    x, rois, offset, *numbers = make_regions(channels=8)
    expected = operator(x, rois, offset, *numbers)
    wide = torch.stack([x, x], 4)[..., 0]
    turned = [rois.T.contiguous().T, offset.mT.contiguous().mT]
    assert torch.equal(operator(wide, *turned, *numbers), expected)
    grad = torch.randn((), dtype=expected.dtype).expand_as(expected)
    results = [
        backward(g, *tensors, *numbers, [True, True])
        for g, tensors in [(grad.contiguous(), (x, rois, offset)), (grad, (wide, *turned))]
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@BACKENDS
def test_no_regions_and_no_images(name):
    x, rois, offset, *_ = make_regions(channels=4)
    with backend(name):
        empty = deform_roi_pool(x.requires_grad_(), rois[:0], offset[:0].requires_grad_(), 3)
        none = deform_roi_pool(x[:0], rois, offset, 3)
    assert empty.shape == (0, 4, 3, 3)
    assert not torch.autograd.grad(empty.sum(), x)[0].any()
    assert none.shape == (5, 4, 3, 3)
    assert not none.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    x, rois, offset, *numbers = make_regions(channels=100, size=(40, 50), side=7, count=60, dtype=dtype)
    grad = torch.randn(60, 100, 7, 7).to(dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            gradients = backward(grad, x, rois, offset, *numbers, [True, True])
            runs.append((operator(x, rois, offset, *numbers), *gradients))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"moved": False}, {"count": 0}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(options, layout, device):
    x, rois, offset, *numbers = make_regions(**options)
    x, rois = x.to(device).contiguous(memory_format=layout), rois.to(device)
    offset = None if offset is None else offset.to(device)
    leaves = [t if t is None else t.clone(memory_format=torch.preserve_format) for t in (x, rois, offset)]
    for leaf in leaves[::2]:
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(operator.default, (*leaves, *numbers))
    grad = torch.randn_like(operator(x, rois, offset, *numbers))
    for needs in ([True, True], [False, True]):
        torch.library.opcheck(backward.default, (grad, x, rois, offset, *numbers, needs))


def test_compiles_once_for_many_sizes(device):
    def function(x, rois, offset):
        return deform_roi_pool(x.relu(), rois * 0.5, offset, 3, 0.25).tanh()

    torch._dynamo.reset()
    counts = []
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for size, count in [((9, 11), 6), ((14, 23), 9), ((31, 5), 3)]:
        x, rois, offset, *_ = make_regions(size=size, count=count, dtype=torch.float32)
        x, rois, offset = x.to(device).requires_grad_(), rois.to(device), offset.to(device).requires_grad_()
        results = [f(x, rois, offset) for f in (compiled, function)]
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
        torch.testing.assert_close(*[torch.autograd.grad(r.square().sum(), (x, offset)) for r in results])
    assert counts == counts[:1] * 3  # at first twice: the defaults that are floats are tried as unknown numbers


def test_autocast_leaves_types_as_they_are(device):
    x, rois, offset, *_ = (t.to(device) for t in make_regions(dtype=torch.float32)[:3])
    with torch.autocast(device, torch.bfloat16):
        for name in ("compiled", "reference"):
            with backend(name):
                assert deform_roi_pool(x, rois, offset, 3).dtype == torch.float32
                assert deform_roi_pool(x.bfloat16(), rois, offset, 3).dtype == torch.bfloat16


def test_vmap_over_maps_and_regions():
    (x, rois, offset, *numbers), (y, others, moves, *_) = make_regions(), make_regions(seed=1)
    others = others.flip(0)
    maps, many, offsets = torch.stack([x, y], 1), torch.stack([rois, others], 2), torch.stack([offset, moves])
    pool = torch.func.vmap(lambda *tensors: operator(*tensors, *numbers), in_dims=(1, 2, 0))
    expected = [operator(x, rois, offset, *numbers), operator(y, others, moves, *numbers)]
    torch.testing.assert_close(pool(maps, many, offsets), torch.stack(expected))
    only = torch.func.vmap(lambda rois: operator(x, rois, None, *numbers), in_dims=2)(many)
    torch.testing.assert_close(only[1], operator(x, others, None, *numbers))


@BACKENDS
def test_regions_are_constants(name):
    x, rois, offset, *_ = make_regions()
    with backend(name):
        assert not deform_roi_pool(x, rois.clone().requires_grad_(), offset, 3).requires_grad
        result = deform_roi_pool(x.clone().requires_grad_(), rois.clone().requires_grad_(), offset, 3)
        assert result.requires_grad
        tangent = torch.func.jvp(lambda rois: deform_roi_pool(x, rois, offset, 3), (rois,), (rois,))[1]
        assert not tangent.any()


@CONVENTIONS
def test_second_derivatives_name_the_reference(aligned):
    x, rois, offset, *_ = make_regions(channels=1, size=(4, 5), side=2)
    leaves = x.requires_grad_(), offset.requires_grad_()

    def pool(x, offset):
        return deform_roi_pool(x, rois, offset, 2, 0.125, 1, GAMMA, aligned=aligned)

    grads = torch.autograd.grad(pool(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives: expected the functions of dyhead\.ops\.reference"):
        sum(grad.sum() for grad in grads).backward()
    with backend("reference"):
        assert torch.autograd.gradgradcheck(pool, leaves)


def test_tells_shapes_without_data():
    x, rois, offset, *_ = (tensor.to("meta") for tensor in make_regions()[:3])
    assert deform_roi_pool(x, rois, offset, 3).shape == (5, 3, 3, 3)


x, rois, offset, *_ = make_regions(dtype=torch.float32)
WRONG = [
    ("x: expected a tensor, got 3", (3, rois, offset, 3)),
    ("rois: expected a tensor, got None", (x, None, offset, 3)),
    ("x: expected float64, float32, bfloat16 or float16, got (torch.int64|Long)", (x.long(), rois, offset, 3)),
    (r"x: expected \(N, C, H, W\) with at least one channel and one pixel", (x[:, :, :0], rois, offset, 3)),
    (r"rois: expected \(Q, 5\), got \(5, 4\)", (x, rois[:, 1:], offset, 3)),
    ("rois: expected torch.float32 or a narrower floating type, got torch.float64", (x, rois.double(), offset, 3)),
    ("rois: expected cpu, got meta", (x, rois.to("meta"), offset, 3)),
    (r"offset: expected \(5, 2, 4, 4\), got \(5, 2, 3, 3\)", (x, rois, offset, 4)),
    (r"offset: expected \(5, 2, 3, 3\), got \(4, 2, 3, 3\)", (x, rois, offset[1:], 3)),
    ("output_size: expected an integer from 1 to 255, got 0", (x, rois, offset, 0)),
    ("output_size: expected an integer from 1 to 255, got True", (x, rois, offset, True)),
    ("spatial_scale: expected a finite number above 0, got 0", (x, rois, offset, 3, 0)),
    ("spatial_scale: expected a finite number above 0, got nan", (x, rois, offset, 3, math.nan)),
    ("sampling_ratio: expected an integer from 1 to 255, got 0", (x, rois, offset, 3, 1.0, 0)),
    ("gamma: expected a finite number, got '0.1'", (x, rois, offset, 3, 1.0, 2, "0.1")),
]


@BACKENDS
@pytest.mark.parametrize(("message", "arguments"), WRONG, ids=[message for message, _ in WRONG])
def test_wrong_arguments_are_named(name, message, arguments):
    with backend(name), pytest.raises(RuntimeError, match=f"^{message}"):
        deform_roi_pool(*arguments)


def test_convention_is_true_or_false():
    with pytest.raises(RuntimeError, match="^aligned: expected True or False, got 'no'"):
        deform_roi_pool(x, rois, offset, 3, aligned="no")


RAW = [
    ("output_size", 0, "an integer from 1 to 255, got 0"),
    ("output_size", 256, "an integer from 1 to 255, got 256"),
    ("sampling_ratio", -1, "an integer from 1 to 255, got -1"),
    ("spatial_scale", 0.0, "a finite number above 0, got 0"),
    ("spatial_scale", math.nan, "a finite number above 0, got nan"),
    ("gamma", math.inf, "a finite number, got inf"),
    ("rois", rois.double(), r"torch\.float32, got torch\.float64"),
    ("offset", offset[1:], r"\(5, 2, 3, 3\), got \(4, 2, 3, 3\)"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "value", "message"), RAW)
def test_raw_operators_check_for_themselves(name, value, message, device):
    names = "x", "rois", "offset", "output_size", "spatial_scale", "sampling_ratio", "gamma", "aligned"
    arguments = dict(zip(names, make_regions(dtype=torch.float32), strict=True)) | {name: value}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"{name}: expected {message}"):
        operator(**arguments)


def test_raw_backward_checks_for_itself():
    x, rois, offset, *numbers = make_regions()
    grad = operator(x, rois, offset, *numbers)
    for wrong in (grad[:1], grad.float()):
        with pytest.raises(RuntimeError, match="^grad: expected "):
            backward(wrong, x, rois, offset, *numbers, [True, True])
    with pytest.raises(RuntimeError, match="^needs_grad: expected 2 values, got 1"):
        backward(grad, x, rois, offset, *numbers, [True])
