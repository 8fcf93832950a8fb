"""The CUDA kernels against the reference: on a GPU, and the same kernel bodies emulated on the CPU."""

import itertools
import math

import pytest
import torch

from dyhead.ops.border import define_border_align
from dyhead.ops.channelwise import define_affine_maximum, define_channel_statistics
from dyhead.ops.reference import pyramid_deform_conv
from dyhead.ops.regions import define_deform_roi_pool
from tests.ops.borders import BORDER_SHAPES, gradient_loop, make_borders, maxima_loop, put_far
from tests.ops.machines import machine
from tests.ops.maps import MAP_SHAPES, make_maps
from tests.ops.regions import REGION_SHAPES, gradients_loop, make_regions, pooled_loop
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


def names(case):
    """What the gradients of `Machine.backward` are of."""
    others = ("offset", "weight", "bias", "mask", "level_weight")
    given = [name for name in others if getattr(case, name) is not None]
    return [*(f"features[{level}]" for level in range(len(case.features))), *given]


def check(got, exact, precision, name):
    """Operands of products are rounded once each, and so is what is returned; sums are float32 or float64."""
    assert got.shape == exact.shape, name
    sums = 1e-13 if got.dtype == torch.float64 else 1e-5
    if got.numel():
        error = ((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()
        assert error <= 4 * UNIT[precision] + sums, f"{name}: {error:.1e}"


def check_case(case, place, precision, *, deterministic=False):
    """The result and all gradients are the reference's in float64."""
    dtype, allow_tf32 = PRECISIONS[precision]
    exact, exact_grads = case.map(torch.Tensor.double).run(pyramid_deform_conv)
    result = place.forward(case, allow_tf32=allow_tf32)
    assert result.dtype == dtype
    check(result, exact.detach(), precision, "result")
    grads = place.backward(case, allow_tf32=allow_tf32, deterministic=deterministic)
    for name, tensor, grad, best in zip(names(case), case.tensors(), grads, exact_grads, strict=True):
        assert grad.dtype == tensor.dtype, name
        check(grad, best, precision, name)


@pytest.mark.parametrize("options", [*SHAPES, *CUDA_SHAPES], ids=str)
def test_result_and_gradients_are_the_references(options, precision, place, make_case):
    check_case(make_case(**options, dtype=PRECISIONS[precision][0]), place, precision)


@pytest.mark.parametrize("options", [*SHAPES[1:7], CUDA_SHAPES[1]], ids=str)
def test_deterministic_gradients_are_the_references(options, precision, place, make_case):
    check_case(make_case(**options, dtype=PRECISIONS[precision][0]), place, precision, deterministic=True)


@pytest.mark.parametrize("channels", [6, 16], ids=["scalar", "vector"])
def test_geometry_of_a_convolution(channels, precision, place, make_case):
    # 9 x 12, padded by (1, 2), kernel (3, 2) dilated by (2, 1), stride (2, 3): 4 x 5.
    dtype = PRECISIONS[precision][0]
    case = make_case(channels=channels, kernel=(3, 2), size=(4, 5), levels=((9, 12),), level_weight=False, dtype=dtype)
    case.geometry = (False, None, [2, 3], [1, 2], [2, 1])
    check_case(case, place, precision)


@pytest.mark.parametrize("channels", [6, 16], ids=["scalar", "vector"])
def test_channels_last_in_channels_last_out(channels, precision, place, make_case):
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(channels=channels, out_channels=24, dtype=dtype, size=(9, 17), levels=((9, 17), (5, 9)))
    last = case.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    results = [place.forward(c, allow_tf32=allow_tf32) for c in (case, last)]
    grads = [place.backward(c, allow_tf32=allow_tf32, deterministic=True) for c in (case, last)]
    assert results[0].is_contiguous()
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    assert all(grad.is_contiguous() for grad in grads[0])
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads[1][:2])
    torch.testing.assert_close([results[0], *grads[0]], [results[1], *grads[1]], rtol=0, atol=0)


def test_vectors_off_their_boundary_are_read_one_by_one(precision, place, make_case):
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(channels=16, levels=((6, 5),), size=(6, 5), dtype=dtype)

    def shift(tensor):
        if tensor.dim() != 4 or tensor.shape[1] != 16:
            return tensor
        last = tensor.permute(0, 2, 3, 1)
        return torch.cat([last.new_zeros(1), last.flatten()])[1:].view(last.shape).permute(0, 3, 1, 2)

    shifted = case.map(lambda tensor: tensor)
    shifted.features = [shift(feature.detach().to(place.device)) for feature in case.features]
    assert shifted.features[0].data_ptr() % 16 != 0
    with torch.no_grad():
        moved = [shifted.features, *(t if t is None or not isinstance(t, torch.Tensor) else t.detach().to(place.device)
                 for t in shifted.arguments()[1:])]  # fmt: skip
        result = place.operators.pyramid_deform_conv2d(*moved, allow_tf32)
    exact = pyramid_deform_conv(*case.map(torch.Tensor.double).arguments()).detach()
    check(result.cpu(), exact, precision, "result")


@pytest.mark.parametrize("channels", [6, 16], ids=["scalar", "vector"])
def test_unreachable_positions_read_zero_and_have_no_gradient(channels, precision, place, make_case):
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(dtype=dtype, channels=channels, spread=1.0)
    far = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, -(2.0**62), 1e6, -1e6]
    offset = case.offset.detach().clone()
    flat = offset.view(-1)
    hit = torch.randperm(flat.numel())[: flat.numel() // 2]
    flat[hit] = torch.tensor(far)[torch.arange(len(hit)) % len(far)].to(offset.dtype)
    case.offset = offset.requires_grad_()
    for deterministic in (False, True):
        check_case(case, place, precision, deterministic=deterministic)
        grads = place.backward(case, allow_tf32=allow_tf32, deterministic=deterministic)
        assert not grads[len(case.features)].view(-1)[hit].any()


@pytest.mark.parametrize("channels", [3, 32], ids=["scalar", "vector"])
def test_pixels_outside_the_map_are_zero_even_next_to_infinities(channels, precision, place, make_case):
    """A corner outside counts exactly 0; a map of nothing but infinities shows any other."""
    dtype, allow_tf32 = PRECISIONS[precision]
    options = {"kernel": (1, 1), "size": (1, 2), "levels": ((1, 1),), "spread": 0.0, "bias": False, "batch": 1}
    case = make_case(dtype=dtype, channels=channels, **options)
    case.features = [torch.full_like(case.features[0], float("inf"))]
    case.offset = torch.tensor([[-1.5, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2).to(case.offset.dtype)
    assert not place.forward(case, allow_tf32=allow_tf32).any()
    for deterministic in (False, True):
        grads = place.backward(case, allow_tf32=allow_tf32, deterministic=deterministic)
        assert not any(grad.any() for grad in grads)


def test_nan_features_reach_only_what_reads_them(precision, place, make_case):
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(dtype=dtype, channels=16, out_channels=4, groups=2, levels=((9, 17),), size=(9, 17), spread=0.3)
    feature = case.features[0].detach().clone()
    feature[0, 3, 4, 5] = float("nan")
    case.features = [feature]
    result = place.forward(case, allow_tf32=allow_tf32)
    expected = pyramid_deform_conv(*case.map(torch.Tensor.double).arguments())
    assert torch.equal(result.isnan(), expected.isnan())


def test_only_needed_gradients_are_computed(place, make_case):
    case = make_case(size=(3, 4), levels=((3, 4), (2, 2)))
    expected = place.backward(case)
    for needs in itertools.product([False, True], repeat=6):
        for deterministic in (False, True):
            grads = place.backward(case, needs=needs, deterministic=deterministic)
            needed = [*[needs[0]] * 2, *needs[1:]]
            for grad, best, need in zip(grads, expected, needed, strict=True):
                assert (grad is not None) == need
                if need:
                    torch.testing.assert_close(grad, best)


def test_deterministic_gradients_have_the_same_bits(precision, place, make_case):
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(dtype=dtype, channels=24, out_channels=16, size=(17, 19), levels=((17, 19), (9, 10)), spread=5.0)
    runs = [place.backward(case, allow_tf32=allow_tf32, deterministic=True) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_many_levels_are_refused_by_name(place, make_case):
    case = make_case(size=(2, 2), levels=((2, 2),) * 33, kernel=(1, 1))
    with pytest.raises(RuntimeError, match="features: expected at most 32 levels on a CUDA device, got 33 levels"):
        place.forward(case)
    check_case(make_case(size=(2, 2), levels=((2, 2),) * 32, kernel=(1, 1)), place, "float64")


def test_many_channels_are_refused_by_name(place):
    """The bytes of a pixel are counted in 32 bits."""
    one = torch.zeros(1, 1, 1, 1, device=place.device)
    weight = one[None].expand(1, 1, 2**28, 1, 1)
    with pytest.raises(RuntimeError, match=r"features: expected fewer than 2\^28 channels, got 268435456"):
        place.operators.pyramid_deform_conv2d(
            [one.expand(1, 2**28, 1, 1)], one.expand(1, 2, 1, 1), weight, None, None, None, True, None, [1, 1], [0, 0],
            [1, 1], False,
        )  # fmt: skip


@pytest.fixture(name="emulated")
def emulated_fixture():
    """The emulation, whose device a test may set."""
    place = machine("emulation")
    place.operators.take_launches()
    yield place
    place.operators.set_device()


def take_launches(place):
    """Blocks and bytes of shared memory of every launch since the last call."""
    numbers = place.operators.take_launches()
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_kernels_fit_the_shared_memory_of_smaller_devices(precision, emulated, make_case):
    """A block may have 99 KB at compute capability 8.6 and 8.9, 163 KB at 8.0 and 227 KB at 9.0."""
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(
        channels=72, out_channels=136, kernel=(1, 1), batch=1, size=(17, 20), levels=((9, 10),), dtype=dtype
    )
    largest, results = {}, {}
    for limit in (227, 163, 99):
        emulated.operators.set_device(4, limit << 10)
        check_case(case, emulated, precision)
        largest[limit] = max(shared for _, shared in take_launches(emulated))
        assert largest[limit] <= limit << 10
        results[limit] = emulated.forward(case, allow_tf32=allow_tf32)
        emulated.operators.take_launches()
    assert largest[227] > 163 << 10
    assert largest[163] > 99 << 10
    assert torch.equal(results[99], results[163])


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_kernels_of_the_sample_gradient_agree(precision, emulated, make_case):
    """By the shared memory that they have: nine taps at a time, or three."""
    dtype, allow_tf32 = PRECISIONS[precision]
    case = make_case(channels=40, out_channels=8, batch=1, size=(9, 10), levels=((9, 10), (5, 5)), dtype=dtype)
    shared = {}
    for limit in (227, 163, 99):
        emulated.operators.set_device(4, limit << 10)
        check_case(case, emulated, precision)
        check_case(case, emulated, precision, deterministic=True)
        emulated.operators.take_launches()
        emulated.backward(case, needs=(True, *[False] * 5), allow_tf32=allow_tf32)
        shared[limit] = max(size for _, size in take_launches(emulated))
    assert shared[99] == shared[163] < shared[227]


def time_of(parts, rows, work, wave, extra):
    """Steps that the waves of blocks take, of a block that takes `extra` steps more than its part of the work has."""
    return math.ceil(rows * parts / wave) * (math.ceil(work / parts) + extra)


@pytest.mark.parametrize(("processors", "size"), [(4, (32, 32)), (4, (8, 56)), (14, (40, 40)), (132, (24, 24))])
def test_blocks_of_the_weight_gradient_fill_whole_waves(processors, size, emulated, make_case):
    """No other number of parts of 9 blocks is faster, if the waves are at most eight."""
    case = make_case(channels=8, out_channels=8, batch=1, size=size, levels=(size,), dtype=torch.bfloat16)
    emulated.operators.set_device(processors)
    emulated.backward(case, needs=(False, False, True, False, False, False))
    blocks, _ = max(take_launches(emulated), key=lambda launch: launch[1])
    patches = math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
    times = [
        time_of(parts, 9, patches, processors, 4) for parts in range(1, patches + 1) if 9 * parts <= 8 * processors
    ]
    assert blocks % 9 == 0
    assert time_of(blocks // 9, 9, patches, processors, 4) == min(times, default=time_of(1, 9, patches, processors, 4))


def test_few_patches_are_split_by_channels_and_levels(emulated, make_case):
    """6 patches on 12 multiprocessors, 2 runs of channels and 3 levels: two blocks a patch, whose parts are added."""
    case = make_case(channels=40, batch=1, size=(24, 16), levels=((24, 16), (12, 8), (6, 4)), dtype=torch.float32)
    emulated.operators.set_device(12)
    check_case(case, emulated, "float32")
    check_case(case, emulated, "float32", deterministic=True)
    emulated.operators.take_launches()
    emulated.backward(case, needs=(True, True, False, False, False, False))
    assert 12 in [blocks for blocks, _ in take_launches(emulated)]


@pytest.mark.parametrize("channels", [8, 40])
class TestAdditions:
    """Additions to the features' gradient in global memory, of 8 x 8 output pixels with 3 x 3 taps each."""

    def count(self, case, place):
        place.operators.take_additions()
        place.backward(case, needs=(True, *[False] * 5))
        return place.operators.take_additions() / case.features[0].shape[1]

    def test_what_a_patch_reads_is_added_once(self, channels, emulated, make_case):
        """Without offsets that is 9 x 9 pixels for each patch of a 16 x 16 map, of which each is at a corner."""
        case = make_case(
            channels=channels, batch=1, size=(16, 16), levels=((16, 16),), spread=0.0, dtype=torch.bfloat16
        )
        assert self.count(case, emulated) == 4 * 81

    def test_what_lies_outside_the_window_is_added_by_itself(self, channels, emulated, make_case):
        """20 pixels to the right: a tap's rows have 14, 15 or 13 corners in the map, all its 8 columns two each."""
        case = make_case(
            channels=channels, batch=1, size=(8, 8), levels=((8, 40),), scales=[1.0], spread=0.0, dtype=torch.bfloat16
        )
        case.offset = case.offset.detach().clone()
        case.offset[:, 1::2] = 20.0
        case.offset.requires_grad_()
        assert self.count(case, emulated) == (14 + 15 + 13) * 16 * 3
        check_case(case, emulated, "bfloat16")

    @pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
    def test_windows_lie_around_what_patches_read(self, channels, scale, emulated, make_case):
        """Every pixel of a window of 24 x 24 that any tap reads once, and corners outside it, each by itself."""
        size = int(16 * scale)
        case = make_case(
            channels=channels, batch=1, size=(16, 16), levels=((size, size),), scales=[scale], dtype=torch.bfloat16
        )
        near, far = self.places(case.offset.detach()[0].unflatten(0, (9, 2)), scale, size, 24)
        assert self.count(case, emulated) == near + far

    def places(self, offset, scale, size, side):
        """Pixels inside the windows around the middle of each patch, and corners outside them."""
        near, far = set(), 0
        for tap, i, j in itertools.product(range(9), range(16), range(16)):
            dy, dx = offset[tap, :, i, j].tolist()
            y, x = scale * (i + tap // 3 - 0.5 + dy) - 0.5, scale * (j + tap % 3 - 0.5 + dx) - 0.5
            if not (-1 < y < size and -1 < x < size):
                continue
            patch = i // 8, j // 8
            begins = [int(scale * (8 * at + 4)) - side // 2 for at in patch]
            for corner in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                if min(corner) < 0 or max(corner) >= size:
                    continue
                if all(begin <= at < begin + side for begin, at in zip(begins, corner, strict=True)):
                    near.add((patch, corner))
                else:
                    far += 1
        return len(near), far


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [6, 40])
def test_all_samples_at_one_place(channels, deterministic, precision, place, make_case):
    """Inside the window and outside it."""
    case = make_case(channels=channels, batch=1, size=(8, 9), levels=((8, 60),), scales=[1.0],
                     dtype=PRECISIONS[precision][0], spread=0.0)  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    for to in (4.25, 40.75):
        offset = torch.empty_like(case.offset).detach()
        for tap in range(9):
            offset[:, 2 * tap] = 3.5 - (rows + tap // 3 - 1)
            offset[:, 2 * tap + 1] = to - (columns + tap % 3 - 1)
        case.offset = offset.requires_grad_()
        check_case(case, place, precision, deterministic=deterministic)


def test_little_working_memory_changes_no_gradient(emulated, make_case):
    """Images and runs of channels one after the other, where all of them fit otherwise."""
    case = make_case(channels=80, offset_groups=2, size=(4, 9), levels=((8, 18), (4, 9)), dtype=torch.bfloat16)
    expected = emulated.backward(case, deterministic=True)
    launches = len(take_launches(emulated))
    emulated.operators.set_device(working_bytes=1)
    got = emulated.backward(case, deterministic=True)
    assert len(take_launches(emulated)) > launches
    levels = len(case.features)
    assert all(torch.equal(a, b) for a, b in zip(got[:levels], expected[:levels], strict=True))
    torch.testing.assert_close(got[levels:], expected[levels:], rtol=1e-4, atol=1e-4)


def test_tf32_rounds_to_nearest(place, make_case):
    """Operands that were cut instead would make every sum of positive terms too small, by some 2^-11."""
    case = make_case(channels=64, out_channels=32, size=(9, 17), levels=((9, 17),), dtype=torch.float32, spread=0.2)
    case.features = [feature.detach().abs().requires_grad_() for feature in case.features]
    case.weight, case.grad = case.weight.detach().abs().requires_grad_(), case.grad.abs()
    exact, exact_grads = case.map(torch.Tensor.double).run(pyramid_deform_conv)
    results = [place.forward(case, allow_tf32=True), *place.backward(case, allow_tf32=True)]
    compared = zip(["result", *names(case)], results, [exact, *exact_grads], strict=True)
    for name, got, best in compared:
        if name in ("result", "features[0]", "weight"):
            assert abs((got.double().sum() / best.sum()).item() - 1) < 1e-4, name


# Half types, whose vectors are longest, on channels that fill vectors and others; more chunks than threads that join
# them.
WIDE_MAPS = [
    {"count": 3, "channels": 264, "size": (9, 30)},
    {"count": 2, "channels": 16, "size": (1, 1), "batch": 3},
    {"count": 1, "channels": 2, "size": (65, 70), "batch": 1},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [*MAP_SHAPES, *WIDE_MAPS], ids=str)
class TestChannelwise:
    def test_statistics_are_mean_and_variance(self, options, dtype, place):
        x = make_maps(**{**options, "count": 1}, dtype=dtype)[0][0].detach()
        statistics = place.operators.channel_statistics(x.to(place.device)).cpu()
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(
            statistics.double(), define_channel_statistics(x.double()), rtol=tolerance, atol=tolerance
        )

    def test_maximum_and_gradients_are_the_definitions(self, options, dtype, place):
        xs, slopes, intercepts = make_maps(**options, dtype=dtype)
        wides = [t.detach().double().requires_grad_() for t in (*xs, slopes, intercepts)]
        expected = define_affine_maximum(wides[:-2], *wides[-2:])
        grad = torch.randn(expected.shape).to(dtype)
        expected_grads = torch.autograd.grad(expected, wides, grad.double())
        moved = [t.detach().to(place.device) for t in (*xs, slopes, intercepts)]
        result = place.operators.affine_maximum(moved[:-2], *moved[-2:])
        got_xs, *got = place.operators._affine_maximum_backward(grad.to(place.device), moved[:-2], *moved[-2:])
        if result.numel():
            assert result.stride() == moved[0].stride()
            assert all(g.stride() == x.stride() for g, x in zip(got_xs, moved[:-2], strict=True))
        for value, best in zip([result, *got_xs, *got], [expected, *expected_grads], strict=True):
            eps = torch.finfo(value.dtype).eps
            sums = 1e-12 if dtype == torch.float64 else 2e-6
            scale = best.abs().max().item() if best.numel() else 1.0
            torch.testing.assert_close(value.cpu().double(), best, rtol=0.51 * eps, atol=sums * max(scale, 1.0))


def test_variance_survives_a_large_mean(place):
    x = torch.randn(1, 3, 40, 50) + torch.tensor([0.0, 1e3, 1e4])[:, None, None]
    expected = x.double().var(dim=(2, 3), correction=0)
    statistics = place.operators.channel_statistics(x.to(place.device)).cpu()
    torch.testing.assert_close(statistics[:, 1].double(), expected, rtol=1e-3, atol=0)


def test_nan_and_ties_are_those_of_torch_maximum(place):
    x = torch.tensor([float("nan"), 0.0, 1.0, -1.0, float("inf")]).view(1, 1, 1, 5)
    slopes, intercepts = torch.tensor([[[[1.0]], [[-1.0]]]]), torch.zeros(1, 2, 1)
    moved = [t.to(place.device) for t in (x, slopes, intercepts)]
    result = place.operators.affine_maximum(moved[:1], *moved[1:])
    torch.testing.assert_close(result.cpu(), torch.maximum(x, -x), equal_nan=True)
    (grad,), *_ = place.operators._affine_maximum_backward(torch.ones_like(result), moved[:1], *moved[1:])
    assert grad.flatten().tolist() == [0.0, 0.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestBorders:
    def align(self, place, x, boxes, pool_size):
        values, index = place.operators.border_align(x.to(place.device), boxes.to(place.device), pool_size)
        return values.cpu(), index.cpu()

    def gradient(self, place, grad, x, boxes, index, pool_size, *, deterministic=False):
        moved = [tensor.to(place.device) for tensor in (grad, x, boxes, index)]
        return place.operators._border_align_backward(*moved, pool_size, deterministic).cpu()

    @pytest.mark.parametrize("options", BORDER_SHAPES, ids=str)
    def test_maxima_and_gradients_are_the_definitions(self, options, dtype, place):
        x, boxes, pool_size = make_borders(**options, dtype=dtype)
        values, index = self.align(place, x, boxes, pool_size)
        assert values.dtype == dtype
        assert index.dtype == torch.uint8
        expected, expected_index = define_border_align(x.double(), boxes.double(), pool_size)
        rounding, sums = (1e-12, 1e-12) if dtype == torch.float64 else (0.51 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(values.double(), expected, rtol=rounding, atol=sums)
        if dtype == torch.float64:
            assert torch.equal(index, expected_index)
        index, grad = torch.randint_like(index, pool_size + 1), torch.randn_like(values)
        grads = [
            self.gradient(place, grad, x, boxes, index, pool_size, deterministic=deterministic)
            for deterministic in (False, True, True)
        ]
        assert torch.equal(*grads[1:])
        torch.testing.assert_close(*grads[:2], rtol=2 * rounding, atol=10 * sums)
        if values.numel() < 5000:
            expected = gradient_loop(grad, x, boxes, index, pool_size)
            torch.testing.assert_close(grads[0].double(), expected, rtol=rounding, atol=10 * sums)

    @pytest.mark.parametrize("channels", [5, 16], ids=["scalar", "vector"])
    def test_far_points_read_nothing(self, channels, dtype, place):
        x, boxes, pool_size = make_borders(channels=channels, grid=(2, 5), pool_size=4, dtype=dtype)
        boxes = put_far(boxes)
        values, index = self.align(place, x, boxes, pool_size)
        torch.testing.assert_close(values.double(), maxima_loop(x, boxes, pool_size)[0], rtol=1e-2, atol=1e-5)
        index[:, ::3] = 255  # no point of the border
        grad = torch.randn_like(values)
        expected = gradient_loop(grad, x, boxes, index, pool_size)
        for deterministic in (False, True):
            got = self.gradient(place, grad, x, boxes, index, pool_size, deterministic=deterministic)
            torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-4)

    def test_layouts(self, dtype, place):
        x, boxes, pool_size = make_borders(channels=16, dtype=dtype)
        rows = x.permute(0, 2, 3, 1)
        off = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape).permute(0, 3, 1, 2)
        assert off.data_ptr() % 16 != 0  # vectors off their boundary are read one by one
        values, index = self.align(place, x, boxes, pool_size)
        grad = torch.randn_like(values)
        gradient = self.gradient(place, grad, x, boxes, index, pool_size, deterministic=True)
        assert values.is_contiguous()
        assert gradient.is_contiguous()
        for last in (x.contiguous(memory_format=torch.channels_last), off):
            got, got_index = self.align(place, last, boxes, pool_size)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, values)
            assert torch.equal(got_index, index)
            got = self.gradient(place, grad, last, boxes, index, pool_size, deterministic=True)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, gradient)

    def test_first_of_equal_points_and_of_those_that_are_no_numbers(self, dtype, place):
        boxes = torch.tensor([0.0, 0.0, 4.0, 0.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        rows = [([1.0, 3.0, 0.0, 3.0, 2.0], 1, 1), ([0.0] * 5, 0, 0), ([1.0, 5.0, 6.0, torch.nan, 2.0], 2, 1)]
        for row, first, back in rows:
            x = torch.tensor(row, dtype=dtype).repeat(4 * 8, 1).view(1, -1, 1, 5)
            index = self.align(place, x, boxes.view(1, 4, 1, 1), 4)[1].view(4, 8)
            assert [set(side.tolist()) for side in index] == [{first}, {0}, {back}, {0}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestRegions:
    def pool(self, place, *arguments):
        return place.operators.deform_roi_pool(*self.moved(place, arguments)).cpu()

    def gradients(self, place, *arguments, needs=(True, True), deterministic=False):
        moved = self.moved(place, arguments)
        return [grad.cpu() for grad in place.operators._deform_roi_pool_backward(*moved, list(needs), deterministic)]

    def moved(self, place, arguments):
        return [a.to(place.device) if isinstance(a, torch.Tensor) else a for a in arguments]

    @pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "published"])
    @pytest.mark.parametrize("options", REGION_SHAPES, ids=str)
    def test_means_and_gradients_are_the_definitions(self, options, aligned, dtype, place):
        x, rois, offset, *numbers = make_regions(**options, aligned=aligned, dtype=dtype)
        leaves = [None if t is None else t.double().requires_grad_() for t in (x, offset)]
        expected = define_deform_roi_pool(leaves[0], rois.double(), leaves[1], *numbers)
        out = self.pool(place, x, rois, offset, *numbers)
        assert out.dtype == dtype
        rounding, sums = (1e-12, 1e-12) if dtype == torch.float64 else (0.51 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(out.double(), expected.detach(), rtol=rounding, atol=sums)
        grad = torch.randn_like(out)
        wanted = torch.autograd.grad(expected, [leaf for leaf in leaves if leaf is not None], grad.double())
        runs = [
            self.gradients(place, grad, x, rois, offset, *numbers, deterministic=deterministic)
            for deterministic in (False, True, True)
        ]
        assert all(torch.equal(*pair) for pair in zip(*runs[1:], strict=True))
        for run in runs[:2]:
            torch.testing.assert_close(run[0].double(), wanted[0], rtol=rounding, atol=10 * sums)
            if offset is None:
                assert run[1].shape == (0,)
            else:
                torch.testing.assert_close(
                    run[1].double(), wanted[1], rtol=1e-4 if sums > 1e-6 else 1e-10, atol=30 * sums
                )

    @pytest.mark.parametrize("channels", [5, 16], ids=["scalar", "vector"])
    def test_far_regions_and_offsets_read_nothing(self, channels, dtype, place):
        x, rois, offset, *numbers = make_regions(channels=channels, count=20, side=2, dtype=dtype)
        rois, offset = put_far(rois), put_far(offset)
        out = self.pool(place, x, rois, offset, *numbers)
        torch.testing.assert_close(out.double(), pooled_loop(x, rois, offset, *numbers), rtol=1e-2, atol=1e-4)
        grad = torch.randn_like(out)
        expected = gradients_loop(grad, x, rois, offset, *numbers)
        for deterministic in (False, True):
            got = self.gradients(place, grad, x, rois, offset, *numbers, deterministic=deterministic)
            for each, wanted in zip(got, expected, strict=True):
                torch.testing.assert_close(each.double(), wanted, rtol=1e-2, atol=1e-3)

    def test_layouts_and_needs(self, dtype, place):
        x, rois, offset, *numbers = make_regions(channels=16, side=2, dtype=dtype)
        rows = x.permute(0, 2, 3, 1)
        off = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape).permute(0, 3, 1, 2)
        assert off.data_ptr() % 16 != 0  # vectors off their boundary are read one by one
        out = self.pool(place, x, rois, offset, *numbers)
        grad = torch.randn_like(out)
        grads = self.gradients(place, grad, x, rois, offset, *numbers, deterministic=True)
        assert out.is_contiguous()
        assert grads[0].is_contiguous()
        for last in (x.contiguous(memory_format=torch.channels_last), off):
            got = self.pool(place, last, rois, offset, *numbers)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, out)
            got = self.gradients(place, grad, last, rois, offset, *numbers, deterministic=True)
            assert got[0].is_contiguous(memory_format=torch.channels_last)
            assert all(torch.equal(*pair) for pair in zip(got, grads, strict=True))
        for needs in ([True, False], [False, True]):
            got = self.gradients(place, grad, x, rois, offset, *numbers, needs=needs, deterministic=True)
            for each, wanted, needed in zip(got, grads, needs, strict=True):
                assert torch.equal(each, wanted if needed else wanted.new_empty(0))
