"""Both counters know the operators: multiply-adds by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dyhead.layers import SEPC, DyHead
from dyhead.ops import (
    backend,
    border_align,
    channelwise,
    deform_conv2d,
    deform_roi_pool,
    flop_handlers,
    flops,
    pyramid_deform_conv2d,
)
from dyhead.ops.reference import pyramid_deform_conv

operator = torch.ops.dyhead.pyramid_deform_conv2d


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def by_fvcore(function, *inputs):
    """Multiply-adds by operator."""
    nn = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    module = function if isinstance(function, torch.nn.Module) else Called(function)
    analysis = nn.FlopCountAnalysis(module, inputs).set_op_handle(**flop_handlers())
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = dict(analysis.by_operator())
    assert not [name for name in analysis.unsupported_ops() if name.startswith("dyhead::")]
    return counted


def by_torch(function, *inputs):
    """The same, from twice as many."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return {str(op): count // 2 for op, count in counter.get_flop_counts()["Global"].items()}


def test_flops_are_those_of_the_weights(make_case):
    case = make_case(channels=6, out_channels=4, groups=2, size=(5, 7), levels=((10, 14), (5, 7)), batch=3)
    one_pass = 2 * (2 * 9 * 3 * 4) * 3 * 5 * 7
    for function in (operator, pyramid_deform_conv):
        with FlopCounterMode(display=False) as counter:
            function(*case.arguments())
        assert counter.get_total_flops() == one_pass
    # Backward, the samples' gradients and the weight's are a product each.
    with FlopCounterMode(display=False) as counter:
        case.run(operator)
    assert counter.get_total_flops() == 3 * one_pass
    for tensor in case.tensors():
        tensor.requires_grad_(tensor is case.weight)
    with FlopCounterMode(display=False) as counter:
        operator(*case.arguments()).sum().backward()
    assert counter.get_total_flops() == 2 * one_pass


def test_deformable_convolutions_in_both(make_case):
    case = make_case(channels=6, out_channels=4, groups=2, offset_groups=3, size=(5, 7), kernel=(1, 3), batch=3)
    levels, offset, weight, bias, mask = case.features, case.offset, case.weight, case.bias, case.mask
    expected = 3 * (5 * 7) * (3 * 4 * (6 // 2) * 1 * 3)  # batch, pixels, weights of three levels

    def pyramid(first, second, third, *others):
        return pyramid_deform_conv2d([first, second, third], *others)

    inputs = (*levels, offset, weight, bias, mask, case.level_weight)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=not gradients):
            assert by_fvcore(pyramid, *inputs) == {"pyramid_deform_conv2d": expected}
            assert by_torch(pyramid, *inputs) == {"dyhead.pyramid_deform_conv2d": expected}
    feature = torch.rand(2, 6, 9, 8)  # stride 2, padding 1: 5 x 4 pixels
    convolution = feature, torch.rand(2, 18, 5, 4), torch.rand(7, 6, 3, 3), None, 2, 1
    expected = 2 * 20 * 7 * 6 * 9
    assert by_fvcore(lambda x: deform_conv2d(x, *convolution[1:]), feature) == {"pyramid_deform_conv2d": expected}
    assert by_torch(deform_conv2d, *convolution) == {"dyhead.pyramid_deform_conv2d": expected}


def test_channelwise_operators_in_both():
    x, y = (torch.rand(3, 4, 5, 6, requires_grad=True) for _ in range(2))
    slopes, intercepts = torch.rand(3, 2, 2, 4, requires_grad=True), torch.rand(3, 2, 4, requires_grad=True)
    inputs, pixels = (x, y, slopes, intercepts), 3 * 4 * 5 * 6
    assert by_fvcore(channelwise.channel_statistics, x) == {"channel_statistics": 2 * pixels}
    assert by_torch(channelwise.channel_statistics, x) == {"dyhead.channel_statistics": 2 * pixels}

    def maximum(x, y, slopes, intercepts):
        return channelwise.affine_maximum([x, y], slopes, intercepts)

    forward = pixels * (2 * 2)  # two maps of two inputs
    assert by_fvcore(maximum, *inputs) == {"affine_maximum": forward}
    assert by_torch(maximum, *inputs) == {"dyhead.affine_maximum": forward}
    backward = forward + pixels * (2 + 2 + 1)  # for each input its gradient and its slope's, and the intercept's
    counted = by_torch(lambda: maximum(*inputs).sum().backward())
    assert counted == {"dyhead.affine_maximum": forward, "dyhead._affine_maximum_backward": backward}


def test_border_alignment_in_both():
    x, boxes = torch.rand(2, 12, 7, 6, requires_grad=True), torch.rand(2, 4, 5, 3)
    forward = 2 * 12 * 5 * 3 * 11 * 4  # eleven samples of four pixels each
    assert by_fvcore(border_align, x, boxes) == {"border_align": forward}
    assert by_torch(border_align, x, boxes) == {"dyhead.border_align": forward}
    counted = by_torch(lambda: border_align(x, boxes).sum().backward())
    assert counted == {"dyhead.border_align": forward, "dyhead._border_align_backward": forward // 11}


def test_deformable_roi_pooling_in_both():
    x, offset = torch.rand(2, 6, 7, 6, requires_grad=True), torch.rand(5, 2, 3, 3, requires_grad=True)
    rois = torch.rand(5, 5)

    def pool(x, rois, offset):
        return deform_roi_pool(x, rois, offset, 3, sampling_ratio=2)

    forward = 5 * 6 * 3 * 3 * 4 * 4  # four samples of four pixels each
    assert by_fvcore(pool, x, rois, offset) == {"deform_roi_pool": forward}
    counted = by_torch(lambda: pool(x, rois, offset).sum().backward())
    assert counted == {"dyhead.deform_roi_pool": forward, "dyhead._deform_roi_pool_backward": 2 * forward}
    counted = by_torch(lambda: pool(x, rois, None).sum().backward())
    assert counted == {"dyhead.deform_roi_pool": forward, "dyhead._deform_roi_pool_backward": forward}


@pytest.mark.parametrize(
    "make", [lambda: DyHead(32, num_blocks=2), lambda: SEPC(32, num_blocks=2)], ids=["DyHead", "SEPC"]
)
def test_counters_agree_on_whole_necks_and_with_the_definition(make):
    torch.manual_seed(0)
    neck, levels = make().eval(), [torch.rand(2, 32, size, size) for size in (16, 8, 4)]
    torch_counts, fvcore_counts = by_torch(neck, levels), by_fvcore(neck, levels)
    ours = {f"dyhead.{name}": count for name, count in fvcore_counts.items() if f"dyhead.{name}" in torch_counts}
    assert ours == {name: count for name, count in torch_counts.items() if name.startswith("dyhead.")}
    assert ours["dyhead.pyramid_deform_conv2d"]
    assert torch_counts["aten.convolution"] == fvcore_counts["conv"]
    with backend("reference"):
        products = by_torch(neck, levels)["aten.bmm"]
    assert products == ours["dyhead.pyramid_deform_conv2d"]


def test_no_operator_is_left_out():
    names = {name.removeprefix("dyhead::") for name in torch._C._dispatch_get_all_op_names() if "dyhead::" in name}
    names.discard("select_boxes")  # NMS of detectors to export, which multiplies nothing
    assert "pyramid_deform_conv2d" in names
    assert {name for name in names if getattr(torch.ops.dyhead, name) not in flop_registry} == set()
    forward = {name for name in names if not name.endswith("_backward")}
    assert {name.removeprefix("dyhead::") for name in flop_handlers()} == forward


def test_fvcore_may_have_no_defaults_to_add_to(monkeypatch):
    module = pytest.importorskip("fvcore.nn.jit_analysis", reason="fvcore is not installed")
    monkeypatch.setattr(flops.importlib, "import_module", lambda name: module)
    flops.register_with_fvcore()
