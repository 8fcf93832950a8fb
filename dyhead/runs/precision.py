"""Mixed precision, ``SOLVER.AMP``."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What a training's forward pass is computed in where autocast has it so; None without ``SOLVER.AMP.ENABLED``."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    return getattr(torch, cfg.SOLVER.AMP.DTYPE or ("float16" if cuda else "bfloat16"))
