"""Trained detectors in files that run without this project: ONNX, OpenVINO, PyTorch's .pt2 and AOTInductor's packages.

Models of one's own need nothing of it: once `dyhead.ops` is imported, `torch.onnx.export(..., dynamo=True)` knows the
operators.
"""

from dyhead.export.files import FORMATS, export
from dyhead.export.graph import OUTPUTS, DetectorGraph

__all__ = ["FORMATS", "OUTPUTS", "DetectorGraph", "export"]
