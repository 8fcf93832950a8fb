"""What a project's table of names consists of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Row(NamedTuple):
    """One kind of key: a regular expression of theirs, ours, and what becomes of the tensor.

    Attributes:
        theirs: matches the whole key.
        ours: the canonical key, as a template of ``re.Match.expand`` or as a function of the match, which may return
            None: there is none. ``NAME[i]`` is element i of the vector NAME.
        value: makes our tensor of theirs; by default they are the same.
    """

    theirs: str
    ours: str | Callable[[re.Match], str | None]
    value: Callable[[Tensor], Tensor] | None = None

    def rename(self, key: str) -> str | None:
        """The canonical key of ``key``, or None where it is of another kind."""
        match = re.fullmatch(self.theirs, key)
        if match is None:
            return None
        return match.expand(self.ours) if isinstance(self.ours, str) else self.ours(match)


@dataclass(frozen=True)
class Source:
    """A project whose checkpoints are converted.

    Attributes:
        name: the project.
        mark: a regular expression found in some key of each of its checkpoints.
        rows: its table, from its state dict: some names depend on what else is there. The first row that matches a
            key applies.
        unless: a regular expression found in none of its keys.
        dropped: kinds of keys that nothing is lost with, each with the reason.
        left_over: kinds of keys that are known and have no counterpart, each with the reason.
        remainder: the reason for all other keys that are left over. None: they keep their names.
        zero_biases: its convolutions lack biases that ours have.
        note: what its weights need in the configuration, which the shapes do not say.
    """

    name: str
    mark: str
    rows: Callable[[Mapping[str, Tensor]], Iterable[Row]]
    unless: str | None = None
    dropped: tuple[tuple[str, str], ...] = ()
    left_over: tuple[tuple[str, str], ...] = ()
    remainder: str | None = "no detector of this project has it"
    zero_biases: bool = False
    note: str = ""

    def recognises(self, keys: Iterable[str]) -> bool:
        """Whether keys are those of a checkpoint of this project."""
        keys = list(keys)
        if self.unless is not None and any(re.search(self.unless, key) for key in keys):
            return False
        return any(re.search(self.mark, key) for key in keys)


#: What many projects save and no model of ours reads.
COUNTERS = (r".*\.num_batches_tracked", "a counter that normalization by stored statistics does not read")
ANCHORS = (r"(.+\.)?anchor_generator\.cell_anchors\.\d+", "anchors are computed from the configuration")
PIXELS = (r"pixel_(mean|std)", "read from the configuration")
