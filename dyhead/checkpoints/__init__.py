"""Checkpoint files of this and other projects: reading and writing them, giving their weights our keys,
loading them into models.

The canonical keys, which files of both engines have, are listed in :mod:`dyhead.checkpoints.ours`; every other project
has a table of its own beside it.
"""

from dyhead.checkpoints.convert import Conversion, convert, convert_for
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import read_file
from dyhead.checkpoints.loading import load_into
from dyhead.checkpoints.ours import canonical_names
from dyhead.checkpoints.saving import last_checkpoint, note_last_checkpoint, save_checkpoint, write_checkpoint
from dyhead.checkpoints.state import find_state, read_state

__all__ = [
    "CheckpointError",
    "Conversion",
    "canonical_names",
    "convert",
    "convert_for",
    "find_state",
    "last_checkpoint",
    "load_into",
    "note_last_checkpoint",
    "read_file",
    "read_state",
    "save_checkpoint",
    "write_checkpoint",
]
