"""The command `dyhead`: finds its subcommands, and loads nothing before one is named."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dyhead import cli, info
from dyhead.checkpoints import CheckpointError
from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.exit_codes import MEANINGS

ROOT = Path(__file__).parent.parent


def test_info_prints_every_line(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line.strip(), maxsplit=1)[0] for line in lines] == [k.strip() for k in info.collect()]


def test_a_subcommand_gets_its_arguments_and_gives_the_exit_code(monkeypatch, tmp_path):
    (tmp_path / "subcommand_of_a_test.py").write_text(
        "def add_arguments(parser): parser.add_argument('code', type=int)\ndef run(args): return args.code + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.SUBCOMMANDS, "next", ("subcommand_of_a_test", "return the next number"))
    assert cli.main(["next", "3"]) == 4


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([name, "--help"])
    assert error.value.code == 0
    assert f"usage: dyhead {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["inform"], ["info", "--bogus"]])
def test_wrong_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: dyhead" in capsys.readouterr().err


def test_help_names_the_subcommands_and_loads_no_torch():
    code = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('dyhead', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    environment = {**os.environ, "COLUMNS": "200"}  # no line is wrapped
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for name, (_, summary) in cli.SUBCOMMANDS.items():
        assert re.search(rf"{name}\s+{summary}", run.stdout)
    assert run.stdout.splitlines()[-1] == "False"


def test_the_console_script_is_the_command_line():
    module, function = re.search(r'^dyhead = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M).groups()
    assert getattr(importlib.import_module(module), function) is cli.main


@pytest.mark.parametrize("name", ["train", "predict"])
def test_a_package_that_is_not_installed_is_named(name):
    code = "import sys; sys.modules['fvcore'] = None; from dyhead import cli; sys.exit(cli.main(sys.argv[1:]))"
    run = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: fvcore is not installed: pip install 'dyhead[train]'")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("a key"), 1, "error: a key\n"),
        (DataError("a file"), 1, "error: a file\n"),
        (CheckpointError("weights"), 1, "error: weights\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_subcommands_are_told(monkeypatch, capsys, error, code, told):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err == told


def test_an_error_of_the_program_has_its_traceback(monkeypatch):
    monkeypatch.setattr(info, "run", lambda args: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["info"])


def test_help_lists_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^  ([\d, ]+?)  ", capsys.readouterr().out.split("exit codes:")[1], re.M)
    assert [code.strip() for code in listed] == list(MEANINGS)


@pytest.mark.parametrize("words", [["info"], ["config"]])
def test_a_reader_that_has_had_enough_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-W", "ignore", "-m", "dyhead", *words]
    run = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")
