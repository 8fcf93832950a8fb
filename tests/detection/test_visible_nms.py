"""R2NMS against a loop over all pairs, and the crowd that it is for."""

import torch

from dyhead.detection import r2nms
from tests.detection.objects import iou, make_boxes


def kept_by_loops(visible, scores, labels, threshold):
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(labels[i] != labels[j] or iou(visible[i], visible[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    visible = make_boxes(60, 40, 50, smallest=8) - 20  # beyond the image's corner, too
    scores, labels = (
        torch.rand(60, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (60,), generator=generator),
    )
    for threshold in (0.2, 0.5, 0.8):
        got = r2nms(visible, scores, labels, threshold).tolist()
        assert got == kept_by_loops(visible.tolist(), scores.tolist(), labels.tolist(), threshold)
    assert 5 < len(r2nms(visible, scores, labels, 0.2)) < 50
    assert r2nms(visible[:0], scores[:0], labels[:0]).tolist() == []


def test_of_two_in_a_crowd_both_are_kept_and_of_two_detections_of_one_the_better():
    # One stands behind the other's right half: whole boxes have an IoU of 70 / 130, visible ones of 0.
    whole = torch.tensor([[0.0, 0, 100, 200], [30, 0, 130, 200], [31, 0, 131, 200]])
    visible = torch.tensor([[0.0, 0, 100, 200], [101, 0, 130, 200], [100, 0, 131, 200]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long()
    assert r2nms(whole, scores, labels).tolist() == [0]
    assert r2nms(visible, scores, labels).tolist() == [0, 1]
