"""The first kernel of a call: prepares the query and does all that does not need the codes."""

import triton
import triton.language as tl

from .codes import exp2
from .launch import wait_for_previous
from .logits import INTEGERS, LOWEST, OVERFLOW, UNALIGNED, finish_logits


@triton.jit
def _to_terms(x):
    """The integer nearest to x, and its two int8 terms 128 · high + low."""
    integer = tl.floor(tl.clamp(x, -16256.0, 16256.0) + 0.5).to(tl.int32)
    high = (integer + 64) >> 7
    return integer, high.to(tl.int8), (integer - high * 128).to(tl.int8)


@triton.jit
def _sums_and_most(sum_a, sum_b, most_a, sum_c, sum_d, most_b):
    return sum_a + sum_c, sum_b + sum_d, tl.maximum(most_a, most_b)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def rotate_query(
    query, flat_row, exists, scaling, matrices, key_factors, mean, operands, constants, level_scale, level_offset, unit,
    sketch_unit, bound, sketch_bound, DIM: tl.constexpr, DIM_PAD: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, QJL: tl.constexpr, PASSES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """
    Rotates rows of queries of one KV head, z = A⁻ᵀ (q / t), and sketches them, S z.

    Queries and results are rounded to 14 bits, 128 · high + low: those relative to their largest coordinate, these
    relative to a bound, beyond which they are cut off.

    Args:
        query (tensor of pointers): the first coordinate of each row.
        matrices: A⁻ᵀ / `unit` and with `QJL` S A⁻ᵀ / `sketch_unit`, int8 `[terms, PASSES, COUNT · WIDTH, DIM_PAD]`,
            rows in the order of the operands. With two passes they are 128 · first + second.
        key_factors, mean: t and μ of the head.
        bound, sketch_bound: for a vector of norm one, that of z and of S z.

    A row becomes int8 `operands` `[terms, 2, COUNT · WIDTH]` (high and low terms) and fp32 `constants`. With integer
    products i of levels and j of signs

        logit = (i · c₀ + c₁) · scale + (j · c₂ + c₃) · residual norm + c₄
    """
    k = tl.arange(0, DIM_PAD)
    inner = k < DIM
    e = tl.arange(0, WIDTH)
    # Constants do not wait for the previous kernel.
    loaded = ()
    for i in tl.static_range((1 + QJL) * PASSES * COUNT):
        loaded = loaded + (tl.load(matrices + (i * WIDTH + e)[:, None] * DIM_PAD + k[None, :]),)
    if EARLY:
        wait_for_previous()
    x = tl.load(query[None, :] + k[:, None], mask=inner[:, None] & exists[None, :], other=0).to(tl.float32)
    scaling *= 1.4426950408889634
    offset = x * tl.load(mean + k, mask=inner, other=0)[:, None]
    x *= 1.0 / tl.load(key_factors + k, mask=inner, other=1)[:, None]
    # One reduction for all three.
    offset, norm, largest = tl.reduce((offset, x * x, tl.abs(x)), 0, _sums_and_most)
    norm = tl.sqrt(norm)
    # The largest integer that two int8 terms hold with a margin for rounding.
    step = largest / 16256.0
    step = tl.where(step > 0, step, 1.0)
    _, x_high, x_low = _to_terms(x * (1.0 / step)[None, :])
    sums = ()
    steps_out = (norm * (bound / 16256.0), norm * (sketch_bound / 16256.0))
    units = (unit, sketch_unit)
    for term in tl.static_range(1 + QJL):
        to_steps = (step * units[term] / tl.maximum(steps_out[term], 1e-30))[None, :]
        for i in tl.static_range(COUNT):
            matrix = loaded[term * PASSES * COUNT + i]
            z = tl.dot(matrix, x_high, out_dtype=tl.int32).to(tl.float32) * 128.0
            z += tl.dot(matrix, x_low, out_dtype=tl.int32).to(tl.float32)
            if PASSES == 2:
                matrix = loaded[(term * PASSES + 1) * COUNT + i]
                z *= 128.0
                z += tl.dot(matrix, x_high, out_dtype=tl.int32).to(tl.float32) * 128.0
                z += tl.dot(matrix, x_low, out_dtype=tl.int32).to(tl.float32)
            integer, high, low = _to_terms(z * to_steps)
            to = operands + flat_row[None, :] * ((1 + QJL) * 2 * COUNT * WIDTH)
            to += ((term * 2 * COUNT + i) * WIDTH + e)[:, None]
            tl.store(to, high, mask=exists[None, :])
            tl.store(to + COUNT * WIDTH, low, mask=exists[None, :])
            if i == 0:
                total = integer
            else:
                total += integer
        sums = sums + (total.to(tl.float32),)
    level_sum, sign_sum = tl.reduce((sums[0], sums[QJL]), 0, _add)
    c = constants + flat_row * 8
    level_step = steps_out[0] * scaling
    tl.store(c, level_step * level_scale, mask=exists)
    tl.store(c + 1, level_step * level_sum * (level_scale * level_offset), mask=exists)
    tl.store(c + 4, offset * scaling, mask=exists)
    if QJL:
        # The operand is 1 where the sign is minus: Σ q sign = Σ q - 2 Σ q operand.
        sign_step = steps_out[1] * scaling
        tl.store(c + 2, -2.0 * sign_step, mask=exists)
        tl.store(c + 3, sign_step * sign_sum, mask=exists)


@triton.jit
def exact_logits(
    query, chunk, bh, row, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, quantized, phase, scaling, softcap,
    states, query_length, groups, kv_heads, sink_length, ring, slots, held,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    Logits `[TILE, ROWS]` of a tile of exact slots, the first `slots` of the `held` ones; their slots, positions, and
    whether they hold a token, `[TILE, 1]`.
    """
    first = sink_length + quantized
    slot = chunk * TILE + tl.arange(0, TILE)[:, None]
    recent = first + slot - sink_length - phase
    recent = tl.where(recent < first, recent + ring, recent)
    position = tl.where(slot < sink_length, slot, recent)
    valid = (slot < slots) & (position < kv_len)
    d = tl.arange(0, DIM_PAD)
    exists = row < groups * query_length
    q = tl.load(query[None, :] + d[:, None], mask=(d < DIM)[:, None] & exists[None, :], other=0).to(DOT)
    states += bh.to(tl.int64) * held * DIM
    k = tl.load(states + slot * DIM + d[None, :], mask=valid & (d < DIM)[None, :], other=0).to(DOT)
    logits = tl.dot(k, q, input_precision="ieee") * (scaling * 1.4426950408889634)
    logits = finish_logits(
        logits, position, row[None, :], bh, valid, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, query_length,
        groups, kv_heads, softcap, MASK, CAUSAL, SOFTCAP, ASM,
    )  # fmt: skip
    return logits, slot, position, valid


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def prepare_kernel(
    query, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, quantized, phase, scaling, softcap,
    counters, matrices, key_factors, mean, operands, constants, key_states, value_states, partial, stats,
    query_b, query_h, query_t, query_length, groups, kv_heads, scale_heads, mean_heads, sink_length, ring, slots, held,
    row_tiles, pairs, splits, code_splits,
    level_scale, level_offset, unit, sketch_unit, bound, sketch_bound,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, QJL: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """
    Does everything that does not need the codes. The first programs each rotate `ROWS` rows of queries of one KV head
    (batch · KV heads · row tiles), the others each attend to `TILE` exact slots with such rows.
    """
    task = tl.program_id(0)
    rotations = pairs * row_tiles
    pair = task % rotations // row_tiles
    head = pair % kv_heads
    row = task % row_tiles * ROWS + tl.arange(0, ROWS)
    rows = groups * query_length
    exists = row < rows
    flat_row = pair.to(tl.int64) * rows + row
    query += (pair // kv_heads).to(tl.int64) * query_b
    query = query + (head * groups + row // query_length).to(tl.int64) * query_h
    query += (row % query_length).to(tl.int64) * query_t
    if task < rotations:
        rotate_query(
            query, flat_row, exists, scaling, matrices, key_factors + head % scale_heads * DIM,
            mean + head % mean_heads * DIM, operands, constants, level_scale, level_offset, unit, sketch_unit, bound,
            sketch_bound, DIM, DIM_PAD, COUNT, WIDTH, QJL, PASSES, EARLY,
        )  # fmt: skip
    else:
        if EARLY:
            wait_for_previous()
        chunk = task // rotations - 1
        overflown = False
        if counters is not None:
            kv_len = tl.load(counters + pair * 3)
            quantized = tl.load(counters + pair * 3 + 1)
            phase = quantized % tl.maximum(ring, 1)
            # A kernel cannot raise an error beyond the capacity, so its results are NaN.
            overflown = kv_len == OVERFLOW
            kv_len = tl.where(overflown, 0, kv_len)
        logits, slot, position, valid = exact_logits(
            query, chunk, pair, row, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, quantized, phase, scaling,
            softcap, key_states, query_length, groups, kv_heads, sink_length, ring, slots, held,
            DIM, DIM_PAD, TILE, MASK, CAUSAL, SOFTCAP, DOT, ASM,
        )  # fmt: skip
        v = tl.arange(0, VALUE_PAD)[:, None]
        value_states += pair.to(tl.int64) * held * VALUE_DIM
        valid = tl.trans(valid) & (v < VALUE_DIM)
        values = tl.load(value_states + tl.trans(slot) * VALUE_DIM + v, mask=valid, other=0).to(DOT)
        largest = tl.maximum(tl.max(logits, axis=0), LOWEST)
        weights = exp2(logits - largest[None, :], ASM)
        out = tl.dot(values, weights.to(DOT), input_precision="ieee")
        out = tl.where(overflown, float("nan"), out)
        to = flat_row * splits + code_splits + chunk
        tl.store(partial + to[None, :] * VALUE_DIM + v, out, mask=exists[None, :] & (v < VALUE_DIM))
        tl.store(stats + to * 2, largest, mask=exists)
        tl.store(stats + to * 2 + 1, tl.where(overflown, 1.0, tl.sum(weights, axis=0)), mask=exists)
