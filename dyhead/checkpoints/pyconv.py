"""Names of iduta/pyconv's PyConvResNet and PyConvHGResNet, which classify ImageNet."""

from __future__ import annotations

from dyhead.checkpoints.imagenet import CLASSIFIER
from dyhead.checkpoints.pyramid import BOTTOM_UP
from dyhead.checkpoints.source import COUNTERS, Row, Source

_NETWORK = BOTTOM_UP + "pyconv."

PYCONV = Source(
    "PyConv",
    r"^layer1\.0\.conv2\.conv2_1\.weight$",
    lambda state: [
        Row(  # they count kernels from 1
            r"(layer[1-3]\.\d+\.conv2)\.conv2_([1-4])\.(weight)",
            lambda m: f"{_NETWORK}{m[1]}.levels.{int(m[2]) - 1}.{m[3]}",
        ),
        Row(r"((?:conv1|bn1|layer[1-4]\.\d+\.(?:conv\d|bn\d|downsample\.[12]))\.\w+)", _NETWORK + r"\1"),
    ],
    dropped=(COUNTERS,),
    left_over=((r"fc\.(weight|bias)", CLASSIFIER),),
)
