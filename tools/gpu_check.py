"""What tools/gpu_check.sh runs: parts with a time limit each, and a report that is written anew after every part."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 525  # in all
TAIL = 6000  # characters of a part's output that the report keeps

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
        limit: seconds, at most.
        environment: variables beside the process's own.
        needs: programs and Python packages without which it is left out.
        result: JSON file that it writes, for the report.
        status: passed, failed, timed out, or left out (with the reason).
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    result: Path | None = None
    status: str = "not run"
    seconds: float = 0.0
    output: str = ""

    def run(self, folder: Path, seconds_left: float) -> None:
        """Runs it within its limit and what is left of the whole."""
        absent = [name for name in self.needs if not shutil.which(name) and not importlib.util.find_spec(name)]
        limit = min(self.limit, seconds_left)
        if absent:
            self.status = f"left out: {', '.join(absent)} not installed"
        elif limit < 5:
            self.status = "left out: no time left"
        else:
            self._run(folder, limit)

    def _run(self, folder: Path, limit: float) -> None:
        start = time.monotonic()
        log = folder / f"{self.name.replace(' ', '_')}.log"
        with open(log, "wb") as file:
            # A group of its own, so that what it started ends with it.
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                self.status = "passed" if process.wait(limit) == 0 else f"failed with {process.returncode}"
            except subprocess.TimeoutExpired:
                self.status = f"timed out after {limit:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.seconds = round(time.monotonic() - start, 1)
        self.output = log.read_text(errors="replace")[-TAIL:]


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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def parts(folder: Path, capability: str) -> list[Part]:
    """All parts, the most telling first: what comes last is left out where time runs out."""
    python = sys.executable
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    build = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}

    gpu, few = ("--device", "cuda", "--dtype", "bfloat16"), ("--repeats", "5", "--seconds", "6")

    def benchmark(name: str, limit: float, *options: str, **others) -> Part:
        file = folder / f"{name}.json"
        command = [python, "-m", f"benchmarks.{name}", "--output", str(file), *options]
        return Part(f"benchmark {name}", command, limit, result=file, **others)

    def sanitizer(tool: str) -> Part:
        # PyTorch's allocator would hide an access beyond a tensor.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *test]
        return Part(tool, [*command, "tests/ops/test_cuda.py", "-k", FEW], 50, environment, ("compute-sanitizer",))

    compilers = ("nvcc", "setuptools", "pybind11")
    return [
        Part("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 170, build, compilers),
        Part("info", [python, "-m", "dyhead.info"], 30),
        Part("tests", [*test, "-m", "cuda", "tests/ops", "--durations=5"], 130, needs=("pytest",)),
        benchmark("operator", 90, *gpu, *few, "--batch", "8", "--sizes", "100x168", "--no-memory"),
        benchmark(
            *("block", 80, *gpu, *few, "--batch", "8", "--blocks", "released", "--modes", "training"),
            needs=("torchvision",),
        ),
        benchmark("kernels", 40),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        sanitizer("initcheck"),
        benchmark(
            *("detector", 60, *gpu, *few, "--detectors", "fcos", "--backbones", "R50", "--batch", "2", "--no-memory"),
            needs=("torchvision", "fvcore"),
        ),
        Part("emulation", [*test, "tests/ops/test_cuda.py", "-k", "emulation and bfloat16"], 60),
    ]


def write(folder: Path, machine: dict[str, object], done: list[Part], seconds: float) -> str:
    """Writes both reports, and returns the text."""
    entries = []
    for part in done:
        entry = {key: value for key, value in asdict(part).items() if key not in ("result", "needs")}
        if part.result is not None and part.result.exists():
            entry["result"] = json.loads(part.result.read_text())
        entries.append(entry)
    report = {"machine": machine, "seconds": round(seconds, 1), "parts": entries}
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"{key}: {value}" for key, value in machine.items()] + [""]
    lines += [f"{part.name:20} {part.seconds:6.1f} s  {part.status}" for part in done]
    for part in done:
        if part.output and (part.name.startswith(("benchmark", "info", "tests")) or part.status != "passed"):
            lines += ["", f"==== {part.name}: {part.status}", part.output.rstrip()]
    text = "\n".join(lines) + "\n"
    (folder / "gpu_check.txt").write_text(text)
    return text


def main() -> None:
    """Runs all parts; fails where one failed, timed out, or the build was left out."""
    start = time.monotonic()
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = device()
    done: list[Part] = []
    for part in parts(folder, str(machine["compute capability"])):
        part.run(folder, SECONDS - (time.monotonic() - start))
        done.append(part)
        print(f"{part.name:20} {part.seconds:6.1f} s  {part.status}", flush=True)
        text = write(folder, machine, done, time.monotonic() - start)
        if part.name == "build" and part.status != "passed":
            break
    print(text)
    bad = [part.name for part in done if part.status.startswith(("failed", "timed out"))]
    if bad or done[0].status != "passed":
        sys.exit(f"gpu_check: expected all parts to pass, got {', '.join(bad) or done[0].status}; see {folder}")


if __name__ == "__main__":
    main()
