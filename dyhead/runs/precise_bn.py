"""``TEST.PRECISE_BN``: statistics of batch normalization as means over many batches, of the weights as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

_log = logging.getLogger(__name__)


def wants_statistics(cfg: CfgNode, model: nn.Module) -> bool:
    """Whether ``TEST.PRECISE_BN`` is enabled for a model, in training mode, that has such statistics.

    A warning says that one has none.
    """
    if not cfg.TEST.PRECISE_BN.ENABLED:
        return False
    # Imported where it is needed: fvcore.nn compiles a loss by torch.jit.script, of which PyTorch warns in every run.
    from fvcore.nn.precise_bn import get_bn_modules

    if not get_bn_modules(model):
        _log.warning("TEST.PRECISE_BN.ENABLED True: the model learns no statistics of batch normalization")
        return False
    return True


def update_statistics(cfg: CfgNode, model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]) -> None:
    """Give the batch normalization of a model, in training mode, those of ``TEST.PRECISE_BN.NUM_ITER`` batches.

    Args:
        cfg: the configuration.
        model: the model, on its device.
        batches: at least as many.
        forward: runs the model on one of them.
    """
    from fvcore.nn.precise_bn import update_bn_stats

    _log.info("Computing precise statistics of batch normalization from %d batches", cfg.TEST.PRECISE_BN.NUM_ITER)
    update_bn_stats(_Forward(model, forward), batches, cfg.TEST.PRECISE_BN.NUM_ITER)


class _Forward(nn.Module):
    """A model that is run by a function."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, batch: Any) -> Any:
        return self.run(batch)
