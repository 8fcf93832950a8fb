"""The public functions in TorchScript, and in the graphs that torch.onnx exports."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from dyhead.layers import SEPC, DyHead
from dyhead.necks import Stack
from dyhead.ops import border_align, deform_conv2d, deform_roi_pool, library, pyramid_deform_conv2d
from tests.ops.borders import make_borders
from tests.ops.regions import make_regions

compiled = pytest.mark.skipif(library.PROBLEM is not None, reason="TorchScript needs the compiled operator")


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None):
        return deform_conv2d(input, offset, self.weight, self.bias, (2, 1), padding=1, mask=mask)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4, 3, 3))

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None):
        level_weight = input.mean((1, 2))[:, :2].sigmoid()
        return pyramid_deform_conv2d(
            [input, input], offset, self.weight, None, mask, level_weight, scales=[2.0, 1.0], dilation=(1, 2)
        )


class Borders(nn.Module):
    def forward(self, x: Tensor, boxes: Tensor):
        return border_align(x, boxes, pool_size=4) + border_align(x, boxes)


class Regions(nn.Module):
    def forward(self, x: Tensor, rois: Tensor, offset: Tensor):
        pooled = deform_roi_pool(x, rois, offset, 3, spatial_scale=0.125, aligned=False)
        return pooled + deform_roi_pool(x, rois, output_size=3)


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit.script is deprecated
        return torch.jit.script(module)


@pytest.fixture
def arguments():
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 7), torch.randn(2, 18, 3, 7), torch.rand(2, 9, 3, 7)


@compiled
@pytest.mark.parametrize("module", [Convolution, Pyramid])
class TestScript:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    @pytest.mark.parametrize("masked", [True, False])
    def test_equals_the_module(self, module, dtype, masked, arguments, tmp_path):
        module = module().to(dtype)
        script(module).save(tmp_path / "module.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.jit.load(tmp_path / "module.pt")
        arguments = [tensor.to(dtype).requires_grad_() for tensor in arguments[: 3 if masked else 2]]
        results = [function(*arguments) for function in (loaded, module)]
        assert torch.equal(*results)
        for got, expected in zip(*(torch.autograd.grad(r.square().sum(), arguments) for r in results), strict=True):
            assert torch.equal(got, expected)

    def test_positions_are_not_narrowed(self, module, arguments):
        input, offset, _ = arguments
        with pytest.raises(RuntimeError, match=r"offset: expected torch\.float32, got torch\.float64"):
            script(module())(input, offset.double())


@compiled
def test_script_of_border_alignment():
    x, boxes, _ = make_borders(dtype=torch.float16)
    x = x.requires_grad_()
    results = [function(x, boxes.bfloat16().requires_grad_()) for function in (script(Borders()), Borders())]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in results))


@compiled
def test_script_of_deformable_roi_pooling():
    x, rois, offset, *_ = make_regions(dtype=torch.float16)
    leaves = x.requires_grad_(), offset.bfloat16().requires_grad_()
    results = [function(leaves[0], rois, leaves[1]) for function in (script(Regions()), Regions())]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(result.sum(), leaves) for result in results]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_script_without_the_library_says_so(monkeypatch):
    monkeypatch.setattr(library, "PROBLEM", "it was not built")
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: expected the compiled operator, got none: it was not"):
        deform_conv2d.__prepare_scriptable__()  # what torch.jit.script calls when it meets the function first


HEADS = [
    {},
    {"window": None},
    {"task_aware": False},
    {"scale_aware": False},
    {"spatial_aware": False},
    {"spatial_aware": False, "task_aware": False},
    {"block": "released"},
    {"block": "mmdetection_main"},
]


@compiled
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_scripted_head_equals_the_head(options, tmp_path):
    torch.manual_seed(0)
    head = DyHead(16, 2, **options)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            # So that offsets are not zero; but where scale-aware weights are 0 or 1, gradients are not the same.
            parameter += (0.01 if "scale_attention" in name else 0.1) * torch.randn_like(parameter)
    script(head).save(tmp_path / "head.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(tmp_path / "head.pt")
    assert list(loaded.state_dict()) == list(head.state_dict())
    pyramid = {f"p{i}": torch.randn(2, 16, 24 >> i, 32 >> i, requires_grad=True) for i in range(4)}
    outputs = [module(pyramid) for module in (loaded, head)]
    assert [list(output) for output in outputs] == [list(pyramid)] * 2
    for name in pyramid:
        assert torch.equal(*(output[name] for output in outputs)), name
    grads = [
        torch.autograd.grad(sum(level.square().sum() for level in output.values()), pyramid["p1"]) for output in outputs
    ]
    torch.testing.assert_close(*grads)
    with pytest.raises(Exception, match=r"pyramid: expected levels \(N, 16, H, W\), got"):
        loaded({"p0": torch.randn(1, 8, 4, 4)})


def test_script_of_a_neck_that_it_cannot_take_says_what_takes_it():
    with pytest.raises(RuntimeError, match="without SEPC; torch.jit.trace and torch.export take it"):
        script(nn.Sequential(SEPC(16)))
    necks = Stack({"sepc": SEPC(16, task_convs="none"), "dyhead": DyHead(16, 1)})
    with pytest.raises(RuntimeError, match="expected DyHead and no other neck, got sepc, dyhead"):
        script(necks)


@pytest.mark.parametrize("exporting", [False, True])
def test_onnx_is_exported_by_pytorchs_own_operators(arguments, monkeypatch, exporting):
    """torch.onnx itself needs packages that are not here: its flag, and the graph that it would get."""
    levels = torch.randn(1, 16, 6, 6), torch.randn(1, 16, 3, 3)
    head = DyHead(16, 1)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: exporting)
    borders, regions = make_borders(dtype=torch.float32)[:2], make_regions(dtype=torch.float32)[:3]
    for module, inputs in [
        (Convolution(), arguments),
        (Pyramid(), arguments),
        (Borders(), borders),
        (Regions(), regions),
        (head, (levels,)),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about constants in the trace
            graph = str(torch.jit.trace(module, inputs).inlined_graph)
        assert ("dyhead::" in graph) == (not exporting and library.PROBLEM is None)
