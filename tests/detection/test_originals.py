"""Weights, features and objects of mmdetection's heads give its assignments, losses, gradients and detections."""

from pathlib import Path

import pytest

from tools.originals import heads
from tools.originals.rows import table

RECORDS = Path(__file__).parent / "originals"
STAGES = [f"{case} {stage}" for case in "ABC" for stage in ("assignment", "losses", "gradients")]
DETECTIONS = [f"detections: {kind}" for kind in ("labels", "scores", "boxes, pixels")]


@pytest.mark.parametrize("name", heads.HEADS)
def test_computes_what_mmdetection_does(name):
    rows = list(heads.compare(name, *heads.read(RECORDS / f"{name}.json")))
    otherwise = {"A losses", "A gradients"} if name == "retinanet" else set()
    assert [row.stage for row in rows] == [stage for stage in STAGES if stage not in otherwise] + DETECTIONS
    assert all(row.passes for row in rows), table(rows)
