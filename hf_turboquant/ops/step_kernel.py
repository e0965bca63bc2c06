"""The kernel of a step with static capacity: one token comes, one leaves the recent window, whatever the length."""

import triton
import triton.language as tl

from .logits import OVERFLOW
from .quantize_kernels import _append


@triton.jit
def _step(
    args, counters, capacity, sink_length, ring, blocks, heads, SPEC: tl.constexpr, ROLE: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    new, new_strides, exact, exact_strides, buffers, constants = args
    D: tl.constexpr = SPEC[3]
    DP: tl.constexpr = SPEC[4]
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    # every program counts for itself, so that none waits for another
    counter = counters + (ROLE * tl.num_programs(1) + sequence) * 2
    length = tl.load(counter)
    quantized = tl.load(counter + 1)
    fits = length < capacity
    leaves = fits & (length + 1 - sink_length - ring > quantized)
    if leaves:
        if RING:
            leaving = exact + (sink_length + quantized % ring) * exact_strides[2]
            _append((leaving, exact_strides, buffers, constants), quantized, 1, blocks, heads, SPEC, 1)
        else:
            _append((new, new_strides, buffers, constants), quantized, 1, blocks, heads, SPEC, 1)
    # the new token may take the slot of the one that leaves, and the next lengths the place of those that were read
    tl.debug_barrier()
    slot = length
    if RING:
        slot = tl.where(length < sink_length, length, sink_length + (length - sink_length) % ring)
    d = tl.arange(0, DP)
    stays = d < tl.where(fits & (slot < sink_length + ring), D, 0)
    at = new + batch * new_strides[0] + head * new_strides[1] + d * new_strides[3]
    state = tl.load(at, mask=stays, other=0)
    to = exact + batch * exact_strides[0] + head * exact_strides[1] + slot * exact_strides[2] + d * exact_strides[3]
    tl.store(to, state, mask=stays)
    tl.store(counter, tl.where(fits, length + 1, OVERFLOW))
    tl.store(counter + 1, quantized + leaves.to(tl.int32))


@triton.jit(do_not_specialize=["capacity", "sink_length", "ring", "blocks", "heads"])
def step_kernel(
    keys, values, counters, capacity, sink_length, ring, blocks, heads,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """
    [`ops.append`]. Grid (1, batch · heads, 2): a program has the keys or the values of one sequence of one head.

    Args:
        keys, values (tuple): new token `[batch, heads, 1, D]` and its strides, exact slots `[batch, heads, slots, D]`
            and their strides, and buffers and constants as `quantize_kernel` has them.
        counters: see `LayerStates`.
        capacity, sink_length, ring: tokens in all, and slots of the sinks and of the recent window.
        blocks: of the codes of one sequence.
        RING: whether there is a recent window.
    """
    if tl.program_id(2) == 0:
        _step(keys, counters, capacity, sink_length, ring, blocks, heads, KEYS, 0, RING)
    else:
        _step(values, counters, capacity, sink_length, ring, blocks, heads, VALUES, 1, RING)
