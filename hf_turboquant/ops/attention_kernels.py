"""
The two attention kernels that read the codes and merge the results.

`R` rows are the queries of one KV head: row `g * query_length + t` is query t of the group's head g. Logits are
exponents of 2 (log2 e is folded into them). `bh` is an index of (batch, KV head).
"""

import triton
import triton.language as tl

from .codes import codes_per_byte, exp2, key_dots, load_operands, load_scales, log2, part_tokens, value_levels
from .launch import prefetch, wait_for_previous
from .logits import INTEGERS, LOWEST, UNALIGNED, finish_logits, key_logits, load_constants


@triton.jit
def load_mask(mask_row, block, length, PARTS: tl.constexpr, ASM: tl.constexpr):
    """The mask of the tokens of one block, in the form of `load_scales`."""
    out = ()
    for p in tl.static_range(PARTS):
        token = block * 128 + part_tokens(p, PARTS, ASM)
        out = out + (tl.load(mask_row + token, mask=token < length, other=0),)
    return out


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def attend_kernel(
    mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, length, softcap,
    counters, operands, constants, key_wide, key_one, key_scales, key_residual_norms, key_tables,
    value_wide, value_one, value_scales, value_table, partial, stats,
    query_length, groups, kv_heads, sink_length, key_blocks, value_blocks, row_tiles, splits, code_splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, QJL: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_BITS: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIKE: tl.constexpr,
    DOT: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
    KEY_SNIPPET: tl.constexpr, KEY_CONSTRAINTS: tl.constexpr,
    VALUE_SNIPPET: tl.constexpr, VALUE_CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """
    Softmax and weighted sum over the blocks of one split, for `ROWS` rows. Grid (`code_splits` · row tiles, batch · KV
    heads). Tokens are the M dimension of every matrix product and rows the N dimension, so that codes stay in
    registers.

    Weights of int8 values are integers of two int8 terms. With `FOLD` (at most `ROWS / 2` rows) every row takes two
    columns, one for the high and one for the low terms.

    With `ALIKE` all heads and queries of a sequence share one mask, which is contiguous along tokens.

    With `counters`, the lengths are read from there, and splits beyond them have no block.

    Writes the sum of weighted values, still rotated and without the codebook's scale, fp32 `[R, splits, VALUE_DIM]`,
    and `stats` `[R, splits, 2]`: running maximum and sum of exponentials.
    """
    split = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    bh = tl.program_id(1)
    bh64 = bh.to(tl.int64)
    TOKENS: tl.constexpr = 128 // PARTS
    HALVES: tl.constexpr = 2 if VALUE_BITS == 3 else 1
    COUNT: tl.constexpr = codes_per_byte(KEY_BITS)
    column = tl.arange(0, ROWS)
    row = column % (ROWS // 2) if FOLD else tile * ROWS + column
    rows = groups * query_length
    exists = row < rows
    flat_row = bh64 * rows + row
    # For every row, the largest logit plus log2 of its value's scale, so that weights times scales are in [0, 1].
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    # int8 levels at 4 bits lack the offset 1/2, whose contribution is half the sum of the weights.
    OFFSET: tl.constexpr = DOT == tl.int8 and VALUE_BITS == 4
    if OFFSET:
        mass = tl.zeros([TOKENS, ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(HALVES):
        sums = sums + (tl.zeros([VALUE_ROWS, ROWS], tl.float32),)

    if counters is not None:
        kv_len = tl.load(counters + bh * 3)
        length = tl.load(counters + bh * 3 + 1)
    blocks = (length + 127) // 128
    first = (split * blocks) // code_splits
    last = ((split + 1) * blocks) // code_splits
    key_block = bh64 * key_blocks
    value_block = bh64 * value_blocks
    if EARLY:
        # The first codes come from memory while the previous kernel prepares the query.
        ahead = tl.minimum(last - first, 4)
        KEY_BYTES: tl.constexpr = 128 * DIM // COUNT
        VALUE_BYTES: tl.constexpr = 128 * VALUE_DIM // codes_per_byte(VALUE_BITS)
        prefetch(key_wide + (key_block + first) * KEY_BYTES, ahead * KEY_BYTES)
        prefetch(value_wide + (value_block + first) * VALUE_BYTES, ahead * VALUE_BYTES)
        wait_for_previous()
    SETS: tl.constexpr = (2 + 2 * QJL) * COUNT
    q = load_operands(operands, flat_row, exists, SETS * WIDTH, SETS, WIDTH)
    c = load_constants(constants, flat_row, exists, QJL)
    # Scales are too narrow for Triton's asynchronous copies of tiles: prefetch them one block ahead.
    next_key_scales = load_scales(key_scales, key_block + first, PARTS, ASM)
    next_value_scales = load_scales(value_scales, value_block + first, PARTS, ASM)
    if QJL:
        next_norms = load_scales(key_residual_norms, key_block + first, PARTS, ASM)
    if ALIKE:
        # One value of the mask for all rows of a token, prefetched too.
        mask_row = mask_ptr + (bh // kv_heads).to(tl.int64) * mask_b + sink_length
        next_seen = load_mask(mask_row, first, length, PARTS, ASM)
    for block in range(first, last):
        ks = next_key_scales
        vs = next_value_scales
        ahead = tl.minimum(block + 1, last - 1)
        next_key_scales = load_scales(key_scales, key_block + ahead, PARTS, ASM)
        next_value_scales = load_scales(value_scales, value_block + ahead, PARTS, ASM)
        norms = ks
        if QJL:
            norms = next_norms
            next_norms = load_scales(key_residual_norms, key_block + ahead, PARTS, ASM)
        if ALIKE:
            seen = next_seen
            next_seen = load_mask(mask_row, ahead, length, PARTS, ASM)
        dots = key_dots(
            key_wide, key_one, key_tables, key_block + block, q,
            DIM, WIDTH, KEY_BITS, QJL, PARTS, KEY_SNIPPET, KEY_CONSTRAINTS, ASM,
        )  # fmt: skip
        raw = key_logits(dots, ks, norms, c, PARTS, QJL, SOFTCAP)
        logits = ()
        value_scale = ()
        for p in tl.static_range(PARTS):
            token = block * 128 + part_tokens(p, PARTS, ASM)
            valid = token < length
            if ALIKE and MASK == 1:
                valid = valid & (seen[p] != 0)
            # Memory beyond the length may hold anything.
            scale = tl.where(valid, vs[p].to(tl.float32), 0.0)
            s = finish_logits(
                raw[p], (sink_length + token)[:, None], row[None, :], bh, valid[:, None], mask_ptr, mask_b, mask_h,
                mask_t, mask_n, kv_len, query_length, groups, kv_heads, softcap, 0 if ALIKE else MASK, CAUSAL, SOFTCAP,
                ASM,
            )  # fmt: skip
            if ALIKE and MASK == 2:
                s += seen[p].to(tl.float32)[:, None] * 1.4426950408889634
            logits = logits + (s,)
            value_scale = value_scale + (scale,)
            # A value of zero must not give its token an infinite logit.
            s = s + log2(tl.maximum(scale, 1e-18), ASM)[:, None]
            if p == 0:
                peak = s
            else:
                peak = tl.maximum(peak, s)
        tile_largest = tl.maximum(tl.max(peak, axis=0), LOWEST)
        new_largest = tl.maximum(largest, tile_largest)
        decay = exp2(largest - new_largest, ASM)
        largest = new_largest
        levels = value_levels(
            value_wide, value_one, value_table, value_block + block,
            VALUE_DIM, VALUE_ROWS, VALUE_BITS, PARTS, DOT, VALUE_SNIPPET, VALUE_CONSTRAINTS, ASM,
        )  # fmt: skip
        new_sums = ()
        if DOT == tl.int8:
            # Fourteen bits relative to the largest weight of the tile, as 128 · high + low: adding 1.5 · 2^23 leaves
            # the rounded integer in the low bits.
            growth = exp2(tile_largest - new_largest, ASM)
            total *= decay[None, :]
            high = ()
            low = ()
            for p in tl.static_range(PARTS):
                weight = exp2(logits[p] - tile_largest[None, :], ASM)
                total += weight * growth[None, :]
                weight = weight * value_scale[p][:, None]
                if OFFSET:
                    if p == 0:
                        mass *= decay[None, :]
                    mass += weight * growth[None, :]
                integer = (weight * 16256.0 + 12582912.0).to(tl.int32, bitcast=True)
                if FOLD:
                    integer = integer >> tl.where(column < ROWS // 2, 7, 0)[None, :]
                else:
                    high = high + (((integer >> 7) & 127).to(tl.int8),)
                low = low + ((integer & 127).to(tl.int8),)
            for h in tl.static_range(HALVES):
                if FOLD:
                    product = tl.dot(levels[h * PARTS], low[0], out_dtype=tl.int32)
                    for p in tl.static_range(1, PARTS):
                        product = tl.dot(levels[h * PARTS + p], low[p], product, out_dtype=tl.int32)
                else:
                    product = tl.dot(levels[h * PARTS], high[0], out_dtype=tl.int32)
                    for p in tl.static_range(1, PARTS):
                        product = tl.dot(levels[h * PARTS + p], high[p], product, out_dtype=tl.int32)
                    product = product * 128
                    for p in tl.static_range(PARTS):
                        product = tl.dot(levels[h * PARTS + p], low[p], product, out_dtype=tl.int32)
                new_sums = new_sums + (sums[h] * decay[None, :] + product.to(tl.float32) * growth[None, :],)
        else:
            total *= decay[None, :]
            weights = ()
            for p in tl.static_range(PARTS):
                weight = exp2(logits[p] - largest[None, :], ASM)
                total += weight
                weights = weights + ((weight * value_scale[p][:, None]).to(DOT),)
            for h in tl.static_range(HALVES):
                acc = sums[h] * decay[None, :]
                for p in tl.static_range(PARTS):
                    acc = tl.dot(levels[h * PARTS + p], weights[p], acc, input_precision="ieee")
                new_sums = new_sums + (acc,)
        sums = new_sums

    if not SOFTCAP:
        # Once for all codes. A row that has seen nothing stays lowest.
        largest = tl.where(largest > LOWEST, largest + tl.sum(c[4], axis=0), largest)
    at = flat_row * splits + split
    d = tl.arange(0, VALUE_ROWS)
    HEIGHT: tl.constexpr = VALUE_DIM // HALVES
    if OFFSET:
        half = tl.sum(mass, axis=0) * 0.5
    for h in tl.static_range(HALVES):
        to = partial + (h * HEIGHT + d)[:, None]
        if FOLD:
            result = sums[h] * tl.where(column < ROWS // 2, 128.0 / 16256.0, 1.0 / 16256.0)[None, :]
            if OFFSET:
                result += tl.where(column < ROWS // 2, half, 0.0)[None, :]
            result = tl.sum(tl.reshape(result, [VALUE_ROWS, 2, ROWS // 2]), axis=1)
            narrow = tl.arange(0, ROWS // 2)
            to += ((bh64 * rows + narrow) * splits + split)[None, :] * VALUE_DIM
            tl.store(to, result, mask=(narrow < rows)[None, :] & (d < HEIGHT)[:, None])
        else:
            result = sums[h] / 16256.0 if DOT == tl.int8 else sums[h]
            if OFFSET:
                result += half[None, :]
            tl.store(to + at[None, :] * VALUE_DIM, result, mask=exists[None, :] & (d < HEIGHT)[:, None])
    tl.store(stats + at * 2, largest, mask=exists)
    tl.store(stats + at * 2 + 1, tl.sum(total, axis=0), mask=exists)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    sinks, out, partial, stats, dual, mean, rows, query_length, groups, kv_heads, mean_heads,
    splits, code_splits, out_b, out_h, out_t, level_scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, COLUMNS: tl.constexpr, CODED: tl.constexpr, EXACT: tl.constexpr,
    MEAN: tl.constexpr, SINKS: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """
    Merges the splits by log-sum-exp, those of codes (at most `CODED`) in one step, and rotates the part of the codes
    back, x̂ = A⁻¹ ẑ. Grid (batch · KV heads · R, ⌈DIM / COLUMNS⌉).
    """
    flat_row = tl.program_id(0)
    bh = flat_row // rows
    row = flat_row % rows
    head = bh % kv_heads
    k = tl.arange(0, DIM_PAD)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    outer = (d < DIM)[None, :]
    first = flat_row.to(tl.int64) * splits
    # Issue all loads before using any, so that this kernel takes the time of a single memory access.
    matrix = tl.load(dual + k[:, None] * DIM + d[None, :], mask=(k < DIM)[:, None] & outer, other=0)
    if EARLY:
        wait_for_previous()
    s = tl.arange(0, CODED)
    coded = s < code_splits
    x = partial + (first + s)[:, None] * DIM + k[None, :]
    x = tl.load(x, mask=coded[:, None] & (k < DIM)[None, :], other=0)
    maxima = tl.load(stats + (first + s) * 2, mask=coded, other=LOWEST)
    masses = tl.load(stats + (first + s) * 2 + 1, mask=coded, other=0)
    largest = LOWEST
    total = 0.0
    if SINKS:
        largest = tl.load(sinks + head * groups + row // query_length).to(tl.float32) * 1.4426950408889634
        total = 1.0
    result = tl.zeros([COLUMNS], tl.float32)
    for start in range(code_splits, splits, EXACT):
        e = start + tl.arange(0, EXACT)
        here = e < splits
        y = tl.load(partial + (first + e)[:, None] * DIM + d[None, :], mask=here[:, None] & outer, other=0)
        exact_maxima = tl.load(stats + (first + e) * 2, mask=here, other=LOWEST)
        exact_masses = tl.load(stats + (first + e) * 2 + 1, mask=here, other=0)
        new_largest = tl.maximum(largest, tl.max(exact_maxima, axis=0))
        decay = exp2(largest - new_largest, ASM)
        weight = exp2(exact_maxima - new_largest, ASM)
        largest = new_largest
        total = total * decay + tl.sum(weight * exact_masses, axis=0)
        result = result * decay + tl.sum(y * weight[:, None], axis=0)
    new_largest = tl.maximum(largest, tl.max(maxima, axis=0))
    decay = exp2(largest - new_largest, ASM)
    weight = exp2(maxima - new_largest, ASM)
    code_total = tl.sum(weight * masses, axis=0)
    total = total * decay + code_total
    turned = tl.sum(x * weight[:, None], axis=0) * level_scale
    result = result * decay + tl.sum(turned[:, None] * matrix.to(tl.float32), axis=0)
    if MEAN:
        result += code_total * tl.load(mean + head % mean_heads * DIM + d, mask=d < DIM, other=0)
    # A row that may attend to nothing is zero.
    result = tl.where(total > 0, result / total, 0.0)
    offset = (bh // kv_heads).to(tl.int64) * out_b + (head * groups + row // query_length).to(tl.int64) * out_h
    offset += row % query_length * out_t
    tl.store(out + offset + d, result.to(out.dtype.element_ty), mask=d < DIM)
