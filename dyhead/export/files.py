"""Files of exported detectors: ONNX, OpenVINO's, and PyTorch's own two."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dyhead.config import ConfigError
from dyhead.export.graph import DetectorGraph
from dyhead.ops import backend
from dyhead.ops.checks import as_integer

#: By the ending of the file: the format, and the packages that writing it needs.
FORMATS = {
    ".onnx": ("onnx", ("onnx", "onnxscript")),
    ".xml": ("openvino", ("onnx", "onnxscript", "openvino")),
    ".pt2": ("pt2", ()),
    ".aoti.pt2": ("aoti", ()),
}
OPSETS = range(19, 24)


def export(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    output: str = "detections",
    batch: int | None = 1,
    size: tuple[int, int] | None = None,
    opset: int = 19,
    plain: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> DetectorGraph:
    """Write a detector to a file that runs without this project.

    Args:
        model: a detector of either engine, in evaluation mode, on the CPU.
        path: the file, which must not be there yet. Its ending says the format: `.onnx`; `.xml` for OpenVINO, which
            writes a `.bin` beside it; `.pt2` for `torch.export.load`; `.aoti.pt2` for
            `torch._inductor.aoti_load_package`, compiled for this machine.
        output: what it puts out, one of :data:`dyhead.export.OUTPUTS`.
        batch: images of a batch; None: any number.
        size: height and width of the images that the network is to see; None: any multiples of what it pads images to
            (:attr:`DetectorGraph.multiple`) that are larger than the coarsest level's stride.
        opset: of ONNX, from 19 to 23.
        plain: of PyTorch's own files: put the operators together from PyTorch's own, which is slower, but needs no
            library of this project.
        metadata: texts that ONNX files hold beside the graph.

    Returns:
        What was exported, which runs in PyTorch, too.

    Raises:
        ConfigError: the detector cannot be exported like that; a package is missing; the file is there.
    """
    path = os.fspath(path)
    kind, files = check_path(path)
    if plain and kind in ("onnx", "openvino"):
        raise ConfigError(f"{path}: plain is for PyTorch's own files; this format has the operator")
    if opset not in OPSETS:
        raise ConfigError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if model.training:
        raise ConfigError("model: expected one in evaluation mode (model.eval()), got one in training mode")
    graph = DetectorGraph(model, output, onnx=kind in ("onnx", "openvino")).eval()
    program = _program(graph, batch, size, plain)
    write = {"onnx": _write_onnx, "openvino": _write_openvino, "pt2": _write_pt2, "aoti": _write_aoti}[kind]
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        # Files appear when they are complete.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            temporary = os.path.join(scratch, os.path.basename(path))
            write(program, temporary, graph, opset, dict(metadata or {}))
            for file in files:
                os.replace(os.path.join(scratch, os.path.basename(file)), file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from error
    return graph


def check_path(path: str) -> tuple[str, list[str]]:
    """The format of a file that is to be written, and all files that this writes.

    Raises:
        ConfigError: no such format; a package is missing; one of the files is there.
    """
    endings = [ending for ending in FORMATS if path.endswith(ending) and os.path.basename(path) != ending]
    if not endings:
        raise ConfigError(f"{path}: expected a name that ends with one of {', '.join(FORMATS)}")
    kind, packages = FORMATS[max(endings, key=len)]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{path}: needs {' and '.join(missing)}, not installed (pip install 'dyhead[export]')")
    files = [path, *([f"{os.path.splitext(path)[0]}.bin"] if kind == "openvino" else [])]
    for file in files:
        if os.path.lexists(file):
            raise ConfigError(f"{file}: exists and is not overwritten")
    return kind, files


def _program(graph: DetectorGraph, batch: int | None, size: tuple[int, int] | None, plain: bool) -> ExportedProgram:
    """The graph, traced."""
    for name, number in (("batch", batch), *(zip(("height", "width"), size, strict=True) if size else ())):
        if number is not None and (as_integer(number) is None or number < 1):
            raise ConfigError(f"{name}: expected an integer of at least 1, got {number!r}")
    multiple = graph.multiple
    least = graph.coarsest_stride // multiple + 1  # on a level of one pixel PyTorch takes the size for a constant
    shape = (2 if batch is None else batch, 3, *(size or (2 * least * multiple, 3 * least * multiple)))
    dynamic: dict[int, Any] = {} if batch is not None else {0: Dim("batch")}
    if size is None:
        dynamic |= {2 + i: multiple * Dim(name, min=least) for i, name in enumerate(("height", "width"))}
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad(), backend("reference") if plain else nullcontext():
        try:
            program = torch.export.export(
                graph, (example,), dynamic_shapes=(dynamic,) if dynamic else None, strict=False
            )
            _check_others(program, graph, example, dynamic)
        except Exception as error:  # PyTorch's tracing has no error of its own
            of_any = [name for name, value in (("batch", batch), ("size", size)) if value is None]
            hint = f"; try a fixed {' and '.join(of_any)}" if of_any else ""
            first = str(error).strip().split("\n", 1)[0]
            raise ConfigError(f"{type(error).__name__} while the detector was traced: {first}{hint}") from error
    return program


def _check_others(program: ExportedProgram, graph: DetectorGraph, example: Tensor, dynamic: Mapping[int, Any]) -> None:
    """Raise ValueError if what was traced is wrong for other images: tracing may take a size for a constant."""
    if not dynamic:
        return
    steps = {0: 1, 2: graph.multiple, 3: 2 * graph.multiple}
    shape = [side + (steps[i] if i in dynamic else 0) for i, side in enumerate(example.shape)]
    other = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255
    for name, got, expected in zip(graph.names, program.module()(other), graph(other), strict=True):
        if got.shape != expected.shape or not torch.allclose(got, expected, equal_nan=True):
            raise ValueError(f"of images {tuple(other.shape)} it makes other {name} than the detector")


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes of PyTorch's exporter about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_onnx(
    program: ExportedProgram, path: str, graph: DetectorGraph, opset: int, metadata: dict[str, str]
) -> None:
    with _quiet():
        onnx = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(graph.names),
            custom_translation_table={torch.ops.dyhead.select_boxes.default: _non_max_suppression()},
            verbose=False,
        )
        onnx.model.metadata_props.update(metadata)
        onnx.save(path)


def _non_max_suppression() -> Callable:
    from onnxscript import opset18

    def translate(boxes: Any, scores: Any, limit: int, threshold: float) -> Any:
        numbers = opset18.Constant(value_ints=[limit]), opset18.Constant(value_floats=[threshold])
        return opset18.NonMaxSuppression(boxes, scores, *numbers, opset18.Constant(value_floats=[0.0]))

    return translate


def _write_openvino(
    program: ExportedProgram, path: str, graph: DetectorGraph, opset: int, metadata: dict[str, str]
) -> None:
    import openvino

    from dyhead.export.openvino import read

    onnx = f"{path}.onnx"
    _write_onnx(program, onnx, graph, opset, metadata)
    model = read(onnx)
    for key, text in metadata.items():
        model.set_rt_info(text, ["dyhead", key])
    openvino.save_model(model, path, compress_to_fp16=False)


def _write_pt2(program: ExportedProgram, path: str, *unused: Any) -> None:
    torch.export.save(program, path)


def _write_aoti(program: ExportedProgram, path: str, *unused: Any) -> None:
    with torch.no_grad():
        shutil.move(torch._inductor.aoti_compile_and_package(program, package_path=f"{path}.pt2"), path)
