"""How fast is the operator, compared with torchvision, two inference engines, and a dense convolution as the floor?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import composition
from benchmarks.engines import onnxruntime_deform_conv2d, openvino_deform_conv2d
from benchmarks.measure import Unavailable
from benchmarks.program import Benchmark, parser, run, size
from dyhead.ops import flops, pyramid_deform_conv2d

# Pixels. Learned offsets are a few pixels long.
OFFSET_STD = 2.0
# P3 to P7 of an image of 800 x 1333, and a small map.
SIZES = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11), (16, 16)]
TAPS = 9
SAMPLING_OUTPUTS = 16
MOST_COPIES = 64


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        mode: "forward" (without gradients) or "forward+backward" (all gradients).
        dtype: dtype of features and weight.
        levels: 1, or 3 to include the next finer and the next coarser level.
        size: (height, width) of the output, and of the level it belongs to.
        channels: channels in and out.
        batch: number of images.
        threads: number of threads of PyTorch and the engines.
    """

    mode: str
    dtype: str
    levels: int
    size: tuple[int, int]
    channels: int = 256
    batch: int = 1
    threads: int = 1

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the weights in the forward pass."""
        weight = (self.levels, self.channels, self.channels, TAPS)
        return flops.deform_conv(weight, (self.batch, 2 * TAPS, *self.size))

    def level_sizes(self) -> list[tuple[int, int]]:
        """Sizes of the levels, fine to coarse."""
        h, w = self.size
        return [(h, w)] if self.levels == 1 else [(2 * h, 2 * w), (h, w), (-(-h // 2), -(-w // 2))]


def build(case: Case, peer: str, device: torch.device) -> Callable[[], Any]:
    """Returns a function that runs `peer` in a case and returns the output, or its gradients.

    On a GPU calls cycle through enough sets of inputs that the cache cannot hold them.
    """
    copies = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, 1 + math.ceil(2 * cache / least_bytes(replace(case, mode="forward"))))
    calls = cycle([build_once(case, peer, device, seed) for seed in range(copies)])
    return lambda: next(calls)()


def build_once(case: Case, peer: str, device: torch.device, seed: int) -> Callable[[], Any]:
    """The same with one set of inputs."""
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    n, c, (h, w) = case.batch, case.channels, case.size
    features = [torch.randn(n, c, *level, device=device).to(dtype) for level in case.level_sizes()]
    offset = OFFSET_STD * torch.randn(n, 2 * TAPS, h, w, device=device)
    mask = torch.rand(n, TAPS, h, w, device=device)
    weight = (torch.randn(case.levels, c, c, 3, 3, device=device) / (3 * c**0.5)).to(dtype)
    grad = torch.randn(n, c, h, w, device=device).to(dtype)
    scales = [1.0] if case.levels == 1 else [2.0, 1.0, 0.5]

    kind, _, layout = peer.partition(", ")
    last = layout == "channels_last" or kind == "sampling"
    if last:
        features = [x.contiguous(memory_format=torch.channels_last) for x in features]
        grad = grad.contiguous(memory_format=torch.channels_last)

    if kind in ("OpenVINO", "ONNX Runtime"):
        if (case.mode, case.levels, case.dtype, device.type) != ("forward", 1, "float32", "cpu"):
            raise Unavailable("compared on a CPU in float32, forward, with one level only")
        engine = openvino_deform_conv2d if kind == "OpenVINO" else onnxruntime_deform_conv2d
        return engine(features[0], offset, mask, weight[0])
    if kind == "torchvision":
        if dtype == torch.bfloat16 and device.type == "cpu":
            raise Unavailable("has no bfloat16 on a CPU")
        if layout == "float16":
            if device.type == "cpu" or composition.deform_conv2d is None:
                raise Unavailable("compared on a GPU only, where torchvision is installed")
            return _half_torchvision(case, features, offset, mask, weight, grad)
        return _call(case, composition.pyramid_deform_conv2d, [*features, offset, mask, weight], grad, scales)
    if kind == "ours":
        return _call(case, pyramid_deform_conv2d, [*features, offset, mask, weight], grad, scales)
    if kind == "dense":
        # The same arithmetic: levels become channels of one map of the output's size.
        x = torch.randn(n, case.levels * c, h, w, device=device).to(dtype)
        kernel = weight.transpose(0, 1).reshape(c, case.levels * c, 3, 3)
        if last:
            x, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (x, kernel))
        return _differentiate(case, lambda x, kernel: functional.conv2d(x, kernel, padding=1), [x, kernel], grad)
    if kind == "sampling":
        if case.mode != "forward":
            raise Unavailable("shown for the forward pass only")
        few = weight[:, : min(c, SAMPLING_OUTPUTS)].contiguous()
        return _call(case, pyramid_deform_conv2d, [*features, offset, mask, few], grad, scales)
    # "copy": half of the bytes are read and half are written, in total the traffic of least_bytes.
    source = torch.ones(least_bytes(case) // 2, dtype=torch.uint8, device=device)  # zeros would be one page
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _half_torchvision(case, features, offset, mask, weight, grad) -> Callable[[], Any]:
    """torchvision in its fastest type, whose positions are too coarse to be useful: only the time is meaningful."""
    inputs = [x.detach().half() for x in (*features, offset, mask, weight)]

    def function(*inputs: Tensor) -> Tensor:
        *features, offset, mask, weight = inputs
        out = 0
        for level, feature in enumerate(features):
            if feature.shape[2:] != offset.shape[2:]:
                feature = functional.interpolate(feature, offset.shape[2:], mode="bilinear", align_corners=False)
            out = out + composition.deform_conv2d(feature, offset, weight[level], None, 1, 1, 1, mask)
        return out

    return _differentiate(case, function, inputs, grad.half())


def least_bytes(case: Case) -> int:
    """Bytes that must cross the memory bus: every input read once, every result written once.

    The backward pass adds reading the inputs again and the output's gradient, and writing the inputs' gradients.
    """
    element = getattr(torch, case.dtype).itemsize
    h, w = case.size
    c, pixels = case.channels, case.batch * h * w
    inputs = element * (
        case.batch * c * sum(a * b for a, b in case.level_sizes()) + case.levels * TAPS * c * c
    ) + 4 * pixels * 3 * TAPS  # fmt: skip
    output = element * pixels * c
    return inputs + output if case.mode == "forward" else 3 * inputs + 2 * output


def _call(case: Case, operator: Callable, inputs: list[Tensor], grad: Tensor, scales: list[float]) -> Callable:
    def function(*inputs: Tensor) -> Tensor:
        *features, offset, mask, weight = inputs
        return operator(features, offset, weight, mask=mask, scales=scales)

    return _differentiate(case, function, inputs, grad)


def _differentiate(case: Case, function: Callable, inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    if case.mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    inputs = [x.requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def same(case: Case) -> list[str]:
    """Peers with the same result. Resized levels and peers that are only a floor give different ones."""
    ours = ["ours, channels_last", "ours, NCHW"]
    if case.levels > 1:
        return ours
    return [*ours, "torchvision"] + (["OpenVINO", "ONNX Runtime"] if case.mode == "forward" else [])


BENCHMARK = Benchmark(
    name="operator",
    question="How fast is the operator, 3x3, C channels in and out, with mask, without bias?",
    build=build,
    peers={
        "ours, channels_last": "dyhead.ops.pyramid_deform_conv2d on maps in channels_last, its native layout",
        "ours, NCHW": "the same on contiguous maps",
        "torchvision": "torchvision.ops.deform_conv2d, a call per level on maps resized by interpolate, summed; half "
        "types in float32, as under autocast",
        "torchvision, float16": "the same in float16, which is too coarse for its positions: a time, not a result",
        "OpenVINO": "DeformableConvolution, NCHW, inference only",
        "ONNX Runtime": "DeformConv, NCHW, inference only",
        "dense, NCHW": "torch.nn.functional.conv2d, 3x3, levels * C channels in: the same multiply-adds",
        "dense, channels_last": "the same on maps in channels_last",
        "sampling": f"ours, channels_last, with {SAMPLING_OUTPUTS} output channels: all samples, hardly any product",
        "copy": "a copy that moves as many bytes as inputs and outputs have (benchmarks.operator.least_bytes)",
    },
    columns={
        "ours": ("ours, channels_last",),
        "ours NCHW": ("ours, NCHW",),
        "torchvision": ("torchvision", "torchvision, float16"),
        "OpenVINO": ("OpenVINO",),
        "ONNX Runtime": ("ONNX Runtime",),
        "dense": ("dense, NCHW", "dense, channels_last"),
    },
    ratios=(("torchvision", "ours"), ("ours", "dense")),
    warm=lambda case, peer: replace(case, size=(4, 4), channels=16),
    same=same,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    options_of = parser(BENCHMARK)
    options_of.add_argument("--modes", nargs="+", choices=["forward", "forward+backward"], help="default: both")
    options_of.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="default: the first two"
    )
    options_of.add_argument("--levels", nargs="+", type=int, choices=[1, 3], default=[1, 3])
    options_of.add_argument("--sizes", nargs="+", type=size, help="of the output; default: P3 to P7 of 800x1333, 16x16")
    options_of.add_argument("--channels", type=int, default=256)
    options_of.add_argument("--batch", type=int, default=1)
    options = options_of.parse_args(argv)
    modes = options.modes or ["forward", "forward+backward"]
    sizes = options.sizes or SIZES
    if options.quick:
        options.repeats, sizes, options.channels = 3, options.sizes or [(7, 11)], 16
    cases = [
        Case(mode, dtype, levels, place, options.channels, options.batch, options.threads)
        for mode, dtype, levels, place in product(
            modes, options.dtype or ["float32", "bfloat16"], options.levels, sizes
        )
    ]
    return run(BENCHMARK, cases, options, argv)


if __name__ == "__main__":
    main()
