"""
Triton functions that read one block of codes as matrix operands.

A block's 128 tokens are processed in `PARTS` parts of `128 / PARTS` tokens, as many as a byte of values has codes, to
match the tokens in their words. With `ASM` (NVIDIA sm_80 and later) the snippets of [`ptx`] turn words directly into
register operands of the matrix instructions; there are at least 2 parts, because keys of 3 bits come in pairs. Without
it, bytes go through table look-ups, which works on any GPU and in the interpreter. Both compute the same sums of the
same integers. 8-bit codes are operands as they are.
"""

import triton
import triton.language as tl

from .. import packing

BLOCK = tl.constexpr(128)
# For kernels.
codes_per_byte = triton.constexpr_function(packing.codes_per_byte)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    if ASM:
        # tl.exp2 spends instructions on denormals.
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def log2(x, ASM: tl.constexpr):
    if ASM:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def part_tokens(part: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr):
    """Tokens of a part, within the block, in the order of a row of values."""
    element = tl.arange(0, 128 // PARTS)
    if ASM:
        token = part * (128 // PARTS) + element
    else:
        token = value_token(part, element, PARTS)
    return token


@triton.jit
def value_token(position, byte, COUNT: tl.constexpr):
    """The token of the code at `position` in `byte` of values; every byte has `COUNT` codes (of 8, 4 or 2 bits)."""
    if COUNT == 1:
        return byte
    word = byte // 4
    byte = byte % 4
    if COUNT == 2:
        return byte // 2 * 64 + word * 4 + byte % 2 * 2 + position
    return (byte // 2 + position % 2 * 2) * 32 + word * 4 + byte % 2 * 2 + position // 2


@triton.jit
def code_at(byte, bits, i: tl.constexpr, BITS: tl.constexpr):
    """Code `i` of bytes of the widest plane, at 3 bits joined with its bit of the 1-bit plane; all int32."""
    WIDTH: tl.constexpr = 8 // codes_per_byte(BITS)
    code = (byte >> (i * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        code = code | ((bits >> (i % 2 + i // 2 * 4)) & 1) << 2
    return code


@triton.jit
def load_operands(operands, row, exists, stride, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """`COUNT` query operands `[WIDTH, rows]`, consecutive in memory; zero where no row `exists`."""
    out = ()
    e = tl.arange(0, WIDTH)
    for i in tl.static_range(COUNT):
        at = operands + row[None, :] * stride + (i * WIDTH + e)[:, None]
        out = out + (tl.load(at, mask=exists[None, :], other=0),)
    return out


@triton.jit
def _dot_int(codes, start: tl.constexpr, high, low, COUNT: tl.constexpr):
    """⟨codes, 128 · high + low⟩, fp32 `[tokens, rows]`."""
    total = tl.dot(codes[start], high[0], out_dtype=tl.int32)
    for i in tl.static_range(1, COUNT):
        total = tl.dot(codes[start + i], high[i], total, out_dtype=tl.int32)
    total = total * 128
    for i in tl.static_range(COUNT):
        total = tl.dot(codes[start + i], low[i], total, out_dtype=tl.int32)
    return total.to(tl.float32)


@triton.jit
def key_dots(
    wide, one, tables, block, operands,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, QJL: tl.constexpr, PARTS: tl.constexpr,
    SNIPPET: tl.constexpr, CONSTRAINTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    Integer products of one block of keys with the rows of the query.

    Args:
        wide, one (pointers to uint8): the widest plane and, at 3 bits, the 1-bit plane.
        tables (pointer to int8): levels and signs of every code, 16 each; read up to 4 bits without `ASM` only.
        block (int64): index of the block.
        operands (tuple): `COUNT` operands each of query high, low, and with `QJL` sketched query high, low.
        WIDTH: elements of an operand, a power of two; `DIM` codes of a row fill it partly.

    Returns:
        Tuple of the `PARTS` products with the levels, fp32 `[128 / PARTS, rows]`, then with `QJL` as many with the
        signs (1 where minus).
    """
    COUNT: tl.constexpr = codes_per_byte(BITS)
    ROW: tl.constexpr = DIM // COUNT
    OUT: tl.constexpr = COUNT * (1 + QJL)
    high = operands[:COUNT]
    low = operands[COUNT : 2 * COUNT]
    e = tl.arange(0, WIDTH)[None, :]
    mask = e < ROW
    levels = ()
    signs = ()
    if BITS == 8:
        for p in tl.static_range(PARTS):
            token = part_tokens(p, PARTS, ASM)[:, None]
            codes = tl.load(wide + (block * 128 + token) * ROW + e, mask=mask, other=0).to(tl.int8, bitcast=True)
            levels = levels + (_dot_int((codes,), 0, high, low, 1),)
    elif ASM:
        # Parts p and p + PARTS / 2 are tokens r and r + 64, which share a row of the 1-bit plane.
        second = ()
        second_signs = ()
        for p in tl.static_range(PARTS // 2):
            row = p * (128 // PARTS) + tl.arange(0, 128 // PARTS)[:, None]
            a = tl.load(wide + (block * 128 + row) * ROW + e, mask=mask, other=0)
            b = tl.load(wide + (block * 128 + 64 + row) * ROW + e, mask=mask, other=0)
            if BITS == 3:
                c = tl.load(one + (block * 64 + row) * ROW + e, mask=mask, other=0)
                codes = tl.inline_asm_elementwise(
                    SNIPPET, CONSTRAINTS, [a, b, c], dtype=(tl.int8,) * (2 * OUT), is_pure=True, pack=4
                )
            else:
                codes = tl.inline_asm_elementwise(
                    SNIPPET, CONSTRAINTS, [a], dtype=(tl.int8,) * OUT, is_pure=True, pack=4
                ) + tl.inline_asm_elementwise(
                    SNIPPET, CONSTRAINTS, [b], dtype=(tl.int8,) * OUT, is_pure=True, pack=4
                )  # fmt: skip
            levels = levels + (_dot_int(codes, 0, high, low, COUNT),)
            second = second + (_dot_int(codes, OUT, high, low, COUNT),)
            if QJL:
                z_high = operands[2 * COUNT : 3 * COUNT]
                z_low = operands[3 * COUNT : 4 * COUNT]
                signs = signs + (_dot_int(codes, COUNT, z_high, z_low, COUNT),)
                second_signs = second_signs + (_dot_int(codes, OUT + COUNT, z_high, z_low, COUNT),)
        levels = levels + second
        signs = signs + second_signs
    else:
        for p in tl.static_range(PARTS):
            token = part_tokens(p, PARTS, ASM)[:, None]
            byte = tl.load(wide + (block * 128 + token) * ROW + e, mask=mask, other=0).to(tl.int32)
            bits = byte
            if BITS == 3:
                bits = tl.load(one + (block * 64 + token % 64) * ROW + e, mask=mask, other=0).to(tl.int32)
                bits = bits >> tl.where(token < 64, 2, 0)
            part_levels = ()
            part_signs = ()
            for i in tl.static_range(COUNT):
                code = code_at(byte, bits, i, BITS)
                part_levels = part_levels + (tl.load(tables + code),)
                if QJL:
                    part_signs = part_signs + (tl.load(tables + 16 + code),)
            levels = levels + (_dot_int(part_levels, 0, high, low, COUNT),)
            if QJL:
                z_high = operands[2 * COUNT : 3 * COUNT]
                z_low = operands[3 * COUNT : 4 * COUNT]
                signs = signs + (_dot_int(part_signs, 0, z_high, z_low, COUNT),)
    return levels + signs


@triton.jit
def load_scales(scales, block, PARTS: tl.constexpr, ASM: tl.constexpr):
    """The scales of one block, `PARTS` tensors of `[128 / PARTS]`, in their stored dtype."""
    out = ()
    for p in tl.static_range(PARTS):
        out = out + (tl.load(scales + block * 128 + part_tokens(p, PARTS, ASM)),)
    return out


@triton.jit
def value_levels(
    wide, one, table, block,
    DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    SNIPPET: tl.constexpr, CONSTRAINTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    One block of values as operands `[ROWS, 128 / PARTS]` of dtype `DOT`: levels plus offset, or in int8 just levels.

    Args:
        table (pointer to fp32): value of every code; read up to 4 bits without `ASM` only.
        ROWS: rows of an operand, a power of two, filled partly by `DIM` (at 3 bits `DIM / 2`) dimensions.

    Returns:
        Tuple of `PARTS` operands; at 3 bits those of dims 0 .. DIM / 2 - 1, then those of the rest.
    """
    WIDTH: tl.constexpr = 128 // PARTS
    HEIGHT: tl.constexpr = DIM // 2 if BITS == 3 else DIM
    d = tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, WIDTH)[None, :]
    mask = d < HEIGHT
    if BITS == 8:
        out = ()
        for p in tl.static_range(PARTS):
            at = wide + (block * DIM + d) * 128 + part_tokens(p, PARTS, ASM)[None, :]
            out = out + (tl.load(at, mask=mask, other=0).to(tl.int8, bitcast=True).to(DOT),)
        return out
    a = tl.load(wide + (block * DIM + d) * WIDTH + e, mask=mask, other=0)
    if BITS == 3:
        b = tl.load(wide + (block * DIM + HEIGHT + d) * WIDTH + e, mask=mask, other=0)
        c = tl.load(one + (block * HEIGHT + d) * WIDTH + e, mask=mask, other=0)
    if ASM:
        if BITS == 3:
            out = tl.inline_asm_elementwise(
                SNIPPET, CONSTRAINTS, [a, b, c], dtype=(tl.int8,) * (2 * PARTS), is_pure=True, pack=4
            )
        elif DOT == tl.int8:
            out = tl.inline_asm_elementwise(SNIPPET, CONSTRAINTS, [a], dtype=(tl.int8,) * PARTS, is_pure=True, pack=4)
        else:
            out = tl.inline_asm_elementwise(
                SNIPPET, CONSTRAINTS, [a], dtype=(tl.float16,) * PARTS, is_pure=True, pack=4
            )
    else:
        out = ()
        byte = a.to(tl.int32)
        bits = byte
        if BITS == 3:
            bits = c.to(tl.int32)
        for p in tl.static_range(PARTS):
            out = out + (tl.load(table + code_at(byte, bits >> 2, p, BITS)).to(DOT),)
        if BITS == 3:
            byte = b.to(tl.int32)
            for p in tl.static_range(PARTS):
                out = out + (tl.load(table + code_at(byte, bits, p, BITS)).to(DOT),)
    return out
