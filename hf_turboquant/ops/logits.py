"""Triton functions that turn products of codes and queries into logits, which are exponents of 2."""

import triton
import triton.language as tl

from .codes import exp2

# Floor of the running maximum: finite, so that a row that has seen nothing yet subtracts to zero and not to NaN.
LOWEST = tl.constexpr(-1e30)

# Stored as the length of a sequence that exceeds a fixed capacity.
OVERFLOW = tl.constexpr(2**30)

# Compiled kernels must not specialise on the values of these arguments, because launchers reuse them for all values.
INTEGERS = (
    "query_b query_h query_t length pairs blocks mask_b mask_h mask_t mask_n query_length groups kv_heads "
    "scale_heads mean_heads kv_len quantized phase sink_length ring slots held key_blocks value_blocks row_tiles "
    "splits code_splits exact_tiles rows out_b out_h out_t"
).split()
UNALIGNED = ["query", "mask_ptr", "sinks"]


@triton.jit
def load_constants(constants, row, exists, QJL: tl.constexpr):
    out = ()
    for i in tl.static_range(5):
        if QJL or i < 2 or i == 4:
            out = out + (tl.load(constants + row * 8 + i, mask=exists, other=0)[None, :],)
        else:
            out = out + (0.0,)
    return out


@triton.jit
def key_logits(dots, scales, residual_norms, constants, PARTS: tl.constexpr, QJL: tl.constexpr, MEAN: tl.constexpr):
    """
    Logits (exponents of 2) from `dots` and the rows' affine `constants`: see `rotate_query`. Without `MEAN`, the last
    constant, which is the same for all codes, is left out.
    """
    out = ()
    for p in tl.static_range(PARTS):
        logits = (dots[p] * constants[0] + constants[1]) * scales[p].to(tl.float32)[:, None]
        if QJL:
            correction = dots[PARTS + p] * constants[2] + constants[3]
            logits += correction * residual_norms[p].to(tl.float32)[:, None]
        if MEAN:
            logits += constants[4]
        out = out + (logits,)
    return out


@triton.jit
def finish_logits(
    logits, position, row, bh, valid, mask_ptr, mask_b, mask_h, mask_t, mask_n, kv_len, query_length, groups, kv_heads,
    softcap, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """
    Softcap, mask and length for logits at `position` × `row`, two index tensors of which one is a column and one a row.

    Args:
        valid (tensor of bool, of the shape of `position`): the tokens that exist.
        MASK: 0 none, 1 boolean (read as uint8), 2 additive.
    """
    if SOFTCAP:
        # c tanh(x / c) = c - 2 c / (1 + e^(2 x / c)); the logits and the cap are both exponents of 2.
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
