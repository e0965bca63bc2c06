"""
The three kernels of attention from codes, and the one of scores.

`R` rows are the queries of one KV head: row `g * query_length + t` is query t of the group's head g. Logits are in
powers of two (log2 e is folded into them). `bh` is an index of (batch, KV head).
"""

import triton
import triton.language as tl

from .codes import (
    exp2,
    key_dots,
    key_logits,
    load_operands,
    load_scales,
    log2,
    operand_position,
    part_tokens,
    value_levels,
)

# floor of the running maximum: finite, so that a row that has seen nothing yet subtracts to zero and not to NaN
LOWEST = tl.constexpr(-1e30)

# arguments whose value no compiled kernel may depend on: the launchers reuse it for all of them
INTEGERS = (
    "query_b query_h query_t mask_b mask_h mask_t mask_n query_length groups kv_heads operator_heads mean_heads "
    "dual_heads kv_len recent_start sink_length ring phase slots length key_stride value_stride splits code_splits "
    "key_blocks value_blocks row_tiles padded_rows rows out_b out_h out_t"
).split()
UNALIGNED = ["query", "mask_ptr", "sinks"]


@triton.jit
def finish_logits(
    logits, position, row, bh, valid, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, query_length, groups, kv_heads,
    softcap, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    Softcap, mask and length for logits at `position` × `row`, two index tensors of which one is a column and one a row.

    Args:
        valid (tensor of bool, of the shape of `position`): tokens that there are.
        MASK: 0 none, 1 boolean (read as uint8), 2 additive.
    """
    if SOFTCAP:
        # c tanh(x / c) = c - 2 c / (1 + e^(2 x / c)); the logits and the cap are both in powers of two
        logits = softcap - 2.0 * softcap / (1.0 + exp2(logits * (2.0 * 1.4426950408889634 / softcap), ASM))
    if MASK:
        head = bh % kv_heads * groups + row // query_length
        offset = (bh // kv_heads).to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
        offset = offset + (row % query_length).to(tl.int64) * mask_t + position.to(tl.int64) * mask_n
        seen = valid & (row < groups * query_length)
        value = tl.load(mask_ptr + offset, mask=seen, other=0)
        if MASK == 1:
            logits = tl.where(value != 0, logits, float("-inf"))
        else:
            logits += value.to(tl.float32) * 1.4426950408889634
    if CAUSAL:
        valid = valid & (position <= kv_len - query_length + row % query_length)
    return tl.where(valid, logits, float("-inf"))


@triton.jit
def _round_query(x, step):
    """`x / step`, rounded, as 128 · high + low: the integer and its two int8 terms."""
    integer = tl.floor(x / step[:, None] + 0.5).to(tl.int32)
    high = (integer + 64) >> 7
    return integer, high.to(tl.int8), (integer - high * 128).to(tl.int8)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def prepare_kernel(
    query, operators, mean, operands, constants, key_states, value_states, mask_ptr, partial, stats, logits_out,
    query_b, query_h, query_t, mask_b, mask_h, mask_t, mask_n,
    query_length, groups, kv_heads, operator_heads, mean_heads, kv_len, recent_start, sink_length, ring, phase, slots,
    key_stride, value_stride, splits, code_splits, scaling, softcap, level_scale, level_offset,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, PASSES: tl.constexpr, TILE: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SCORES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    Everything that does not need the codes. Grid (`TERMS` + chunks of `TILE` exact slots, tiles of 16 rows, batch · KV
    heads). The first `TERMS` programs turn the query, A⁻ᵀ q, and sketch it, κS A⁻ᵀ q, and write both as integers; each
    of the others attends to one chunk of exact tokens (with `SCORES`: writes its logits).

    With `PASSES` 2 an operator is a sum of two matrices in the query's own 16 bits, the second times 2048: two products
    of a 16-bit matrix product are as good as one in fp32, and faster.

    A query row becomes int8 `operands` `[TERMS, 2, COUNT · WIDTH]` (high and low term of every coordinate, in the
    order of `operand_position`), and fp32 `constants`, so that with integer products i of levels and j of signs

        logit = (i · c₀ + c₁) · scale + (j · c₂ + c₃) · residual norm + c₄
    """
    task = tl.program_id(0)
    tile = tl.program_id(1)
    bh = tl.program_id(2)
    batch = (bh // kv_heads).to(tl.int64)
    head = bh % kv_heads
    rows = groups * query_length
    row = tile * 16 + tl.arange(0, 16)
    exists = row < rows
    query_offset = batch * query_b + (head * groups + row // query_length).to(tl.int64) * query_h
    query_offset += (row % query_length).to(tl.int64) * query_t
    padded_rows = tl.num_programs(1) * 16
    if task < TERMS:
        CHUNK: tl.constexpr = 64 if DIM_PAD <= 128 else 32
        d = tl.arange(0, DIM_PAD)
        operator = operators + (task * PASSES * operator_heads + head % operator_heads).to(tl.int64) * DIM * DIM
        turned = tl.zeros([16, DIM_PAD], tl.float32)
        rest = tl.zeros([16, DIM_PAD], tl.float32)
        for start in range(0, DIM, CHUNK):
            k = start + tl.arange(0, CHUNK)
            x = tl.load(query + query_offset[:, None] + k[None, :], mask=exists[:, None] & (k < DIM)[None, :], other=0)
            x = x.to(operators.dtype.element_ty)
            m_mask = (k < DIM)[:, None] & (d < DIM)[None, :]
            m = tl.load(operator + k[:, None] * DIM + d[None, :], mask=m_mask, other=0)
            turned = tl.dot(x, m, turned, input_precision=PRECISION)
            if PASSES == 2:
                low = operator + operator_heads.to(tl.int64) * DIM * DIM + k[:, None] * DIM + d[None, :]
                rest = tl.dot(x, tl.load(low, mask=m_mask, other=0), rest)
        turned += rest / 2048.0
        # the largest integer that two int8 terms, 128 · high + low, hold with room for rounding
        step = tl.max(tl.abs(turned), axis=1) / 16256.0
        step = tl.where(step > 0, step, 1.0)
        integer, high, low = _round_query(turned, step)
        total = tl.sum(integer, axis=1).to(tl.float32)
        COUNT: tl.constexpr = 2 if BITS == 4 else 4
        at = (bh.to(tl.int64) * padded_rows + row) * (TERMS * 2 * COUNT * WIDTH) + task * (2 * COUNT * WIDTH)
        # coordinates beyond the last are zero, and so are the places of the operands that no coordinate goes to
        p = operand_position(d, BITS, COUNT * WIDTH // 2, ASM)
        inside = (d < COUNT * WIDTH)[None, :]
        tl.store(operands + at[:, None] + p[None, :], high, mask=inside)
        tl.store(operands + at[:, None] + (COUNT * WIDTH + p)[None, :], low, mask=inside)
        c = constants + (bh.to(tl.int64) * padded_rows + row) * 8
        factor = step * (scaling * 1.4426950408889634)
        if task == 0:
            tl.store(c, factor * level_scale)
            tl.store(c + 1, factor * level_scale * level_offset * total)
            if MEAN:
                dot = tl.zeros([16], tl.float32)
                for start in range(0, DIM, CHUNK):
                    k = start + tl.arange(0, CHUNK)
                    inner = exists[:, None] & (k < DIM)[None, :]
                    x = tl.load(query + query_offset[:, None] + k[None, :], mask=inner, other=0).to(tl.float32)
                    mu = tl.load(mean + head % mean_heads * DIM + k, mask=k < DIM, other=0)
                    dot += tl.sum(x * mu[None, :], axis=1)
                tl.store(c + 4, dot * (scaling * 1.4426950408889634))
        else:
            # the operand is 1 where the sign is minus: Σ q sign = Σ q - 2 Σ q operand
            tl.store(c + 2, -2.0 * factor)
            tl.store(c + 3, factor * total)
    else:
        slot = (task - TERMS) * TILE + tl.arange(0, TILE)
        recent = recent_start + (slot - sink_length - phase + ring) % tl.maximum(ring, 1)
        position = tl.where(slot < sink_length, slot, recent)
        valid = (slot < slots) & (position < kv_len)
        d = tl.arange(0, DIM_PAD)
        q_mask = exists[:, None] & (d < DIM)[None, :]
        q = tl.load(query + query_offset[:, None] + d[None, :], mask=q_mask, other=0).to(DOT)
        slot64 = slot.to(tl.int64)
        k_mask = (d < DIM)[:, None] & valid[None, :]
        k = tl.load(
            key_states + bh.to(tl.int64) * key_stride + slot64[None, :] * DIM + d[:, None], mask=k_mask, other=0
        )
        if not SCORES:
            # asked for before it is needed, so that both loads are under way together
            v = tl.arange(0, VALUE_PAD)
            v_mask = valid[:, None] & (v < VALUE_DIM)[None, :]
            values = value_states + bh.to(tl.int64) * value_stride + slot64[:, None] * VALUE_DIM + v[None, :]
            values = tl.load(values, mask=v_mask, other=0).to(DOT)
        logits = tl.dot(q, k.to(DOT), input_precision="ieee") * (scaling * 1.4426950408889634)
        logits = finish_logits(
            logits, position[None, :], row[:, None], bh, valid[None, :], mask_ptr, mask_b, mask_h, mask_t, mask_n,
            kv_len, query_length, groups, kv_heads, softcap, MASK, CAUSAL, SOFTCAP, ASM,
        )  # fmt: skip
        flat_row = bh.to(tl.int64) * rows + row
        if SCORES:
            out = logits_out + flat_row[:, None] * kv_len + position[None, :]
            tl.store(out, logits * 0.6931471805599453, mask=exists[:, None] & valid[None, :])
        else:
            largest = tl.maximum(tl.max(logits, axis=1), LOWEST)
            weights = exp2(logits - largest[:, None], ASM)
            out = tl.dot(weights.to(DOT), values, input_precision="ieee")
            at = flat_row * splits + code_splits + task - TERMS
            tl.store(
                partial + at[:, None] * VALUE_DIM + v[None, :], out, mask=exists[:, None] & (v < VALUE_DIM)[None, :]
            )
            tl.store(stats + at * 2, largest, mask=exists)
            tl.store(stats + at * 2 + 1, tl.sum(weights, axis=1), mask=exists)


@triton.jit
def _load_constants(constants, row, QJL: tl.constexpr, MEAN: tl.constexpr):
    out = ()
    for i in tl.static_range(5):
        if i < 2 or (QJL and i < 4) or (MEAN and i == 4):
            out = out + (tl.load(constants + row * 8 + i)[None, :],)
        else:
            out = out + (0.0,)
    return out


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def attend_kernel(
    operands, constants, key_wide, key_one, key_scales, key_residual_norms, key_tables,
    value_wide, value_one, value_scales, value_table, mask_ptr, partial, stats,
    mask_b, mask_h, mask_t, mask_n, query_length, groups, kv_heads, kv_len, sink_length, length,
    key_blocks, value_blocks, row_tiles, padded_rows, splits, code_splits, softcap,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, QJL: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_BITS: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr,
    KEY_SNIPPET: tl.constexpr, KEY_CONSTRAINTS: tl.constexpr,
    VALUE_SNIPPET: tl.constexpr, VALUE_CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """
    Softmax and weighted sum over the blocks of one split, for `ROWS` rows. Grid (`code_splits` · row tiles, batch · KV
    heads). Tokens are the M of every matrix product and rows its N, so that codes stay in registers.

    Writes the sum of weighted values, still turned and not yet times the codebook's scale, fp32 `[R, splits,
    VALUE_DIM]`, and `stats` `[R, splits, 2]`: running maximum and sum of exponentials.
    """
    split = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    bh = tl.program_id(1)
    bh64 = bh.to(tl.int64)
    TOKENS: tl.constexpr = 128 // PARTS
    HALVES: tl.constexpr = 2 if VALUE_BITS == 3 else 1
    COUNT: tl.constexpr = 2 if KEY_BITS == 4 else 4
    row = tile * ROWS + tl.arange(0, ROWS)
    padded_row = bh64 * padded_rows + row
    SETS: tl.constexpr = (2 + 2 * QJL) * COUNT
    q = load_operands(operands, padded_row, SETS * WIDTH, SETS, WIDTH)
    c = _load_constants(constants, padded_row, QJL, MEAN)

    # of every row the largest logit plus log2 of its value's scale: what enters the weighted sum is then in [0, 1]
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(HALVES):
        sums = sums + (tl.zeros([VALUE_ROWS, ROWS], tl.float32),)

    blocks = (length + 127) // 128
    first = (split * blocks) // code_splits
    last = ((split + 1) * blocks) // code_splits
    key_block = bh64 * key_blocks
    value_block = bh64 * value_blocks
    # scales are too narrow for the asynchronous copies that Triton makes of tiles: fetch them a block ahead
    next_key_scales = load_scales(key_scales, key_block + first, PARTS, ASM)
    next_value_scales = load_scales(value_scales, value_block + first, PARTS, ASM)
    if QJL:
        next_norms = load_scales(key_residual_norms, key_block + first, PARTS, ASM)
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
        dots = key_dots(
            key_wide, key_one, key_tables, key_block + block, q,
            DIM, WIDTH, KEY_BITS, QJL, PARTS, KEY_SNIPPET, KEY_CONSTRAINTS, ASM,
        )  # fmt: skip
        raw = key_logits(dots, ks, norms, c, PARTS, QJL, MEAN)
        logits = ()
        value_scale = ()
        for p in tl.static_range(PARTS):
            token = block * 128 + part_tokens(p, PARTS, ASM)
            valid = token < length
            # memory beyond the length may hold anything
            scale = tl.where(valid, vs[p].to(tl.float32), 0.0)
            s = finish_logits(
                raw[p], (sink_length + token)[:, None], row[None, :], bh, valid[:, None], mask_ptr, mask_b, mask_h,
                mask_t, mask_n, kv_len, query_length, groups, kv_heads, softcap, MASK, CAUSAL, SOFTCAP, ASM,
            )  # fmt: skip
            logits = logits + (s,)
            value_scale = value_scale + (scale,)
            # a value of zero must not make its weight infinite
            s = s + log2(tl.maximum(scale, 1e-18), ASM)[:, None]
            if p == 0:
                peak = s
            else:
                peak = tl.maximum(peak, s)
        new_largest = tl.maximum(largest, tl.max(peak, axis=0))
        decay = exp2(largest - new_largest, ASM)
        largest = new_largest
        total *= decay[None, :]
        weights = ()
        for p in tl.static_range(PARTS):
            weight = exp2(logits[p] - largest[None, :], ASM)
            total += weight
            weights = weights + ((weight * value_scale[p][:, None]).to(DOT),)
        levels = value_levels(
            value_wide, value_one, value_table, value_block + block,
            VALUE_DIM, VALUE_ROWS, VALUE_BITS, PARTS, DOT, VALUE_SNIPPET, VALUE_CONSTRAINTS, ASM,
        )  # fmt: skip
        new_sums = ()
        for h in tl.static_range(HALVES):
            acc = sums[h] * decay[None, :]
            for p in tl.static_range(PARTS):
                acc = tl.dot(levels[h * PARTS + p], weights[p], acc, input_precision="ieee")
            new_sums = new_sums + (acc,)
        sums = new_sums

    rows = groups * query_length
    exists = row < rows
    at = (bh64 * rows + row) * splits + split
    d = tl.arange(0, VALUE_ROWS)
    HEIGHT: tl.constexpr = VALUE_DIM // HALVES
    for h in tl.static_range(HALVES):
        out = partial + at[None, :] * VALUE_DIM + (h * HEIGHT + d)[:, None]
        tl.store(out, sums[h], mask=exists[None, :] & (d < HEIGHT)[:, None])
    tl.store(stats + at * 2, largest, mask=exists)
    tl.store(stats + at * 2 + 1, tl.sum(total, axis=0), mask=exists)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    partial, stats, dual, mean, sinks, out, rows, query_length, groups, kv_heads, dual_heads, mean_heads,
    splits, code_splits, out_b, out_h, out_t, level_scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MEAN: tl.constexpr, SINKS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    Merges the splits by log-sum-exp, `CHUNK` at a time, and turns the part of the codes back, x̂ = A⁻¹ ẑ. Grid (batch ·
    KV heads · R, ⌈DIM / COLUMNS⌉).
    """
    bh = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    head = bh % kv_heads
    k = tl.arange(0, DIM_PAD)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = (k < DIM)[None, :]
    outer = (d < DIM)[None, :]
    matrix = dual + (head % dual_heads).to(tl.int64) * DIM * DIM + k[:, None] * DIM + d[None, :]
    matrix = tl.load(matrix, mask=(k < DIM)[:, None] & outer, other=0)
    largest = LOWEST
    total = 0.0
    if SINKS:
        largest = tl.load(sinks + head * groups + row // query_length).to(tl.float32) * 1.4426950408889634
        total = 1.0
    code_total = 0.0
    turned = tl.zeros([CHUNK, DIM_PAD], tl.float32)
    plain = tl.zeros([CHUNK, COLUMNS], tl.float32)
    first = (bh.to(tl.int64) * rows + row) * splits
    for start in range(0, splits, CHUNK):
        s = start + tl.arange(0, CHUNK)
        at = first + s
        here = s < splits
        coded = s < code_splits
        x = tl.load(partial + at[:, None] * DIM + k[None, :], mask=coded[:, None] & inner, other=0)
        y = tl.load(
            partial + at[:, None] * DIM + d[None, :], mask=(here & (s >= code_splits))[:, None] & outer, other=0
        )
        maxima = tl.load(stats + at * 2, mask=here, other=-1e30)
        masses = tl.load(stats + at * 2 + 1, mask=here, other=0)
        new_largest = tl.maximum(largest, tl.max(maxima, axis=0))
        decay = exp2(largest - new_largest, ASM)
        weight = exp2(maxima - new_largest, ASM)
        largest = new_largest
        total = total * decay + tl.sum(weight * masses, axis=0)
        if MEAN:
            code_total = code_total * decay + tl.sum(tl.where(coded, weight * masses, 0.0), axis=0)
        turned = turned * decay + x * weight[:, None]
        plain = plain * decay + y * weight[:, None]
    result = tl.sum((tl.sum(turned, axis=0) * level_scale)[:, None] * matrix, axis=0) + tl.sum(plain, axis=0)
    if MEAN:
        result += code_total * tl.load(mean + head % mean_heads * DIM + d, mask=d < DIM, other=0)
    # a row that may attend to nothing is zero
    result = tl.where(total > 0, result / total, 0.0)
    offset = (bh // kv_heads).to(tl.int64) * out_b + (head * groups + row // query_length).to(tl.int64) * out_h
    offset += row % query_length * out_t
    tl.store(out + offset + d, result.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def scores_kernel(
    operands, constants, key_wide, key_one, key_scales, key_residual_norms, key_tables, mask_ptr, out,
    mask_b, mask_h, mask_t, mask_n, query_length, groups, kv_heads, kv_len, sink_length, length,
    key_blocks, row_tiles, padded_rows, softcap,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, QJL: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, MEAN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ASM: tl.constexpr, SNIPPET: tl.constexpr, CONSTRAINTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Logits of `BLOCKS` blocks of keys, fp32 `[R, kv_len]`. Grid (chunks of blocks · row tiles, batch · KV heads)."""
    tile = tl.program_id(0) % row_tiles
    bh = tl.program_id(1)
    bh64 = bh.to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    padded_row = bh64 * padded_rows + row
    COUNT: tl.constexpr = 2 if KEY_BITS == 4 else 4
    SETS: tl.constexpr = (2 + 2 * QJL) * COUNT
    q = load_operands(operands, padded_row, SETS * WIDTH, SETS, WIDTH)
    c = _load_constants(constants, padded_row, QJL, MEAN)
    rows = groups * query_length
    exists = row < rows
    flat_row = bh64 * rows + row
    first = tl.program_id(0) // row_tiles * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, (length + 127) // 128)):
        ks = load_scales(key_scales, bh64 * key_blocks + block, PARTS, ASM)
        norms = ks
        if QJL:
            norms = load_scales(key_residual_norms, bh64 * key_blocks + block, PARTS, ASM)
        dots = key_dots(
            key_wide, key_one, key_tables, bh64 * key_blocks + block, q,
            DIM, WIDTH, KEY_BITS, QJL, PARTS, SNIPPET, CONSTRAINTS, ASM,
        )  # fmt: skip
        raw = key_logits(dots, ks, norms, c, PARTS, QJL, MEAN)
        for p in tl.static_range(PARTS):
            token = block * 128 + part_tokens(p, PARTS, ASM)
            valid = token < length
            logits = finish_logits(
                raw[p], (sink_length + token)[:, None], row[None, :], bh, valid[:, None], mask_ptr, mask_b, mask_h,
                mask_t, mask_n, kv_len, query_length, groups, kv_heads, softcap, MASK, CAUSAL, SOFTCAP, ASM,
            )  # fmt: skip
            to = out + flat_row[None, :] * kv_len + (sink_length + token)[:, None]
            tl.store(to, logits * 0.6931471805599453, mask=valid[:, None] & exists[None, :])
