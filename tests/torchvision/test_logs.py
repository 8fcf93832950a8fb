"""What a run leaves behind while it trains."""

import json
import logging
import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from dyhead.data import CocoSplit, DatasetInfo
from dyhead.evaluation.results import Evaluated
from dyhead.torchvision.logs import TrainingLog


def test_a_run_goes_on_without_tensorboard_when_that_fails(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError("No space left on device")

    with TrainingLog(str(tmp_path), 0, 2) as log:
        monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
        log.iteration(0, {"total_loss": 1.0}, 0.1)
        log.iteration(1, {"total_loss": 3.0}, 0.1)
        log.evaluation(1, [Evaluated(CocoSplit(DatasetInfo("a", "", ""), [], [], []), {"AP": 5.0}, [])])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[0]["total_loss"] == 2
    assert lines[1] == {"iteration": 1, "bbox/AP": 5}
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == ["TensorBoard's files are not written any more (OSError: No space left on device)"]


@pytest.mark.parametrize(("ap", "said"), [(12.345, "AP 12.35 on a"), (math.nan, "no AP on a")])
def test_an_evaluation_on_the_way_says_its_ap(tmp_path, caplog, ap, said):
    caplog.set_level(logging.INFO)
    with TrainingLog(str(tmp_path), 0, 2) as log:
        log.evaluation(0, [Evaluated(CocoSplit(DatasetInfo("a", "", ""), [], [], []), {"AP": ap}, [])])
    assert f"iteration 1/2  {said}" in caplog.text
