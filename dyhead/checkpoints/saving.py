"""Writing checkpoints, and finding the last one of a run, for both engines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from dyhead.checkpoints.errors import CheckpointError
from dyhead.files import replacing, write_text

_NOTE = "last_checkpoint"


def write_checkpoint(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a file that ``torch.load`` reads; it appears when it is complete and on the disk.

    Raises:
        CheckpointError: it cannot be written. Nothing is left of it; a file of that name is what it was.
    """
    try:
        with replacing(path) as file:
            torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {os.fspath(path)}: cannot be written: {_reason(error)}") from error


def save_checkpoint(output_dir: str | os.PathLike, name: str, content: Mapping[str, Any]) -> None:
    """Write a checkpoint into the folder of a run, and then its name into ``last_checkpoint``.

    Args:
        output_dir: the folder.
        name: the file, such as ``model_final.pth``.
        content: what it is to hold.

    Raises:
        CheckpointError: one of them cannot be written; ``last_checkpoint`` names the one before.
    """
    write_checkpoint(os.path.join(output_dir, name), content)
    note_last_checkpoint(output_dir, name)


def note_last_checkpoint(output_dir: str | os.PathLike, name: str) -> None:
    """Write the name of a checkpoint into ``last_checkpoint``; :class:`CheckpointError` if it cannot be written."""
    note = os.path.join(output_dir, _NOTE)
    try:
        write_text(note, name)
    except OSError as error:
        raise CheckpointError(f"{note}: cannot be written: {_reason(error)}") from error


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in the folder of a run, or None.

    Raises:
        CheckpointError: there is a ``last_checkpoint``, and it does not hold the name of a file beside it.
    """
    note = os.path.join(output_dir, _NOTE)
    if not os.path.lexists(note):
        return None
    try:
        with open(note, encoding="utf-8") as file:
            name = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{note}: expected a file with the name of a checkpoint beside it: {_reason(error)}"
        ) from error
    if not name.isprintable() or name in ("", ".", "..") or os.path.basename(name) != name:
        raise CheckpointError(f"{note}: expected the name of a checkpoint beside it, got {name[:200]!r}")
    path = os.path.join(output_dir, name)
    if not os.path.isfile(path):
        raise CheckpointError(f"{note}: expected the name of a checkpoint beside it, {path} does not exist")
    return path


def _reason(error: Exception) -> str:
    """What the system says, which stands behind errors of PyTorch's in the chain."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)
