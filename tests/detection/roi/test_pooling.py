"""RoI pooling of several views of a region, and layers that read a part of the features."""

import torch
from torchvision.ops import roi_align

from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import class_and_box_layers


def test_each_view_is_of_the_region_enlarged_around_its_center_on_the_level_of_the_region_itself():
    generator = torch.Generator().manual_seed(0)
    levels = {
        "p3": torch.randn(1, 4, 32, 40, generator=generator),
        "p4": torch.randn(1, 4, 16, 20, generator=generator),
    }
    boxes = torch.tensor([[100.0, 80, 210, 200], [40, 40, 240, 220]])  # 115 pixels, level 3; 190 pixels, level 3
    boxes = torch.cat([boxes, torch.tensor([[10.0, 10, 300, 230]])])  # 253 pixels, level 4
    pool = PyramidPool({"p3": 8, "p4": 16}, 5, 2, aligned=True, scales=(1.0, 1.5))
    out = pool(levels, [boxes])
    assert out.shape == (3, 8, 5, 5)
    for i, (name, stride) in enumerate((("p3", 8), ("p3", 8), ("p4", 16))):
        x0, y0, x1, y1 = boxes[i].tolist()
        dx, dy = 0.25 * (x1 - x0), 0.25 * (y1 - y0)
        for view, box in enumerate(((x0, y0, x1, y1), (x0 - dx, y0 - dy, x1 + dx, y1 + dy))):
            want = roi_align(levels[name], [torch.tensor([box])], 5, 1 / stride, 2, aligned=True)
            torch.testing.assert_close(out[i, 4 * view : 4 * view + 4], want[0])
    assert pool(levels, [boxes[:0]]).shape == (0, 8, 5, 5)


def test_layers_read_their_own_part_of_the_features():
    classes, boxes = class_and_box_layers((3, 5), 4, 8)
    x = torch.randn(2, 8)
    torch.testing.assert_close(classes(x), x[:, :3] @ classes.weight.T + classes.bias)
    torch.testing.assert_close(boxes(x), x[:, 3:] @ boxes.weight.T + boxes.bias)
    both = class_and_box_layers(8, 4, 8)
    assert [layer.in_features for layer in both] == [8, 8]
    assert all((layer.bias == 0).all() for layer in (classes, boxes, *both))
