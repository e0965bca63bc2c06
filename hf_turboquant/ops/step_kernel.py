"""The kernel of a step: one token comes, one leaves the recent window, whatever the length."""

import triton
import triton.language as tl

from .logits import OVERFLOW
from .quantize_kernels import _append


@triton.jit
def _step(
    args, exact, counters, capacity, length, quantized, sink_length, ring, slots, blocks, heads,
    SPEC: tl.constexpr, ROLE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    new, strides, buffers, constants = args
    D: tl.constexpr = SPEC[3]
    DP: tl.constexpr = SPEC[4]
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    if counters is not None:
        # every program counts for itself, so that none waits for another
        counter = counters + (ROLE * tl.num_programs(1) + sequence) * 2
        length = tl.load(counter)
        quantized = tl.load(counter + 1)
    fits = length < capacity
    slot = length
    if RING:
        slot = tl.where(length < sink_length, length, sink_length + (length - sink_length) % ring)
    d = tl.arange(0, DP)
    stays = d < tl.where(fits & (slot < sink_length + ring), D, 0)
    state = tl.load(new + batch * strides[0] + head * strides[1] + d * strides[3], mask=stays, other=0)
    exact += sequence * slots * D
    leaves = fits & (length + 1 - sink_length - ring > quantized)
    if leaves:
        if RING:
            leaving = exact + (sink_length + quantized % ring) * D
            _append((leaving, (0, 0, 0, 1), buffers, constants), quantized, 1, blocks, heads, SPEC, 1)
        else:
            _append(args, quantized, 1, blocks, heads, SPEC, 1)
    # the new token may take the slot of the one that leaves, and the next lengths the place of those that were read
    tl.debug_barrier()
    tl.store(exact + slot * D + d, state, mask=stays)
    if counters is not None:
        tl.store(counter, tl.where(fits, length + 1, OVERFLOW))
        tl.store(counter + 1, quantized + leaves.to(tl.int32))


@triton.jit(do_not_specialize=["capacity", "length", "quantized", "sink_length", "ring", "slots", "blocks", "heads"])
def step_kernel(
    keys, values, exact_keys, exact_values, counters, capacity, length, quantized, sink_length, ring, slots, blocks,
    heads, KEYS: tl.constexpr, VALUES: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """
    [`ops.append`]. Grid (1, batch · heads, 2): a program has the keys or the values of one sequence of one head.

    Args:
        keys, values (tuple): new token `[batch, heads, 1, D]`, strides, buffers and constants as of `quantize_kernel`.
        exact_keys, exact_values: of shape `[batch, heads, slots, D]`, contiguous.
        counters: see `LayerStates`; without them lengths come as `length` (in all) and `quantized`.
        capacity, sink_length, ring: tokens in all, and slots of the sinks and of the recent window.
        blocks: of the codes of one sequence.
        RING: whether there is a recent window.
    """
    if tl.program_id(2) == 0:
        _step(
            keys, exact_keys, counters, capacity, length, quantized, sink_length, ring, slots, blocks, heads, KEYS, 0,
            RING,
        )  # fmt: skip
    else:
        _step(
            values, exact_values, counters, capacity, length, quantized, sink_length, ring, slots, blocks, heads,
            VALUES, 1, RING,
        )  # fmt: skip
