import math

import pytest
import torch

from dyhead.detection.scores import RefinedScore, Score


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def expected(score, logits, quality):
    rows = []
    for row, q in zip(logits.tolist(), quality.tolist(), strict=True):
        kinds = {"class": lambda p, q: p, "product": lambda p, q: p * q, "root": lambda p, q: math.sqrt(p * q)}
        rows.append([kinds[score](sigmoid(x), sigmoid(q)) for x in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("rank", ["score", "class"])
@pytest.mark.parametrize("threshold", ["score", "class"])
@pytest.mark.parametrize("score", ["class", "product", "root"])
def test_what_is_compared_ranked_and_reported(score, threshold, rank):
    torch.manual_seed(0)
    logits, quality = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    got = Score(score, score_thresh_on=threshold, topk_by=rank)(logits, quality)
    want = {"score": expected(score, logits, quality), "class": expected("class", logits, quality)}
    for mine, theirs in zip(got, (want[threshold], want[rank], want["score"]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_class_needs_no_quality():
    logits = torch.randn(4, 2)
    assert all(torch.equal(part, logits.sigmoid()) for part in Score("class")(logits, None))


@pytest.mark.parametrize("score", ["product", "root"])
def test_the_others_need_one(score):
    with pytest.raises(ValueError, match=f"SCORE {score}: the detector predicts no quality"):
        Score(score)(torch.randn(4, 2), None)


@pytest.mark.parametrize("final", ["root", "product"])
@pytest.mark.parametrize("rank", ["score", "class", "final"])
@pytest.mark.parametrize("threshold", ["score", "class", "final"])
def test_what_a_second_stage_makes_of_it(threshold, rank, final):
    torch.manual_seed(0)
    logits, refined = torch.randn(2, 5, 3, dtype=torch.float64)
    quality = torch.randn(5, dtype=torch.float64)
    for score in ("class", "product", "root"):
        got = RefinedScore(score, threshold, rank, final)(logits, quality, refined)
        want = {"score": expected(score, logits, quality), "class": expected("class", logits, quality)}
        want["final"] = want["score"] * expected("class", refined, quality)
        if final == "root":
            want["final"] = want["final"] ** 0.5
        for mine, theirs in zip(got, (want[threshold], want[rank], want["final"]), strict=True):
            torch.testing.assert_close(mine, theirs)
