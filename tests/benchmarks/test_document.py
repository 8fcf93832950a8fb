"""The tables of the committed documents are those of the committed results."""

import pytest

from benchmarks import document


@pytest.mark.parametrize("path", document.DOCUMENTS, ids=lambda path: path.name)
def test_the_committed_tables_are_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert document.fill(text) == text, "write it again: python -m benchmarks.document"


def test_a_pattern_is_all_machines_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    head = '{"command": "%s", "machine": {}, "latency": null, "date": "%s", "entries": [%s]}'
    entry = '{"name": "x", "config": "", "keys": {}, "against": "", "engine": "e", "runs": [{"seed": %d, "AP": 1}]}'
    (tmp_path / "accuracy-s-later.json").write_text(head % ("second", "2026-02", entry % 1))
    (tmp_path / "accuracy-s-earlier.json").write_text(head % ("first", "2026-01", entry % 0))
    (tmp_path / "accuracy-other-a.json").write_text("not read")
    result = document.study("accuracy-s-*.json")
    assert [about["command"] for about in result["origins"]] == ["first", "second"]
    assert [run["seed"] for run in result["entries"][0]["runs"]] == [0, 1]
    with pytest.raises(FileNotFoundError, match="expected results of a study, found none"):
        document.study("accuracy-none-*.json")
