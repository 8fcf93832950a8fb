"""Compare this project with the numbers that the original projects' own code computed.

    python tools/compare_with_originals.py FOLDER

FOLDER holds ``oracles``, records of single heads, ``oracles/seeds``, of research code, ``oracles/backbones``, of
networks and necks, and ``published``, of whole recipes: NAME.json and NAME.npz each. Prints a table; the exit code is
1 if a difference is over its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.originals import (
    border,
    d2det,
    double_head,
    fpt,
    heads,
    hit_detector,
    losses,
    recipes,
    resnets,
    saccadenet,
    sepc,
    spinenet,
)
from tools.originals.rows import Row, table

#: What is compared: functions of the folder that yield rows.
COMPARISONS: tuple[Callable[[Path], Iterable[Row]], ...] = (
    heads.rows,
    border.rows,
    d2det.rows,
    double_head.rows,
    fpt.rows,
    hit_detector.rows,
    losses.rows,
    recipes.rows,
    resnets.rows,
    saccadenet.rows,
    sepc.rows,
    spinenet.rows,
)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    rows = [row for comparison in COMPARISONS for row in comparison(folder)]
    if not any(row.difference is not None for row in rows):
        parser.error(f"{folder}: expected records in oracles or published, found none to compare")
    print(table(rows))
    over = [row for row in rows if not row.passes]
    print(f"\n{sum(row.difference is not None for row in rows)} comparisons, {len(over)} over their tolerance")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
