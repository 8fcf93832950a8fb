"""The published recipes give the detections, losses and gradients that the original projects' own code computed."""

import json
from pathlib import Path

import pytest

from tools.originals.recipes import CONFIGS, compare
from tools.originals.rows import table

FOLDER = Path(__file__).parent / "published"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.npz"))
# Of which there is no record; test_swin.py has what is known of their weights.
WITHOUT_RECORD = {"dyhead_swint_atss_fpn_2x_ms", "atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco"}


@pytest.fixture
def record(request, published, tmp_path):
    """The record of a recipe, its names and shapes added; a path without suffix."""
    name = request.param
    facts = json.loads((FOLDER / f"{name}.json").read_text()) | {"keys": published[name]}
    (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    (tmp_path / f"{name}.npz").symlink_to(FOLDER / f"{name}.npz")
    return tmp_path / name


def test_every_recipe_has_a_configuration_and_the_other_way_round():
    configs = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("base_")}
    assert configs == WITHOUT_RECORD.union(RECIPES)
    assert len(RECIPES) == 5


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
@pytest.mark.parametrize("record", RECIPES, indirect=True)
def test_a_recipe_agrees_with_the_original_stage_by_stage(record, engine):
    rows = list(compare(record, engine))
    stages = {row.stage.removeprefix(f"{engine}: ") for row in rows}
    assert {"fpn", "dyhead", "detections, pixels", "detections, scores"} <= stages
    assert "gradient norms" in stages or record.name == "dyhead_r50_rcnn_fpn_1x"
    assert all(row.passes for row in rows), table(rows)
