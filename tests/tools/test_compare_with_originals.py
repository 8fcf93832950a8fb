import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.compare_with_originals import main
from tools.originals import heads
from tools.originals.rows import Row, largest, relative, table

RECORDS = Path(__file__).parents[1] / "detection" / "originals"


@pytest.fixture
def folder(tmp_path):
    oracles = tmp_path / "oracles"
    oracles.mkdir()
    for part in RECORDS.glob("atss.*"):
        shutil.copy(part, oracles)
    return tmp_path


def lines_of(output):
    return [line.split() for line in output.splitlines()]


def test_prints_a_table_of_what_agrees(folder, capsys):
    (folder / "oracles" / "unheard_of.json").write_text("{}")
    assert main([str(folder)]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert sum(line[-1:] == ["ok"] for line in lines) == 12
    assert ["unheard_of", "not", "in", "the", "core"] in lines
    assert lines[-1] == ["12", "comparisons,", "0", "over", "their", "tolerance"]


def test_fails_where_a_number_is_another(folder, capsys):
    file = folder / "oracles" / "atss.json"
    record = json.loads(file.read_text())
    record["cases"]["B"]["losses"]["loss_cls"] *= 1 + 1e-5
    file.write_text(json.dumps(record))
    assert main([str(folder)]) == 1
    over = [line for line in lines_of(capsys.readouterr().out) if line[-1:] == ["OVER"]]
    assert over == [["atss", "B", "losses", "1.0e-05", "1e-06", "OVER"]]


def test_a_folder_without_records_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path)])
    assert error.value.code == 2
    assert "expected records in oracles or published, found none" in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "passes"), [(0.9, True), (1.0, True), (1.1, False), (math.nan, False)])
def test_a_row_passes_up_to_its_tolerance(difference, passes):
    row = Row("head", "stage", difference, 1.0)
    assert row.passes == passes
    assert table([row]).split()[-1] == ("ok" if passes else "OVER")


def test_differences():
    got, want = torch.tensor([1.0, 2.5, 0.0]), torch.tensor([1.0, 2.0, -1e-7])
    assert largest(got, want) == 0.5
    assert relative(got, want) == 0.25
    assert relative(got[2:], want[2:]) == pytest.approx(0.1)
    assert largest(got, want[:2]) == relative(got, want[:2]) == math.inf
    assert largest(got[:0], want[:0]) == relative(got[:0], want[:0]) == 0


def test_outputs_may_stand_in_another_heads_record(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"raw_outputs_as_in": "b"}))
    np.savez(tmp_path / "a.npz", **{"det.0.labels": np.array([1])})
    np.savez(tmp_path / "b.npz", **{"det.0.labels": np.array([2]), "raw.0.0": np.array([3.0])})
    _, arrays = heads.read(tmp_path / "a.json")
    assert {key: value.tolist() for key, value in arrays.items()} == {"det.0.labels": [1], "raw.0.0": [3.0]}
