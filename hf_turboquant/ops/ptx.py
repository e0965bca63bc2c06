"""
PTX that turns a 32-bit word of codes into matrix operands by byte look-ups (sm_80 and later).

`prmt.b32 d, a, b, c` combines four of the eight bytes of (a, b), each selected by the low three bits of a nibble of c:
a table of eight one-byte entries with four look-ups per instruction. Bit 3 of the nibble replicates the selected byte's
sign bit instead. The codebook is compiled in as immediates. One word is four consecutive bytes of a row: see `packing`
for its layout. Every snippet returns its operands in the order of `operand_offsets`, four codes per int8 register and
two per fp16 register.
"""

import numpy as np

from ..codebook import Codebook


def level_snippet(nbits: int, qjl: bool, codebook: Codebook) -> tuple[str, str]:
    """
    Turns words of keys, or of values below 4 bits, into int8 operands: the levels and, with `qjl`, 1 where the sign of
    the sketch is minus.

    Inputs: one word of the 4-bit or 2-bit plane; at 3 bits the words of two rows of the 2-bit plane (tokens r and
    r + 64 of keys, dims d and d + head_dim / 2 of values) and the word of the 1-bit plane that belongs to both.
    Outputs, for one row and then the other: levels (two registers at 4 bits, else four), then as many registers of
    signs.

    Returns:
        The assembly and its constraints, for `tl.inline_asm_elementwise(..., pack=4)`.
    """
    levels = codebook.levels.astype(np.int8).view(np.uint8)
    tables = [levels]
    if qjl:
        # The sign is the highest bit of the code, so the levels repeat in the upper half of the table.
        tables = [np.tile(levels, 2), np.repeat(np.array([1, 0], dtype=np.uint8), len(levels))]
    if nbits == 4:
        body = _qjl_nibbles(tables) if qjl else _sign_magnitude_nibbles(levels)
        return _assemble(body, 2 * (1 + qjl), 1)
    selectors = _selectors(nbits)
    body = list(selectors.lines)
    for token in selectors.registers:
        for table in tables:
            body += [f"prmt.b32 OUT, {_word(table, 0)}, {_word(table, 4)}, {s};" for s in token]
    return _assemble(body, 4 * len(tables) * len(selectors.registers), selectors.inputs)


def value_snippet(codebook: Codebook) -> tuple[str, str]:
    """Turns words of 4-bit values into two fp16 operands of two registers each: `levels + offset`, exactly."""
    halves = (codebook.levels.astype(np.float16) + np.float16(codebook.offset)).view(np.uint16)
    low, high = (halves & 255).astype(np.uint8), (halves >> 8).astype(np.uint8)
    body = _nibble_signs() + ["shr.b32 h, m, 16;"]
    # Codes 0-7 are the magnitudes; bit 3 of the nibble becomes the sign bit of the high byte.
    for selector, sign in (("m", "x"), ("h", "y")):
        body += [
            f"prmt.b32 a, {_word(low, 0)}, {_word(low, 4)}, {selector};",
            f"prmt.b32 b, {_word(high, 0)}, {_word(high, 4)}, {selector};",
            f"lop3.b32 b, {sign}, 0x80808080, b, 0xea;",
            "prmt.b32 OUT, a, b, 0x5140;",
            "prmt.b32 OUT, a, b, 0x7362;",
        ]
    return _assemble(body, 4, 1)


def operand_offsets(nbits: int) -> tuple[int, list[int], int]:
    """
    The order of a row's codes in the operands: element e of operand o is the code at position
    `stride * (e // 4) + step * (e % 4) + first[o]` of the row.

    Returns:
        `stride` (codes of a word), `first` (of every operand), `step`.
    """
    return {8: (4, [0], 1), 4: (8, [0, 4], 1)}.get(nbits, (16, [0, 8, 1, 9], 2))


class _selectors:
    """Nibbles that index a table of up to eight entries, for the words of 2-bit and 2 + 1-bit codes."""

    def __init__(self, nbits: int):
        if nbits == 2:
            self.inputs = 1
            self.lines = [
                "and.b32 a, IN0, 0x33333333;",
                "shr.b32 b, IN0, 2;",
                "and.b32 b, b, 0x33333333;",
                "shr.b32 h, a, 16;",
                "shr.b32 g, b, 16;",
            ]
            self.registers = [("a", "h", "b", "g")]
            return
        self.inputs = 3
        self.lines = []
        self.registers = []
        # Positions of the high bits of even and odd codes of the two tokens or rows in a nibble of the 1-bit plane.
        for i, (even, odd) in enumerate(
            (("mov.b32 c, IN2", "shr.b32 d, IN2, 1"), ("shl.b32 c, IN2, 2", "shl.b32 d, IN2, 1"))
        ):
            p, q, r, s = (f"{name}{i}" for name in "pqrs")
            self.lines += [
                f"{even};",
                f"{odd};",
                f"and.b32 {p}, IN{i}, 0x33333333;",
                f"lop3.b32 {p}, c, 0x44444444, {p}, 0xea;",
                f"shr.b32 {q}, IN{i}, 2;",
                f"and.b32 {q}, {q}, 0x33333333;",
                f"lop3.b32 {q}, d, 0x44444444, {q}, 0xea;",
                f"shr.b32 {r}, {p}, 16;",
                f"shr.b32 {s}, {q}, 16;",
            ]
            self.registers.append((p, r, q, s))


def _sign_magnitude_nibbles(levels: np.ndarray) -> list[str]:
    # A negative level is the one's complement of its positive twin.
    return _nibble_signs() + [
        "shr.b32 h, m, 16;",
        f"prmt.b32 a, {_word(levels, 0)}, {_word(levels, 4)}, m;",
        f"prmt.b32 b, {_word(levels, 0)}, {_word(levels, 4)}, h;",
        "xor.b32 OUT, a, x;",
        "xor.b32 OUT, b, y;",
    ]


def _nibble_signs() -> list[str]:
    # m: the selectors without their sign bits; x, y: 255 where bit 3 of nibbles 0-3, 4-7 is set.
    return [
        "and.b32 m, IN0, 0x77777777;",
        "shl.b32 s, IN0, 4;",
        "prmt.b32 x, s, IN0, 0xd9c8;",
        "prmt.b32 y, s, IN0, 0xfbea;",
    ]


def _qjl_nibbles(tables: list[np.ndarray]) -> list[str]:
    # The sign bit of the sketch selects the sign bit of a table of ones, which is zero.
    level = tables[0]
    return [
        "shr.b32 h, IN0, 16;",
        "and.b32 m, IN0, 0x77777777;",
        "and.b32 g, h, 0x77777777;",
        f"prmt.b32 OUT, {_word(level, 0)}, {_word(level, 4)}, m;",
        f"prmt.b32 OUT, {_word(level, 0)}, {_word(level, 4)}, g;",
        "prmt.b32 OUT, 0x01010101, 0x01010101, IN0;",
        "prmt.b32 OUT, 0x01010101, 0x01010101, h;",
    ]


def _word(table: np.ndarray, start: int) -> str:
    entries = [int(x) for x in table[start : start + 4]]
    return f"{sum(x << (8 * i) for i, x in enumerate(entries)):#010x}"


def _assemble(body: list[str], outputs: int, inputs: int) -> tuple[str, str]:
    """Numbers the operands: outputs in the order they are written, then inputs."""
    text = "\n".join(body)
    for i in range(outputs):
        text = text.replace("OUT", f"${i}", 1)
    for i in range(inputs):
        text = text.replace(f"IN{i}", f"${outputs + i}")
    names = "a,b,c,d,g,h,m,s,x,y," + ",".join(f"{name}{i}" for name in "pqrs" for i in range(2))
    return "{\n.reg .b32 " + names + ";\n" + text + "\n}", ",".join(["=&r"] * outputs + ["r"] * inputs)
