import pytest

from dyhead.data import DataError, catalog


@pytest.fixture(autouse=True)
def empty_catalog(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "_registered", {})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))


def test_a_json_registered_by_the_config_is_found_by_its_name(small_set):
    small_set.write()
    catalog.register_from_config([["cells", small_set.info.json_file, small_set.info.image_root]])
    info = catalog.get("cells")
    assert (info.name, info.json_file, info.image_root) == (
        "cells",
        *[str(small_set.folder / n) for n in ("small.json", "images")],
    )
    assert "cells" in catalog.names()


def test_registering_twice_is_fine_with_the_same_paths_only(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    catalog.register_coco_json("cells", "a.json", "images")
    catalog.register_coco_json("cells", tmp_path / "a.json", "images")
    with pytest.raises(DataError, match=r"'cells'.*a\.json.*b\.json"):
        catalog.register_coco_json("cells", "b.json", "images")


@pytest.mark.parametrize("name", ["coco_2017_val", "shapes_train"])
def test_built_in_names_cannot_be_taken(name):
    with pytest.raises(DataError, match=f"{name}.*built-in"):
        catalog.register_coco_json(name, "a.json", "images")


@pytest.mark.parametrize("entry", [["cells", "a.json"], "cells", ["cells", "a.json", 3], ["cells", "", "images"]])
def test_a_malformed_config_entry_is_shown(entry):
    with pytest.raises(DataError, match=r"DATASETS\.REGISTER: expected .* got"):
        catalog.register_from_config([entry])


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(DataError, match="'coco_2017_vall' is not known.*Did you mean coco_2017_val"):
        catalog.get("coco_2017_vall")


def test_coco_is_looked_for_in_the_datasets_folder(tmp_path):
    with pytest.raises(
        DataError, match="'coco_2017_val'.*instances_val2017.json does not exist.*put .*val2017.*sets/coco"
    ):
        catalog.get("coco_2017_val")
    (tmp_path / "sets/coco/annotations").mkdir(parents=True)
    (tmp_path / "sets/coco/annotations/instances_val2017.json").write_text("{}")
    with pytest.raises(DataError, match="image folder .*val2017 does not exist"):
        catalog.get("coco_2017_val")
    (tmp_path / "sets/coco/val2017").mkdir()
    assert catalog.get("coco_2017_val").image_root == str(tmp_path / "sets/coco/val2017")


def test_a_registered_file_that_is_missing_is_named(tmp_path):
    catalog.register_coco_json("cells", tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match=r"'cells': annotation file .*none\.json does not exist"):
        catalog.get("cells")
