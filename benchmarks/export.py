"""How fast are exported detectors in ONNX Runtime and OpenVINO, beside PyTorch with our operator?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.detector import CONFIGS, FILES, SIZES
from benchmarks.measure import Unavailable
from benchmarks.program import Benchmark, parser, run, size
from dyhead.config import ConfigError, load_config
from dyhead.detection import DETECTORS
from dyhead.export import DetectorGraph, export
from dyhead.torchvision import build_model, get_cfg

NAMES = [detector.name.lower() for detector in DETECTORS.values() if detector.name != "PairedBox"]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        detector: a registered detector in lower case.
        backbone: "R18" (quickstart) or "R50" (full).
        output: see `dyhead.export.OUTPUTS`.
        size: (height, width) of the images.
        dtype: "float32".
        batch: number of images.
        threads: number of threads of PyTorch and the engines.
    """

    detector: str
    backbone: str
    output: str
    size: tuple[int, int]
    dtype: str = "float32"
    batch: int = 1
    threads: int = 1


def build(case: Case, peer: str, device: torch.device) -> Callable[[], Any]:
    """One inference on random images with random weights, from images to detections; writing the file is not timed."""
    cfg = get_cfg()
    load_config(cfg, CONFIGS / FILES[case.backbone].format(case.detector))
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, module in model.named_modules():
        if name.endswith("offset"):  # zero-initialised ones would read at whole pixels
            nn.init.normal_(module.bias, std=2)
    images = 255 * torch.rand(case.batch, 3, *case.size)
    if peer == "ours":
        graph = DetectorGraph(model, case.output)

        def infer() -> Any:
            with torch.no_grad():
                return graph(images)

        return infer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("detector.onnx" if peer == "ONNX Runtime" else "detector.xml")
        try:
            export(model, path, output=case.output, batch=case.batch, size=case.size)
            return (_onnxruntime if peer == "ONNX Runtime" else _openvino)(path, images)
        except (ConfigError, ImportError) as error:
            raise Unavailable(str(error)) from None


def _onnxruntime(path: Path, images: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images.numpy()})


def _openvino(path: Path, images: torch.Tensor) -> Callable[[], Any]:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    # Its weights are mapped from the file, which is gone afterwards, unless they are read.
    model = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", options)
    return lambda: model([images.numpy()], share_inputs=True, share_outputs=True)


BENCHMARK = Benchmark(
    name="export",
    question="How fast are exported detectors, from images to detections?",
    build=build,
    peers={
        "ours": "dyhead.export.DetectorGraph in PyTorch, with the compiled operators",
        "ONNX Runtime": "the same in an ONNX file, CPUExecutionProvider",
        "OpenVINO": "the same in an OpenVINO file, on the CPU in float32",
    },
    columns={name: (name,) for name in ("ours", "ONNX Runtime", "OpenVINO")},
    ratios=(("ONNX Runtime", "ours"), ("OpenVINO", "ours")),
    warm=lambda case, peer: replace(case, backbone="R18", size=(64, 64)),
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program."""
    options_of = parser(BENCHMARK)
    options_of.set_defaults(repeats=15, seconds=60, memory=False)
    options_of.add_argument("--detectors", nargs="+", choices=NAMES, default=["fcos", "atss"])
    options_of.add_argument("--backbones", nargs="+", choices=list(FILES), default=["R18"])
    options_of.add_argument("--outputs", nargs="+", choices=["detections", "boxes", "levels"], default=["detections"])
    options_of.add_argument("--sizes", nargs="+", type=size, help="of images; default: 192x256 (R18), 800x1333 (R50)")
    options_of.add_argument("--batch", type=int, default=1)
    options = options_of.parse_args(argv)
    if options.device != "cpu":
        options_of.error("--device: expected cpu, which all of them have")
    if options.quick:
        options.repeats, options.detectors, options.backbones, options.sizes = 3, ["fcos"], ["R18"], [(64, 64)]
    cases = [
        Case(detector, backbone, output, place, "float32", options.batch, options.threads)
        for detector, backbone, output in product(options.detectors, options.backbones, options.outputs)
        for place in options.sizes or [SIZES[backbone]]
    ]
    return run(BENCHMARK, cases, options, argv)


if __name__ == "__main__":
    main()
