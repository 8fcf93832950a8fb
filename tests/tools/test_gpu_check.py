"""The check on a GPU, with commands in place of its parts: what it runs, for how long, and what it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import gpu_check
from tools.gpu_check import GRACE, SECONDS, Part, limit_of, parts


def python(code, name="part", least=0.0, most=60.0, **others):
    return Part(name, [sys.executable, "-c", code], least, most, **others)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the check with these parts in place of its own; returns its report."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*fakes, code=0):
        monkeypatch.setattr(gpu_check, "device", lambda: {"device": "none", "compute capability": "9.0"})
        monkeypatch.setattr(gpu_check, "parts", lambda folder, capability: list(fakes))
        with pytest.raises(SystemExit) if code else contextlib.nullcontext():
            gpu_check.main([str(tmp_path)])
        return json.loads((tmp_path / "gpu_check.json").read_text())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def overtime(tmp_path, monkeypatch):
    """The time of a part is up as soon as it has printed "ready"."""

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None or timeout <= GRACE or "ready" not in str(self.args):
                return super().wait(timeout)
            while self.poll() is None:
                if any("ready" in log.read_text() for log in tmp_path.rglob("*.log")):
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)


WAIT = "import time\ntry:\n print('ready', flush=True)\n time.sleep(60)\nexcept KeyboardInterrupt: print(%r)"


class TestTime:
    def test_parts_never_take_more_than_there_is(self, tmp_path):
        every = parts(tmp_path, "9.0")
        assert SECONDS <= 480
        left = float(SECONDS)
        for i, part in enumerate(every):  # each takes all that it may
            limit = limit_of(part, every[i + 1 :], left)
            assert part.least <= limit <= part.most
            left -= limit
        assert left == 0

    def test_the_last_part_has_what_the_others_leave(self, tmp_path):
        *others, last = parts(tmp_path, "9.0")
        assert last.name == "emulation"
        assert limit_of(last, [], 300.0) == 300
        assert others[0].name == "build"
        assert limit_of(others[0], [*others[1:], last], SECONDS) > 120

    def test_a_part_that_is_over_time_ends_with_what_it_started(self, tmp_path, overtime, monkeypatch):
        monkeypatch.setattr(gpu_check, "GRACE", 0.2)
        code = (
            "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
            "print('ready', child.pid, flush=True); time.sleep(60)"
        )
        part = python(code)
        part.run(tmp_path, 60.0)
        assert part.status == "unfinished after 60 s"
        child = Path("/proc", part.output.split()[1], "stat")
        for _ in range(100):
            if not child.exists() or child.read_text().split()[2] == "Z":
                return
            time.sleep(0.1)
        raise AssertionError("the part's child still runs")

    def test_without_time_nothing_starts(self, tmp_path):
        part = python("print('started')")
        part.run(tmp_path, 2 * GRACE - 1)
        assert part.status == "left out: no time left"
        assert not part.output


class TestReport:
    def test_two_files_and_a_folder_remain(self, check, tmp_path):
        report = check(python("print('hello')", "build"), python("print('world')", "tests"))
        assert {path.name for path in tmp_path.iterdir()} == {"gpu_check.json", "gpu_check.txt", "parts"}
        assert {path.name for path in (tmp_path / "parts").iterdir()} == {"build.log", "tests.log"}
        assert [part["output"] for part in report["parts"]] == ["hello\n", "world\n"]
        assert "world" in (tmp_path / "gpu_check.txt").read_text()

    def test_results_that_parts_leave_are_in_the_reports(self, tmp_path):
        folder = tmp_path / "parts"
        results = {part.result for part in parts(folder, "9.0") if part.result is not None}
        assert {file.parent for file in results} == {folder}
        assert len(results) == 4

    def test_a_timeout_is_no_failure(self, check, overtime, capsys):
        report = check(
            python("", "build"),
            python(WAIT % "========= ERROR SUMMARY: 0 errors", "slow"),
            python("print('after')", "after"),
        )
        assert [part["status"] for part in report["parts"]] == ["passed", "unfinished after 60 s", "passed"]
        assert report["parts"][1]["output"] == "ready\n========= ERROR SUMMARY: 0 errors\n"
        assert capsys.readouterr().out.endswith("gpu_check: nothing failed; unfinished: slow\n")

    @pytest.mark.parametrize(
        "line",
        [
            "1 failed, 3 passed in 4.00s",
            "FAILED tests/ops/test_cuda.py",
            "========= Invalid __global__ read of size 4 bytes",
            "========= Uninitialized __global__ memory read of size 4 bytes",
            "========= Error: Race reported between Write access",
            "========= ERROR SUMMARY: 2 errors",
        ],
    )
    def test_failures_before_a_timeout_count(self, check, overtime, line):
        report = check(python("", "build"), python(WAIT % line, "tests"), code=1)
        assert report["parts"][1]["status"] == "failed, and unfinished after 60 s"

    def test_a_failure_fails_the_check_but_not_what_follows(self, check):
        report = check(python("", "build"), python("raise SystemExit(3)", "bad"), python("", "good"), code=1)
        assert [part["status"] for part in report["parts"]] == ["passed", "failed with 3", "passed"]

    def test_without_a_build_nothing_else_runs(self, check):
        report = check(python("raise SystemExit(1)", "build"), python("", "tests"), code=1)
        assert [part["name"] for part in report["parts"]] == ["build"]
        report = check(python("", "build", needs=("no_such_program",)), python("", "tests"), code=1)
        assert report["parts"][0]["status"] == "left out: no_such_program not installed"

    @pytest.mark.parametrize(("text", "expected"), [('{"cases": [1]}', {"cases": [1]}), ('{"cases": [1', None)])
    def test_a_result_that_was_cut_off_spoils_no_report(self, check, tmp_path, text, expected):
        file = tmp_path / "result.json"
        file.write_text(text)
        report = check(python("", "build"), python("", "benchmark", result=file))
        assert report["parts"][1]["result"] == expected

    def test_the_report_is_there_after_every_part(self, check, tmp_path):
        file = str(tmp_path / "gpu_check.json")
        look = f"import json; print([part['name'] for part in json.load(open({file!r}))['parts']])"
        report = check(python(look, "build"), python(look, "tests"))
        assert [part["output"] for part in report["parts"]] == ["[]\n", "['build']\n"]


@pytest.mark.parametrize("before", ["carried/along", None])
def test_pythonpath_is_kept(tmp_path, monkeypatch, before):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before:
        monkeypatch.setenv("PYTHONPATH", before)
    part = python("import os; print(os.environ['PYTHONPATH'])")
    part.run(tmp_path, 60.0)
    assert part.output.strip().split(os.pathsep) == [str(gpu_check.ROOT), *([before] if before else [])]


@pytest.mark.parametrize(("capability", "built"), [("9.0", "9.0a"), ("8.6", "8.6"), ("12.0", "12.0")])
def test_a_library_is_built_for_the_device_with_all_that_it_alone_has(tmp_path, capability, built):
    environment = parts(tmp_path, capability)[0].environment
    assert environment == {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": built}


def test_sanitizers_watch_our_kernels_alone_where_they_can(tmp_path):
    tools = [part.command for part in parts(tmp_path, "9.0") if part.command[0] == "compute-sanitizer"]
    assert [command[command.index("--tool") + 1] for command in tools] == ["memcheck", "racecheck", "initcheck"]
    for command in tools:
        assert command[command.index("--report-api-errors") + 1] == "no"
        if "initcheck" in command:  # which takes what other kernels wrote for uninitialised where it watches ours alone
            assert "--kernel-name" not in command
            continue
        assert command[command.index("--kernel-name") + 1] == "kns=dyhead"
        assert command.index("--kernel-name") < command.index(sys.executable)
