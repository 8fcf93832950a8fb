"""Inference engines that have a deformable convolution: OpenVINO and ONNX Runtime, both optional."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Unavailable


def openvino_deform_conv2d(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Callable[[], np.ndarray]:
    """OpenVINO's DeformableConvolution, 3x3, padding 1; float32, NCHW, the weight a constant of the model."""
    try:
        import openvino
        from openvino import opset8
    except ImportError:
        raise Unavailable("not installed (pip install openvino)") from None
    tensors = [x.numpy() for x in (input, offset, mask)]
    parameters = [opset8.parameter(list(x.shape), np.float32) for x in tensors]
    node = opset8.deformable_convolution(
        parameters[0],
        parameters[1],
        opset8.constant(weight.numpy()),
        strides=[1, 1],
        pads_begin=[1, 1],
        pads_end=[1, 1],
        dilations=[1, 1],
        mask=parameters[2],
        bilinear_interpolation_pad=True,
    )
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", options)
    return lambda: model(tensors, share_inputs=True, share_outputs=True)[0]


def onnxruntime_deform_conv2d(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Callable[[], np.ndarray]:
    """ONNX Runtime's DeformConv, 3x3, padding 1; float32, NCHW, the weight an initializer of the model."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise Unavailable("not installed (pip install onnxruntime onnx)") from None
    tensors = {"input": input.numpy(), "offset": offset.numpy(), "mask": mask.numpy()}
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "DeformConv", ["input", "weight", "offset", "", "mask"], ["out"], kernel_shape=[3, 3], pads=[1] * 4
            )
        ],
        "deform_conv2d",
        [onnx.helper.make_tensor_value_info(name, kind, list(x.shape)) for name, x in tensors.items()],
        [onnx.helper.make_tensor_value_info("out", kind, None)],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight")],
    )
    # The oldest versions with the current DeformConv.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, tensors)[0]
