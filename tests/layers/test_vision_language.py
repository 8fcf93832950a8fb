import pytest
import torch

from dyhead.layers import DyHead, VisionLanguageDyHead


def test_maps_the_levels_and_passes_on_the_rest(make_pyramid):
    head = DyHead(8, 1, norm_groups=2)
    levels = tuple(make_pyramid(6, 5, dtype=torch.float32))
    text = {"hidden": torch.randn(2, 3, 4)}
    inputs = {"visual": levels, "lang": text, "step": 3}
    out = VisionLanguageDyHead(head)(inputs)
    assert all(torch.equal(a, b) for a, b in zip(out["visual"], head(levels), strict=True))
    assert list(out) == ["visual", "lang", "step"]
    assert out["lang"] is text
    assert inputs["visual"] is levels
    other = VisionLanguageDyHead(head, key="features")({"features": levels})
    assert all(torch.equal(a, b) for a, b in zip(other["features"], out["visual"], strict=True))


@pytest.mark.parametrize(("inputs", "got"), [([1], "list"), ({"lang": 1}, r"\['lang'\]")])
def test_names_what_is_no_such_dict(inputs, got):
    with pytest.raises(TypeError, match=f"inputs: expected a dict with levels under 'visual', got {got}"):
        VisionLanguageDyHead(DyHead(8, 0))(inputs)
