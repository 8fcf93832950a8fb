"""What is drawn is what the head computes."""

import pytest
import torch

from dyhead.layers import DyHead
from dyhead.ops import deform_conv2d
from dyhead.visualize import traced
from dyhead.visualize.tracing import sampled


def head_and_pyramid(**options):
    torch.manual_seed(0)
    head = DyHead(16, 2, **options).double()
    for parameter in head.parameters():  # offsets that are not 0, weights of levels that differ
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    sizes = [(12, 20), (6, 10), (3, 5)]
    return head, {f"p{i}": torch.randn(2, 16, *size, dtype=torch.float64) for i, size in enumerate(sizes, 3)}


@pytest.mark.parametrize(
    "options", [{}, {"task_aware": False}, {"spatial_aware": False}, {"window": None, "offset_groups": 2}]
)
def test_the_last_maps_of_a_block_are_its_output(options):
    head, pyramid = head_and_pyramid(**options)
    with traced(head) as traces:
        out = head(pyramid)
    (trace,) = traces
    assert trace.levels == ["p3", "p4", "p5"]
    blocks = trace.blocks
    assert len(blocks) == 2
    for level, expected in zip(list(blocks[1].maps.values())[-1], out.values(), strict=True):
        torch.testing.assert_close(level, expected[0])
    for level, expected in zip(blocks[0].maps["input"], pyramid.values(), strict=True):
        assert torch.equal(level, expected[0])


def test_there_is_a_map_after_each_attention():
    head, pyramid = head_and_pyramid()
    with traced(head) as traces:
        head(pyramid)
    block = traces[0].blocks[0]
    assert list(block.maps) == ["input", "scale-aware", "spatial-aware", "task-aware"]
    ratio = block.maps["scale-aware"][1] / block.maps["input"][1]
    torch.testing.assert_close(ratio, block.weights[1].expand_as(ratio))
    assert block.offsets[0].shape == (1, 9, 2, 12, 20)
    assert block.importances[2].shape == (1, 9, 3, 5)


def test_released_blocks_have_maps_before_and_after_them():
    head, pyramid = head_and_pyramid(block="released")
    with traced(head) as traces:
        out = head(pyramid)
    assert list(traces[0].blocks[1].maps) == ["input", "output"]
    torch.testing.assert_close(traces[0].blocks[1].maps["output"][0], out["p3"][0])
    assert traces[0].blocks[0].weights is None


def test_sampling_places_are_those_that_the_operator_reads():
    """An image of one bright pixel: a pixel of the output is bright where a place lies on that pixel."""
    head, pyramid = head_and_pyramid()
    with traced(head) as traces:
        head(pyramid)
    block, stride, (y, x) = traces[0].blocks[0], 8, (5, 7)
    places, importances = sampled(block, 0, stride, y, x)
    ramp = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")).double()[None]
    offset = block.offsets[0].flatten(0, 2)[None]
    mask = block.importances[0].flatten(0, 1)[None]
    for tap in range(9):  # a kernel that reads one tap of a ramp of positions tells where that tap is
        weight = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
        weight[0, 0].view(-1)[tap] = weight[1, 1].view(-1)[tap] = 1
        seen = deform_conv2d(ramp, offset, weight, padding=1, mask=mask)[0, :, y, x] / importances[tap]
        torch.testing.assert_close(((seen + 0.5) * stride).flip(0), places[tap])


def test_a_model_without_a_head_is_refused_and_hooks_do_not_stay():
    with (
        pytest.raises(ValueError, match="expected a model with one DyHead, got one with none"),
        traced(torch.nn.ReLU()),
    ):
        pass
    head, pyramid = head_and_pyramid()
    with traced(head) as traces:
        pass
    head(pyramid)
    assert traces == []
