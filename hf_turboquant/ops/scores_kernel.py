"""The kernel that computes only logits."""

import triton
import triton.language as tl

from .codes import codes_per_byte, key_dots, load_operands, load_scales, part_tokens
from .logits import INTEGERS, UNALIGNED, finish_logits, key_logits, load_constants
from .prepare_kernel import exact_logits


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def scores_kernel(
    query, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, quantized, phase, scaling, softcap, out,
    operands, constants, key_wide, key_one, key_scales, key_residual_norms, key_tables, key_states,
    query_b, query_h, query_t, query_length, groups, kv_heads, sink_length, ring, slots, held, key_blocks, row_tiles,
    exact_tiles,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, QJL: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT_DOT: tl.constexpr, ASM: tl.constexpr, SNIPPET: tl.constexpr,
    CONSTRAINTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """
    Logits of `TILE` exact slots or of `BLOCKS` blocks of keys, fp32 `[R, kv_len]`. Grid (tiles of exact slots and
    chunks of blocks · row tiles, batch · KV heads).
    """
    chunk = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    bh = tl.program_id(1)
    bh64 = bh.to(tl.int64)
    head = bh % kv_heads
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = groups * query_length
    exists = row < rows
    flat_row = bh64 * rows + row
    to = out + flat_row[None, :] * kv_len
    query += (bh // kv_heads).to(tl.int64) * query_b
    query = query + (head * groups + row // query_length).to(tl.int64) * query_h
    query += (row % query_length).to(tl.int64) * query_t
    if chunk < exact_tiles:
        logits, _, position, valid = exact_logits(
            query, chunk, bh, row, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, quantized, phase, scaling,
            softcap, key_states, query_length, groups, kv_heads, sink_length, ring, slots, held,
            DIM, DIM_PAD, TILE, MASK, CAUSAL, SOFTCAP, EXACT_DOT, ASM,
        )  # fmt: skip
        tl.store(to + position, logits * 0.6931471805599453, mask=valid & exists[None, :])
        return

    COUNT: tl.constexpr = codes_per_byte(KEY_BITS)
    SETS: tl.constexpr = (2 + 2 * QJL) * COUNT
    q = load_operands(operands, flat_row, exists, SETS * WIDTH, SETS, WIDTH)
    c = load_constants(constants, flat_row, exists, QJL)
    first = (chunk - exact_tiles) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, (quantized + 127) // 128)):
        ks = load_scales(key_scales, bh64 * key_blocks + block, PARTS, ASM)
        norms = ks
        if QJL:
            norms = load_scales(key_residual_norms, bh64 * key_blocks + block, PARTS, ASM)
        dots = key_dots(
            key_wide, key_one, key_tables, bh64 * key_blocks + block, q,
            DIM, WIDTH, KEY_BITS, QJL, PARTS, SNIPPET, CONSTRAINTS, ASM,
        )  # fmt: skip
        raw = key_logits(dots, ks, norms, c, PARTS, QJL, True)
        for p in tl.static_range(PARTS):
            token = block * 128 + part_tokens(p, PARTS, ASM)
            valid = token < quantized
            logits = finish_logits(
                raw[p], (sink_length + token)[:, None], row[None, :], bh, valid[:, None], mask_ptr, mask_b, mask_h,
                mask_t, mask_n, kv_len, query_length, groups, kv_heads, softcap, MASK, CAUSAL, SOFTCAP, ASM,
            )  # fmt: skip
            at = to + (sink_length + token)[:, None]
            tl.store(at, logits * 0.6931471805599453, mask=valid[:, None] & exists[None, :])
