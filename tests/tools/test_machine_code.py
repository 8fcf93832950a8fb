"""The reading of CUDA machine code, on instructions made here."""

import struct

import pytest

from tools.machine_code import decode, kernels, problems, waits

NONE = 7


def instruction(operation, *, holds=NONE, waits_for=(), fields=0):
    return struct.pack("<QQ", operation, fields | holds << 46 | sum(1 << barrier for barrier in waits_for) << 52)


def load(holds, *, constant=True, size=6, waits_for=()):
    return instruction(0x981, holds=holds, waits_for=waits_for, fields=size << 9 | constant << 15)


def product(*waits_for):
    return instruction(0x23C, waits_for=waits_for)


def other(*waits_for, holds=NONE):
    return instruction(0x202, holds=holds, waits_for=waits_for)


LOADS, STORE = load(4) + load(5) * 3, other(4, 5)
QUARTER = LOADS + other(1, holds=2) + product(2) + product() * 31
CODE = {
    "in order": (LOADS + STORE + (QUARTER + STORE) * 4, [False] * 4),
    "without a store between": (LOADS + product() + LOADS + product(), [False, False]),
    "a move waits before the product": (LOADS + other(5) + product() + STORE, [True]),
    "the product's operands share a barrier": (LOADS + other(holds=4) + product(4) + STORE, [True]),
    "a load waits for the one before": (load(4) + load(5, waits_for=[4]) + load(5) * 2 + product(), [True]),
    "waits within the product": (LOADS + product() * 8 + other(5) + product() * 8, [True]),
    "only the second waits": (QUARTER + STORE + LOADS + product(5), [False, True]),
    "a load within the product": (load(5) * 3 + product() + load(5) + product() + STORE, [True, True]),
    "what other loads hold": (LOADS + load(3, size=4) + load(2, constant=False) + product(3, 2), [False]),
}


@pytest.mark.parametrize("kind", CODE)
def test_products_that_wait_for_loads(kind):
    code, expected = CODE[kind]
    assert waits(decode(code)) == expected


def cubin(named):
    """A 64-bit ELF file with a section of code for each name."""
    names = b"\0.names\0" + b"".join(b".text." + name.encode() + b"\0" for name in named)
    parts, at = [(b"", 0), (names, 1)], 8
    for name, code in named.items():
        parts.append((code, at))
        at += len(name) + 7
    body, headers = b"", b""
    for data, title in parts:
        headers += struct.pack("<IIQQQQ24x", title, 1, 0, 0, 64 + len(body), len(data))
        body += data
    start = b"\x7fELF\x02".ljust(40, b"\0") + struct.pack("<Q", 64 + len(body))
    return start.ljust(58, b"\0") + struct.pack("<HHH", 64, len(parts), 1) + body + headers


FORWARD = "_ZN6dyhead4cuda10run_kernelINS0_7ForwardI{}Lb1ELb{}ELi256EEELi139264EEEvNT_6ParamsE"
WEIGHT = "_ZN6dyhead4cuda10run_kernelINS0_14WeightGradientIN3c104HalfELb1ELb1ELi1EEELi87040EEEvNT_6ParamsE"
SUM = WEIGHT.replace("14WeightGradient", "17SumWeightGradient")
LATE = LOADS + product(5)


def test_kernels_of_a_file_by_name():
    named = {"a": QUARTER, "name": product(1) + load(3)}
    assert kernels(cubin(named)) == {name: decode(code) for name, code in named.items()}


def test_only_kernels_that_gather_have_to_pass(tmp_path):
    named = {FORWARD.format("f", 1): QUARTER, FORWARD.format("f", 0): LATE, SUM: LATE, WEIGHT: QUARTER}
    (tmp_path / "forward.compute_90.sm_90.cubin").write_bytes(cubin(named))
    (tmp_path / "forward.compute_120.cubin").write_bytes(b"of a later machine")
    assert problems(tmp_path) == []
    (tmp_path / "forward.compute_80.cubin").write_bytes(cubin({**named, WEIGHT: LATE, FORWARD.format("f", 1): STORE}))
    assert problems(tmp_path) == [
        f"forward.compute_80: {FORWARD.format('f', 1)}: 0 of 0 products wait for loads",
        f"forward.compute_80: {WEIGHT}: 1 of 1 products wait for loads",
    ]


def test_products_of_warp_groups_wait_for_nothing(tmp_path):
    (tmp_path / "forward.compute_90a.sm_90a.cubin").write_bytes(cubin({FORWARD.format("f", 1): LOADS + STORE}))
    assert problems(tmp_path) == []
    (tmp_path / "forward.compute_90a.sm_90a.cubin").write_bytes(cubin({FORWARD.format("f", 1): LATE}))
    assert len(problems(tmp_path)) == 1


def test_files_without_such_kernels_do_not_pass(tmp_path):
    assert problems(tmp_path) == [f"{tmp_path}: no kernel that gathers"]
    (tmp_path / "forward.compute_120.cubin").write_bytes(b"of a later machine")
    assert problems(tmp_path) == []
    (tmp_path / "forward.compute_80.cubin").write_bytes(cubin({SUM: QUARTER}))
    assert problems(tmp_path) == [f"{tmp_path}: no kernel that gathers"]
