"""`python -m benchmarks.names`: writes the tables of names into docs/detectron2.md; it needs Detectron2.

What there is comes from Detectron2's registries and from those of this project. A table is between a line
`<!-- table: WHAT -->` and a line `<!-- end -->`, where WHAT is a key of `TABLES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectron2.modeling
from detectron2.config import get_cfg
from fvcore.common.registry import Registry

import dyhead.detectron2
from benchmarks.document import rewrite
from benchmarks.program import code, codes, markdown
from dyhead.backbones import NETWORKS
from dyhead.config_checks import TWO_STAGE_NODES
from dyhead.config_options import option_nodes
from dyhead.config_page import summary
from dyhead.data.shapes import SPECS
from dyhead.detection import DETECTORS
from dyhead.detection.roi import BOX_HEADS
from dyhead.necks import NECKS
from dyhead.options import leaves

DOCUMENT = Path(__file__).parents[1] / "docs" / "detectron2.md"


def registered(registry: Registry) -> dict[str, Any]:
    """What this project has put into one of Detectron2's registries, by name."""
    return {name: built for name, built in sorted(registry) if built.__module__.split(".")[0] == "dyhead"}


def section(words: list[str]) -> str:
    """The table of which the first line has these words."""
    header, rows = TABLES[" ".join(words)]
    return markdown([header, *rows()], left=len(header))


def _meta_architectures() -> Iterator[list[str]]:
    box_heads = {head.node for head in BOX_HEADS.values()}
    for name, built in registered(detectron2.modeling.META_ARCH_REGISTRY).items():
        detector = DETECTORS.get(name)
        nodes = [detector.node] if detector else [node for node in TWO_STAGE_NODES if node not in box_heads]
        yield [code(name), codes(nodes), _sentence(detector.options if detector else built)]


def _backbones() -> Iterator[list[str]]:
    for name, built in registered(detectron2.modeling.BACKBONE_REGISTRY).items():
        network = next((network for network in NETWORKS.values() if name in network.builders), None)
        nodes = ["MODEL.RESNETS" if network is None else network.node]
        nodes += [] if network is not None and network.has_pyramid else ["MODEL.FPN"]
        nodes += ["MODEL.DYHEAD"] if "dyhead" in name else []
        yield [code(name), codes(nodes), _sentence(built)]


def _necks() -> Iterator[list[str]]:
    for name, neck in NECKS.items():
        yield [code(name), code(neck.node), _sentence(neck.options)]


def _box_heads() -> Iterator[list[str]]:
    for name in registered(detectron2.modeling.ROI_BOX_HEAD_REGISTRY):
        yield [code(name), code(BOX_HEADS[name].node), _sentence(BOX_HEADS[name].options)]


def _roi_heads() -> Iterator[list[str]]:
    for name, built in registered(detectron2.modeling.ROI_HEADS_REGISTRY).items():
        yield [code(name), _sentence(built)]


def _datasets() -> Iterator[list[str]]:
    for name, spec in SPECS.items():
        yield [code(name), str(spec.images), ", ".join(spec.classes)]


def _keys() -> Iterator[list[str]]:
    """What is in nodes that are neither a detector's nor a neck's nor a box head's, and not in Detectron2's."""
    theirs, nodes = set(_names(get_cfg())), option_nodes()
    for node in sorted(
        set(nodes) - {part.node for part in (*DETECTORS.values(), *NECKS.values(), *BOX_HEADS.values())}
    ):
        keys = [leaf.key for leaf in leaves(nodes[node]) if f"{node}.{leaf.key}" not in theirs]
        if keys:
            yield [code(node), codes(keys)]


def _classes() -> Iterator[list[str]]:
    for name in sorted(set(dyhead.detectron2.__all__) - set(DETECTORS)):
        yield [code(name), _sentence(getattr(dyhead.detectron2, name))]


#: The tables: their header, and a function that gives their rows.
TABLES = {
    "meta-architectures": (["`MODEL.META_ARCHITECTURE`", "its nodes", "what it is"], _meta_architectures),
    "backbones": (["`MODEL.BACKBONE.NAME`", "its nodes", "what it is"], _backbones),
    "necks": (["in `MODEL.NECKS`", "its node", "what it is"], _necks),
    "box heads": (["`MODEL.ROI_BOX_HEAD.NAME`", "its node", "what it is"], _box_heads),
    "RoI heads": (["RoI heads", "what they are"], _roi_heads),
    "datasets": (["in `DATASETS.TRAIN` and `TEST`", "images", "classes"], _datasets),
    "keys": (["node", "keys"], _keys),
    "classes": (["`dyhead.detectron2.`", "what it is"], _classes),
}


def _names(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _sentence(documented: Any) -> str:
    """The first sentence of a docstring."""
    return re.split(r"\.\s(?=[A-Z`])", summary(documented))[0].rstrip(".")


if __name__ == "__main__":
    rewrite(DOCUMENT, section)
