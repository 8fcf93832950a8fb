"""Weights and checkpoints: from where they come, what fits, and when they are written.

A checkpoint of a training is a dict in Detectron2's form, which ``torch.load(file, weights_only=True)`` reads:

    model        the detector's weights, see :func:`portable_state`; with ``SOLVER.EMA`` their moving average
    trained      with ``SOLVER.EMA``, the weights themselves
    optimizer    the optimizer's state
    grad_scaler  the state of float16's loss scaling, empty without it
    iteration    index, from 0, of the last iteration that is done
    dyhead       seed of the run
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from fvcore.common.config import CfgNode
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn

from dyhead import checkpoints
from dyhead.backbones import timm
from dyhead.checkpoints import canonical_names, convert_for, find_state, load_into, read_file
from dyhead.checkpoints.errors import as_config_errors
from dyhead.checkpoints.resuming import check_written_by, entry, iteration
from dyhead.config import ConfigError
from dyhead.progress import is_quiet

_IMAGENET = re.compile(r"detectron2://ImageNetPretrained/torchvision/R-(18|34|50|101|152)\.pkl")


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """:func:`dyhead.checkpoints.last_checkpoint`, with :class:`ConfigError`."""
    with as_config_errors():
        return checkpoints.last_checkpoint(output_dir)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """:func:`dyhead.checkpoints.read_file`, with :class:`ConfigError`."""
    with as_config_errors():
        return read_file(path)


def load_weights(model: nn.Module, weights: str, *, strict: bool) -> None:
    """Load ``MODEL.WEIGHTS`` into a detector.

    Args:
        model: the detector.
        weights: a file that :mod:`dyhead.checkpoints` knows; an address of one, ``https://`` or ``http://``; or
            ``detectron2://ImageNetPretrained/torchvision/R-50.pkl`` (or R-18, R-34, R-101, R-152), which stands for
            torchvision's weights of that name; or ``timm://NAME``, timm's.
        strict: whether all keys must fit. Otherwise what fits is loaded and what does not is named in the log.

    Raises:
        ConfigError: the weights cannot be had or read, nothing fits, or not everything with ``strict``.
    """
    origin = f"checkpoint {weights}"
    names = canonical_names(model.state_dict())
    with as_config_errors():
        conversion = convert_for(model, find_state(_read_weights(weights), origin), origin)
        load_into(model, conversion, names, strict=strict, origin=origin)


def load_state(model: nn.Module, state: Any, path: str) -> None:
    """Load all weights of a state dict under the keys of :func:`portable_state`, which a checkpoint has beside others.

    Raises:
        ConfigError: they are none, or do not fit.
    """
    origin = f"checkpoint {path}"
    with as_config_errors():
        conversion = convert_for(model, find_state({"model": state}, origin), origin)
        load_into(model, conversion, canonical_names(model.state_dict()), strict=True, origin=origin)


def portable_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a detector, or others in their place, under the keys that both engines read
    (:mod:`dyhead.checkpoints.ours`)."""
    state = model.state_dict() if state is None else state
    return {name: state[key] for key, name in canonical_names(state).items()}


def save_checkpoint(output_dir: str, name: str, content: dict[str, Any]) -> None:
    """:func:`dyhead.checkpoints.save_checkpoint` of what the head of this module lists, with :class:`ConfigError`."""
    with as_config_errors():
        checkpoints.save_checkpoint(output_dir, name, content)


def load_states(checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, precision: Precision) -> None:
    """Go on with the states of the optimizer and of the loss scaling in a checkpoint of :func:`read_resumable`.

    Raises:
        ConfigError: the loss scaling's is none.
    """
    optimizer.load_state_dict(checkpoint["optimizer"])
    try:
        if checkpoint["grad_scaler"]:
            precision.load_state_dict(checkpoint["grad_scaler"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"--resume: {checkpoint['path']}: grad_scaler is no state of float16's loss scaling ({error})"
        ) from error


def read_resumable(cfg: CfgNode, path: str) -> dict[str, Any]:
    """The content of a checkpoint that a training is to go on from, and its ``path``.

    Raises:
        ConfigError: the file cannot be read or is damaged; another engine or an earlier version of this project wrote
            it; it has done more than ``SOLVER.MAX_ITER`` iterations.
    """
    content = read_checkpoint(path)
    with as_config_errors():
        check_written_by(content, "torchvision", path)
        entry(content, "dyhead.seed", int, path)
        for key in ("optimizer", "grad_scaler"):
            entry(content, key, dict, path)
        iteration(content, "iteration", cfg.SOLVER.MAX_ITER, path)
    return content | {"path": path}


def _read_weights(weights: str) -> dict[str, Any]:
    """The content of the file that ``weights`` names."""
    imagenet = _IMAGENET.fullmatch(weights)
    if imagenet:
        name = f"ResNet{imagenet[1]}_Weights"
        try:
            weights_of = getattr(torchvision.models, name).IMAGENET1K_V1
            return weights_of.get_state_dict(progress=not is_quiet(), check_hash=True)
        except Exception as error:  # of the network, or of a damaged file that is there
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise _not_fetched(weights, f"torchvision's {name}.IMAGENET1K_V1", folder, error) from error
    if weights.startswith(timm.SCHEME):
        return timm.pretrained_state(weights)
    if weights.startswith(("https://", "http://")):
        return read_checkpoint(_fetched(weights))
    if "://" in weights:
        raise ConfigError(
            f"MODEL.WEIGHTS {weights}: the torchvision engine reads files, https:// and http:// addresses of files, "
            "timm://NAME and detectron2://ImageNetPretrained/torchvision/R-{18,34,50,101,152}.pkl"
        )
    if "?" in weights and not os.path.exists(weights):
        raise ConfigError(f"MODEL.WEIGHTS {weights}: no such file; what follows a ? is for the Detectron2 engine alone")
    return read_checkpoint(weights)


def _fetched(address: str) -> str:
    """The file of an address, fetched unless it was before. Files of one name from different addresses stay apart."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints", hashlib.sha256(address.encode()).hexdigest()[:16])
    try:
        path = os.path.join(folder, os.path.basename(urlparse(address).path) or "weights")
        if not os.path.isfile(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(address, path, progress=not is_quiet())
    except Exception as error:  # libraries below raise their own kinds for a bad address or answer
        with suppress(OSError):
            os.rmdir(folder)
        raise _not_fetched(address, "the file", folder, error) from error
    return path


def _not_fetched(weights: str, what: str, folder: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"MODEL.WEIGHTS {weights}: {what} could not be fetched into {folder} ({error}). "
        'Put it there, name another file, or train from scratch with MODEL.WEIGHTS ""'
    )
