"""DyHead before the head of an Ultralytics YOLO model: Detect_DyHead(nc, hidc, block_num, ch).

    pip install ultralytics            (AGPL-3.0, or a licence that they sell: read what it means for your project)
    python ultralytics_head.py yolov8n.yaml

Nothing here is Ultralytics' code, and dyhead imports nothing of theirs. The class inherits from the `Detect` that is
installed, so that it has that version's predictors, losses and decoding; `Detect` gets levels of `hidc` channels in
place of the neck's. A trainer of Ultralytics builds its own model: let its `get_model` call `replace_head`.

Tested with a class of the same shape only, not with Ultralytics.
"""

import sys
from collections.abc import Sequence

import torch
from torch import nn

from dyhead.layers import DyHead

try:
    from ultralytics.nn.modules import Detect
except ImportError as error:
    sys.exit(f"expected the package ultralytics (pip install ultralytics), got: {error}")


class Detect_DyHead(Detect):
    """Levels of channels `ch` to `hidc`, `block_num` blocks of DyHead, then `Detect` for `nc` classes."""

    def __init__(self, nc: int = 80, hidc: int = 256, block_num: int = 2, ch: Sequence[int] = ()) -> None:
        super().__init__(nc=nc, ch=(hidc,) * len(ch))
        self.dyhead = DyHead(in_channels=list(ch), out_channels=hidc, num_blocks=block_num)

    def forward(self, x: list[torch.Tensor]):
        """Whatever `Detect` returns, in training, inference and export."""
        return super().forward(self.dyhead(list(x)))


def replace_head(layers: nn.Sequential, hidc: int = 256, block_num: int = 2) -> Detect_DyHead:
    """Puts `Detect_DyHead` in the place of the last layer of a model (`YOLO(...).model.model`), and returns it.

    Strides and the layer's place in the graph stay as they were; predictors and blocks are new.
    """
    old = layers[-1]
    ch = [branch[0].conv.in_channels for branch in old.cv2]
    head = Detect_DyHead(old.nc, hidc, block_num, ch)
    head.i, head.f, head.type = old.i, old.f, "Detect_DyHead"
    head.np = sum(parameter.numel() for parameter in head.parameters())
    head.stride = old.stride
    head.bias_init()
    layers[-1] = head
    return head


def main() -> None:
    from ultralytics import YOLO

    model = YOLO(sys.argv[1] if len(sys.argv) > 1 else "yolov8n.yaml").model
    head = replace_head(model.model, hidc=64)
    print(f"{head.np} parameters in the head, strides {head.stride.tolist()}")
    print([tuple(x.shape) for x in model.train()(torch.rand(2, 3, 256, 256))])


if __name__ == "__main__":
    main()
