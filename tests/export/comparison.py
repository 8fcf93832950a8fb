"""Outputs of fixed shapes beside an engine's detections."""

import torch


def assert_same_detections(outputs, expected, *, pixels=1e-3):
    """Compares (boxes, scores, labels) of a batch with a list of dicts; both best first."""
    for boxes, scores, labels, of_image in zip(*outputs, expected, strict=True):
        there = labels >= 0
        assert int(there.sum()) == len(of_image["boxes"])
        assert torch.equal(labels[there], of_image["labels"])
        torch.testing.assert_close(boxes[there], of_image["boxes"], rtol=0, atol=pixels)
        torch.testing.assert_close(scores[there], of_image["scores"], rtol=0, atol=1e-4)
        assert not scores[~there].any()
        assert not boxes[~there].any()
