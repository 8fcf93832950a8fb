"""The operators in ONNX, run by ONNX Runtime and OpenVINO, against their definitions."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from dyhead.layers import DyHead
from dyhead.ops import border_align, deform_conv2d, deform_roi_pool, library, pyramid_deform_conv2d, reference
from dyhead.ops.channelwise import affine_maximum, channel_statistics
from tests.export.runtimes import RUNTIMES, operators, runner

pytest.importorskip("onnxscript", reason="needs onnxscript (pip install 'dyhead[export]')")

# Far finer, far coarser, in between; and sizes of levels that are no multiples of the output's.
SCALES = (4.0, 2.0, 1.5, 1.0, 0.5, 0.25)
SIZE = (5, 7)
ALL = slice(0, 6)
SIDES = [(17, 25), (11, 15), (9, 11), (5, 7), (3, 5), (1, 2)]


class Calls(nn.Module):
    """Many calls in one graph, since every export takes seconds."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, *tensors):
        return tuple(function(*tensors) for function in self.functions)


def export(module, tensors, path, opset=19, **options):
    torch.onnx.export(
        module.eval(), tuple(tensors), path, dynamo=True, opset_version=opset, verbose=False, external_data=False,
        input_names=[f"x{i}" for i in range(len(tensors))], **options,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Path of a graph, its inputs, and what they have to give."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, *side) for side in SIDES]
    offset, mask, level_weight = 2 * torch.randn(2, 36, *SIZE), torch.rand(2, 18, *SIZE), torch.rand(2, len(SIDES))
    weight, bias = torch.randn(len(SIDES), 6, 2, 3, 3), torch.randn(6)
    narrow = torch.randn(len(SIDES), 6, 4, 1, 2)
    small = torch.randn(6, 2, 3, 2)

    def variants(pyramid, convolution):
        def call(options, levels=ALL, w=weight, b=None, masked=True, weighted=True, channels=36):
            def function(*tensors):
                *features, offset, mask, level_weight = tensors
                return pyramid(
                    features[levels],
                    offset[:, :channels],
                    w[levels],
                    b,
                    mask if masked else None,
                    level_weight[:, levels] if weighted else None,
                    **options,
                )

            return function

        bare = {"masked": False, "weighted": False}
        return [
            call({"scales": SCALES}, b=bias),
            call({"dilation": (3, 1)}, slice(0, 6, 4), masked=False),  # scales by the heights
            call({"scales": (1.0, 7.0, 0.3, 0.3, 9.0, 2.5), "dilation": 2}, weighted=False),
            call({"scales": SCALES[2::3], "dilation": (2, 3)}, slice(2, 6, 3), narrow, channels=4, **bare),
            lambda *t: convolution(t[1], t[6][:, :24], small, bias, (3, 2), (2, 0), (1, 2), t[7][:, :12]),
            lambda *t: convolution(t[1], t[6][:, :24], small, None, (3, 2), (2, 0), (1, 2)),
        ]

    tensors += [offset, mask, level_weight]
    with torch.no_grad():
        expected = [f(*tensors) for f in variants(reference.pyramid_deform_conv2d, reference.deform_conv2d)]
    path = tmp_path_factory.mktemp("onnx") / "calls.onnx"
    return export(Calls(variants(pyramid_deform_conv2d, deform_conv2d)), tensors, path), tensors, expected


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_levels_are_read_where_the_definition_reads_them(runtime, calls):
    path, tensors, expected = calls
    for number, (got, wanted) in enumerate(zip(runner(runtime, path)(tensors), expected, strict=True)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5, msg=lambda text, n=number: f"call {n}: {text}")


def test_the_operator_is_deform_conv_and_nothing_is_gathered(calls):
    assert operators(calls[0])["DeformConv"] == 6 + 2 + 6 + 2 + 1 + 1
    assert not operators(calls[0]).keys() & {"GatherElements", "GatherND", "GridSample"}


def pyramid(batch, height, width):
    torch.manual_seed(1)
    return [torch.randn(batch, 16, height // 2**i, width // 2**i) for i in range(2)]


def head(**options):
    torch.manual_seed(0)
    head = DyHead(16, 1, **options).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # so that offsets are not zero
    return head


@pytest.mark.parametrize("block", ["paper", "released"])
def test_a_head_exports(block, tmp_path):
    """The paper's with any batch and size: what a coarser level is padded by is not known before."""
    module = Calls([lambda *levels: torch.cat([x.flatten(1) for x in module.head(levels)], dim=1)])
    module.head = head(block=block)
    shapes, options = [(2, 12, 20)], {}
    if block == "paper":
        batch, height, width = Dim("batch"), Dim("height"), Dim("width")
        sizes = [{0: batch, 2: 2 // 2**i * height, 3: 2 // 2**i * width} for i in range(2)]
        shapes, options = [(2, 12, 20), (1, 16, 8)], {"dynamic_shapes": (tuple(sizes),)}
    path = export(module, pyramid(*shapes[0]), tmp_path / "head.onnx", 22, **options)
    runs = [runner(runtime, path) for runtime in RUNTIMES if runtime.installed]
    for shape in shapes:
        levels = pyramid(*shape)
        with torch.no_grad():
            expected = module(*levels)[0]
        for run in runs:
            torch.testing.assert_close(run(levels)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(library.PROBLEM is not None, reason="needs the compiled operator")
def test_a_program_that_was_exported_before_has_its_operators_translated(tmp_path):
    torch.manual_seed(0)
    x, boxes, weight = torch.randn(1, 16, 6, 8), 4 * torch.rand(1, 4, 3, 2), torch.randn(1, 4, 16, 3, 3)
    slopes = torch.randn(1, 2, 1, 16)
    rois, offset = torch.tensor([[0.0, 1, 1, 5, 4], [0, -2, 3, 3, 9]]), torch.randn(2, 2, 3, 3)
    module = Calls([
        lambda x, boxes: border_align(x, boxes, 3),
        lambda x, boxes: pyramid_deform_conv2d([x], x.repeat(1, 2, 1, 1)[:, :18], weight),
        lambda x, boxes: affine_maximum([x], slopes, channel_statistics(x)),
        lambda x, boxes: deform_roi_pool(x, rois, offset, 3, aligned=False),
    ])  # fmt: skip
    program = torch.export.export(module.eval(), (x, boxes))
    names = ("border_align", "pyramid_deform_conv2d", "affine_maximum", "channel_statistics", "deform_roi_pool")
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"dyhead.{name}.default" for name in names} <= targets
    path = tmp_path / "program.onnx"
    torch.onnx.export(program, (), path, dynamo=True, opset_version=19, verbose=False, external_data=False)
    assert operators(path)["DeformConv"] == 1
    run, *_ = [runner(runtime, path) for runtime in RUNTIMES if runtime.installed]
    for got, expected in zip(run([x, boxes]), module(x, boxes), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
