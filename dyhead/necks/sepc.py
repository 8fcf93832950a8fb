"""Scale-equalizing pyramid convolution (Wang et al., CVPR 2020) as a neck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dyhead.layers import SEPC
from dyhead.layers.batch_norm import NORMS
from dyhead.layers.sepc import CONVS, TASK_CONVS
from dyhead.necks.registry import register_neck
from dyhead.options import at_least, one_of, option


@register_neck("SEPC")
@dataclass(frozen=True)
class SEPCOptions:
    """Scale-equalizing pyramid convolution as a neck, where ``MODEL.NECKS`` lists it; see :class:`dyhead.layers.SEPC`.

    The defaults are the paper's SEPC. SEPC-lite has ``CONV plain``; PConv with iBN ``TASK_CONVS plain``, too; PConv
    also ``NORM ""``. Unless ``TASK_CONVS`` is none, classes and boxes are predicted from features of their own, which
    one-stage detectors with predictors on the pyramid read, and no further neck: it is then the last of
    ``MODEL.NECKS``, and the detector's ``NUM_CONVS`` is best 0.
    """

    num_blocks: int = option(4, "pyramid convolutions in a row", at_least(0))
    conv: str = option(
        "deformable",
        "what they are: plain; deformable on all levels but the finest; sampled is another function, which reads "
        "levels at the output's own grid, one call of the operator of Eq. 4",
        one_of(*CONVS),
    )
    task_convs: str = option(
        "deformable",
        "after them a convolution for classes and one for boxes: plain; deformable on all levels but the finest; or "
        "none: the result is one pyramid, which any detector and neck takes",
        one_of(*TASK_CONVS),
    )
    norm: str = option(
        "BN",
        "after all of these: BN has one set of statistics for all levels together (iBN), and wants about 4 images on a "
        "device; SyncBN also for all devices",
        one_of(*NORMS),
    )
    task_padding: int = option(
        1,
        "of the tasks' convolutions; the published code has 0, by mistake: levels lose two rows and columns, and its "
        "weights need it",
        one_of(0, 1),
    )

    @property
    def task_levels(self) -> bool:
        """Whether each level becomes a pair, for classes and for boxes."""
        return self.task_convs != "none"

    def build(self, channels: int, num_levels: int | None = None) -> SEPC:
        """The module, with random weights, for any number of levels.

        Raises:
            ValueError: options that do not fit each other.
        """
        return SEPC(channels, **asdict(self))

    def size_divisibility(self, strides: Sequence[int]) -> int:
        """What it asks of the image's height and width, in pixels."""
        return 1
