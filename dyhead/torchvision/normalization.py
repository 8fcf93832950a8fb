"""What torchvision's detectors do with images before the network sees them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class Normalization(GeneralizedRCNNTransform):
    """Normalises images and pads them to one size, but does not resize them: the dataset has done that.

    Images are (3, H, W) with values 0 to 255. They are padded with zeros after that, at the right and the bottom.

    Args:
        mean: of the three channels.
        std: of the three channels.
        size_divisible: height and width of the batch become multiples of this, in pixels.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], size_divisible: int = 32) -> None:
        super().__init__(0, 0, list(mean), list(std), size_divisible)

    def normalize(self, image: Tensor) -> Tensor:
        """A image of any number type, as float32 with mean 0 and deviation 1."""
        return super().normalize(image.float())

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Nothing."""
        return image, target

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: list[tuple[int, int]], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Nothing: detections are in pixels of the images as they came, and masks stay cells of their boxes."""
        return result
