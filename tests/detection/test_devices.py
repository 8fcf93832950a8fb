"""Losses of processes that train together."""

import pytest
import torch
from torch import multiprocessing

from tests.detection import devices


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What two processes computed, the first with two images, the second with one."""
    folder = tmp_path_factory.mktemp("devices")
    multiprocessing.spawn(devices.train, (2, str(folder), [[0, 1], [2]]), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_mean(computed, which, together):
    """That the losses under this key are on average those that one process has on all images."""
    first, second = (each["losses"][which] for each in computed)
    assert len(together) in (3, 5)
    for name, want in together.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, want.detach())
        assert not torch.isclose(first[name], second[name])


@pytest.mark.parametrize("by_centerness", [False, True])
@pytest.mark.parametrize("kind", devices.KINDS)
def test_their_mean_is_the_loss_that_one_has_on_all_images(computed, kind, by_centerness):
    assert_mean(computed, (kind, by_centerness), devices.losses_of(kind, by_centerness, [0, 1, 2]))


def test_so_it_is_where_box_losses_are_divided_by_weights(computed):
    assert_mean(computed, "GFL", devices.losses_of_gfl([0, 1, 2]))


def test_so_it_is_of_autoassign(computed):
    assert_mean(computed, "AutoAssign", devices.losses_of_autoassign([0, 1, 2]))


def test_so_it_is_of_borderdet(computed):
    together = devices.losses_of_borderdet([0, 1, 2])
    assert len(together) == 5
    assert_mean(computed, "BorderDet", together)


def test_they_share_a_moving_average(computed):
    count = ((3 + 0) + (4 + 2)) / 2
    once = 0.9 * 10 + 0.1 * count
    want = torch.tensor([once, 0.9 * once + 0.1 * count])
    for each in computed:
        torch.testing.assert_close(torch.stack(each["moved"]), want)
