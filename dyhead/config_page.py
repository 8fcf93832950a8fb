"""``dyhead config``: docs/config.md, the page of all keys of the configuration, made from their declarations."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

import yaml

from dyhead.config_checks import (
    AUGMENTATION_CHECKS,
    CASCADE,
    CASCADE_CHECKS,
    CHECKS,
    FPN_CHECKS,
    KEYPOINT_CHECKS,
    MASK_CHECKS,
    RESNET_CHECKS,
    TWO_STAGE_CHECKS,
)
from dyhead.config_files import packaged_configs
from dyhead.config_options import TWO_STAGE, option_nodes
from dyhead.detection import DETECTORS
from dyhead.detection.dense_options import DenseOptions
from dyhead.options import Leaf, leaves

_INTRODUCTION = """\
# Configuration keys

`dyhead config > docs/config.md` writes this page from the code; do not edit it.

A configuration is a YAML file with Detectron2's keys and those of this project. `_BASE_: other.yaml` inherits from
another file; `KEY VALUE` pairs at the end of `dyhead train`'s command line override both. A file that is not there is
looked for among those that come with the package (`dyhead config --files`), and so is a base. Both engines read the
same keys. Text is taken as it is written, `OUTPUT_DIR: 2026_11_25`, and a leading `~` of a path is the home folder. A
key that stands twice in a file, an empty section and a tag are errors. What Detectron2's own keys mean is said in
[its documentation](https://detectron2.readthedocs.io/en/latest/modules/config.html). Values are checked before a run
starts; a wrong one is an error that names the key, what was expected and what came.

* (D2) marks keys that Detectron2 has as well; their default is Detectron2's.
* Defaults are written as in YAML. On the command line, quote lists (`"['p3', 'p4']"`) and write `None` for null.
* `MODEL.META_ARCHITECTURE` chooses the detector: {detectors}.
  A detector reads its own node and not those of others.
"""

_SHARED = """\
## One-stage detectors

The keys that stand in {nodes}. A default that differs in one of them, and a
node that lacks a key, are given as well.
"""

_CHECKED = """\
## Values of Detectron2's keys

These keys have Detectron2's meaning and defaults; their values are checked as below. The torchvision engine supports
fewer values of some keys, and the error then names those that it supports.
"""

_CHECKED_TABLES = (
    ("All detectors", CHECKS),
    ("With `TEST.AUG.ENABLED`", AUGMENTATION_CHECKS),
    ("Backbones with `resnet` in `MODEL.BACKBONE.NAME`", RESNET_CHECKS),
    ("Backbones with `fpn` in `MODEL.BACKBONE.NAME`", FPN_CHECKS),
    (f"`{TWO_STAGE}`", TWO_STAGE_CHECKS),
    (f"`{TWO_STAGE}` with `MODEL.ROI_HEADS.NAME {CASCADE}`", CASCADE_CHECKS),
    (f"`{TWO_STAGE}` with `MODEL.MASK_ON`", MASK_CHECKS),
    (f"`{TWO_STAGE}` with `MODEL.KEYPOINT_ON`", KEYPOINT_CHECKS),
)


_HEADER = ("key", "default", "values", "meaning")

# The one-stage detectors' options by node.
_DENSE = {d.node: d.options for d in DETECTORS.values() if issubclass(d.options, DenseOptions)}


def page() -> str:
    """The text of docs/config.md."""
    detectron2 = _detectron2_keys()
    names = ", ".join(f"`{name}` (`{detector.node}`)" for name, detector in DETECTORS.items())
    sections = [_INTRODUCTION.format(detectors=f"{names}, or `{TWO_STAGE}`, the engine's own R-CNN")]
    for node, options in option_nodes().items():
        if node == next(iter(_DENSE)):
            sections.append(_shared_section(detectron2))
        # A detector may mean something else by a key of all of them.
        shared = {(leaf.key, leaf.doc) for leaf in leaves(DenseOptions)} if node in _DENSE else set()
        rows = [
            (f"`{leaf.key}`{_mark([node], leaf.key, detectron2)}", _code(leaf.default), _values(leaf), leaf.doc)
            for leaf in leaves(options)
            if (leaf.key, leaf.doc) not in shared
        ]
        sections.append(f"## {node}\n\n{summary(options)}\n\n{_table(_HEADER, rows)}")
    sections.append(_CHECKED)
    for title, checks in _CHECKED_TABLES:
        rows = [(f"`{key}`", check.text) for key, check in checks.items()]
        sections.append(f"### {title}\n\n{_table(('key', 'values'), rows)}")
    return "\n".join(sections)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--files", action="store_true", help="list the config files that come with the package instead")


def run(args: argparse.Namespace) -> int:
    """Print the page, or the names of the files; returns the exit code."""
    if args.files:
        folder = packaged_configs()
        print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml")), sep="\n")
    else:
        print(page(), end="")
    return 0


def summary(documented: Any) -> str:
    """The first paragraph of a docstring, as Markdown."""
    paragraph = " ".join(documented.__doc__.strip().split("\n\n")[0].split())
    return re.sub(r"``([^`]+)``", r"`\1`", re.sub(r":\w+:`~?([^`]+)`", r"`\1`", paragraph))


def _shared_section(detectron2: set[str]) -> str:
    """The keys that stand in the node of every one-stage detector, but for those that are said not to have them."""
    defaults = {node: {leaf.key: leaf.default for leaf in leaves(options)} for node, options in _DENSE.items()}
    rows = []
    for leaf in leaves(DenseOptions):
        default = _code(leaf.default)
        for node, others in defaults.items():
            if leaf.key not in others:
                default += f"; not in `{node}`"
            elif others[leaf.key] != leaf.default:
                default += f"; `{node}`: {_code(others[leaf.key])}"
        rows.append((f"`{leaf.key}`{_mark(_DENSE, leaf.key, detectron2)}", default, _values(leaf), leaf.doc))
    return f"{_SHARED.format(nodes=', '.join(f'`{node}`' for node in _DENSE))}\n{_table(_HEADER, rows)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _values(leaf: Leaf) -> str:
    if leaf.check is None:
        return leaf.type.text
    return leaf.check.text if leaf.check.text.startswith("one of") else f"{leaf.type.text}, {leaf.check.text}"


def _mark(nodes: Collection[str], key: str, detectron2: set[str]) -> str:
    """Which of the nodes have the key in Detectron2, too."""
    marked = [node for node in nodes if f"{node}.{key}" in detectron2]
    if not marked:
        return ""
    return " (D2)" if len(nodes) == 1 else f" (D2: {', '.join(f'`{node}`' for node in marked)})"


def _code(value: Any) -> str:
    text = {True: "True", False: "False"}[value] if isinstance(value, bool) else json.dumps(value)
    return f"`{text}`"


def _detectron2_keys() -> set[str]:
    """Full names of the keys of Detectron2, from the torchvision engine's copy of its defaults."""
    file = resources.files("dyhead") / "torchvision" / "detectron2_defaults.yaml"
    defaults = next(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    return set(_names(defaults))


def _names(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
