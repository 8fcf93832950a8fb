"""Any network of the package timm that puts out feature maps: CSPNet, Swin, ConvNeXt, RegNet, MViT, EfficientNet, ...

timm is optional; nothing here imports it before a network is asked for.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

from dyhead.backbones.registry import register_network
from dyhead.checkpoints.errors import CheckpointError
from dyhead.options import at_least, at_least_one, below, each, increasing, one_of, option

#: What ``MODEL.WEIGHTS`` starts with where timm fetches its own weights of a network, or takes them from its cache.
SCHEME = "timm://"

# How networks that were made for images of one size are asked to take any, the most that one understands first. Windows
# of Swin are shifted in all stages, as in its authors' detectors, also where a classified image has but one window.
_ANY_SIZE = ({"dynamic_img_size": True, "always_partition": True}, {"dynamic_img_size": True}, {})


@register_network("timm", may_be_plain=True)
@dataclass(frozen=True)
class TimmOptions:
    """The network of the backbones with ``timm`` in their name: one of the package timm.

    Its maps are called by their strides, ``res2`` at 4 pixels to ``res5`` at 32; ``MODEL.FPN.IN_FEATURES`` chooses
    among them. A plain vision transformer has one, ``res4``, with ``OUT_INDICES [-1]``. ``MODEL.WEIGHTS`` may be a file
    of timm's, or ``timm://NAME``, which is its own weights of that name.
    """

    name: str = option("", "of the network, one of `timm.list_models()`, with or without the tag of its weights")
    out_indices: tuple[int, ...] = option(
        (-4, -3, -2, -1),
        "which of its maps, counted from the end",
        at_least_one("map") & each(below(0)) & increasing(),
    )
    out_norm: str = option(
        "", "normalization of each map: LN is over its channels, as detectors on Swin have it", one_of("", "LN")
    )
    frozen_bn: bool = option(
        True, "keep batch normalization as it is in the weights, as MODEL.RESNETS.NORM FrozenBN does"
    )
    drop_path_rate: float = option(0.0, "of the last block, in training (stochastic depth)", at_least(0) & below(1))

    @property
    def title(self) -> str:
        """What tables call the network."""
        return f"`{self.name}`"

    def check(self) -> None:
        """Raise ValueError unless timm is installed and has the network."""
        check_name(self.name)

    def build(self, wanted: Collection[str] | None = None) -> TimmNetwork:
        """The network, with random weights.

        Args:
            wanted: the maps that are read; others have no norm, which nothing would train. None: all of them.

        Raises:
            ValueError: timm is not installed, or has no such network; it puts out no such maps.
        """
        return TimmNetwork(self, wanted)


class TimmNetwork(nn.Module):
    """A network of timm, without its classifier.

    Args:
        options: which, and what of it.
        wanted: see :meth:`TimmOptions.build`.

    Attributes:
        channels: of each map, by its name, from fine to coarse.
        strides: likewise, in pixels of the image.

    Raises:
        ValueError: see :meth:`TimmOptions.build`.
    """

    def __init__(self, options: TimmOptions, wanted: Collection[str] | None = None) -> None:
        super().__init__()
        check_name(options.name)
        self.name = options.name
        self.network = _create(options)
        info = self.network.feature_info
        names = _names(info.reduction(), options.name)
        self.channels = dict(zip(names, info.channels(), strict=True))
        self.strides = {name: 2 ** int(name.removeprefix("res")) for name in names}
        # Networks of which timm says so put out (N, H, W, C).
        self.channels_last = str(getattr(getattr(self.network, "output_fmt", ""), "value", "")) == "NHWC"
        self.norms = nn.ModuleDict()
        if options.out_norm:
            normed = self.channels if wanted is None else wanted
            self.norms.update({name: nn.LayerNorm(x) for name, x in self.channels.items() if name in normed})
        if options.frozen_bn:
            self.network = _timm().layers.freeze_batch_norm_2d(self.network)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to maps (N, C, H / stride, W / stride) by name, fine to coarse."""
        maps = dict(zip(self.channels, self.network(x), strict=True))
        if self.channels_last:
            maps = {name: x.permute(0, 3, 1, 2).contiguous() for name, x in maps.items()}
        return {name: over_channels(self.norms[name], x) if name in self.norms else x for name, x in maps.items()}

    def own_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The network's part of a classifier's weights, with timm's names or, where timm knows them, its authors'.

        timm's networks for features have the classifier's names but for some dots that are underscores.

        Args:
            state: of the classifier.

        Returns:
            ``state`` with timm's names, and the name in this module of each key that it has; None: of less than half.
        """
        own = self.network.state_dict()
        names = {key.removeprefix("model.").replace(".", "_"): key for key in own}  # "model." where timm wraps it
        best: tuple[dict[str, Tensor], dict[str, str]] = {}, {}
        for candidate in (dict(state), self._as_named_by_timm(state)):
            found = {key: names.get(key.replace(".", "_")) for key in candidate}
            fits = {key: name for key, name in found.items() if name and own[name].shape == candidate[key].shape}
            best = max(best, (candidate, fits), key=lambda pair: len(pair[1]))
        weights, fits = best
        return (weights, {key: f"network.{name}" for key, name in fits.items()}) if 2 * len(fits) > len(own) else None

    def _as_named_by_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        timm = _timm()
        entry = timm.models.model_entrypoint(self.name.partition(".")[0])
        rename = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
        if rename is None:
            return {}
        try:
            with torch.device("meta"):
                classifier = timm.create_model(self.name)
            return dict(rename(dict(state), classifier))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return {}  # weights of something else


def check_name(name: str) -> None:
    """Raise ValueError unless timm is installed and has a network of that name."""
    timm = _timm()
    if not name or not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"NAME: expected a network of timm {timm.__version__}, got {name!r}{meant}")


def pretrained_state(address: str) -> dict[str, Tensor]:
    """The weights that timm publishes of a network, from its cache or fetched, with timm's names.

    Args:
        address: ``timm://NAME``.

    Raises:
        CheckpointError: timm is not installed, has no such network or no weights of it; they cannot be fetched.
    """
    name = address.removeprefix(SCHEME)
    try:
        check_name(name)
        timm = _timm()
    except ValueError as error:
        raise CheckpointError(f"MODEL.WEIGHTS {address}: {error}") from error
    if not timm.models.is_model_pretrained(name):
        raise CheckpointError(f"MODEL.WEIGHTS {address}: timm {timm.__version__} has no weights of this name")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the network, of libraries that fetch, or of a damaged file
        raise CheckpointError(
            f"MODEL.WEIGHTS {address}: timm's weights are not in its cache and could not be fetched ({error}). Name a "
            'file with them, or train from scratch with MODEL.WEIGHTS ""'
        ) from error


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"NAME: expected the package timm to be installed (pip install timm), got: {error}") from error
    return timm


def _create(options: TimmOptions) -> nn.Module:
    arguments = {"features_only": True, "out_indices": options.out_indices}
    if options.drop_path_rate:
        arguments["drop_path_rate"] = options.drop_path_rate
    for any_size in _ANY_SIZE:
        try:
            return _timm().create_model(options.name, pretrained=False, **arguments, **any_size)
        except TypeError as error:
            problem = error
            if not any(f"'{key}'" in str(error) for key in any_size):
                break
        except (AssertionError, IndexError, RuntimeError) as error:
            problem = error
            break
    raise ValueError(
        f"NAME {options.name}: timm cannot build its maps {list(options.out_indices)} as configured: {problem}"
    ) from problem


def _names(strides: list[int], network: str) -> list[str]:
    powers = [stride.bit_length() - 1 for stride in strides]
    if any(2**power != stride for power, stride in zip(powers, strides, strict=True)) or any(
        coarse != 2 * fine for fine, coarse in pairwise(strides)
    ):
        raise ValueError(
            f"OUT_INDICES: expected maps of {network} whose strides are powers of 2, each twice the one before, got "
            f"strides {', '.join(map(str, strides))}"
        )
    return [f"res{power}" for power in powers]


def over_channels(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A norm over the last dimension, on the channels of maps (N, C, H, W)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
