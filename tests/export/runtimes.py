"""Runtimes of exported files, behind one interface. A test of one that is not installed is skipped."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Runtime:
    package: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def __str__(self) -> str:
        return self.package


ONNXRUNTIME, OPENVINO = Runtime("onnxruntime"), Runtime("openvino")
RUNTIMES = [ONNXRUNTIME, OPENVINO]


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
