"""OpenVINO: its ONNX reader does not know DeformConv, which its own DeformableConvolution stands for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from openvino import Model
    from openvino.frontend import NodeContext
    from openvino.frontend.onnx import ConversionExtension


def extension() -> ConversionExtension:
    """What lets OpenVINO read ONNX files with DeformConv: ``convert_model(file, extension=[extension()])``."""
    from openvino.frontend.onnx import ConversionExtension

    return ConversionExtension("DeformConv", _deformable_convolution)


def read(path: str | os.PathLike) -> Model:
    """The model of an ONNX file."""
    import openvino

    return openvino.convert_model(os.fspath(path), extension=[extension()])


def _deformable_convolution(node: NodeContext) -> list:
    from openvino import opset8

    inputs = [node.get_input(i) for i in range(node.get_input_size())]
    x, weight, offset, bias, mask = (*inputs, None, None)[:5]
    bias, mask = (None if _is_absent(value) else value for value in (bias, mask))

    def pairs(name: str, default: int, count: int = 2) -> list[int]:
        return list(node.get_attribute(name)) if node.has_attribute(name) else [default] * count

    pads = pairs("pads", 0, 4)
    out = opset8.deformable_convolution(
        x,
        offset,
        weight,
        strides=pairs("strides", 1),
        pads_begin=pads[:2],
        pads_end=pads[2:],
        dilations=pairs("dilations", 1),
        mask=mask,
        group=int(node.get_attribute("group", 1)),
        deformable_group=int(node.get_attribute("offset_group", 1)),
        bilinear_interpolation_pad=True,  # what is outside counts 0
    )
    if bias is not None:
        out = opset8.add(out, opset8.reshape(bias, opset8.constant(np.array([1, -1, 1, 1])), special_zero=False))
    return out.outputs()


def _is_absent(value: object) -> bool:
    """Whether an optional input is left out, which the reader hands over as a node of its own."""
    return value is None or value.get_node().get_type_name() == "NullNode"
