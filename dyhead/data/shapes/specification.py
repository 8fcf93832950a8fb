"""What each `shapes` set looks like."""

from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar


@dataclass(frozen=True)
class Spec:
    """What the images of a set look like. Lengths are in pixels, pairs are (lowest, highest).

    Attributes:
        seed: seed of the random numbers.
        images: number of images.
        classes: keys of `outlines.DISTANCES`; class i has the category id i + 1.
        side: width and height of an image, drawn independently, in steps of 32.
        objects: how many objects are tried per image.
        size: diameter of the circle around an object, log-uniform.
        visible: smallest part of each object that others and the image border may leave visible.
        contrast: distance in RGB (0 to 255) between an object's colour and what lies beneath it.
        textured: whether objects and background have textures.
        noise: standard deviation of the noise added to the finished image, on the scale 0 to 255.
        suffix: ".png" (lossless) or ".jpg" (quality 90, colour not subsampled).
        whole: whether boxes and areas are those of whole objects inside the image, with the visible part's box beside
            them, instead of the visible part's.
    """

    whole: ClassVar[bool] = False

    seed: int
    images: int
    classes: tuple[str, ...]
    side: tuple[int, int]
    objects: tuple[int, int]
    size: tuple[float, float]
    visible: float
    contrast: tuple[float, float]
    textured: bool
    noise: float
    suffix: str


@dataclass(frozen=True)
class CrowdSpec(Spec):
    """A set for detectors of two boxes of an object: all of it, and what is visible."""

    whole: bool = field(default=True, kw_only=True)


_EASY = Spec(
    seed=1,
    images=600,
    classes=("circle", "triangle", "square"),
    side=(192, 192),
    objects=(1, 4),
    size=(24, 96),
    visible=1.0,
    contrast=(100, 255),
    textured=False,
    noise=0,
    suffix=".png",
)
_STANDARD = Spec(
    seed=3,
    images=3000,
    classes=("circle", "triangle", "square", "bar", "star", "cross", "ring", "crescent"),
    side=(320, 448),
    objects=(2, 14),
    size=(8, 200),
    visible=0.5,
    contrast=(60, 200),
    textured=True,
    noise=6,
    suffix=".jpg",
)
_CROWD = CrowdSpec(**asdict(replace(_EASY, seed=7, objects=(5, 9), visible=0.3)))
_MEDIUM = replace(_STANDARD, seed=9, side=(192, 192), objects=(2, 8), size=(12, 128))
_HARD = replace(_STANDARD, seed=5, objects=(10, 30), size=(8, 128), visible=0.25, contrast=(30, 70), noise=12)

SPECS: dict[str, Spec] = {
    "shapes_easy_train": _EASY,
    "shapes_easy_val": replace(_EASY, seed=2, images=100),
    "shapes_crowd_train": _CROWD,
    "shapes_crowd_val": replace(_CROWD, seed=8, images=100),
    "shapes_medium_train": _MEDIUM,
    "shapes_medium_val": replace(_MEDIUM, seed=10, images=500),
    "shapes_train": _STANDARD,
    "shapes_val": replace(_STANDARD, seed=4, images=500),
    "shapes_hard_train": _HARD,
    "shapes_hard_val": replace(_HARD, seed=6, images=500),
}
