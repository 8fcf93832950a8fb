import pytest
import torch

from dyhead.detection.losses import APLoss, ap


def update(logits, targets, factor=1.0, **options):
    """Loss and gradient, of a copy of the logits."""
    logits = logits.detach().clone().requires_grad_()
    loss = APLoss(**options)(logits, targets)
    (factor * loss).backward()
    return loss.detach(), logits.grad


def by_loops(logits, targets, delta=1.0, interpolated=True):
    """The paper's definition, a pair at a time."""
    scores, positive = logits.flatten().tolist(), [target > 0 for target in targets.flatten().tolist()]

    def step(difference):
        return min(max(difference / (2 * delta) + 0.5, 0.0), 1.0)

    gradient, count = [0.0] * len(scores), sum(positive)
    total, largest = 0.0, 0.0
    for i in sorted((i for i, true in enumerate(positive) if true), key=lambda i: scores[i]):
        among, above = 1.0, 0.0  # its own step is 1/2
        for j, score in enumerate(scores):
            if j != i and positive[j]:
                among += step(score - scores[i])
            elif not positive[j]:
                above += step(score - scores[i])
        precision, factor = among / (among + above), 1.0
        if interpolated:
            if precision < largest:
                factor, precision = (1 - largest) / (1 - precision), largest
            largest = precision
        total += precision
        gradient[i] -= (1 - precision) / count
        for j, score in enumerate(scores):
            if not positive[j]:
                gradient[j] += factor * step(score - scores[i]) / (among + above) / count
    loss = 1 - total / count if count else 0.0
    return torch.tensor(loss, dtype=logits.dtype), torch.tensor(gradient, dtype=logits.dtype).view_as(logits)


def test_computed_by_hand():
    # The positive at 1: none of the positives is above it, a = 1; of the negatives the one at 0.5 by
    # -0.5 / 2 + 1/2 = 1/4, so that its precision is 1 / (1 + 1/4) = 4/5. The positive at 0: a = 1 + 1, b = 3/4 + 1/4,
    # precision 2/3. The loss is 1 - (4/5 + 2/3) / 2 = 4/15. Gradients: (1/4 / (5/4) + 3/4 / 3) / 2 = 9/40 at 0.5,
    # (1/4 / 3) / 2 = 1/24 at -0.5, none at -3, -(1/5) / 2 at 1 and -(1/3) / 2 at 0.
    logits = torch.tensor([[1.0, 0.5, -3.0], [0.0, -0.5, -3.0]])
    targets = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    loss, gradient = update(logits, targets)
    torch.testing.assert_close(loss, torch.tensor(4 / 15))
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 10, 9 / 40, 0], [-1 / 6, 1 / 24, 0]]))


def test_interpolation_computed_by_hand():
    # The positive at 2 has precision 2 / (2 + 1), the one at 3 has 1 / (1 + 1), which is below. Interpolated, both have
    # 2/3, and what the one at 3 pushes the negative by, 1/2, shrinks by (1 - 2/3) / (1 - 1/2) = 2/3.
    logits, targets = torch.tensor([[2.0, 3.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss, gradient = update(logits, targets, interpolated=True)
    torch.testing.assert_close(loss, torch.tensor(1 / 3))
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 6, -1 / 6, (1 / 3 + 1 / 3) / 2]]))
    loss, gradient = update(logits, targets, interpolated=False)
    torch.testing.assert_close(loss, torch.tensor(1 - (2 / 3 + 1 / 2) / 2))
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 6, -1 / 4, (1 / 3 + 1 / 2) / 2]]))


def scattered(places, classes, share, spread=2.0, step=None):
    torch.manual_seed(0)
    logits = spread * torch.randn(places, classes, dtype=torch.float64)
    if step is not None:
        logits = (logits / step).round() * step
    return logits, (torch.rand(places, classes) < share).double()


INPUTS = {
    "few positives": scattered(20, 4, 0.05),
    "many positives": scattered(20, 4, 0.5),
    "one class": scattered(60, 1, 0.2),
    "one place": scattered(1, 30, 0.2),
    "no positives": scattered(10, 3, 0.0),
    "no negatives": scattered(10, 3, 1.0),
    "ties, and differences of delta": scattered(20, 4, 0.3, step=0.5),
    "all equal": scattered(10, 3, 0.3, spread=0.0),
    "far apart": scattered(20, 4, 0.3, spread=100.0),
    "huge": scattered(20, 4, 0.3, spread=1e30),
}


@pytest.mark.parametrize("interpolated", [True, False])
@pytest.mark.parametrize("delta", [1.0, 0.3])
@pytest.mark.parametrize("name", INPUTS)
def test_equals_the_definition_by_loops(name, delta, interpolated):
    logits, targets = INPUTS[name]
    loss, gradient = update(logits, targets, delta=delta, interpolated=interpolated)
    want, want_gradient = by_loops(logits, targets, delta, interpolated)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient)
    assert gradient.isfinite().all()


def test_interpolation_is_at_work_there():
    assert not torch.equal(by_loops(*INPUTS["many positives"])[0], by_loops(*INPUTS["many positives"], 1.0, False)[0])


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**9])
def test_the_size_of_chunks_does_not_change_the_result(chunk, monkeypatch):
    logits, targets = INPUTS["many positives"]
    want, want_gradient = update(logits, targets)
    monkeypatch.setattr(ap, "_CHUNK", chunk)
    loss, gradient = update(logits, targets)
    torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-14, atol=1e-18)


def test_no_more_than_a_chunk_is_compared_at_a_time(monkeypatch):
    logits, targets = scattered(100, 4, 0.1)
    monkeypatch.setattr(ap, "_CHUNK", 128)
    sizes, compare = [], ap._compare

    def watched(*arguments):
        for part in compare(*arguments):
            sizes.append(part.numel())
            yield part

    monkeypatch.setattr(ap, "_compare", watched)
    update(logits, targets)
    assert len(sizes) > 100
    assert max(sizes) <= 128


def test_the_gradient_is_multiplied_by_what_comes_from_above():
    logits, targets = INPUTS["few positives"]
    torch.testing.assert_close(update(logits, targets, factor=1024.0)[1], 1024 * update(logits, targets)[1])


@pytest.mark.parametrize("interpolated", [True, False])
def test_the_update_sums_to_the_loss(interpolated):
    logits, targets = INPUTS["many positives"]
    loss, gradient = update(logits, targets, interpolated=interpolated)
    torch.testing.assert_close(gradient[targets > 0].sum(), -loss)
    torch.testing.assert_close(gradient[targets == 0].sum(), loss)


def test_a_million_negatives_are_counted_right_in_float32():
    # Half of a step each: the positive's precision is 1 / (1 + 500000); the negatives share the update evenly.
    logits, targets = torch.zeros(1000, 1001), torch.zeros(1000, 1001)
    logits[:, 0], targets[0, 0] = -10.0, 1.0
    logits[0, 0] = 0.0
    loss, gradient = update(logits, targets)
    torch.testing.assert_close(1 - loss, torch.tensor(1 / 500001), rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient[0, 1], torch.tensor(0.5 / 500001), rtol=1e-6, atol=0)
    assert torch.equal(gradient[:, 1:], gradient[0, 1].expand(1000, 1000))


def test_float32_is_ranked_in_float64():
    logits, targets = scattered(5000, 4, 0.01)
    assert torch.equal(update(logits.float(), targets)[1], update(logits.float().double(), targets)[1].float())


@pytest.mark.parametrize("where", [0, 1])
def test_nan_is_not_hidden(where):
    logits, targets = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    logits[0, where] = torch.nan
    assert update(logits, targets)[0].isnan()
