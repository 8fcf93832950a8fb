"""From the keys of any project that is known to the canonical ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyhead.checkpoints.detectron2 import DETECTRON2
from dyhead.checkpoints.dynamic_head import MICROSOFT
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import shown, some
from dyhead.checkpoints.hit_detector import HIT_DETECTOR
from dyhead.checkpoints.imagenet import CAFFE2_RESNET, DETECTRON2_RESNET, TORCHVISION_RESNET
from dyhead.checkpoints.mmdetection import MMDETECTION_DETECTOR
from dyhead.checkpoints.ours import CANONICAL, EARLIER_DETECTRON2, TORCHVISION
from dyhead.checkpoints.psconv import PSCONV
from dyhead.checkpoints.pyconv import PYCONV
from dyhead.checkpoints.pyramid import BOTTOM_UP
from dyhead.checkpoints.source import Source
from dyhead.checkpoints.spinenet import SPINENET_GARDEN, SPINENET_PORT, SPINENET_TPU
from dyhead.checkpoints.towers import FENECK_HEAD, GLIP, MMDETECTION_GLIP_DETECTOR, YOLO

#: The projects whose checkpoints are converted.
SOURCES = (
    CANONICAL,
    EARLIER_DETECTRON2,
    TORCHVISION,
    DETECTRON2,
    TORCHVISION_RESNET,
    DETECTRON2_RESNET,
    CAFFE2_RESNET,
    PYCONV,
    PSCONV,
    HIT_DETECTOR,
    MICROSOFT,
    MMDETECTION_DETECTOR,
    GLIP,
    MMDETECTION_GLIP_DETECTOR,
    YOLO,
    FENECK_HEAD,
    SPINENET_PORT,
    SPINENET_TPU,
    SPINENET_GARDEN,
)

# Convolutions of ours that always have a bias.
_BIASED = re.compile(
    r"(backbone\.dyhead\.blocks\.\d+\.(?:coarser|same|finer)|detector\.head\.(?:class|box)_tower\.\d+\.conv)\.weight"
)
_ELEMENT = re.compile(r"(.+)\[(\d+)\]")


@dataclass(frozen=True)
class Conversion:
    """Weights with canonical keys, and what became of every key of the file.

    Attributes:
        state: tensors by canonical key.
        source: the project that the file comes from.
        renamed: their key -> ours, also where both are the same; ``NAME[i]`` is element i of the vector NAME.
        dropped: keys that nothing is lost with, each with the reason.
        left_over: keys that have no counterpart here, each with the reason.
        added: canonical keys that the file does not have, each with what they are.
        note: what the weights need in the configuration, which their shapes do not say.
    """

    state: dict[str, Tensor]
    source: str
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    note: str = ""


def convert(state: Mapping[str, Tensor], origin: str = "state dict") -> Conversion:
    """Rename the weights of a checkpoint to the canonical keys (:mod:`dyhead.checkpoints.ours`).

    Args:
        state: tensors by key, as :func:`dyhead.checkpoints.read_state` returns them; it is left as it is.
        origin: what errors call the checkpoint.

    Returns:
        The weights and an account of every key. Blocks of DyHead are those of ``DyHead(C, block="released")``.

    Raises:
        TypeError: ``state`` is not a dict of tensors (for example the content of the file).
        CheckpointError: the keys are those of no project that is known, or of several; two keys become the same.

    Example:
        The head alone, as a module:

        >>> conversion = convert(read_state("atss_r50_fpn_dyhead_1x_coco.pth"))              # doctest: +SKIP
        >>> prefix = "backbone.dyhead."                                                      # doctest: +SKIP
        >>> tower = {k.removeprefix(prefix): v for k, v in conversion.state.items() if k.startswith(prefix)}
        ...                                                                                  # doctest: +SKIP
        >>> DyHead(256, block="released").load_state_dict(tower)                             # doctest: +SKIP
    """
    nested = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if nested:
        kind = type(state[nested[0]]).__name__
        raise TypeError(f"{origin}: expected tensors by key, got {kind} under {some(nested)}")
    try:
        source = _recognise(state)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    try:
        return _convert(state, source)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except (IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:  # of shapes and numbers in keys
        raise CheckpointError(
            f"{origin}: keys or shapes that are not those of {source.name}: {shown(str(error))}"
        ) from error


def convert_for(model: nn.Module, state: Mapping[str, Tensor], origin: str = "state dict") -> Conversion:
    """:func:`convert`, which also knows the weights of a classifier of timm if the model has its network.

    Args:
        model: the detector. A network of timm in it has the method ``own_weights``
            (:class:`dyhead.backbones.TimmNetwork`), one with weights of several forms ``fitted``
            (:class:`dyhead.backbones.PSResNet`).
        state: see :func:`convert`.
        origin: likewise.
    """
    for network in model.modules():
        found = network.own_weights(state) if hasattr(network, "own_weights") else None
        if found is not None:
            weights, names = found
            ours = {key: f"{BOTTOM_UP}timm.{name}" for key, name in names.items()}
            rest = {key: "not of the network's maps" for key in weights if key not in names}
            return Conversion({name: weights[key] for key, name in ours.items()}, "timm", ours, left_over=rest)
        if hasattr(network, "fitted"):
            try:
                state = network.fitted(state)
            except CheckpointError as error:
                raise CheckpointError(f"{origin}: {error}") from error
    return convert(state, origin)


def _convert(state: Mapping[str, Tensor], source: Source) -> Conversion:
    rows = list(source.rows(state))
    out = Conversion({}, source.name, note=source.note)
    for key, value in state.items():
        reason = _reason(source.dropped, key)
        if reason is not None:
            out.dropped[key] = reason
            continue
        name, change = next(((name, row.value) for row in rows if (name := row.rename(key)) is not None), (None, None))
        if name is None and source.remainder is None:
            name = key
        if name is None:
            out.left_over[key] = _reason(source.left_over, key) or source.remainder
            continue
        if name in out.state:
            first = next(theirs for theirs, ours in out.renamed.items() if ours == name)
            raise CheckpointError(f"{source.name}: expected one key for {name}, got {shown(first)} and {shown(key)}")
        out.renamed[key] = name
        try:
            out.state[name] = value if change is None else change(value)
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{shown(key)}: not of a shape that {source.name} has: {tuple(value.shape)}"
            ) from error
    _join_elements(out.state)
    if source.zero_biases:
        for key, value in list(out.state.items()):
            match = _BIASED.fullmatch(key)
            if match and f"{match[1]}.bias" not in out.state:
                out.state[f"{match[1]}.bias"] = value.new_zeros(len(value))
                out.added[f"{match[1]}.bias"] = "zeros: the convolution has no bias there"
    return out


def _recognise(state: Mapping[str, Tensor]) -> Source:
    found = [source for source in SOURCES if source.recognises(state)]
    if len(found) == 1:
        return found[0]
    tried = "".join(f"\n  {source.name}: a key like {source.mark}" for source in found or SOURCES)
    raise CheckpointError(
        f"expected the keys of one project, got {some(state) or 'no key'}, which are those of "
        f"{'several' if found else 'none'} of{tried}"
    )


def _reason(kinds: tuple[tuple[str, str], ...], key: str) -> str | None:
    return next((reason for pattern, reason in kinds if re.fullmatch(pattern, key)), None)


def _join_elements(state: dict[str, Tensor]) -> None:
    """Replace NAME[0], NAME[1], ... by the vector NAME, in place."""
    vectors: dict[str, dict[int, Tensor]] = {}
    for key in [key for key in state if _ELEMENT.fullmatch(key)]:
        name, i = _ELEMENT.fullmatch(key).groups()
        if state[key].numel() != 1:
            raise CheckpointError(f"{key}: expected one number, got a tensor of shape {tuple(state[key].shape)}")
        vectors.setdefault(name, {})[int(i)] = state.pop(key).reshape(())
    for name, elements in vectors.items():
        if sorted(elements) != list(range(len(elements))):
            raise CheckpointError(f"{name}: expected the elements 0, 1, ..., got {sorted(elements)}")
        state[name] = torch.stack([elements[i] for i in sorted(elements)])
