"""`python -m benchmarks.heads`: writes the tables of detectors and parts, and what they cost, into docs/detectors.md.

What there is comes from the registries, multiply-adds from a pass on the meta device, which computes nothing. A table
is between a line `<!-- table: WHAT -->` and a line `<!-- end -->`, where WHAT is `detectors`, `losses`, `boxes`,
`assigners`, `criteria` or `necks`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.document import rewrite
from benchmarks.program import code, codes, markdown, pyramid_sizes
from dyhead.build import build_detector
from dyhead.config import load_config
from dyhead.detection import DETECTORS, DenseDetector, assigners, boxes, criteria, losses
from dyhead.evaluation import count_flops, count_parameters
from dyhead.necks import NECKS
from dyhead.options import leaves, parts
from dyhead.torchvision import get_cfg

_ROOT = Path(__file__).parents[1]
DOCUMENT = _ROOT / "docs" / "detectors.md"
IMAGE, CHANNELS = (800, 1344), 256
_STRIDES = {f"p{level}": 2**level for level in range(2, 8)}
_NECK_LEVELS = ("p3", "p4", "p5", "p6", "p7")

#: arXiv's number of each paper that the first line of a part's module names.
PAPERS = {
    "Chen et al., CVPR 2019": "1904.06373",
    "Dai et al., CVPR 2021": "2106.08322",
    "Girshick et al., CVPR 2014": "1311.2524",
    "Huang et al., CVPR 2020": "2003.12729",
    "Lan et al., CVPR 2020": "2003.12125",
    "Law and Deng, ECCV 2018": "1808.01244",
    "Li et al., CVPR 2020": "1912.05086",
    "Li et al., NeurIPS 2020": "2006.04388",
    "Lin et al., ICCV 2017": "1708.02002",
    "Qian et al., CVPR 2020": "1907.10156",
    "Qiu et al., ECCV 2020": "2007.11056",
    "Rezatofighi et al., CVPR 2019": "1902.09630",
    "Tian et al., ICCV 2019": "1904.01355",
    "Wang et al., CVPR 2020": "2005.03101",
    "Yang et al., ICCV 2019": "1904.11490",
    "Yu et al., 2016": "1608.01471",
    "Zhang et al., CVPR 2020": "1912.02424",
    "Zhang et al., ECCV 2020": "2007.09451",
    "Zheng et al., AAAI 2020": "1911.08287",
    "Zhu et al., 2020": "2007.03496",
}
_CITATION = re.compile(r"\((?P<who>[A-Z]\w+ (?:et al\.|and [A-Z]\w+))[^()]*?, (?P<where>(?:[A-Z]\w+ )?\d{4})")
_BOX_LOSS_PAPERS = {
    "smooth_l1": "",
    "iou": "Yu et al., 2016",
    "giou": "Rezatofighi et al., CVPR 2019",
    "diou": "Zheng et al., AAAI 2020",
    "ciou": "Zheng et al., AAAI 2020",
}

#: Necks that have names of their own, by the neck that they are: the options in which they differ from its defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "DyHead": {"DyHead, 6 blocks": {}},
    "FPT": {"FPT": {}, "FPT, distances": {"similarity": "distance"}},
    "SEPC": {
        "PConv": {"conv": "plain", "task_convs": "plain", "norm": ""},
        "PConv with iBN": {"conv": "plain", "task_convs": "plain"},
        "SEPC-lite": {"conv": "plain"},
        "SEPC": {},
        "SEPC, one pyramid": {"task_convs": "none"},
        "sampled": {"conv": "sampled"},
    },
}


def section(words: list[str]) -> str:
    """The table of which the first line has these words."""
    (what,) = words
    return {
        "detectors": _detectors,
        "losses": _losses,
        "boxes": lambda: _parts("box form", boxes, lambda detector: [_built(detector).box_form]),
        "assigners": lambda: _parts("assigner", assigners, lambda detector: [part for part, *_ in _options(detector)]),
        "criteria": lambda: _parts("criterion", criteria, lambda detector: [_built(detector).criterion]),
        "necks": _necks,
    }[what]()


def _detectors() -> str:
    head = ["detector", "paper", "`MODEL.`", "boxes", "assigned by", "class loss", "criterion", "reads pairs"]
    lines = [[*head, "own towers, G", "M", "after DyHead, G", "M"]]
    for name, detector in DETECTORS.items():
        built = _built(name)
        parts_of = [_name(part) for part, *_ in _options(name)]
        chosen = any(leaf.key == "CLASS_LOSS" for leaf in leaves(detector.options))
        own_loss = ", ".join(part for part in parts_of if part in losses.__all__) or "in the criterion"
        node = code(detector.node.removeprefix("MODEL."))
        lines.append(
            [
                detector.name,
                _paper(detector.options),
                f"{node}, `ANCHOR_GENERATOR`" if detector.options.has_anchors else node,
                _name(built.box_form),
                ", ".join(part for part in parts_of if part in assigners.__all__) or "none",
                "`CLASS_LOSS`" if chosen else own_loss,
                _name(built.criterion),
                "yes" if getattr(built.head, "takes_task_levels", False) else "no",
                *_cost(built, built.in_features),
                *_cost(_built(name, "_dyhead"), built.in_features),
            ]
        )
    return markdown(lines, left=8)


def _losses() -> str:
    lines = [["loss", "paper", "of", "chosen by", "options", "detectors"]]
    for name in losses.__all__:
        loss = getattr(losses, name)
        if not isinstance(loss, type):
            continue
        uses = [(detector, *use) for detector in DETECTORS for use in _options(detector) if type(use[0]) is loss]
        chosen = codes(dict.fromkeys(f"CLASS_LOSS {choice}" for _, _, choice, _ in uses if choice))
        keys = dict.fromkeys(key for _, part, _, prefix in uses for key in _keys(part, prefix))
        lines.append([name, _paper(loss), "classes", chosen, codes(keys), _listed(use[0] for use in uses)])
    for name, paper in _BOX_LOSS_PAPERS.items():
        taking = [
            detector
            for detector, of in DETECTORS.items()
            if any(leaf.key == "BBOX_REG_LOSS_TYPE" and leaf.expected(name) is None for leaf in leaves(of.options))
        ]
        chosen = f"`BBOX_REG_LOSS_TYPE {name}`"
        options = codes(["SMOOTH_L1_LOSS_BETA"] if name == "smooth_l1" else [])
        lines.append([name, _link(paper), "boxes", chosen, options, _listed(taking)])
    return markdown(lines, left=6)


def _parts(title: str, package: ModuleType, of_detector: Callable[[str], list[Any]]) -> str:
    """A table of the parts in a package that detectors have, with these parts' own keys."""
    found: dict[Any, tuple[dict[str, None], list[str]]] = {}
    for detector in DETECTORS:
        for part in of_detector(detector):
            of = part if isinstance(part, FunctionType) else type(part)
            if not of.__module__.startswith(package.__name__) or of.__name__ not in package.__all__:
                continue
            keys, detectors = found.setdefault(of, ({}, []))
            detectors.append(detector)
            for held, _, prefix in _options(detector):
                # A criterion's options may stand beside it.
                if type(held) is of or (package is criteria and type(held).__module__ == of.__module__):
                    keys.update(dict.fromkeys(_keys(held, prefix)))
    lines = [[title, "paper", "options", "detectors"]]
    lines += [[_name(of), _paper(of), codes(keys), _listed(names)] for of, (keys, names) in found.items()]
    return markdown(lines, left=4)


def _necks() -> str:
    lines = [["neck", "paper", "`MODEL.`", "levels become pairs", "G", "M"]]
    for name, neck in NECKS.items():
        for title, changed in VARIANTS.get(name, {name: {}}).items():
            options = neck.options(**changed)
            node = code(neck.node.removeprefix("MODEL."))
            keys = codes(f"{key.upper()} {value}" if value else f'{key.upper()} ""' for key, value in changed.items())
            with torch.device("meta"):
                module = options.build(CHANNELS, len(_NECK_LEVELS))
            pairs = "yes" if getattr(options, "task_levels", False) else "no"
            lines.append(
                [title, _paper(neck.options), f"{node}: {keys}" if keys else node, pairs, *_cost(module, _NECK_LEVELS)]
            )
    return markdown(lines, left=4)


@cache
def _built(name: str, neck: str = "") -> DenseDetector:
    """The detector of a configuration file, without memory: with its own towers, or for what follows a neck."""
    cfg = get_cfg()
    load_config(cfg, _ROOT / "configs" / f"{DETECTORS[name].name.lower()}{neck}_R50.yaml")
    with torch.device("meta"):
        return build_detector(cfg, DETECTORS[name], CHANNELS, _STRIDES).eval()


def _cost(module: nn.Module, levels: Sequence[str]) -> list[str]:
    """Billions of multiply-adds from these levels of an image on, and millions of parameters."""
    pyramid = dict(zip(_STRIDES, pyramid_sizes((IMAGE[0] // 4, IMAGE[1] // 4), len(_STRIDES)), strict=True))
    inputs = {level: torch.empty(1, CHANNELS, *pyramid[level], device="meta") for level in levels}
    return [f"{count_flops(module, inputs):.1f}", f"{count_parameters(module) / 1e6:.1f}"]


def _options(detector: str) -> list[tuple[Any, str, str]]:
    return list(parts(DETECTORS[detector].options))


def _keys(part: Any, prefix: str) -> list[str]:
    """A part's own keys, without those of the parts that it holds."""
    fields = dataclasses.fields(part)
    return [prefix + field.name.upper() for field in fields if not {"prefix", "registry"} & field.metadata.keys()]


def _name(part: Any) -> str:
    return part.__name__ if isinstance(part, (type, FunctionType)) else type(part).__name__


def _paper(part: Any) -> str:
    """The paper that the first line of the part's module names, with a link to it."""
    match = _CITATION.search(sys.modules[part.__module__].__doc__.split("\n")[0])
    return _link(f"{match['who']}, {match['where']}" if match else "")


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{PAPERS[paper]})" if paper in PAPERS else paper


def _listed(detectors: Iterable[str]) -> str:
    names = list(dict.fromkeys(DETECTORS[detector].name for detector in detectors))
    missing = [detector.name for detector in DETECTORS.values() if detector.name not in names]
    return "all" if not missing else f"all but {', '.join(missing)}" if len(missing) < 3 else ", ".join(names)


if __name__ == "__main__":
    rewrite(DOCUMENT, section)
