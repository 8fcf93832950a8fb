"""`dyhead convert` through its functions."""

import argparse
import resource

import pytest
import torch
import torchvision

from dyhead.checkpoints import command, convert, read_state


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_writes_canonical_weights_that_both_engines_and_torch_read(tmp_path, published, state_of, capsys):
    shapes = published["atss_r50_fpn_dyhead_1x_coco"]
    state = state_of({key: [min(size, 4) for size in shape] for key, shape in shapes.items()})
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 0
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert content["source"] == "mmdetection"
    expected = convert(state).state
    assert content["model"].keys() == expected.keys()
    assert all(torch.equal(content["model"][key], value) for key, value in expected.items())
    again = convert(read_state(tmp_path / "ours.pth"))
    assert again.source == "dyhead"
    assert again.state.keys() == expected.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.pth", "theirs.pth"]

    lines = capsys.readouterr().out.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines if line.startswith(("source", "keys", "renamed", "dropped ")))
    assert table == {"source": "mmdetection", "keys": "447", "renamed": "394", "dropped": "53"}
    assert f"written    408 tensors to {tmp_path / 'ours.pth'}" in lines
    assert "dropped, a counter that normalization by stored statistics does not read: 53" in lines
    assert "added, zeros: the convolution has no bias there: 18" in lines


def test_what_is_left_over_is_listed(tmp_path, capsys):
    surplus = {f"surplus.{i}": torch.ones(1) for i in range(25)}
    torch.save(torchvision.models.resnet18().state_dict() | surplus, tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("left over, ImageNet's classifier:")
    assert lines[start + 1 : start + 3] == ["  fc.weight", "  fc.bias"]
    start = lines.index("left over, no detector of this project has it:")
    assert lines[start + 1 :] == [*(f"  surplus.{i}" for i in range(20)), "  and 5 more"]
    assert "left over  27" in lines


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    (tmp_path / "ours.pth").write_text("mine")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 1
    assert (tmp_path / "ours.pth").read_text() == "mine"
    assert "ours.pth: exists and is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"encoder.weight": torch.ones(1)}, "expected the keys of one project, got encoder.weight"),
        ({"bbox_head.x": torch.ones(1)}, "none of its keys has a counterpart here"),
        ({"layer1.0.conv1.weight": torch.tensor(float("nan"))}, "got NaN in layer1.0.conv1.weight"),
        (None, "theirs.pth: no such file"),
    ],
)
def test_a_file_that_cannot_be_converted_is_an_error_and_leaves_nothing(tmp_path, capsys, state, message):
    if state is not None:
        torch.save(state, tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dyhead convert: checkpoint {tmp_path / 'theirs.pth'}: ")
    assert message in captured.err
    assert not captured.out
    assert not list(tmp_path.glob("ours*"))


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "absent" / "ours.pth") == 1
    assert "absent" in capsys.readouterr().err


def test_on_a_full_disk_nothing_is_left(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        assert run(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ours.pth: cannot be written: File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


def test_a_link_to_nowhere_is_not_overwritten(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    (tmp_path / "ours.pth").symlink_to(tmp_path / "absent")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 1
    assert (tmp_path / "ours.pth").is_symlink()
    assert "ours.pth: exists and is not overwritten" in capsys.readouterr().err
