"""Reads the machine code of CUDA kernels: whether a product waits for loads that should arrive while it runs.

For cubin files of compute capability 8 and 9. Kernels whose products go on by themselves (warp groups, in files of
sm_90a) have none that could wait. An instruction there is 16 bytes. Its upper bits name one of six
barriers, which it holds until its result has arrived, and those that it waits for before it starts. NVIDIA does not
document this; `nvdisasm -hex` prints the bits beside the instructions.
"""

import itertools
import re
import struct
from pathlib import Path
from typing import NamedTuple

# The kernels that gather while they multiply: on tensor cores, by whole vectors.
GATHERING = re.compile(r"\d(?:Forward|WeightGradient)I.*?Lb1ELb1E")
CORNERS = 4
CAPABILITIES = range(80, 100)
LOAD, PRODUCT = 0x981, 0x23C  # LDG, HMMA


class Instruction(NamedTuple):
    """What matters here of an instruction."""

    is_product: bool
    is_load: bool  # of 16 bytes, through the cache for read-only data
    holds: int  # a barrier; 7: none
    waits: int  # a bit for each barrier


def decode(code: bytes) -> list[Instruction]:
    """The instructions of a kernel."""
    found = []
    for low, high in struct.iter_unpack("<QQ", code):
        operation = low & 0xFFF
        is_load = operation == LOAD and high >> 9 & 7 == 6 and high >> 15 & 1 == 1
        found.append(Instruction(operation == PRODUCT, is_load, high >> 46 & 7, high >> 52 & 63))
    return found


def kernels(cubin: bytes) -> dict[str, list[Instruction]]:
    """The kernels in a cubin file (64-bit ELF), by their mangled names."""
    offset, size, count, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<II16xQQ", cubin, offset + i * size) for i in range(count)]
    found = {}
    for title, _, begin, length in sections:
        start = sections[names][2] + title
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = decode(cubin[begin : begin + length])
    return found


def waits(code: list[Instruction]) -> list[bool]:
    """Of every product of a kernel that gathers: whether it waits for loads that are under way.

    A product is a run of HMMA instructions without a load between; the last four loads before it are the corners'. All
    of them have to stand before it, and nothing up to its end may wait for them.
    """
    found, loads = [], []
    events = [i for i, instruction in enumerate(code) if instruction.is_product or instruction.is_load]
    for at, following in itertools.zip_longest(events, events[1:]):
        if code[at].is_load:
            loads.append(at)
        elif following is None or code[following].is_load:
            corners, loads = loads[-CORNERS:], []
            held = [code[load].holds for load in corners]
            between = code[corners[0] + 1 : at + 1] if len(corners) == CORNERS else []
            found.append(not between or any(step.waits >> barrier & 1 for step in between for barrier in held))
    return found


def problems(folder: Path) -> list[str]:
    """What is wrong with kernels that gather in a folder's cubin files; those of other machines are not looked at."""
    targets = {file: file.stem.rpartition("_")[2] for file in sorted(folder.glob("*.cubin"))}
    files = {file: int(target.rstrip("af")) in CAPABILITIES for file, target in targets.items()}
    found, seen = [], 0
    for file in (file for file, known in files.items() if known):
        for name, code in kernels(file.read_bytes()).items():
            if GATHERING.search(name):
                seen += 1
                early = waits(code)
                if any(early) or (not early and targets[file] != "90a"):
                    found.append(f"{file.stem}: {name}: {sum(early)} of {len(early)} products wait for loads")
    if not seen and (not files or any(files.values())):
        found.append(f"{folder}: no kernel that gathers")
    return found
