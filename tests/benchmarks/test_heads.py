"""The tables of docs/detectors.md are what the code says, and what they say is right."""

import re

import pytest

from benchmarks import heads
from benchmarks.document import fill
from dyhead.detection import DETECTORS
from dyhead.necks import NECKS
from dyhead.ops import library

compiled = pytest.mark.skipif(library.PROBLEM is not None, reason="the operator is not built")


def rows(what):
    """The lines of a table as cells, by the first one."""
    lines = [line.strip("| ").split(" | ") for line in heads.section([what]).splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


@compiled
def test_the_committed_document_is_what_the_code_says():
    text = heads.DOCUMENT.read_text(encoding="utf-8")
    assert fill(text, heads.section) == text, "write it again: python -m benchmarks.heads"
    words = re.findall(r"<!-- table: (.+?) -->", text)
    assert sorted(words) == ["assigners", "boxes", "criteria", "detectors", "losses", "necks"]


def test_every_detector_and_neck_has_its_line_and_every_paper_its_address():
    assert list(rows("detectors")) == [detector.name for detector in DETECTORS.values()]
    nodes = {cells[1].split("`")[1] for cells in rows("necks").values()}
    assert nodes == {neck.node.removeprefix("MODEL.") for neck in NECKS.values()}
    for what in ("detectors", "losses", "boxes", "assigners", "necks"):
        papers = {name: cells[0] for name, cells in rows(what).items() if name != "smooth_l1"}
        assert [name for name, paper in papers.items() if not paper.startswith("[")] == [], "see heads.PAPERS"


def test_multiply_adds_by_hand():
    pixels = 100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11
    towers = 2 * 4 * 9 * 256 * 256 * pixels
    expected = {
        "FCOS": 9 * 256 * (80 + 4 + 1) * pixels,
        "GFL": 9 * 256 * (80 + 4 * 17) * pixels,
        "RetinaNet": 9 * 256 * 9 * (80 + 4) * pixels,
    }
    table = rows("detectors")
    for name, predictors in expected.items():
        own, _, after, _ = table[name][-4:]
        assert [own, after] == [f"{(predictors + towers) / 1e9:.1f}", f"{predictors / 1e9:.1f}"]
    # RepPoints: a 3 x 3 convolution and 18 numbers for the first points, two deformable 3 x 3 convolutions, 80 classes
    # and 18 numbers more.
    points = (3 * 9 * 256 * 256 + 256 * (18 + 80 + 18)) * pixels
    assert table["RepPoints"][-2] == f"{points / 1e9:.1f}"
    # BorderDet, besides FCOS's: of either module 1 x 1 convolutions to the point and the four sides, one of all five to
    # 256 channels, and the predictor; of each side's channel eleven samples of four pixels.
    widths = {256: 80, 128: 4}
    borders = sum(2 * 5 * width * 256 + 256 * outputs + 4 * width * 11 * 4 for width, outputs in widths.items())
    assert table["BorderDet"][-2] == f"{(expected['FCOS'] + borders * pixels) / 1e9:.1f}"
    # PConv, four times: at each level its own convolution; at all but the finest, one that reads the finer level and
    # one whose result the finer level gets. Then a convolution of each task.
    pconv = (4 * (pixels + 2 * (pixels - 100 * 168)) + 2 * pixels) * 9 * 256 * 256
    assert rows("necks")["PConv"][-2] == f"{pconv / 1e9:.1f}"
