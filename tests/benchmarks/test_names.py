# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""The tables of docs/detectron2.md are what the code says, and nothing that is registered is missing."""

import re

import pytest

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.modeling
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from fvcore.common.registry import Registry

import dyhead.detectron2
from benchmarks import names
from benchmarks.document import fill

TEXT = names.DOCUMENT.read_text(encoding="utf-8")


def test_the_committed_document_is_what_the_code_says():
    assert fill(TEXT, names.section) == TEXT, "write it again: python -m benchmarks.names"
    assert re.findall(r"<!-- table: (.+?) -->", TEXT) == list(names.TABLES)


def test_every_name_in_detectron2s_registries_has_its_line():
    registries = [each for each in vars(detectron2.modeling).values() if isinstance(each, Registry)]
    own = {name for each in registries for name, built in each if built.__module__.startswith("dyhead.")}
    assert own >= {"DyHeadFCOS", "DyHeadRCNN", "build_timm_fpn_backbone", "DyHeadBoxHead"}
    own |= {name for name in DatasetCatalog if name.startswith("shapes")}
    own |= {name for name in dyhead.detectron2.__all__}
    assert [name for name in sorted(own) if f"\n| `{name}` " not in TEXT] == []


def test_every_node_that_is_added_is_on_the_page():
    before, after = get_cfg(), dyhead.detectron2.add_dyhead_config(get_cfg())
    added = {f"MODEL.{node}" for node in set(after.MODEL) - set(before.MODEL) - {"NECKS"}}
    assert added >= {"MODEL.FCOS", "MODEL.DYHEAD", "MODEL.TIMM", "MODEL.DOUBLE_HEAD"}
    assert [node for node in sorted(added) if f"`{node}`" not in TEXT] == []
