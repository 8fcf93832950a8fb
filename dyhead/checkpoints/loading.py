"""Loading canonical weights into a model of either engine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from dyhead.checkpoints.convert import Conversion
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.files import some
from dyhead.checkpoints.ours import PARTS

_log = logging.getLogger(__name__)

# Used in training only, by some models; where it is missing the model's own is a good start.
_OPTIONAL = (
    "detector.loss_normalizer.average",
    "detector.criterion.first_normalizer.average",
    "detector.criterion.border_normalizer.average",
)
_COUNTER = "num_batches_tracked"

_ODD = 1 / 30  # of the model's weights: with fewer no training starts


def load_into(
    model: nn.Module, weights: Conversion, names: Mapping[str, str] | None = None, *, strict: bool, origin: str
) -> None:
    """Load the weights of a checkpoint into a model.

    Args:
        model: the detector.
        weights: what :func:`dyhead.checkpoints.convert` makes of the checkpoint.
        names: the model's own keys -> canonical keys (:func:`dyhead.checkpoints.canonical_names`). None: they are the
            same.
        strict: whether all keys must fit. Otherwise what fits is loaded and the rest is named in the log.
        origin: what messages call the checkpoint.

    Raises:
        CheckpointError: of no part of the model (network, pyramid, Dynamic Head, ...) do more than half of the weights
            fit, or not everything with ``strict``; a weight is too large for the model's numbers. Keys that the file
            lacks are named as the model calls them, others as the file does. Moving averages of positives, which are
            for training, and ``num_batches_tracked``, which frozen batch normalization does not have, may differ.
    """
    own = model.state_dict()
    names = {key: key for key in own} if names is None else {key: names.get(key, key) for key in own}
    theirs = {}  # canonical -> the file's key; that of the first element of a vector
    for key, name in weights.renamed.items():
        theirs.setdefault(name.partition("[")[0], key)

    fitting, missing, misshapen, mistyped = {}, [], [], []
    for key, name in names.items():
        value = weights.state.get(name)
        if value is None:
            if name not in _OPTIONAL and not name.endswith(_COUNTER):
                missing.append(key)
        elif value.shape != own[key].shape:
            misshapen.append(f"{key} {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model")
        elif own[key].is_floating_point() and not value.is_floating_point():
            mistyped.append(f"{key} {value.dtype} in the file, {own[key].dtype} in the model")
        else:
            fitting[key] = value
            if not value.to(own[key].dtype).isfinite().all():
                raise CheckpointError(
                    f"{origin}: expected weights that {own[key].dtype} holds, got larger ones in {key}"
                )
    canonical = set(names.values())
    unexpected = [
        theirs.get(name, name)
        for name in weights.state
        if name not in {*canonical, *_OPTIONAL} and not name.endswith(_COUNTER)
    ]
    without = {
        reason: [k for k, why in weights.left_over.items() if why == reason] for reason in weights.left_over.values()
    }
    problems = [
        f"{title}: {some(sorted(keys))}"
        for title, keys in (
            ("missing in the file", missing),
            ("not in the model", unexpected),
            ("of another shape", misshapen),
            ("of another type", mistyped),
            *((f"without a counterpart in any model ({reason})", keys) for reason, keys in without.items()),
        )
        if keys
    ]
    if (problems and strict) or not _any_part(
        weights.state, {name: own[key] for key, name in names.items()}, {names[key]: x for key, x in fitting.items()}
    ):
        raise CheckpointError(
            f"{origin} ({weights.source}) does not fit the model ({len(fitting)} of {len(own)} tensors do)\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict(fitting, strict=False)
    _log.info("Loaded %d of %d tensors from %s (%s)", len(fitting), len(own), origin, weights.source)
    if weights.note:
        _log.info("%s: %s", origin, weights.note)
    if problems:
        _log.info("Not loaded:\n  %s", "\n  ".join(problems))


def _any_part(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], fitting: Mapping[str, Tensor]) -> bool:
    """Whether more fits than would by chance: by canonical keys.

    That is more than half of some part of the model, or of what the file has of it, and more than the odd tensor.
    Where the model has matrices they count alone: vectors have the same lengths in many networks.
    """
    matrices = {_part(name) for name, x in ours.items() if x.ndim > 1}
    of_file, of_model, fits = (
        Counter(
            _part(name)
            for name, x in of.items()
            if (x.ndim > 1 or _part(name) not in matrices) and name not in _OPTIONAL and not name.endswith(_COUNTER)
        )
        for of in (theirs, ours, fitting)
    )
    enough = fits.total() >= _ODD * of_model.total()
    return enough and any(2 * count > min(of_file[part], of_model[part]) for part, count in fits.items())


def _part(name: str) -> str:
    return next((part for part in PARTS if name.startswith(part)), name.partition(".")[0])
