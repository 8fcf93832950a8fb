"""Checkpoint files of this and other projects: reading them, giving their weights our keys, loading them into models.

The canonical keys, which files of both engines have, are listed in :mod:`dyhead.checkpoints.ours`; every other project
has a table of its own beside it.
"""

from dyhead.checkpoints.convert import Conversion, convert
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import find_state, read_file, read_state
from dyhead.checkpoints.loading import load_into
from dyhead.checkpoints.ours import canonical_names

__all__ = [
    "CheckpointError",
    "Conversion",
    "canonical_names",
    "convert",
    "find_state",
    "load_into",
    "read_file",
    "read_state",
]
