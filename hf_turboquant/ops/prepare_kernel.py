"""The first kernel of a call: prepares the query and does all that does not need the codes."""

import triton
import triton.language as tl

from .codes import exp2, operand_position
from .logits import INTEGERS, LOWEST, OVERFLOW, UNALIGNED, finish_logits
from .step_kernel import append_token


@triton.jit
def _round_query(x, step):
    """Rounds `x / step` to 128 · high + low; returns the integer and its two int8 terms."""
    integer = tl.floor(x / step[:, None] + 0.5).to(tl.int32)
    high = (integer + 64) >> 7
    return integer, high.to(tl.int8), (integer - high * 128).to(tl.int8)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def prepare_kernel(
    query, new_key, new_value, mask_ptr, mask_b, mask_h, mask_t, mask_n, logits_out,
    kv_len, recent_start, phase, leaving, scaling, softcap,
    key_side, value_side, operators, key_scale, mean, operands, constants, key_states, value_states, partial, stats,
    query_b, query_h, query_t, query_length, groups, kv_heads, operator_heads, scale_heads, mean_heads,
    sink_length, ring, slots, blocks, key_stride, value_stride, pairs, splits, code_splits, level_scale, level_offset,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, PASSES: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, MEAN: tl.constexpr, STATIC: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SCORES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """
    Does everything that does not need the codes. The first programs of the grid each rotate (A⁻ᵀ q) or sketch
    (κS A⁻ᵀ q) 16 rows of queries, `TERMS` programs for the same rows, and write the result as integers. Each of the
    others attends to `TILE` exact slots with 16 rows of one pair of batch and KV head (with `SCORES`: writes its
    logits).

    With specifications `KEYS` and `VALUES` the last token is not in its slot yet: before all others, two programs per
    pair append its key and its value with [`append_token`]. Programs that attend to exact slots read it from the input.

    With `PASSES` 2 an operator is a sum of two matrices in the query's own 16 bits, the second times 2048: two 16-bit
    matrix products are as precise as one in fp32, and faster.

    A query row becomes int8 `operands` `[TERMS, 2, COUNT · WIDTH]` (high and low term of every coordinate, in the
    order of `operand_position`) and fp32 `constants`. With integer products i of levels and j of signs

        logit = (i · c₀ + c₁) · scale + (j · c₂ + c₃) · residual norm + c₄
    """
    rows = groups * query_length
    # Rows that share an operator fill tiles together: all of them, or those of one pair.
    segment_rows = pairs * rows if operator_heads == 1 else rows
    segment_tiles = (segment_rows + 15) // 16
    query_tiles = pairs * rows // segment_rows * segment_tiles
    task = tl.program_id(0)
    if KEYS is not None:
        sequence = (task // 2).to(tl.int64)
        before = recent_start - sink_length - leaving
        capacity = kv_len
        if task >= 2 * pairs:
            pass
        elif task % 2 == 0:
            append_token(
                new_key, key_side, key_states, None, sequence, capacity, kv_len - 1, before, sink_length, ring, slots,
                blocks, kv_heads, KEYS, RING,
            )  # fmt: skip
        else:
            append_token(
                new_value, value_side, value_states, None, sequence, capacity, kv_len - 1, before, sink_length, ring,
                slots, blocks, kv_heads, VALUES, RING,
            )  # fmt: skip
        task -= 2 * pairs
    if task < 0:
        pass
    elif task < TERMS * query_tiles:
        term = task // query_tiles
        segment = task % query_tiles // segment_tiles
        local = task % segment_tiles * 16 + tl.arange(0, 16)
        exists = local < segment_rows
        flat = segment * segment_rows + local
        pair = flat // rows
        member = flat % rows
        head = pair % kv_heads
        x_rows = query + (pair // kv_heads).to(tl.int64) * query_b
        x_rows += (head * groups + member // query_length).to(tl.int64) * query_h
        x_rows += (member % query_length).to(tl.int64) * query_t
        CHUNK: tl.constexpr = 64 if DIM_PAD <= 128 else 32
        d = tl.arange(0, DIM_PAD)
        operator = operators + (term * PASSES * operator_heads + segment % operator_heads).to(tl.int64) * DIM * DIM
        turned = tl.zeros([16, DIM_PAD], tl.float32)
        rest = tl.zeros([16, DIM_PAD], tl.float32)
        offsets = tl.zeros([16, CHUNK], tl.float32)
        for start in range(0, DIM, CHUNK):
            k = start + tl.arange(0, CHUNK)
            x_mask = exists[:, None] & (k < DIM)[None, :]
            x = tl.load(x_rows[:, None] + k[None, :], mask=x_mask, other=0)
            if MEAN:
                mu = tl.load(mean + (head % mean_heads * DIM)[:, None] + k[None, :], mask=x_mask, other=0)
                offsets += x.to(tl.float32) * mu
            if SCALE:
                # Rounded like the query itself.
                factor = tl.load(key_scale + (head % scale_heads * DIM)[:, None] + k[None, :], mask=x_mask, other=1)
                x = x.to(tl.float32) * (1.0 / factor)
            x = x.to(operators.dtype.element_ty)
            m_mask = (k < DIM)[:, None] & (d < DIM)[None, :]
            m = tl.load(operator + k[:, None] * DIM + d[None, :], mask=m_mask, other=0)
            turned = tl.dot(x, m, turned, input_precision=PRECISION)
            if PASSES == 2:
                low = operator + operator_heads.to(tl.int64) * DIM * DIM + k[:, None] * DIM + d[None, :]
                rest = tl.dot(x, tl.load(low, mask=m_mask, other=0), rest)
        turned += rest / 2048.0
        # The largest integer that two int8 terms, 128 · high + low, hold with a margin for rounding.
        step = tl.max(tl.abs(turned), axis=1) / 16256.0
        step = tl.where(step > 0, step, 1.0)
        integer, high, low = _round_query(turned, step)
        total = tl.sum(integer, axis=1).to(tl.float32)
        COUNT: tl.constexpr = 2 if BITS == 4 else 4
        at = flat.to(tl.int64) * (TERMS * 2 * COUNT * WIDTH) + term * (2 * COUNT * WIDTH)
        # Coordinates beyond the last are zero, and so are positions of the operands without a coordinate.
        p = operand_position(d, BITS, COUNT * WIDTH // 2, ASM)
        inside = exists[:, None] & (d < COUNT * WIDTH)[None, :]
        tl.store(operands + at[:, None] + p[None, :], high, mask=inside)
        tl.store(operands + at[:, None] + (COUNT * WIDTH + p)[None, :], low, mask=inside)
        c = constants + flat.to(tl.int64) * 8
        factor = step * (scaling * 1.4426950408889634)
        if term == 0:
            tl.store(c, factor * level_scale, mask=exists)
            tl.store(c + 1, factor * level_scale * level_offset * total, mask=exists)
            if MEAN:
                tl.store(c + 4, tl.sum(offsets, axis=1) * (scaling * 1.4426950408889634), mask=exists)
        else:
            # The operand is 1 where the sign is minus: Σ q sign = Σ q - 2 Σ q operand.
            tl.store(c + 2, -2.0 * factor, mask=exists)
            tl.store(c + 3, factor * total, mask=exists)
    else:
        task -= TERMS * query_tiles
        chunks = splits - code_splits
        chunk = task % chunks
        tiles = (rows + 15) // 16
        bh = task // chunks // tiles
        row = task // chunks % tiles * 16 + tl.arange(0, 16)
        exists = row < rows
        query_offset = (bh // kv_heads).to(tl.int64) * query_b
        query_offset += (bh % kv_heads * groups + row // query_length).to(tl.int64) * query_h
        query_offset += (row % query_length).to(tl.int64) * query_t
        if STATIC:
            # Pointers to both lengths of every sequence.
            quantized = tl.load(recent_start + bh * 3)
            held = tl.load(kv_len + bh * 3)
            overflown = held == OVERFLOW
            tokens = tl.where(overflown, 0, held)
            first = sink_length + quantized
            turn = quantized % tl.maximum(ring, 1)
        else:
            tokens = kv_len
            first = recent_start
            turn = phase
        slot = chunk * TILE + tl.arange(0, TILE)
        recent = first + slot - sink_length - turn
        recent = tl.where(recent < first, recent + ring, recent)
        position = tl.where(slot < sink_length, slot, recent)
        valid = (slot < slots) & (position < tokens)
        d = tl.arange(0, DIM_PAD)
        q_mask = exists[:, None] & (d < DIM)[None, :]
        q = tl.load(query + query_offset[:, None] + d[None, :], mask=q_mask, other=0).to(DOT)
        slot64 = slot.to(tl.int64)
        stored = valid
        if KEYS is not None:
            newest = valid & (position == tokens - 1)
            stored = valid & (position != tokens - 1)
        k_mask = (d < DIM)[:, None] & stored[None, :]
        k = tl.load(
            key_states + bh.to(tl.int64) * key_stride + slot64[None, :] * DIM + d[:, None], mask=k_mask, other=0
        )
        if KEYS is not None:
            strides = key_side[0]
            at = new_key + (bh // kv_heads).to(tl.int64) * strides[0] + bh % kv_heads * strides[1] + d * strides[3]
            k_new = tl.load(at, mask=d < DIM, other=0)
            k = tl.where(newest[None, :], k_new[:, None], k)
        if not SCORES:
            # Loaded before it is needed, so that both loads overlap.
            v = tl.arange(0, VALUE_PAD)
            v_mask = stored[:, None] & (v < VALUE_DIM)[None, :]
            values = value_states + bh.to(tl.int64) * value_stride + slot64[:, None] * VALUE_DIM + v[None, :]
            values = tl.load(values, mask=v_mask, other=0).to(DOT)
            if KEYS is not None:
                strides = value_side[0]
                at = new_value + (bh // kv_heads).to(tl.int64) * strides[0] + bh % kv_heads * strides[1]
                v_new = tl.load(at + v * strides[3], mask=v < VALUE_DIM, other=0).to(DOT)
                values = tl.where(newest[:, None], v_new[None, :], values)
        logits = tl.dot(q, k.to(DOT), input_precision="ieee") * (scaling * 1.4426950408889634)
        logits = finish_logits(
            logits, position[None, :], row[:, None], bh, valid[None, :], mask_ptr, mask_b, mask_h, mask_t, mask_n,
            tokens, query_length, groups, kv_heads, softcap, MASK, CAUSAL, SOFTCAP, ASM,
        )  # fmt: skip
        flat_row = bh.to(tl.int64) * rows + row
        if SCORES:
            out = logits_out + flat_row[:, None] * tokens + position[None, :]
            tl.store(out, logits * 0.6931471805599453, mask=exists[:, None] & valid[None, :])
        else:
            largest = tl.maximum(tl.max(logits, axis=1), LOWEST)
            weights = exp2(logits - largest[:, None], ASM)
            out = tl.dot(weights.to(DOT), values, input_precision="ieee")
            total = tl.sum(weights, axis=1)
            if STATIC:
                # A kernel cannot raise an error beyond the capacity, so its results are NaN.
                out = tl.where(overflown, float("nan"), out)
                total = tl.where(overflown, 1.0, total)
            at = flat_row * splits + code_splits + chunk
            tl.store(
                partial + at[:, None] * VALUE_DIM + v[None, :], out, mask=exists[:, None] & (v < VALUE_DIM)[None, :]
            )
            tl.store(stats + at * 2, largest, mask=exists)
            tl.store(stats + at * 2 + 1, total, mask=exists)
