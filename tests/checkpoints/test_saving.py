"""Checkpoints are on the disk as a whole or not at all, and the note of the last one tells the truth."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch

from dyhead.checkpoints import CheckpointError, last_checkpoint, save_checkpoint, write_checkpoint
from dyhead.files import replacing, write_text


@contextmanager
def full_disk(bytes_left):
    """No file grows beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(value, size=20_000):
    return {"model": {"a": torch.full((size,), float(value))}, "iteration": value}


def test_a_checkpoint_is_noted_and_comes_back(tmp_path):
    assert last_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, "model_0.pth", content(0))
    save_checkpoint(tmp_path, "model_1.pth", content(1))
    assert last_checkpoint(tmp_path) == str(tmp_path / "model_1.pth")
    assert torch.load(tmp_path / "model_1.pth")["iteration"] == 1
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth", "model_1.pth"]


@pytest.mark.parametrize("left", [0, 1000, 50_000, 80_000])
def test_on_a_full_disk_the_file_is_named_and_the_last_good_one_stays(tmp_path, left):
    save_checkpoint(tmp_path, "model_0.pth", content(0))
    for name in ("model_1.pth", "model_0.pth"):
        with (
            full_disk(left),
            pytest.raises(CheckpointError, match=rf"{name}: cannot be written: File too large$"),
        ):
            save_checkpoint(tmp_path, name, content(1))
    assert last_checkpoint(tmp_path) == str(tmp_path / "model_0.pth")
    assert torch.load(tmp_path / "model_0.pth")["iteration"] == 0
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]


def test_a_note_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "model_0.pth", content(0))
    (tmp_path / "last_checkpoint.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"/last_checkpoint: cannot be written: Is a directory$"):
        save_checkpoint(tmp_path, "model_1.pth", content(1))
    assert last_checkpoint(tmp_path) == str(tmp_path / "model_0.pth")


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent/w\.pth: cannot be written: No such file or directory$"):
        write_checkpoint(tmp_path / "absent" / "w.pth", {})


def test_the_name_appears_only_with_the_whole_file_synced(tmp_path, monkeypatch):
    steps, path = [], tmp_path / "w.pth"

    def fsync(descriptor, sync=os.fsync):
        steps.append("sync")
        sync(descriptor)

    def replace(source, target, rename=os.replace):
        assert torch.load(source)["iteration"] == 1
        assert torch.load(target)["iteration"] == 0
        steps.append("rename")
        rename(source, target)

    write_checkpoint(path, content(0))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_checkpoint(path, content(1))
    assert steps[:2] == ["sync", "rename"]
    assert torch.load(path)["iteration"] == 1


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "ä: 1\n")
    assert path.read_bytes() == "ä: 1\n".encode()

    def interrupted():
        with replacing(path, "w") as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "ä: 1\n"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_errors_of_a_text_file_name_it(tmp_path):
    with full_disk(10), pytest.raises(OSError, match="File too large") as error:
        write_text(tmp_path / "results.json", "x" * 100)
    assert error.value.filename == str(tmp_path / "results.json")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("note", ["model_0.pth", "model_0.pth\n", " model_0.pth \r\n"])
def test_a_note_written_by_hand_is_read(tmp_path, note):
    torch.save({}, tmp_path / "model_0.pth")
    (tmp_path / "last_checkpoint").write_text(note)
    assert last_checkpoint(tmp_path) == str(tmp_path / "model_0.pth")


@pytest.mark.parametrize(
    "note",
    [b"", b"\n", b"absent.pth", b"../model_0.pth", b"/etc/hostname", b".", b"..", b"folder", b"folder/model_0.pth",
     b"model_0.pth\nmodel_0.pth", b"model_0.pth\0", b"\xff\xfe", b"x" * 10_000, b"\x1b[2Jx"],
)  # fmt: skip
def test_a_note_that_names_no_file_beside_it_is_an_error(tmp_path, note):
    run = tmp_path / "run"
    (run / "folder").mkdir(parents=True)
    for folder in (tmp_path, run, run / "folder"):
        torch.save({}, folder / "model_0.pth")
    (run / "last_checkpoint").write_bytes(note)
    with pytest.raises(CheckpointError, match=r"run/last_checkpoint: expected ") as error:
        last_checkpoint(run)
    assert str(error.value).isprintable()


def test_a_note_that_is_no_file_is_an_error_and_not_a_run_without_checkpoints(tmp_path):
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(CheckpointError, match=r"last_checkpoint: expected a file"):
        last_checkpoint(tmp_path)
    (tmp_path / "last_checkpoint").rmdir()
    (tmp_path / "last_checkpoint").symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"last_checkpoint: expected a file"):
        last_checkpoint(tmp_path)
