"""The operator as a citizen of a CUDA device: streams, graphs, devices, determinism, and how precise half types are."""

import pytest
import torch

from dyhead.ops import functional, library, pyramid_deform_conv2d, reference

pytestmark = pytest.mark.cuda

operator = torch.ops.dyhead.pyramid_deform_conv2d
# Enough patches, slices and parts for every kernel to run many blocks.
LARGE = {"channels": 64, "out_channels": 64, "size": (50, 84), "levels": ((100, 168), (50, 84), (25, 42))}


def test_library_is_loaded():
    assert library.CUDA_PROBLEM is None
    assert library.runs_on(torch.device("cuda"))


def plain(features, offset, weight, bias, mask, level_weight, aligned, scales, stride, padding, dilation):
    """The operator as PyTorch would run it in a half type: samples in memory, rounded, then a product per level."""
    assert aligned
    _, out_channels, channels, kh, kw = weight.shape
    batch, _, height, width = offset.shape
    shift = offset.view(batch, 1, kh, kw, 2, height, width)
    out = 0
    for level, feature in enumerate(features):
        scale = feature.shape[2] / height
        rows, columns = reference.aligned_axis(scale, kh, dilation[0]), reference.aligned_axis(scale, kw, dilation[1])
        y = reference._grid(rows, kh, height, shift).view(kh, 1, height, 1) + rows.shift * shift[:, :, :, :, 0]
        x = reference._grid(columns, kw, width, shift).view(1, kw, 1, width) + columns.shift * shift[:, :, :, :, 1]
        samples = reference.sample_bilinear(feature.float(), y, x) * mask.view(batch, 1, 1, kh, kw, height, width)
        samples = (samples * level_weight[:, level].view(batch, 1, 1, 1, 1, 1, 1)).to(feature.dtype)
        kernel = weight[level].reshape(out_channels, channels * kh * kw)
        out = out + kernel @ samples.reshape(batch, channels * kh * kw, height * width)
    return out.view(batch, out_channels, height, width) + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [LARGE, {**LARGE, "channels": 20, "out_channels": 36}], ids=["vector", "scalar"])
def test_half_types_are_as_precise_as_a_plain_run(options, dtype, make_case):
    case = make_case(**options, dtype=dtype, device="cuda")
    exact, exact_grads = case.map(torch.Tensor.double).run(reference.pyramid_deform_conv)
    results = [[result, *grads] for result, grads in (case.run(operator), case.run(plain))]
    for ours, theirs, best in zip(*results, [exact, *exact_grads], strict=True):
        errors = [(got.double() - best).abs().max().item() for got in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1] + 1e-5 * best.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_in_the_current_stream(dtype, make_case):
    case = make_case(**LARGE, dtype=dtype, device="cuda")
    expected, expected_grads = case.run(operator)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = case.map(torch.zeros_like)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: anything in another stream would read the zeros
        with torch.no_grad():
            for target, source in zip([*late.tensors(), late.grad], [*case.tensors(), case.grad], strict=True):
                target.copy_(source)
        result, grads = late.run(operator)
    stream.synchronize()
    assert torch.equal(result, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "ordered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_in_a_graph(dtype, deterministic, make_case):
    backward = torch.ops.dyhead._pyramid_deform_conv2d_backward
    case, other = (make_case(**LARGE, dtype=dtype, device="cuda", seed=seed) for seed in (0, 1))
    held = case.map(torch.clone)

    @torch.no_grad()
    def both(case):
        features, *others = backward(case.grad, *case.arguments(), [True] * 6, False, deterministic)
        return [operator(*case.arguments()), *features, *others]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both(held)
    for inputs in (other, case):
        with torch.no_grad():
            for target, source in zip([*held.tensors(), held.grad], [*inputs.tensors(), inputs.grad], strict=True):
                target.copy_(source)
        graph.replay()
        torch.testing.assert_close(results, both(inputs), rtol=2e-2, atol=1e-2)
        assert torch.equal(results[0], operator(*inputs.arguments()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_where_determinism_is_asked_for(dtype, make_case):
    case = make_case(**LARGE, dtype=dtype, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [case.run(operator) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result, grads in runs[1:]:
        assert torch.equal(result, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True))
    # Samples' gradients are rounded on the way, so that sums of them are as precise as their largest terms.
    for ordered, other in zip(runs[0][1], case.run(operator)[1], strict=True):
        assert (ordered - other).abs().max() <= 2e-2 * other.abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_runs_on_a_device_that_is_not_the_current_one(make_case):
    first, second = (make_case(**LARGE, dtype=torch.float32, device=f"cuda:{index}") for index in (0, 1))
    with torch.cuda.device(0):
        result, grads = second.run(operator)
    expected, expected_grads = first.run(operator)
    assert result.device.index == 1
    torch.testing.assert_close(result.cpu(), expected.cpu())
    torch.testing.assert_close([g.cpu() for g in grads], [g.cpu() for g in expected_grads], rtol=1e-3, atol=1e-3)


def test_tf32_follows_the_setting_of_convolutions(make_case, monkeypatch):
    case = make_case(**LARGE, dtype=torch.float32, device="cuda")
    features, offset, weight, bias, mask, level_weight, *_ = case.arguments()
    exact = reference.pyramid_deform_conv(*case.map(torch.Tensor.double).arguments())
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert functional._allow_tf32(features[0]) == allowed
        result = pyramid_deform_conv2d(features, offset, weight, bias, mask, level_weight)
        errors.append(((result.double() - exact).abs().max() / exact.abs().max()).item())
    assert errors[0] < 1e-5 < errors[1] < 2e-3


def test_large_maps_are_addressed_in_64_bits():
    """More than 2^31 elements of features, read at the very end."""
    height, width, channels = 2**11, 2**11 + 1, 2**9
    need = 2 * height * width * channels
    if torch.cuda.mem_get_info()[0] < 1.2 * need:
        pytest.skip(f"needs {1.2 * need / 2**30:.0f} GiB of free memory")
    feature = torch.zeros(1, channels, height, width, device="cuda", dtype=torch.half).to(
        memory_format=torch.channels_last
    )
    feature[:, :, -1, -1] = 1
    offset = torch.tensor([height - 1.0, width - 1.0], device="cuda").view(1, 2, 1, 1)
    weight = torch.ones(1, 1, channels, 1, 1, device="cuda", dtype=torch.half)
    result = operator([feature], offset, weight, None, None, None, True, [1.0], [1, 1], [0, 0], [1, 1])
    assert result.item() == channels
