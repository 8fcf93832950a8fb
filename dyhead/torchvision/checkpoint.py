"""Weights and checkpoints: from where they come, what fits, and when they are written.

A checkpoint of a training is a dict in Detectron2's form, which ``torch.load(file, weights_only=True)`` reads:

    model        the detector's weights, see :func:`portable_state`
    optimizer    the optimizer's state
    grad_scaler  the state of float16's loss scaling, empty without it
    iteration    index, from 0, of the last iteration that is done
    dyhead       seed of the run
"""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dyhead.checkpoints import CheckpointError, canonical_names, convert, find_state, load_into, read_file
from dyhead.config import ConfigError

_IMAGENET = re.compile(r"detectron2://ImageNetPretrained/torchvision/R-(18|34|50|101|152)\.pkl")


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in the folder of a run, or None.

    Raises:
        ConfigError: the file ``last_checkpoint`` names a file that is not there.
    """
    note = os.path.join(output_dir, "last_checkpoint")
    if not os.path.isfile(note):
        return None
    with open(note, encoding="utf-8") as file:
        path = os.path.join(output_dir, file.read().strip())
    if not os.path.isfile(path):
        raise ConfigError(f"{note}: expected the name of a checkpoint beside it, {path} does not exist")
    return path


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; nothing in it is run.

    Raises:
        ConfigError: the file is missing, or is none that PyTorch can read safely.
    """
    try:
        return read_file(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def load_weights(model: nn.Module, weights: str, *, strict: bool) -> None:
    """Load ``MODEL.WEIGHTS`` into a detector.

    Args:
        model: the detector.
        weights: a file that :mod:`dyhead.checkpoints` knows; an address of one that starts with ``https://``; or
            ``detectron2://ImageNetPretrained/torchvision/R-50.pkl`` (or R-18, R-34, R-101, R-152), which stands for
            torchvision's weights of that name.
        strict: whether all keys must fit. Otherwise what fits is loaded and what does not is named in the log.

    Raises:
        ConfigError: the weights cannot be had or read, nothing fits, or not everything with ``strict``.
    """
    origin = f"checkpoint {weights}"
    names = canonical_names(model.state_dict())
    try:
        conversion = convert(find_state(_read_weights(weights), origin), origin)
        load_into(model, conversion, names, strict=strict, origin=origin)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def portable_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a detector under the keys that both engines read (:mod:`dyhead.checkpoints.ours`)."""
    state = model.state_dict()
    return {name: state[key] for key, name in canonical_names(state).items()}


def save_checkpoint(output_dir: str, name: str, content: dict[str, Any]) -> None:
    """Write a checkpoint into the folder of a run, and its name into ``last_checkpoint``.

    Either file appears when it is complete.

    Args:
        output_dir: the folder.
        name: the file, such as ``model_final.pth``.
        content: what it is to hold, see the head of this module.
    """
    path, note = os.path.join(output_dir, name), os.path.join(output_dir, "last_checkpoint")
    torch.save(content, path + ".partial")
    os.replace(path + ".partial", path)
    with open(note + ".partial", "w", encoding="utf-8") as file:
        file.write(name)
    os.replace(note + ".partial", note)


def read_resumable(path: str) -> dict[str, Any]:
    """The content of a checkpoint that a training is to go on from.

    Raises:
        ConfigError: the file cannot be read; another engine or an earlier version of this project wrote it.
    """
    content = read_checkpoint(path)
    if "global_step" in content:
        raise ConfigError(
            f"--resume: {path} was written by an earlier version of this project and cannot be continued; "
            "start from its weights, with MODEL.WEIGHTS and another OUTPUT_DIR"
        )
    if not {"dyhead", "optimizer", "iteration"} <= content.keys():
        raise ConfigError(f"--resume: {path} is no checkpoint of a training on torchvision; set MODEL.WEIGHTS")
    return content


def _read_weights(weights: str) -> dict[str, Any]:
    """The content of the file that ``weights`` names."""
    imagenet = _IMAGENET.fullmatch(weights)
    try:
        if imagenet:
            name = f"ResNet{imagenet[1]}_Weights"
            return getattr(torchvision.models, name).IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        if weights.startswith("https://"):
            return torch.hub.load_state_dict_from_url(weights, map_location="cpu", weights_only=True)
        if "://" in weights:
            raise ConfigError(
                f"MODEL.WEIGHTS {weights}: the torchvision engine reads files, https:// addresses of PyTorch files and "
                "detectron2://ImageNetPretrained/torchvision/R-{18,34,50,101,152}.pkl"
            )
        return read_checkpoint(weights)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # URLError is an OSError
        what = f"torchvision's {name}.IMAGENET1K_V1" if imagenet else "the file"
        raise ConfigError(
            f"MODEL.WEIGHTS {weights}: {what} could not be fetched into "
            f"{os.path.join(torch.hub.get_dir(), 'checkpoints')} ({error}). "
            'Put it there, name another file, or train from scratch with MODEL.WEIGHTS ""'
        ) from error
