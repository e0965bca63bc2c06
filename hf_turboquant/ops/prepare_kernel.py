"""The first kernel of a call: the query, and what does not need the codes."""

import triton
import triton.language as tl

from .codes import exp2, operand_position
from .logits import INTEGERS, LOWEST, OVERFLOW, UNALIGNED, finish_logits


@triton.jit
def _round_query(x, step):
    """`x / step`, rounded, as 128 · high + low: the integer and its two int8 terms."""
    integer = tl.floor(x / step[:, None] + 0.5).to(tl.int32)
    high = (integer + 64) >> 7
    return integer, high.to(tl.int8), (integer - high * 128).to(tl.int8)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def prepare_kernel(
    query, operators, key_scale, mean, operands, constants, key_states, value_states, mask_ptr, partial, stats,
    logits_out,
    query_b, query_h, query_t, mask_b, mask_h, mask_t, mask_n,
    query_length, groups, kv_heads, operator_heads, scale_heads, mean_heads,
    kv_len, recent_start, sink_length, ring, phase, slots,
    key_stride, value_stride, splits, code_splits, scaling, softcap, level_scale, level_offset,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, PASSES: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, MEAN: tl.constexpr, STATIC: tl.constexpr,
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
    if STATIC:
        # pointers to both lengths of every sequence
        quantized = tl.load(recent_start + bh * 2)
        kv_len = tl.load(kv_len + bh * 2)
        recent_start = sink_length + quantized
        phase = quantized % tl.maximum(ring, 1)
        overflown = kv_len == OVERFLOW
        kv_len = tl.where(overflown, 0, kv_len)
    if task < TERMS:
        CHUNK: tl.constexpr = 64 if DIM_PAD <= 128 else 32
        d = tl.arange(0, DIM_PAD)
        operator = operators + (task * PASSES * operator_heads + head % operator_heads).to(tl.int64) * DIM * DIM
        turned = tl.zeros([16, DIM_PAD], tl.float32)
        rest = tl.zeros([16, DIM_PAD], tl.float32)
        for start in range(0, DIM, CHUNK):
            k = start + tl.arange(0, CHUNK)
            x = tl.load(query + query_offset[:, None] + k[None, :], mask=exists[:, None] & (k < DIM)[None, :], other=0)
            if SCALE:
                # rounded like the query itself
                x = x.to(tl.float32)
                x *= (1.0 / tl.load(key_scale + head % scale_heads * DIM + k, mask=k < DIM, other=1))[None, :]
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
            total = tl.sum(weights, axis=1)
            if STATIC:
                # a step beyond the capacity cannot raise: everything that comes of it shall show
                out = tl.where(overflown, float("nan"), out)
                total = tl.where(overflown, 1.0, total)
            at = flat_row * splits + code_splits + task - TERMS
            tl.store(
                partial + at[:, None] * VALUE_DIM + v[None, :], out, mask=exists[:, None] & (v < VALUE_DIM)[None, :]
            )
            tl.store(stats + at * 2, largest, mask=exists)
            tl.store(stats + at * 2 + 1, total, mask=exists)
