"""Which options stand in which node of the configuration; those that no part of a detector has are declared here."""

from __future__ import annotations

from dataclasses import dataclass

from dyhead.backbones import NETWORKS
from dyhead.detection import DETECTORS
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.roi import BOX_HEADS, DuallySupervisedOptions
from dyhead.necks import NECKS
from dyhead.options import Check, at_least, between, each, name_in, one_of, option

#: The meta-architecture of two-stage detectors, which are those of the engine.
TWO_STAGE = "DyHeadRCNN"

#: The node of further RoI heads in training.
DUAL = "MODEL.DSFPN"


@dataclass(frozen=True)
class ModelOptions:
    """What the network is made of."""

    necks: tuple[str, ...] = option(
        (),
        "what follows the backbone's pyramid, in this order",
        each(name_in(NECKS)) & Check("each at most once", lambda names: len(set(names)) == len(names)),
    )


@dataclass(frozen=True)
class BackboneOptions:
    """The backbone, up to its own pyramid."""

    size_divisibility: int = option(
        0,
        "images are padded to multiples of it, in pixels; 0: of what the backbone and the necks ask for",
        at_least(0),
    )


@dataclass(frozen=True)
class FPNOptions:
    """P6 and P7 of the backbones with ``p6p7`` in their name and ``build_retinanet_resnet_fpn_dyhead_backbone``."""

    p6p7_in_feature: str = option("p5", "the level that P6 and P7 are computed from", one_of("p5", "res5"))
    p7_relu: bool = option(True, "apply ReLU to P6 before P7 is computed from it; mmdetection does not")


@dataclass(frozen=True)
class DatasetOptions:
    """Datasets by name."""

    register: tuple[tuple[str, str, str], ...] = option(
        (),
        "datasets in COCO's format to register: [[name, json file, image folder], ...]; paths from the working folder",
    )
    clip_boxes: bool = option(
        False,
        "clip annotated boxes that extend more than a pixel beyond their image, and drop those wholly outside, instead "
        "of refusing them; AP counts the boxes as they are in the file",
    )


@dataclass(frozen=True)
class SolverOptions:
    """The optimizer."""

    optimizer: str = option("SGD", "SGD has MOMENTUM and NESTEROV", one_of("SGD", "ADAMW"))
    accumulate: int = option(
        1,
        "parts into which each device divides its images of an iteration, to hold one at a time in memory; the "
        "gradient is the mean of theirs, and IMS_PER_BATCH and everything else stay as they are",
        at_least(1),
    )


@dataclass(frozen=True)
class AMPOptions:
    """Mixed precision, where ``SOLVER.AMP.ENABLED`` is True."""

    dtype: str = option(
        "",
        "of the forward pass; empty: float16 on a GPU, bfloat16 on a CPU. The loss is scaled with float16",
        one_of("", "float16", "bfloat16"),
    )


@dataclass(frozen=True)
class EMAOptions:
    """An exponential moving average of the weights. It is evaluated, and saved as the model."""

    enabled: bool = option(False, "keep one, and evaluate it instead of the last weights")
    decay: float = option(
        0.9998,
        "what stays of it in an iteration; less in the first ones, (1 + i) / (10 + i) of iteration i",
        between(0, 1),
    )


@dataclass(frozen=True)
class BenchmarkOptions:
    """What an evaluation times."""

    num_images: int = option(50, "images of the first test set that are timed; 0: nothing is measured", at_least(0))
    batch_size: int = option(1, "images at a time", at_least(1))


def option_nodes() -> dict[str, type]:
    """The options that stand in the configuration, by node; where Detectron2 has a key of the name, it is Detectron2's.

    Parts that are registered later are among them from then on.
    """
    return {
        "MODEL": ModelOptions,
        "MODEL.BACKBONE": BackboneOptions,
        **{NETWORKS[name].node: NETWORKS[name].options for name in sorted(NETWORKS)},  # whatever was imported first
        "MODEL.FPN": FPNOptions,
        "MODEL.ANCHOR_GENERATOR": AnchorOptions,
        **{neck.node: neck.options for neck in NECKS.values()},
        **{detector.node: detector.options for detector in DETECTORS.values()},
        **{head.node: head.options for head in BOX_HEADS.values()},
        DUAL: DuallySupervisedOptions,
        "DATASETS": DatasetOptions,
        "SOLVER": SolverOptions,
        "SOLVER.AMP": AMPOptions,
        "SOLVER.EMA": EMAOptions,
        "TEST.BENCHMARK": BenchmarkOptions,
    }
