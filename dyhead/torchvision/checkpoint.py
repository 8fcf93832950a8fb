"""Weights and checkpoints: from where they come, what fits, and when they are written.

A checkpoint is a file of lightning's; its ``state_dict`` holds the detector's own keys. It reads with
``torch.load(file, weights_only=True)``.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
import torchvision
from torch import Tensor, nn

from dyhead.config import ConfigError
from dyhead.layers import convert_checkpoint

_log = logging.getLogger(__name__)

_IMAGENET = re.compile(r"detectron2://ImageNetPretrained/torchvision/R-(18|34|50|101|152)\.pkl")
_NAMED = 12  # so many keys are named in a message, the rest is counted

# Names of the same layers in other projects, as regular expressions of theirs and ours, in this order.
_RENAMED = [
    (r"module\.(.+)", r"\1"),
    # the heads of this project on Detectron2
    (r"head\.((?:logits|deltas|quality)\..+)", r"head.predictor.\1"),
    # torchvision's and mmdetection's ResNets
    (r"(?:backbone\.)?((?:conv1|bn1|layer[1-4])\..+)", r"backbone.body.\1"),
    # Detectron2's ResNet-FPN, alone or inside the backbone of a DyHead
    (r"(?:backbone\.)*((?:bottom_up|fpn_lateral\d|fpn_output\d|top_block)\..+)", r"backbone.\1"),
    (r"backbone\.bottom_up\.(stem|res\d)\.(.+)", r"backbone.body.\1.\2"),
    (r"backbone\.body\.stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    (r"backbone\.body\.stem\.conv1\.(.+)", r"backbone.body.conv1.\1"),
    *((rf"backbone\.body\.res{n}\.(.+)", rf"backbone.body.layer{n - 1}.\1") for n in (2, 3, 4, 5)),
    (r"(backbone\.body\.layer\d\.\d+)\.conv(\d)\.norm\.(.+)", r"\1.bn\2.\3"),
    (r"(backbone\.body\.layer\d\.\d+)\.shortcut\.norm\.(.+)", r"\1.downsample.1.\2"),
    (r"(backbone\.body\.layer\d\.\d+)\.shortcut\.(.+)", r"\1.downsample.0.\2"),
    (r"backbone\.fpn_lateral(\d)\.norm\.(.+)", r"backbone.fpn.inner_blocks.\1.1.\2"),
    (r"backbone\.fpn_lateral(\d)\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"backbone\.fpn_output(\d)\.norm\.(.+)", r"backbone.fpn.layer_blocks.\1.1.\2"),
    (r"backbone\.fpn_output(\d)\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"backbone\.top_block\.(.+)", r"backbone.fpn.extra_blocks.\1"),
    # mmdetection's FPN and DyHead
    (r"neck\.(?:\d\.)?lateral_convs\.(\d)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.(?:\d\.)?fpn_convs\.([012])\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.(?:\d\.)?fpn_convs\.3\.conv\.(.+)", r"backbone.fpn.extra_blocks.p6.\1"),
    (r"neck\.(?:\d\.)?fpn_convs\.4\.conv\.(.+)", r"backbone.fpn.extra_blocks.p7.\1"),
    (r"neck\.(?:\d\.)?blocks\.(.+)", r"backbone.dyhead.blocks.\1"),
]


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
    if not os.path.isfile(path):
        raise ConfigError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"checkpoint {path}: not a file of tensors that PyTorch reads safely: {reason}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"checkpoint {path}: expected a dict of tensors, got {type(content).__name__}")
    return dict(content)


def load_weights(model: nn.Module, weights: str, *, strict: bool) -> None:
    """Load ``MODEL.WEIGHTS`` into a detector.

    Args:
        model: the detector.
        weights: a file of this engine; of a ResNet of torchvision; of DyHead by microsoft/DynamicHead or mmdetection;
            an address that starts with ``https://``; or ``detectron2://ImageNetPretrained/torchvision/R-50.pkl`` (or
            R-18, R-34, R-101, R-152), which stands for torchvision's weights of that name.
        strict: whether all keys must fit. Otherwise what fits is loaded and what does not is named in the log.

    Raises:
        ConfigError: the weights cannot be had or read, nothing fits, or not everything with ``strict``.
    """
    state = _renamed(_read_weights(weights))
    own = model.state_dict()
    shapes = {
        f"{key} {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    }
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    # Counted, but nothing to load: frozen batch normalisation does not have it.
    counters = {key for key in {*state, *own} if key.endswith("num_batches_tracked")}
    differing = {key for key in state if key in own} - set(fitting)
    missing = set(own) - set(state) - counters
    unexpected = set(state) - set(own) - counters
    problems = [
        f"{title}: {_some(keys)}"
        for title, keys in (
            ("missing in the file", missing),
            ("not in the model", unexpected),
            ("of another shape", shapes if differing else set()),
        )
        if keys
    ]
    if problems and (strict or not fitting):
        raise ConfigError(
            f"{weights} does not fit the model ({len(fitting)} of {len(own)} tensors do)\n  " + "\n  ".join(problems)
        )
    model.load_state_dict(fitting, strict=False)
    _log.info("Loaded %d of %d tensors from %s", len(fitting), len(own), weights)
    if problems:
        _log.info("Not loaded:\n  %s", "\n  ".join(problems))


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


def _read_weights(weights: str) -> dict[str, Tensor]:
    imagenet = _IMAGENET.fullmatch(weights)
    try:
        if imagenet:
            name = f"ResNet{imagenet[1]}_Weights"
            content = getattr(torchvision.models, name).IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        elif weights.startswith("https://"):
            content = torch.hub.load_state_dict_from_url(weights, map_location="cpu", weights_only=True)
        elif "://" in weights:
            raise ConfigError(
                f"MODEL.WEIGHTS {weights}: the torchvision engine reads PyTorch files, https:// addresses and "
                "detectron2://ImageNetPretrained/torchvision/R-{18,34,50,101,152}.pkl"
            )
        else:
            content = read_checkpoint(weights)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # URLError is an OSError
        what = f"torchvision's {name}.IMAGENET1K_V1" if imagenet else "the file"
        raise ConfigError(
            f"MODEL.WEIGHTS {weights}: {what} could not be fetched into "
            f"{os.path.join(torch.hub.get_dir(), 'checkpoints')} ({error}). "
            'Put it there, name another file, or train from scratch with MODEL.WEIGHTS ""'
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(
            f"MODEL.WEIGHTS {weights}: expected a dict of tensors, or one under state_dict or model, got "
            f"{_some(set(map(str, content)))}"
        )
    return dict(content)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the detector's own keys, whichever project it comes from."""
    if any(re.search(r"dyhead_(tower|blocks)\.\d+\.", key) for key in state):
        state = convert_checkpoint(state)
    renamed = {}
    for key, value in state.items():
        if not key.startswith(("backbone.body.", "backbone.fpn.", "backbone.dyhead.")):
            for theirs, ours in _RENAMED:
                key = re.sub(rf"^{theirs}$", ours, key)
        renamed[key] = value
    # Detectron2 numbers the pyramid's convolutions by their level.
    level = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks)\.(\d)\.(.+)")
    if any(re.search(r"fpn_(lateral|output)\d\.", key) for key in state):
        first = min(int(match[2]) for match in map(level.fullmatch, renamed) if match)
        renamed = {level.sub(lambda m: f"{m[1]}.{int(m[2]) - first}.{m[3]}", key): v for key, v in renamed.items()}
    if any(key.startswith("fc.") for key in state):  # ImageNet's classifier
        renamed = {key: value for key, value in renamed.items() if not key.startswith("fc.")}
    return renamed


def _some(keys: set[str]) -> str:
    more = f", and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(sorted(keys)[:_NAMED]) + more
