"""Writing files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO


@contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """A file to write ``path`` with.

    What is written stands in ``PATH.partial`` and takes its name when it is complete and on the disk. After an error
    nothing is left of it, and ``path`` is what it was before.

    Args:
        path: the file.
        mode: "wb" or "w", which is UTF-8.

    Raises:
        OSError: it cannot be written; its ``filename`` is ``path``.
    """
    path = os.fspath(path)
    partial = path + ".partial"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), path) from error
        raise
    _sync_folder(os.path.dirname(path) or ".")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file as :func:`replacing` does, whose error it has."""
    with replacing(path, "w") as file:
        file.write(text)


def _sync_folder(folder: str) -> None:
    """Put the new name on the disk, too, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
