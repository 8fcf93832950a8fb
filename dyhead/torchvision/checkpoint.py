"""Weights and checkpoints: from where they come, what fits, and when they are written.

A checkpoint is a file of lightning's; its ``state_dict`` holds the detector's own keys. It reads with
``torch.load(file, weights_only=True)``.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from typing import Any

import lightning.pytorch as L
import torch
import torchvision
from torch import nn

from dyhead.checkpoints import CheckpointError, canonical_names, convert, find_state, load_into, read_file
from dyhead.config import ConfigError

_log = logging.getLogger(__name__)

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


class Checkpoints(L.Callback):
    """Writes ``model_0000099.pth`` after iteration 99, and so on, and ``model_final.pth`` after the last.

    The file ``last_checkpoint`` holds the name of the newest one. A file appears when it is complete.

    Args:
        output_dir: where to.
        period: iterations between two checkpoints.
        max_iter: the last iteration, counted from 1.
    """

    def __init__(self, output_dir: str, period: int, max_iter: int) -> None:
        self.output_dir = output_dir
        self.period = period
        self.max_iter = max_iter

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Write what is due."""
        done = trainer.global_step
        if done % self.period == 0:
            self._save(trainer, f"model_{done - 1:07d}.pth")
        if done == self.max_iter:
            self._save(trainer, "model_final.pth")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        path = os.path.join(self.output_dir, name)
        trainer.save_checkpoint(path + ".partial")
        if trainer.is_global_zero:
            os.replace(path + ".partial", path)
            note = os.path.join(self.output_dir, "last_checkpoint")
            with open(note + ".partial", "w", encoding="utf-8") as file:
                file.write(name)
            os.replace(note + ".partial", note)


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
