"""Runtimes of exported files, behind one interface. A test of one that is not installed is skipped."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Runtime:
    package: str

    @property
    def installed(self) -> bool:
        """Whether it is there and has the operator, which ONNX Runtime has had only since 2026."""
        return importlib.util.find_spec(self.package) is not None and (self.package != "onnxruntime" or _has_operator())

    def __str__(self) -> str:
        return self.package


ONNXRUNTIME, OPENVINO = Runtime("onnxruntime"), Runtime("openvino")
RUNTIMES = [ONNXRUNTIME, OPENVINO]


@cache
def _has_operator() -> bool:
    import onnx
    import onnxruntime
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

    kind = onnx.TensorProto.FLOAT
    shapes = {"x": [1, 1, 1, 1], "w": [1, 1, 1, 1], "o": [1, 2, 1, 1]}
    tensors = [make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    graph = make_graph(
        [make_node("DeformConv", list(shapes), ["y"])], "graph", tensors, [make_tensor_value_info("y", kind, None)]
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 19)], ir_version=9)
    try:
        onnxruntime.InferenceSession(model.SerializeToString())
    except Exception:  # its own NotImplemented is in no public module
        return False
    return True


def runner(runtime: Runtime, path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs a file: from the inputs, in their order, to the outputs."""
    if not runtime.installed:
        pytest.skip(f"needs {runtime} (pip install 'dyhead[export]')")
    if runtime is ONNXRUNTIME:
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [each.name for each in session.get_inputs()]
        return lambda inputs: [
            torch.from_numpy(out)
            for out in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        ]
    import openvino

    from dyhead.export.openvino import read

    model = read(path) if str(path).endswith(".onnx") else str(path)
    model = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: [torch.from_numpy(out.copy()) for out in model([x.numpy() for x in inputs]).values()]


def operators(path) -> Counter[str]:
    """The operators of an ONNX file, and how many of each there are."""
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)
