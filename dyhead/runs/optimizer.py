"""The optimizer that ``SOLVER`` names, and how a resumed run takes over the state of an earlier one."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from dyhead.checkpoints.errors import as_config_errors
from dyhead.checkpoints.resuming import check_optimizer_state
from dyhead.config import ConfigError

_log = logging.getLogger(__name__)

_NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm),
)

_CLIPPING = ("value", "norm", "full_model")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW (``SOLVER.OPTIMIZER``) on the parameters of ``model`` that are trained, with Detectron2's groups.

    Normalisation layers decay by ``WEIGHT_DECAY_NORM``; parameters called bias decay by ``WEIGHT_DECAY_BIAS``, where
    that is set, and learn ``BIAS_LR_FACTOR`` times as fast. Each step clips the gradients first, as
    ``CLIP_GRADIENTS`` says (:func:`clip_gradients`).

    Raises:
        ConfigError: another optimizer or kind of clipping, or nothing to train.
    """
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], dict[str, nn.Parameter]] = defaultdict(dict)
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY
            if isinstance(module, _NORMALISATIONS):
                decay = solver.WEIGHT_DECAY_NORM
            if name == "bias":
                lr *= solver.BIAS_LR_FACTOR
                decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
            groups[lr, decay][f"{path}.{name}"] = parameter
    parameters = [
        {"params": list(named.values()), "param_names": list(named), "lr": lr, "weight_decay": decay}
        for (lr, decay), named in groups.items()
    ]
    if not parameters:
        raise ConfigError("the configuration leaves no parameter to train")
    if solver.OPTIMIZER == "ADAMW":
        optimizer = adamw(cfg, parameters)
    elif solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(parameters, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    else:
        raise ConfigError(f"SOLVER.OPTIMIZER: expected 'SGD' or 'ADAMW', got {solver.OPTIMIZER!r}")
    kind = solver.CLIP_GRADIENTS.CLIP_TYPE
    if solver.CLIP_GRADIENTS.ENABLED and kind not in _CLIPPING:
        raise ConfigError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: expected one of {', '.join(_CLIPPING)}, got {kind!r}")
    if solver.CLIP_GRADIENTS.ENABLED:
        # In a fixed order, which the sum of their squares is rounded by.
        trained = [parameter for group in parameters for parameter in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: clip_gradients(cfg, trained))
    return optimizer


def adamw(cfg: CfgNode, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW on ``groups`` of parameters, by PyTorch's fused steps.

    A fused step divides gradients by the scale of ``SOLVER.AMP`` itself, after they were clipped: with it the steps are
    not fused.
    """
    return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, fused=not cfg.SOLVER.AMP.ENABLED)


def clip_gradients(cfg: CfgNode, parameters: Iterable[Tensor]) -> None:
    """Clip gradients in place by ``SOLVER.CLIP_GRADIENTS.CLIP_VALUE``.

    ``CLIP_TYPE`` "value" clips every number, "norm" the norm of each parameter's gradient, "full_model" that of all
    together.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE == "value":
        clip_grad_value_(parameters, clip.CLIP_VALUE)
    elif clip.CLIP_TYPE == "full_model":
        clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        for parameter in parameters:
            clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)


def resumed_state(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: str = "the checkpoint"
) -> dict[str, Any]:
    """The state dict for ``optimizer`` with which a resumed run goes on.

    What the optimizer has learned (momenta, moments, counts of steps) is the saved run's, parameter by parameter;
    learning rates, decay and all other settings are those of ``optimizer``, which is the configuration's. Parameters
    that the saved run did not train start anew.

    Args:
        optimizer: of :func:`build_optimizer`.
        saved: the state dict of the optimizer of the run that is resumed.
        path: its file, for messages.

    Raises:
        ConfigError: the state is damaged; it was another ``SOLVER.OPTIMIZER``; or it is of an earlier version, which
            saved no names, and trained other parameters.
    """
    with as_config_errors():
        check_optimizer_state(saved, path)
    state = optimizer.state_dict()
    theirs, ours = (_kind(groups) for groups in (saved["param_groups"], state["param_groups"]))
    if theirs != ours:
        raise ConfigError(f"SOLVER.OPTIMIZER: expected {theirs!r}, with which it was trained, got {ours!r}")
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if all("param_names" in group for group in saved["param_groups"]):
        saved_names = [name for group in saved["param_groups"] for name in group["param_names"]]
    elif [len(g["params"]) for g in saved["param_groups"]] == [len(g["params"]) for g in state["param_groups"]]:
        saved_names = names
    else:
        raise ConfigError(
            f"--resume: {path}, of an earlier version, does not say which {len(indices)} parameters it "
            f"trained, and the configuration trains {len(names)}: keep MODEL.BACKBONE.FREEZE_AT and SOLVER's decays "
            "and bias factors as they were, or start from its weights with MODEL.WEIGHTS and another OUTPUT_DIR"
        )
    learned = {
        name: saved["state"][index] for name, index in zip(saved_names, indices, strict=True) if index in saved["state"]
    }
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            _check_shapes(learned.get(name, {}), parameter, f"--resume: {path}: the optimizer's state of {name}")
    known = set(saved_names)
    new, gone = [n for n in names if n not in known], sorted(known.difference(names))
    if new:
        _log.info("Resuming: %d parameters are trained from now on (%s, ...)", len(new), new[0])
    if gone:
        _log.info("Resuming: %d parameters are no longer trained (%s, ...)", len(gone), gone[0])
    state["state"] = {i: learned[name] for i, name in enumerate(names) if name in learned}
    return state


def _check_shapes(values: dict[str, Any], parameter: Tensor, origin: str) -> None:
    for key, value in values.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape:
            raise ConfigError(f"{origin}: expected {key} of {tuple(parameter.shape)}, got {tuple(value.shape)}")


def _kind(groups: list[dict[str, Any]]) -> str:
    return "ADAMW" if "betas" in groups[0] else "SGD"
