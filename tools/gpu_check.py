"""What tools/gpu_check.sh runs: parts that share the time there is, and a report that is written after every part."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 470  # in all, so that eight minutes are never over
GRACE = 5  # seconds of a part's limit in which it may end by itself once it is interrupted
TAIL = 6000  # characters of a part's output that the report keeps
# What pytest and compute-sanitizer print about a fault, in the output of a part that was cut off.
FAULT = re.compile(
    r"^(FAILED|ERROR) |\b\d+ failed\b|^=+ (Invalid|Uninitialized|Error: Race)|SUMMARY: [1-9]", re.MULTILINE
)

# A few shapes of every kernel: whole vectors and odd channels, groups, a deterministic backward pass.
FEW = (
    "not emulation and (float32 or bfloat16 or tf32) and "
    "(geometry or (deterministic_gradients_are and (37 or offset_groups)) or unreachable or channels_last)"
)


@dataclass
class Part:
    """A command and what became of it.

    Attributes:
        name: in a word or two.
        command: what runs.
        least: seconds that the parts before it leave it.
        most: seconds that it takes at most, where the parts after it leave them.
        environment: variables beside the process's own.
        needs: programs and Python packages without which it is left out.
        result: JSON file that it writes, for the report; what it has written by its end counts.
        status: passed, failed, unfinished (with how long it ran), or left out (with the reason).
    """

    name: str
    command: list[str]
    least: float
    most: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    result: Path | None = None
    status: str = "not run"
    seconds: float = 0.0
    output: str = ""

    def run(self, folder: Path, limit: float) -> None:
        """Runs it for at most `limit` seconds; its output goes into a file in `folder`."""
        absent = [name for name in self.needs if not shutil.which(name) and not importlib.util.find_spec(name)]
        if absent:
            self.status = f"left out: {', '.join(absent)} not installed"
        elif limit < 2 * GRACE:
            self.status = "left out: no time left"
        else:
            self._run(folder, limit)

    def _run(self, folder: Path, limit: float) -> None:
        start = time.monotonic()
        log = folder / f"{self.name.replace(' ', '_')}.log"
        # The repository's packages before others, and these before what is installed.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(log, "wb") as file:
            # A group of its own, so that what it started ends with it.
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path} | self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = _wait(process, limit)
            finally:
                _end(process, signal.SIGKILL)
                process.wait()
        self.seconds = round(time.monotonic() - start, 1)
        output = log.read_text(errors="replace")
        self.output = output[-TAIL:]
        if code is None:
            self.status = f"{'failed, and ' if FAULT.search(output) else ''}unfinished after {limit:.0f} s"
        else:
            self.status = "passed" if code == 0 else f"failed with {code}"

    def entry(self) -> dict[str, object]:
        """It in the report."""
        entry = {key: value for key, value in asdict(self).items() if key not in ("result", "needs")}
        if self.result is not None and self.result.exists():
            try:
                entry["result"] = json.loads(self.result.read_text())
            except ValueError:  # it ended while it wrote
                entry["result"] = None
        return entry


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """The exit code; None where the process is interrupted, for it to say what it has, because the time is up."""
    try:
        return process.wait(limit - GRACE)
    except subprocess.TimeoutExpired:
        _end(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None


def _end(process: subprocess.Popen, how: signal.Signals) -> None:
    """Sends a signal to a process and all that it has started, if there is any of it left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def limit_of(part: Part, later: list[Part], seconds_left: float) -> float:
    """Seconds for a part: all that is left but what the later ones need at least, and no more than it may take."""
    return min(part.most, seconds_left - sum(other.least for other in later))


def device() -> dict[str, object]:
    """The GPU and what is installed."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check: expected a CUDA device, found none")
    properties = torch.cuda.get_device_properties(0)
    driver = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "driver, clocks, power": _line(driver),
        "nvcc": _line(["nvcc", "--version"]),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "python": platform.python_version(),
        "commit": _line(["git", "rev-parse", "HEAD"]),
    }


def _line(command: list[str]) -> str:
    """The last line that a command prints, or why there is none."""
    if not shutil.which(command[0]):
        return f"no {command[0]}"
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return f"no answer from {command[0]}"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def parts(folder: Path, capability: str) -> list[Part]:
    """All parts: the most telling first, and last what is most likely to take all the time there is."""
    python = sys.executable
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # With what belongs to one machine alone, where the kernels use it.
    build = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": {"9.0": "9.0a"}.get(capability, capability)}

    gpu, few = ("--device", "cuda", "--dtype", "bfloat16"), ("--repeats", "5", "--seconds", "6")

    def benchmark(name: str, least: float, most: float, *options: str, **others) -> Part:
        file = folder / f"{name}.json"
        command = [python, "-m", f"benchmarks.{name}", "--output", str(file), *options]
        return Part(f"benchmark {name}", command, least, most, result=file, **others)

    def sanitizer(tool: str, least: float) -> Part:
        # PyTorch's allocator would hide an access beyond a tensor. PyTorch asks for much that CUDA refuses, which is no
        # fault, and its own kernels would take most of the time.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        if tool != "initcheck":  # for which only what a watched kernel wrote is initialised
            command += ["--kernel-name", "kns=dyhead"]
        command += [*test, "tests/ops/test_cuda.py", "-k", FEW]
        return Part(tool, command, least, 60, environment, ("compute-sanitizer",))

    compilers = ("nvcc", "setuptools")
    return [
        Part("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 120, 240, build, compilers),
        Part("info", [python, "-m", "dyhead.info"], 10, 30),
        Part("tests", [*test, "-m", "cuda", "tests/ops", "--durations=5"], 60, 130, needs=("pytest",)),
        benchmark("operator", 40, 90, *gpu, *few, "--batch", "8", "--sizes", "100x168", "--no-memory"),
        benchmark(
            *("block", 30, 80, *gpu, *few, "--batch", "8", "--blocks", "released", "--modes", "training"),
            needs=("torchvision",),
        ),
        benchmark("kernels", 25, 60),
        benchmark(
            *("detector", 30, 60, *gpu, *few),
            *("--detectors", "fcos", "--backbones", "R50", "--batch", "2", "--no-memory"),
            *("--peers", "ours", "composition"),
            needs=("torchvision", "fvcore"),
        ),
        sanitizer("memcheck", 30),
        sanitizer("racecheck", 25),
        sanitizer("initcheck", 25),
        Part("emulation", [*test, "tests/ops/test_cuda.py", "-k", "emulation and bfloat16"], 60, SECONDS),
    ]


def write(folder: Path, machine: dict[str, object], done: list[Part], seconds: float) -> str:
    """Writes both reports, and returns the text."""
    report = {"machine": machine, "seconds": round(seconds, 1), "parts": [part.entry() for part in done]}
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"{key}: {value}" for key, value in machine.items()] + [""]
    lines += [f"{part.name:20} {part.seconds:6.1f} s  {part.status}" for part in done]
    for part in done:
        if part.output and (part.name.startswith(("benchmark", "info", "tests")) or part.status != "passed"):
            lines += ["", f"==== {part.name}: {part.status}", part.output.rstrip()]
    text = "\n".join(lines) + "\n"
    (folder / "gpu_check.txt").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Runs all parts; fails where one failed or the library was not built, not where the time was too short."""
    start = time.monotonic()
    # With a handler here parts can be interrupted, even where a shell that runs this in the background ignores that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit("gpu_check: terminated"))
    machine = device()
    folder = Path((arguments or sys.argv[1:])[0]).resolve()
    details = folder / "parts"
    details.mkdir(parents=True, exist_ok=True)
    done: list[Part] = []
    text = write(folder, machine, done, time.monotonic() - start)
    later = parts(details, str(machine["compute capability"]))
    while later:
        part = later.pop(0)
        part.run(details, limit_of(part, later, SECONDS - (time.monotonic() - start)))
        done.append(part)
        print(f"{part.name:20} {part.seconds:6.1f} s  {part.status}", flush=True)
        text = write(folder, machine, done, time.monotonic() - start)
        if part.name == "build" and part.status != "passed":
            break
    print(text)
    bad = [part.name for part in done if part.status.startswith("failed")]
    if bad or done[0].status != "passed":
        sys.exit(f"gpu_check: expected all parts to pass, got {', '.join(bad) or done[0].status}; see {folder}")
    unfinished = [part.name for part in done if part.status.startswith("unfinished")]
    if unfinished:
        print(f"gpu_check: nothing failed; unfinished: {', '.join(unfinished)}")


if __name__ == "__main__":
    main()
