import torch

from dyhead.detection import Predictions, Targets
from dyhead.detection.assigners import BACKGROUND, IGNORED
from dyhead.detection.criteria import match
from dyhead.detection.fcos import FCOSOptions


def test_by_hand():
    detector = FCOSOptions(num_classes=3, in_features=("p3",)).build(4, (8,))
    assigned = {1.0: [1, BACKGROUND, 0, IGNORED], 2.0: [BACKGROUND, IGNORED, BACKGROUND, 0], 0.0: [BACKGROUND] * 4}
    detector.assigner = lambda places, boxes: torch.tensor(assigned[boxes[:1].sum().item()])
    targets = [
        Targets(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0, 0, 8, 4]]), torch.tensor([2, 1])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
        Targets(torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0])),
    ]
    predictions = Predictions(torch.zeros(3, 4, 3, dtype=torch.float64), torch.zeros(3, 4, 4), None, [(1, 4)])
    matches = match(detector, predictions, targets)
    assert matches.positive.tolist() == [[True, False, True, False], [False] * 4, [False] * 3 + [True]]
    assert matches.counted.tolist() == [[True] * 3 + [False], [True] * 4, [True, False, True, True]]
    assert matches.anchors.tolist() == [[0, 0, 8, 8], [16, 0, 24, 8], [24, 0, 32, 8]]
    assert matches.boxes.tolist() == [[0, 0, 8, 4], [0.25] * 4, [0.5] * 4]
    assert matches.labels.tolist() == [1, 2, 0]
    assert matches.boxes.dtype == torch.float64
