"""The command: what it writes, and what it refuses."""

import re

import numpy as np
import pytest
from PIL import Image

from dyhead.cli import main
from dyhead.visualize.pictures import level_for, stride_of

MAPS = {"input", "scale-aware", "spatial-aware", "task-aware"}


@pytest.fixture
def whole(pictures):
    """The pictures without the broken one."""
    (pictures / "broken.jpg").unlink()
    return pictures


def visualize(*words):
    return main(["visualize", *map(str, words)])


@pytest.mark.parametrize("detector", ["fcos_dyhead", "faster_rcnn_dyhead"])
def test_a_page_and_its_pictures(detector, make_run, whole, tmp_path, capsys):
    run, _ = make_run(detector)
    out = tmp_path / "out"
    assert visualize(run, whole, "--out", out, "--score-threshold", 0, "--details", 2) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "index.html", "weights.png", "sampling-1.png", "sampling-2.png", "maps-1-block-1.png", "maps-2-block-1.png",
    }  # fmt: skip
    assert "5 pictures and index.html" in capsys.readouterr().out
    page = (out / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 5
    assert "http" not in page  # nothing is fetched
    for name in names - {"index.html"}:
        pixels = np.asarray(Image.open(out / name).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, name


def test_the_sets_images_come_with_the_ground_truth(make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    from dyhead.data.shapes import SPECS

    monkeypatch.setitem(SPECS, "shapes_easy_val", __import__("dataclasses").replace(SPECS["shapes_easy_val"], images=4))
    run, _ = make_run()
    assert visualize(run, "--out", tmp_path / "out", "--details", 0, "--count", 2) == 0
    assert (tmp_path / "out" / "predictions.png").exists()


def test_a_released_block_is_drawn_as_far_as_it_can_be(make_run, whole, tmp_path):
    run, _ = make_run("fcos_dyhead", {"MODEL.DYHEAD.BLOCK": "released"})
    out = tmp_path / "out"
    assert visualize(run, whole, "--out", out, "--score-threshold", 0, "--details", 1) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "sampling-1.png", "maps-1-block-1.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--details", "-1"], "--details: expected at least 0, got -1"),
        (["--count", "0"], "--count: expected at least 1, got 0"),
        (["--level", "p9"], "--level: expected one of p3, p4, p5, p6, p7, got 'p9'"),
        (["--pixel", "900", "0"], "--pixel: expected one of the 64x48 of a.png"),
        (["--opts", "MODEL.NECKS", "[]"], "expected a model with one DyHead, got one with none"),
    ],
)
def test_what_cannot_be_drawn_is_said(words, message, make_run, whole, tmp_path, capsys):
    settings = {"MODEL.NECKS": "[]"} if "--opts" in words else {}
    run, _ = make_run("fcos_dyhead", settings)
    assert visualize(run, whole / "a.png", "--out", tmp_path / "out", "--score-threshold", 0, *words) == 1
    assert message in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_touched(make_run, whole, tmp_path, capsys):
    run, _ = make_run()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert visualize(run, whole, "--out", tmp_path / "out") == 1
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_the_level_suits_the_size_of_the_object():
    levels = ["p3", "p4", "p5", "p6", "p7"]
    assert [level_for(levels, (0, 0, side, side)) for side in (10, 100, 200, 400, 4000)] == levels
    assert stride_of("p5") == 32
    with pytest.raises(ValueError, match="expected levels that are called p2, p3"):
        stride_of("1")
