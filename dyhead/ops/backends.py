"""Which implementation the public functions run: the compiled operators or their definitions in plain PyTorch."""

from __future__ import annotations

from contextvars import ContextVar

import torch

from . import library

BACKENDS = ("compiled", "reference")

_of_context: ContextVar[str] = ContextVar("dyhead_backend", default="compiled")
# The one switched to last, in any thread, for torch.compile: that of PyTorch 2.11 cannot look into a context variable.
# It guards this one, so a function is compiled anew for another backend.
_latest = "compiled"


class backend:
    """Switches what the functions of `dyhead.ops` and `dyhead.ops.channelwise` run.

        with dyhead.ops.backend("reference"):
            expected = model(images)

    As a context manager it switches back at the end; called alone it switches for good, like `torch.set_grad_enabled`.
    Every thread and asynchronous task has its own; a new thread starts with "compiled". Code under `torch.compile` runs
    what was switched to last in the process, and has to be called within the context, not contain it.

    Args:
        name: "compiled", the default: the compiled operators, and the definitions only for tensors of a device that has
            none. "reference": the definitions in plain PyTorch on every device (`dyhead.ops.reference`), which are
            slower and can be differentiated any number of times.

    Raises:
        ValueError: another name.
        RuntimeError: "compiled" where the library did not load; the text says why.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected {' or '.join(map(repr, BACKENDS))}, got {name!r}")
        if name == "compiled" and library.PROBLEM is not None:
            raise RuntimeError(f"backend: expected a library for 'compiled', got none: {library.PROBLEM}")
        self._before = _of_context.get()
        _switch(name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _switch(self._before)


def _switch(name: str) -> None:
    global _latest
    _of_context.set(name)
    _latest = name


def selected() -> str:
    """The backend here and now: "reference" while ONNX is exported, which knows only PyTorch's own operators."""
    compiling = torch.compiler.is_compiling()
    if (compiling or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
        return "reference"
    return _latest if compiling else _of_context.get()
