"""What optimizers of trainers that are not of this package need to know of it.

``SOLVER.OPTIMIZER ADAMW`` and the clipping ``full_model``: Detectron2's ``build_optimizer``, which its
``DefaultTrainer`` and most projects call, makes SGD whatever the configuration says. It ends by calling
``detectron2.solver.build.maybe_add_gradient_clipping``; importing this module puts in its place what makes of that SGD
the optimizer that is meant. Without this project's keys nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build

from dyhead.config import expect, get
from dyhead.necks import NECKS
from dyhead.runs.optimizer import adamw, clip_gradients

# What trainers that are not of this package would ignore.
_OF_OUR_TRAINER = {"SOLVER.ACCUMULATE": 1, "SOLVER.AMP.DTYPE": "", "SOLVER.EMA.ENABLED": False}

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
        ConfigError: an optimizer that is neither "SGD" nor "ADAMW"; a key that :class:`dyhead.detectron2.Trainer` alone
            honours.
    """
    if "DYHEAD" not in cfg.MODEL:
        return _detectron2s(cfg, optimizer)
    for key, default in _OF_OUR_TRAINER.items():
        expect(cfg, key, get(cfg, key) == default, f"{default!r} with another trainer than dyhead.detectron2.Trainer")
    if type(optimizer) is torch.optim.SGD:
        expect(cfg, "SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER in ("SGD", "ADAMW"), "'SGD' or 'ADAMW'")
        if cfg.SOLVER.OPTIMIZER == "ADAMW":
            groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
            optimizer = adamw(cfg, groups)
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


def except_necks(lr_factor_func: Callable[[str], float]) -> Callable[[str], float]:
    """A learning rate decay for a backbone's blocks that does not take DyHead's for such.

    Detectron2's ``get_vit_lr_decay_rate`` looks for ".blocks." in the names of parameters, and would train
    "backbone.dyhead.blocks.0" as slowly as a transformer's first block.

    Args:
        lr_factor_func: from a parameter's name to what its learning rate is multiplied by.

    Returns:
        The same, but 1 for the parameters of necks. It can be pickled if ``lr_factor_func`` can.

    Example:
        >>> from functools import partial
        >>> from detectron2.modeling import get_vit_lr_decay_rate
        >>> decay = except_necks(partial(get_vit_lr_decay_rate, lr_decay_rate=0.5, num_layers=4))
        >>> decay("backbone.net.blocks.3.attn.qkv.weight"), decay("backbone.dyhead.blocks.3.spatial_attention.weight")
        (0.5, 1.0)
    """
    return partial(_but_for_necks, lr_factor_func)


def _but_for_necks(lr_factor_func: Callable[[str], float], name: str) -> float:
    necks = {neck.lower() for neck in NECKS}
    return 1.0 if necks.intersection(name.split(".")) else lr_factor_func(name)


def _clip_whole_model(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.register_step_pre_hook(lambda *_: clip_gradients(cfg, trained))


build.maybe_add_gradient_clipping = maybe_add_gradient_clipping
