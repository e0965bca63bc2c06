"""The PTX snippets, run by a small emulator of the four instructions they are made of."""

import importlib.util
import re

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from hf_turboquant.codebook import lloyd_max
from hf_turboquant.ops.ptx import level_snippet, operand_offsets, value_snippet
from hf_turboquant.packing import pack

OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
}


def run(snippet: tuple[str, str], words: list[np.ndarray]) -> list[np.ndarray]:
    """Output registers of a snippet for arrays of input words; unwritten registers are an error."""
    text, constraints = snippet
    outputs = constraints.count("=")
    assert constraints.count("r") == outputs + len(words)
    registers = {f"${outputs + i}": word.astype(np.uint64) for i, word in enumerate(words)}
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)\.b32 (.+);", line.strip())
        if match is None:
            continue
        name, operands = match.group(1), [x.strip() for x in match.group(2).split(",")]
        values = [registers[x] if x in registers else np.uint64(int(x, 0)) for x in operands[1:]]
        if name == "prmt":
            result = prmt(*values)
        elif name == "lop3":
            result = lop3(*values)
        else:
            result = OPERATIONS[name](*values)
        registers[operands[0]] = result & np.uint64(0xFFFFFFFF)
    return [registers[f"${i}"] for i in range(outputs)]


def prmt(low, high, selector):
    source = low | (high << np.uint64(32))
    result = np.uint64(0)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (source >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        replicated = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result = result | (np.where(nibble & np.uint64(8), replicated, byte) << np.uint64(8 * i))
    return result


def lop3(a, b, c, table):
    result = np.uint64(0)
    for row in range(8):
        if int(table) >> row & 1:
            terms = [x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def words(plane: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(plane.numpy()).view("<u4")


def operands(registers, dtype: str) -> np.ndarray:
    """Registers of one operand -> its elements, `[..., elements]`."""
    parts = [np.ascontiguousarray(r.astype("<u4"))[..., None].view(dtype) for r in registers]
    parts = np.stack(parts, axis=-2)
    return parts.reshape(*parts.shape[:-2], -1).astype(np.float64)


def random_codes(nbits: int, head_dim: int) -> torch.Tensor:
    return torch.randint(0, 2**nbits, (128, head_dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("qjl", [False, True])
@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys(nbits, qjl, head_dim):
    codebook = lloyd_max(nbits - qjl, head_dim)
    codes = random_codes(nbits, head_dim)
    planes = {name: words(plane[0]) for name, plane in pack(codes, nbits, "keys").items()}
    wide = planes["plane4" if nbits == 4 else "plane2"]
    if nbits == 3:
        tokens = [np.arange(64), np.arange(64, 128)]
        registers = run(level_snippet(nbits, qjl, codebook), [wide[:64], wide[64:], planes["plane1"]])
    else:
        tokens = [np.arange(128)]
        registers = run(level_snippet(nbits, qjl, codebook), [wide])
    stride, first, step = operand_offsets(nbits)
    dims = np.arange(head_dim // stride)[:, None] * stride + np.arange(4) * step
    for rows in tokens:
        for kind in range(1 + qjl):
            for offset in first:
                got = operands([registers.pop(0)], "i1").reshape(len(rows), -1, 4)
                code = codes.numpy()[rows][:, dims + offset]
                if kind:
                    expected = 1 - (code >> (nbits - 1))
                else:
                    expected = codebook.levels[code & (2 ** (nbits - qjl) - 1)]
                np.testing.assert_array_equal(got, expected)
    assert not registers


@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_values(nbits, head_dim):
    codebook = lloyd_max(nbits, head_dim)
    codes = random_codes(nbits, head_dim)
    planes = {name: words(plane[0]) for name, plane in pack(codes, nbits, "values").items()}
    dims = [np.arange(head_dim)]
    if nbits == 4:
        registers = run(value_snippet(codebook), [planes["plane4"]])
    elif nbits == 2:
        registers = run(level_snippet(nbits, False, codebook), [planes["plane2"]])
    else:
        half = head_dim // 2
        dims = [np.arange(half), np.arange(half, head_dim)]
        wide = planes["plane2"]
        registers = run(level_snippet(nbits, False, codebook), [wide[:half], wide[half:], planes["plane1"]])
    parts = 2 if nbits == 4 else 4
    for rows in dims:
        for part in range(parts):
            # a word holds four tokens of every part
            if nbits == 4:
                got = operands([registers.pop(0), registers.pop(0)], "<f2")
            else:
                got = operands([registers.pop(0)], "i1")
            tokens = part * (128 // parts) + np.arange(128 // parts).reshape(-1, 4)
            code = codes.numpy().T[rows][:, tokens]
            expected = codebook.levels[code] + codebook.offset
            np.testing.assert_array_equal(got.reshape(expected.shape), expected)
    assert not registers
