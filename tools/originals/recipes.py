"""Published recipes of microsoft/DynamicHead and mmdetection beside ``configs/released``, on the same files.

A record ``RECIPE.json`` and ``RECIPE.npz`` holds the names and shapes of a published checkpoint, an image, and what the
original's own code computes from them: maps of every stage, raw outputs, detections, the losses of a training step and
the norms of its gradients. Some channels of a map are kept, evenly spaced from the first.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyhead.checkpoints import Conversion, canonical_names, convert, load_into
from dyhead.config import TWO_STAGE, load_config
from tools.originals.rows import Row, of_detections
from tools.originals.values import tensors

CONFIGS = Path(__file__).parents[2] / "configs" / "released"
ENGINES = ("torchvision", "detectron2")

# Six deformable blocks amplify the rounding of float32: 5e-5 of the largest value were seen behind them.
_MAPS, _PIXELS, _SCORES, _LOSSES, _NORMS = 2e-4, 1e-2, 2e-4, 2e-5, 2e-2
_LOSS_NAMES = {"loss_centerness": "loss_ctr", "loss_box_reg": "loss_bbox"}
# Stages and levels in the records, by whose record it is.
_KEYS = {
    "microsoft": lambda stage, level: f"{stage}/{level}",
    "mmdetection": lambda stage, level: f"{stage.removeprefix('head/')}.{level.upper()}".replace(
        "class", "cls"
    ).replace("centerness", "ctr"),
}


def rows(folder: Path) -> Iterator[Row]:
    """A row for each stage, engine and recipe of ``folder/published``."""
    for path in sorted((folder / "published").glob("*.npz")):
        if not (CONFIGS / f"{path.stem}.yaml").is_file():
            yield Row(path.stem, remark="no configuration")
            continue
        for engine in ENGINES:
            if engine == "detectron2" and importlib.util.find_spec("detectron2") is None:
                yield Row(path.stem, engine, remark="Detectron2 is not installed")
                continue
            yield from compare(path.with_suffix(""), engine)


def compare(record: Path, engine: str) -> Iterator[Row]:
    """A row for each stage of the recipe of ``record``, a path without suffix, on an engine."""
    facts = json.loads(record.with_suffix(".json").read_text())
    arrays = dict(np.load(record.with_suffix(".npz")))
    name = record.name
    conversion = convert(tensors(facts), name)
    yield Row(name, f"{engine}: keys left over", float(len(conversion.left_over)), 0.0)
    cfg, model, run = _MODELS[engine](CONFIGS / f"{name}.yaml")
    load_into(model, conversion, canonical_names(model.state_dict()), strict=True, origin=name)

    microsoft = "training" in facts
    image = torch.from_numpy(arrays["picture"]).permute(2, 0, 1)
    if not microsoft and cfg.INPUT.FORMAT == "BGR":
        image = image.flip(0)  # mmdetection's records have RGB
    key = _KEYS["microsoft" if microsoft else "mmdetection"]
    maps = _watch(model.eval())
    with torch.no_grad():
        found = run(image, None)
    differences: dict[str, float] = {}
    for (stage, level), value in maps.items():
        if (array := arrays.get(key(stage, level))) is not None:
            differences[stage] = max(differences.get(stage, 0.0), _of_largest(value[0].numpy(), array))
    yield from (Row(name, f"{engine}: {stage}", value, _MAPS) for stage, value in differences.items())

    names = ("detections/boxes", "detections/scores", "detections/classes")
    names = names if microsoft else ("det_boxes", "det_scores", "det_labels")
    pixels, scores = of_detections(found, [torch.from_numpy(arrays[each]) for each in names])
    yield Row(name, f"{engine}: detections, pixels", pixels, _PIXELS)
    yield Row(name, f"{engine}: detections, scores", scores, _SCORES)
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        yield Row(name, f"{engine}: losses", remark="its samplers are random")
    else:
        yield from _training(name, engine, facts, arrays, conversion, model, lambda targets: run(image, targets))


def _training(
    name: str,
    engine: str,
    facts: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    conversion: Conversion,
    model: nn.Module,
    losses_with: Callable[[tuple[Tensor, Tensor]], dict[str, Tensor]],
) -> Iterator[Row]:
    """The rows of the training step."""
    if "training" in facts:
        step = facts["training"]
        boxes, labels, expected, norms = step["boxes"], step["classes"], step["losses"], step["gradient_norms"]
    else:
        boxes, labels, expected = arrays["gt_boxes"], arrays["gt_labels"], facts["test"]["train"]["losses"]
        norms = dict(zip(arrays["grad_names"].tolist(), arrays["grad_norms"].tolist(), strict=True))
    model.train()
    targets = torch.tensor(np.asarray(boxes), dtype=torch.float32), torch.tensor(np.asarray(labels), dtype=torch.int64)
    losses = losses_with(targets)
    for loss, value in losses.items():
        want = next(expected[each] for each in (loss, _LOSS_NAMES.get(loss), "loss_centerness") if each in expected)
        yield Row(name, f"{engine}: {loss}", abs(value.item() - want) / want, _LOSSES)
    sum(losses.values()).backward()
    theirs = {ours: key for key, ours in conversion.renamed.items()}
    canonical = canonical_names(model.state_dict())
    worst = 0.0
    for key, parameter in model.named_parameters():
        want = norms.get(theirs.get(canonical[key], ""), 0.0)
        if parameter.grad is not None and want > 0:
            worst = max(worst, abs(parameter.grad.norm().item() - want) / want)
    yield Row(name, f"{engine}: gradient norms", worst, _NORMS)


def _of_largest(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference of a map (C, H, W) from some of its channels, of the largest value."""
    kept = got[:: -(-len(got) // len(want))]
    return float("inf") if kept.shape != want.shape else float(np.abs(kept - want).max() / np.abs(want).max())


def _watch(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """A dict that the maps of the next forward pass are put into, by stage and level."""
    maps: dict[tuple[str, str], Tensor] = {}

    def note(stage: str, level: Callable[[str], str] = str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            maps.update({(stage, level(key)): value for key, value in output.items()})

        return hook

    def note_head(module: nn.Module, inputs: Any, output: Any) -> None:
        for stage, levels in zip(("class", "box", "centerness"), output, strict=True):
            maps.update({(f"head/{stage}", f"p{3 + i}"): value for i, value in enumerate(levels or ())})

    backbone = model.backbone
    backbone.register_forward_hook(note("dyhead"))
    if hasattr(backbone, "body"):
        backbone.body.register_forward_hook(note("backbone", lambda key: f"c{key.removeprefix('res')}"))
        backbone.fpn.register_forward_hook(note("fpn"))
    else:
        backbone.backbone.bottom_up.register_forward_hook(note("backbone", lambda key: f"c{key.removeprefix('res')}"))
        backbone.backbone.register_forward_hook(note("fpn"))
    if hasattr(model, "detector"):
        model.detector.head.register_forward_hook(note_head)
    return maps


def _torchvision(config: Path) -> tuple[Any, nn.Module, Callable]:
    from dyhead.torchvision import build_model, get_cfg

    cfg = get_cfg()
    load_config(cfg, config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)

    def run(image: Tensor, targets: tuple[Tensor, Tensor] | None) -> Any:
        if targets is not None:
            return model([image], [{"boxes": targets[0], "labels": targets[1]}])
        (found,) = model([image])
        return found["boxes"], found["scores"], found["labels"]

    return cfg, model, run


def _detectron2(config: Path) -> tuple[Any, nn.Module, Callable]:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    import dyhead.detectron2  # noqa: F401 (registers the models)
    from dyhead.config import add_dyhead_config

    cfg = add_dyhead_config(get_cfg())
    load_config(cfg, config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)

    def run(image: Tensor, targets: tuple[Tensor, Tensor] | None) -> Any:
        if targets is not None:
            objects = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(targets[0]), gt_classes=targets[1])
            with EventStorage():
                return model([{"image": image, "instances": objects}])
        found = model([{"image": image}])[0]["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes

    return cfg, model, run


_MODELS = {"torchvision": _torchvision, "detectron2": _detectron2}
