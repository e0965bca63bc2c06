"""A step at any length: one token comes, and at most one leaves the recent tokens."""

import triton
import triton.language as tl

from .launch import prefetch, wait_for_previous
from .logits import OVERFLOW
from .quantize_kernels import append_tile


@triton.jit
def append_token(
    new, side, exact, counter, sequence, capacity, length, quantized, sink_length, ring, slots, blocks, heads,
    SPEC: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """
    Writes the key or value of one token of `sequence` (batch · heads + head), and quantizes the token that leaves.

    Args:
        new: of shape `[batch, heads, 1, D]`.
        side (tuple): strides of `new`, buffers and constants, as for `quantize_kernel`.
        exact: of shape `[batch, heads, slots, D]`, contiguous.
        counter: that of this sequence and role, see `LayerStates`; `None` if the lengths before the step are given as
            `length` (all tokens) and `quantized`, and `ring` recent tokens stay exact.
        capacity, sink_length, ring, blocks: the most tokens, slots of the sinks and of recent tokens, and blocks of
            codes, all of one sequence.
        RING: whether there are slots for recent tokens.
    """
    strides = side[0]
    D: tl.constexpr = SPEC[3]
    DP: tl.constexpr = SPEC[4]
    batch, head = sequence // heads, sequence % heads
    window = ring
    if counter is not None:
        length = tl.load(counter)
        quantized = tl.load(counter + 1)
        window = tl.load(counter + 2)
    fits = length < capacity
    slot = length
    if RING:
        slot = tl.where(length < sink_length, length, sink_length + (length - sink_length) % ring)
    d = tl.arange(0, DP)
    stays = d < tl.where(fits & (slot < sink_length + ring), D, 0)
    state = tl.load(new + batch * strides[0] + head * strides[1] + d * strides[3], mask=stays, other=0)
    exact += sequence * slots * D
    leaves = fits & (length + 1 - sink_length - window > quantized)
    if RING and counter is not None:
        # With more slots than the window needs, the new token itself may leave. It must not overwrite one that does.
        room = d < tl.where(length - sink_length - quantized < ring, D, 0)
        tl.store(exact + slot * D + d, state, mask=stays & room)
        tl.debug_barrier()
    if leaves:
        if RING:
            leaving = exact + (sink_length + quantized % ring) * D
            append_tile(
                leaving, ((0, 0, 0, 1), side[1], side[2]), quantized, sequence, quantized, 1, blocks, heads, SPEC, 1
            )  # fmt: skip
        else:
            append_tile(new, side, quantized, sequence, quantized, 1, blocks, heads, SPEC, 1)
    # The new token may overwrite the slot of the one that leaves, and the new lengths those that were read.
    tl.debug_barrier()
    tl.store(exact + slot * D + d, state, mask=stays)
    if counter is not None:
        tl.store(counter, tl.where(fits, length + 1, OVERFLOW))
        tl.store(counter + 1, quantized + leaves.to(tl.int32))


@triton.jit
def _prefetch_constants(side, SPEC: tl.constexpr):
    D: tl.constexpr = SPEC[3]
    transform = side[2][0]
    prefetch(transform, D * D * (transform.dtype.element_ty.primitive_bitwidth // 8))
    sketch = side[2][6]
    if sketch is not None:
        prefetch(sketch, D * D * (sketch.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit(do_not_specialize=["capacity", "length", "quantized", "sink_length", "ring", "slots", "blocks", "heads"])
def step_kernel(
    new_keys, new_values, capacity, length, quantized, keys, values, exact_keys, exact_values, counters, sink_length,
    ring, slots, blocks, heads, KEYS: tl.constexpr, VALUES: tl.constexpr, RING: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """
    [`ops.append`]. Grid (1, batch · heads, 2): a program handles the keys or the values of one head of one sequence and
    has its own counter, so that none waits for another. For the arguments see [`append_token`].
    """
    if EARLY:
        # Every layer has matrices of its own, which the weights have pushed out of the cache.
        if tl.program_id(2) == 0:
            _prefetch_constants(keys, KEYS)
        else:
            _prefetch_constants(values, VALUES)
        wait_for_previous()
    sequence = tl.program_id(1).to(tl.int64)
    counter = counters
    if counters is not None:
        counter = counters + (tl.program_id(2) * tl.num_programs(1) + sequence) * 3
    if tl.program_id(2) == 0:
        append_token(
            new_keys, keys, exact_keys, counter, sequence, capacity, length, quantized, sink_length, ring, slots,
            blocks, heads, KEYS, RING,
        )  # fmt: skip
    else:
        append_token(
            new_values, values, exact_values, counter, sequence, capacity, length, quantized, sink_length, ring, slots,
            blocks, heads, VALUES, RING,
        )  # fmt: skip
