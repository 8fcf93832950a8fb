import pytest
import torch

from dyhead.detection.anchors import Anchors

CPU = torch.device("cpu")


def test_anchors_by_loops_in_their_order():
    sizes, ratios, strides, offset = [[4.0, 6.0], [16.0, 20.0]], [[0.5, 1.0, 3.0]], [8, 16], 0.5
    shapes = [(2, 3), (1, 2)]
    want = []
    for level, (height, width) in enumerate(shapes):
        for i in range(height):
            for j in range(width):
                x, y = (j + offset) * strides[level], (i + offset) * strides[level]
                for size in sizes[level]:
                    for ratio in ratios[0]:
                        w = (size * size / ratio) ** 0.5
                        h = ratio * w
                        want.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    places = Anchors(sizes, ratios, strides, offset)(shapes, dtype=torch.float64, device=CPU)
    torch.testing.assert_close(places.anchors, torch.tensor(want, dtype=torch.float64))
    assert places.counts == [2 * 3 * 6, 1 * 2 * 6]
    assert places.strides == (8, 16)
    assert places.per_cell == 6


@pytest.mark.parametrize(("offset", "center"), [(0.0, 0.0), (0.5, 4.0)])
def test_the_offset_moves_the_first_center(offset, center):
    places = Anchors([[32.0]], [[1.0]], [8], offset)([(1, 1)], dtype=torch.float32, device=CPU)
    assert places.centers.tolist() == [[center, center]]
    assert places.anchors.tolist() == [[center - 16, center - 16, center + 16, center + 16]]


def test_a_number_per_level_becomes_one_per_place():
    places = Anchors([[8.0]], [[1.0]], [8, 16], 0.0)([(1, 3), (1, 1)], dtype=torch.float64, device=CPU)
    got = places.by_level([1.5, 7])
    assert got.tolist() == [1.5, 1.5, 1.5, 7.0]
    assert got.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_have_the_dtype_asked_for(dtype):
    assert Anchors([[8.0]], [[1.0]], [8])([(2, 2)], dtype=dtype, device=CPU).anchors.dtype == dtype


def test_one_entry_or_a_plain_list_serves_all_levels():
    shapes = [(2, 2), (1, 1)]
    anchors = [
        Anchors(sizes, ratios, [8, 16])(shapes, dtype=torch.float32, device=CPU).anchors
        for sizes, ratios in (
            ([[8, 12], [8, 12]], [[1.0, 2.0], [1.0, 2.0]]),
            ([[8, 12]], [[1.0, 2.0]]),
            ([8, 12], [1.0, 2.0]),
            (((8, 12),), (1.0, 2.0)),
        )
    ]
    assert all(torch.equal(anchors[0], other) for other in anchors[1:])


@pytest.mark.parametrize(
    ("sizes", "ratios", "message"),
    [
        ([[8], [16]], [[1.0]], r"SIZES: expected a list of 1 or 3 lists \(the levels\), got \[\[8\], \[16\]\]"),
        ([], [[1.0]], "SIZES: expected a list of 1 or 3 lists"),
        ([[8], [], [16]], [[1.0]], "SIZES: expected a list of 1 or 3 lists"),
        ([[8], 16, [32]], [[1.0]], "SIZES: expected a list of 1 or 3 lists"),
        ([[8]], [[1.0], [2.0]], "ASPECT_RATIOS: expected a list of 1 or 3 lists"),
        ([[0]], [[1.0]], r"SIZES: expected numbers above 0, got \[\[0\]\]"),
        ([[8]], [[-1.0]], "ASPECT_RATIOS: expected numbers above 0"),
        ([[8], [8, 16], [8]], [[1.0]], r"expected as many anchors on every level, got \[1, 2, 1\]"),
    ],
)
def test_names_what_does_not_fit(sizes, ratios, message):
    with pytest.raises(ValueError, match=f"MODEL.ANCHOR_GENERATOR.*{message}"):
        Anchors(sizes, ratios, [8, 16, 32])


def test_as_many_levels_as_strides():
    with pytest.raises(ValueError, match="zip"):
        Anchors([[8]], [[1.0]], [8, 16])([(2, 2)], dtype=torch.float32, device=CPU)
