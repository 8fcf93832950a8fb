"""Weights, features and objects of mmdetection's heads give its assignments, losses, gradients and detections.

So do those of BorderDet, D2Det and SaccadeNet, of their authors' code.

Logits and targets of records of classification losses give the losses and gradients of their authors' code.
"""

from pathlib import Path

import pytest

from tools.originals import border, d2det, double_head, heads, losses, saccadenet
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


@pytest.mark.parametrize(("name", "count"), [("ap_loss", 8), ("dr_loss", 8), ("noisy_anchors", 17)])
def test_computes_what_the_authors_of_a_loss_do(name, count):
    rows = list(losses.compare(name, *heads.read(RECORDS / f"{name}.json")))
    assert len(rows) == count
    assert all(row.passes for row in rows), table(rows)


def test_computes_what_the_authors_of_saccadenet_do():
    rows = list(saccadenet.compare(*heads.read(RECORDS / "saccadenet.json")))
    assert len(rows) == 4 * (5 + 3 * 6)  # norms, gradients and detections of each variant; two targets of three cases
    assert all(row.passes for row in rows), table(rows)


def test_computes_what_the_authors_of_borderdet_do():
    rows = list(border.compare(*heads.read(RECORDS / "borderdet.json")))
    assert [row.stage for row in rows] == STAGES + DETECTIONS
    assert all(row.passes for row in rows), table(rows)


def test_computes_what_the_authors_of_d2det_do():
    rows = list(d2det.compare(*heads.read(RECORDS / "d2det.json")))
    assert len(rows) == 5 + 7 + 3 + 3 + 2  # of the pooling, cases A, B and C, and boxes
    assert all(row.passes for row in rows), table(rows)


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_computes_what_mmdetection_does_with_regions(engine):
    rows = list(double_head.compare(engine, *heads.read(RECORDS / "double_head.json")))
    kinds = ("assignment", "losses", "gradients", "running statistics")
    stages = [f"{case} {kind}" for case in "ABC" for kind in kinds] + ["detections, pixels", "detections, scores"]
    assert [row.stage.removeprefix(f"{engine}: ") for row in rows] == stages
    assert all(row.passes for row in rows), table(rows)
