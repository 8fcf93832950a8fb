import json
import math

import pytest

from dyhead.evaluation import Report, Timing, format_table, write_results

METRICS = {"AP": 42.61, "AP50": 60.0, "AP75": 46.4, "APs": 20.0, "APm": 45.0, "APl": math.nan, "AP-cat": 42.61}
TIMING = Timing(12.34, 15.0, 81.0, 1, 50, 123.4, "peak of something")


@pytest.fixture
def report():
    return Report("DyHeadFCOS", "shapes_val", METRICS, 1_234_567, TIMING, 3.21, (192, 256), "engine 1.0")


def test_a_row_stands_below_its_header(report):
    lines = format_table([report, Report("other", "a_dataset_of_a_long_name", {}, 5)]).splitlines()
    header, rule, first, second = lines[:4]
    cells = dict(zip(header.replace("ms p95", "ms_p95").replace(" (M)", "").split(),
                     first.split(), strict=True))  # fmt: skip
    assert cells == {
        "model": "DyHeadFCOS", "dataset": "shapes_val", "AP": "42.6", "AP50": "60.0", "AP75": "46.4", "APs": "20.0",
        "APm": "45.0", "APl": "-", "ms": "12.3", "ms_p95": "15.0", "images/s": "81.0", "MiB": "123.4", "params": "1.23",
        "GFLOPs": "3.21",
    }  # fmt: skip
    assert set(rule) == {"-"}
    assert len(header) == len(first) == len(second) == len(rule)
    for title in ("AP50", "images/s", "GFLOPs"):
        end = header.index(title) + len(title)
        assert first[end - 1].isdigit()
        assert second[end - 1] == "-"


def test_what_was_measured_on_is_said(report):
    table = format_table([report, report])
    for text in ("engine 1.0", "threads", "50 calls of batch 1", "peak of something", "192 x 256"):
        assert table.count(text) == 1, text


def test_results_are_valid_json_with_the_machine(report, tmp_path):
    path = write_results([report], tmp_path)
    assert path == str(tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (result,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["results"]
    assert result["metrics"] == {**METRICS, "APl": None}
    assert result["timing"]["latency_p95_ms"] == 15.0
    assert result["input_size"] == [192, 256]
    assert {"device", "threads", "torch"} <= set(result["machine"])
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_other_tasks_have_rows_or_lines_and_are_in_the_json(report, tmp_path):
    report.tasks = {"segm": {**METRICS, "AP": 12.34}, "sem_seg": {"mIoU": 56.78, "fwIoU": math.nan, "IoU-sky": 3.0}}
    lines = format_table([report]).splitlines()
    row = next(line for line in lines if "/segm" in line)
    assert row.split()[1:3] == [f"{report.dataset}/segm", "12.3"]
    assert row.split()[-1] == "-"
    assert f"{report.dataset}/sem_seg: mIoU 56.8, fwIoU -" in lines
    write_results([report], tmp_path)
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["tasks"]["segm"]["AP"] == 12.34
    assert result["tasks"]["sem_seg"] == {"mIoU": 56.78, "fwIoU": None, "IoU-sky": 3.0}
