"""Config files that come with the package are found from any folder, and never in place of a user's own."""

import os
from pathlib import Path

import pytest

from dyhead import cli, config_files
from dyhead.config import ConfigError, load_config
from dyhead.torchvision import get_cfg

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart/fcos_dyhead_R18_shapes.yaml"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("configs/quickstart/fcos_dyhead_R18_shapes.yaml", QUICKSTART),
        ("./quickstart/fcos_dyhead_R18_shapes.yaml", QUICKSTART),
        ("fcos_dyhead_R18_shapes.yaml", QUICKSTART),
        ("fcos_dyhead_R50.yaml", CONFIGS / "fcos_dyhead_R50.yaml"),
        ("elsewhere/fcos_dyhead_R50.yaml", None),
        ("configs/fcos_dyhead_R18_shapes.yaml", None),
        ("../configs/fcos_dyhead_R50.yaml", None),
        ("/configs/fcos_dyhead_R50.yaml", None),
        ("configs", None),
        ("", None),
    ],
)
def test_a_name_is_one_of_the_package_where_there_is_no_file(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    assert config_files.find_file(name) == (str(found) if found else name)


def test_a_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fcos_dyhead_R50.yaml").write_text("SEED: 12\n")
    cfg = get_cfg()
    assert load_config(cfg, "fcos_dyhead_R50.yaml") == {"SEED"}
    Path("fcos_dyhead_R50.yaml").unlink()
    os.symlink("nowhere", "fcos_dyhead_R50.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(cfg, "fcos_dyhead_R50.yaml")


def test_a_base_may_be_one_of_the_package(tmp_path):
    (tmp_path / "mine.yaml").write_text("_BASE_: fcos_dyhead_R18_shapes.yaml\nSEED: 12\n")
    mine, theirs = get_cfg(), get_cfg()
    load_config(mine, tmp_path / "mine.yaml")
    load_config(theirs, QUICKSTART)
    theirs.SEED = 12
    assert mine == theirs
    (tmp_path / "mine.yaml").write_text("_BASE_: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none.yaml \(a _BASE_ of .*mine.yaml\): no such file"):
        load_config(mine, tmp_path / "mine.yaml")


def test_an_installed_package_has_its_own(tmp_path, monkeypatch):
    (tmp_path / "dyhead/configs").mkdir(parents=True)
    (tmp_path / "dyhead/configs/only.yaml").write_text("SEED: 12\n")
    monkeypatch.setattr(config_files, "__file__", str(tmp_path / "dyhead/config_files.py"))
    monkeypatch.chdir(tmp_path)
    assert config_files.find_file("only.yaml") == str(tmp_path / "dyhead/configs/only.yaml")


def test_the_names_are_listed(capsys):
    assert cli.main(["config", "--files"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "quickstart/fcos_dyhead_R18_shapes.yaml" in names
    assert len(names) == len(list(CONFIGS.rglob("*.yaml")))
