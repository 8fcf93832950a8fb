"""``SOLVER.OPTIMIZER ADAMW`` and the clipping ``full_model`` in trainers that are not of this package.

Detectron2's ``build_optimizer``, which its ``DefaultTrainer`` and most projects call, makes SGD whatever the
configuration says. It ends by calling ``detectron2.solver.build.maybe_add_gradient_clipping``; importing this module
puts in its place what makes of that SGD the optimizer that is meant. Without this project's keys nothing changes.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build

from dyhead.config import expect
from dyhead.runs.optimizer import clip_gradients

_detectron2s = build.maybe_add_gradient_clipping

_Optimizer = torch.optim.Optimizer | type[torch.optim.Optimizer]


@wraps(_detectron2s)
def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: _Optimizer) -> _Optimizer:
    """Detectron2's function of that name, which also takes ``SOLVER.OPTIMIZER`` and ``CLIP_TYPE full_model``.

    Args:
        cfg: the configuration; what this project's keys mean holds where :func:`dyhead.config.add_dyhead_config` added
            them.
        optimizer: an optimizer, or a class of such. An SGD is what Detectron2 makes.

    Raises:
        ConfigError: an optimizer that is neither "SGD" nor "ADAMW".
    """
    if "DYHEAD" not in cfg.MODEL:
        return _detectron2s(cfg, optimizer)
    if type(optimizer) is torch.optim.SGD:
        expect(cfg, "SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER in ("SGD", "ADAMW"), "'SGD' or 'ADAMW'")
        if cfg.SOLVER.OPTIMIZER == "ADAMW":
            groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
            optimizer = torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return _detectron2s(cfg, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        _clip_whole_model(cfg, optimizer)
        return optimizer

    class Clipping(optimizer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            _clip_whole_model(cfg, self)

    return Clipping


def _clip_whole_model(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.register_step_pre_hook(lambda *_: clip_gradients(cfg, trained))


build.maybe_add_gradient_clipping = maybe_add_gradient_clipping
