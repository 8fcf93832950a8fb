"""The switch between compiled operators and their definitions."""

import contextvars
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dyhead import ops
from dyhead.ops import channelwise
from tests.ops.maps import make_maps


class Compiled(TorchDispatchMode):
    """Collects the names of dyhead's compiled operators that run within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dyhead":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def run_all():
    """The results of every public function."""
    torch.manual_seed(0)
    feature, weight = torch.randn(1, 4, 6, 5), torch.randn(1, 2, 4, 3, 3)
    offset = torch.randn(1, 18, 6, 5)
    xs, slopes, intercepts = make_maps()
    with torch.no_grad():
        return [
            ops.pyramid_deform_conv2d([feature], offset, weight),
            ops.deform_conv2d(feature, offset, weight[0], padding=1),
            channelwise.channel_statistics(xs[0]),
            channelwise.affine_maximum(xs, slopes, intercepts),
        ]


ALL = ["pyramid_deform_conv2d", "pyramid_deform_conv2d", "channel_statistics", "affine_maximum"]


def names():
    with Compiled() as compiled:
        run_all()
    return compiled.names


def test_reference_runs_no_compiled_operator_and_gives_the_same():
    expected = run_all()
    assert names() == ALL
    with ops.backend("reference"):
        assert names() == []
        result = run_all()
        with ops.backend("compiled"):
            assert names() == ALL
        assert names() == []
    assert names() == ALL
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_an_exception_switches_back():
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert names() == ALL


def test_called_alone_it_stays():
    def switch():
        ops.backend("reference")
        return names()

    try:
        assert contextvars.copy_context().run(switch) == []
        assert names() == ALL  # a context of its own
    finally:
        ops.backend("compiled")


def test_threads_have_their_own():
    seen = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(names()))
        thread.start()
        thread.join()
        assert names() == []
    assert seen == [ALL]


def test_unknown_names_are_refused():
    for name in ("eager", None):
        with pytest.raises(ValueError, match=f"^backend: expected 'compiled' or 'reference', got {name!r}$"):
            ops.backend(name)
    assert names() == ALL


def test_reference_can_be_differentiated_twice(make_case):
    case = make_case(levels=((5, 7),), size=(5, 7), groups=1)
    with ops.backend("reference"):
        result = ops.pyramid_deform_conv2d(case.features, case.offset, case.weight)
    (grad,) = torch.autograd.grad(result.square().sum(), case.offset, create_graph=True)
    grad.square().sum().backward()
    assert case.weight.grad.isfinite().all()


def test_reference_follows_autocast():
    feature, offset, weight = torch.randn(1, 4, 6, 5), torch.randn(1, 18, 6, 5), torch.randn(1, 2, 4, 3, 3)
    with ops.backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert ops.pyramid_deform_conv2d([feature], offset, weight).dtype == torch.bfloat16


def test_compiled_code_follows_the_switch():
    feature, offset, weight = torch.randn(1, 4, 6, 5), torch.randn(1, 18, 6, 5), torch.randn(1, 2, 4, 3, 3)
    graphs = []

    def compiler(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        graphs.append("dyhead.pyramid_deform_conv2d" in targets)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ops.pyramid_deform_conv2d, backend=compiler, fullgraph=True)
    for _ in range(2):
        expected = compiled([feature], offset, weight)
        with ops.backend("reference"):
            torch.testing.assert_close(compiled([feature], offset, weight), expected, rtol=1e-4, atol=1e-4)
    assert graphs == [True, False]  # once for each
