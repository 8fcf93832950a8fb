"""That races in emulated CUDA kernels are found. tools/sanitize.sh runs this, and the kernels' own tests with it."""

import os

import pytest
import torch

from tests.ops import emulation

pytestmark = pytest.mark.skipif(os.environ.get("DYHEAD_RACES") != "1", reason="needs DYHEAD_RACES=1: see emulation.py")

# Which of two threads is found out depends on the order in which they run.
FOUND = "a race: thread .* of shared memory, .* another thread read|a race: thread .* of shared memory, .* wrote"
RACES = {
    "without a synchronisation": f"{FOUND}|of shared memory, which nobody has written",
    "written again too early": FOUND,
    "within a warp without a synchronisation": f"{FOUND}|of shared memory, which nobody has written",
    "between warps with a warp's synchronisation": f"{FOUND}|of shared memory, which nobody has written",
    "never written": "thread 0 reads byte 0 of shared memory, which nobody has written",
    "from block to block": "a race: thread .* of block 1 writes at global memory, .* what thread .* of block 0 wrote",
    "by atomic additions to what others read": "a race: thread .* at global memory",
    "by a copy that is not waited for": FOUND,
}


@pytest.fixture(name="hand_on", scope="module")
def hand_on_fixture():
    emulation.load()
    return torch.ops.dyhead_emulated.hand_on


@pytest.mark.parametrize("kind", ["through shared memory", "within a warp", "by atomic additions"])
def test_what_is_synchronised_passes(kind, hand_on):
    out = torch.zeros(256)
    hand_on(out, kind)
    places = torch.arange(128.0)
    expected = {
        "through shared memory": places.view(2, 2, 32).flip(1).flatten(),
        "within a warp": places.view(-1, 2).flip(1).flatten(),
        "by atomic additions": torch.tensor([64.0, 64.0]),
    }[kind]
    torch.testing.assert_close(out[: len(expected)], expected)


@pytest.mark.parametrize("kind", RACES)
def test_races_are_found(kind, hand_on):
    with pytest.raises(RuntimeError, match=RACES[kind]):
        hand_on(torch.zeros(256), kind)
