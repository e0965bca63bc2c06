"""The statistics of keys for conditioning, with Triton: three launches in place of the torch reference's hundred."""

import torch
import triton
import triton.language as tl

from .launch import DTYPES, INTERPRETED, on_other_device, run
from .reference_statistics import ALIKE, LANDMARKS, MOST_ALIKE

# Programs per head, each of which sums a part of the tokens.
PARTS = 8
# Rows that each writes: sums of channels, squares around their mean, two times two sums of rotated pairs, a count.
ROWS = tl.constexpr(7)
# Tokens that a program compares with the landmarks.
COMPARED = 32


def supports(keys: torch.Tensor, values: torch.Tensor, *_) -> str | None:
    """`None` if the kernels can read these keys and values, else the reason why not, in words."""
    for name, states in (("keys", keys), ("values", values)):
        if states.dtype not in DTYPES:
            return f"the {name} are {states.dtype}"
    if keys.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {keys.device.type}"
    return None


def channel_statistics(keys, values, query_energy, valid, turns, least_tokens: int, least_energy: float):
    """[`ops.channel_statistics`]."""
    if on_other_device(keys.device):
        with torch.cuda.device(keys.device):
            return channel_statistics(keys, values, query_energy, valid, turns, least_tokens, least_energy)
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    batch, heads, tokens, head_dim = keys.shape
    mean, scale = keys.new_empty((2, heads, 1, head_dim), dtype=torch.float32)
    found = keys.new_empty(4, dtype=torch.int32)
    sums = keys.new_empty((PARTS, heads, ROWS.value, head_dim), dtype=torch.float32)
    seen = sums if valid is None else valid.view(torch.uint8)
    strides = (0, 0) if valid is None else valid.stride()
    different = _count_different(values, seen, strides, valid is not None)
    undo, turn = (sums, sums) if turns is None else map(torch.view_as_real, turns)
    pairs = 0 if turns is None else len(turn)
    padded = triton.next_power_of_2(head_dim)
    shape = head_dim, padded, pairs
    constants = *shape, max(16, triton.next_power_of_2(pairs)), valid is not None, 32 if padded <= 128 else 16
    args = keys, seen, undo, sums, *keys.stride()[:3], *strides, tokens, batch * tokens, *constants
    # A compiled kernel may rely on aligned addresses and 32-bit strides.
    key = sum_kernel, keys.device.index, keys.dtype, keys.data_ptr() % 16, seen.data_ptr() % 16
    key = *key, max(keys.stride()) >= 2**31, *constants
    run(sum_kernel, key, (heads, PARTS, 1), keys.device, args, {})
    energy = sums if query_energy is None else query_energy.contiguous()
    all_heads = triton.next_power_of_2(heads)
    constants = *shape, all_heads, PARTS, query_energy is not None
    sizes = heads, len(different), least_tokens, least_energy
    args = sums, energy, turn, different, mean, scale, found, *sizes, *constants
    key = finish_kernel, keys.device.index, energy.data_ptr() % 16, *constants
    run(finish_kernel, key, (1, 1, 1), keys.device, args, {"num_warps": max(4, min(16, all_heads * padded // 512))})
    return mean, None if query_energy is None else scale, found


def _count_different(values: torch.Tensor, seen: torch.Tensor, strides: tuple, mask: bool) -> torch.Tensor:
    """Numbers of different tokens, int32, one for every `COMPARED` tokens."""
    batch, heads, tokens, head_dim = values.shape
    count = triton.cdiv(batch * tokens, COMPARED)
    different = values.new_empty(count, dtype=torch.int32)
    constants = head_dim, min(64, triton.next_power_of_2(head_dim)), mask, COMPARED, LANDMARKS, MOST_ALIKE, ALIKE
    args = values, seen, different, *values.stride()[:3], *strides, heads, tokens, batch * tokens, *constants
    key = compare_kernel, values.device.index, values.dtype, values.data_ptr() % 16, seen.data_ptr() % 16
    run(compare_kernel, (*key, max(values.stride()) >= 2**31, *constants), (count, 1, 1), values.device, args, {})
    return different


@triton.jit(do_not_specialize="value_b value_h value_t valid_b valid_t heads tokens rows".split())
def compare_kernel(
    values, valid, different, value_b, value_h, value_t, valid_b, valid_t, heads, tokens, rows,
    DIM: tl.constexpr, CHUNK: tl.constexpr, MASK: tl.constexpr, TILE: tl.constexpr,
    LANDMARKS: tl.constexpr, MOST_ALIKE: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Counts `reference_statistics.different_tokens` among `TILE` tokens of all sequences. Grid (tiles)."""
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    counts = row < rows
    at = tl.arange(0, LANDMARKS).to(tl.int64) * 40503 % 65536 * rows // 65536
    known = at < rows
    if MASK:
        counts &= tl.load(valid + row // tokens * valid_b + row % tokens * valid_t, mask=counts, other=0) != 0
        known &= tl.load(valid + at // tokens * valid_b + at % tokens * valid_t, mask=known, other=0) != 0
    of_rows = values + row // tokens * value_b + row % tokens * value_t
    of_landmarks = values + at // tokens * value_b + at % tokens * value_t
    product = tl.zeros([TILE, LANDMARKS], tl.float32)
    row_squares = tl.zeros([TILE], tl.float32)
    squares = tl.zeros([LANDMARKS], tl.float32)
    for head in range(heads):
        for start in range(0, DIM, CHUNK):
            d = start + tl.arange(0, CHUNK)
            offset = head * value_h + d
            x = tl.load(of_rows[:, None] + offset[None, :], mask=counts[:, None] & (d < DIM)[None, :], other=0)
            y = tl.load(of_landmarks[None, :] + offset[:, None], mask=known[None, :] & (d < DIM)[:, None], other=0)
            x = x.to(tl.float32)
            y = y.to(tl.float32)
            product = tl.dot(x, y, product)
            row_squares += tl.sum(x * x, axis=1)
            squares += tl.sum(y * y, axis=0)
    alike = known[None, :] & (product > ALIKE * tl.sqrt(row_squares)[:, None] * tl.sqrt(squares)[None, :])
    # Each landmark is like itself.
    others = tl.sum(alike.to(tl.int32), axis=1) - 1
    counts &= LANDMARKS * others < MOST_ALIKE * tl.sum(known.to(tl.int32), axis=0)
    tl.store(different + tl.program_id(0), tl.sum(counts.to(tl.int32), axis=0))


@triton.jit(do_not_specialize="key_b key_h key_t valid_b valid_t tokens rows".split())
def sum_kernel(
    keys, valid, undo, sums, key_b, key_h, key_t, valid_b, valid_t, tokens, rows,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAIRS: tl.constexpr, PAIRS_PAD: tl.constexpr, MASK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """
    For the valid tokens of one part: sums by channel, squares around the part's mean, sums of pairs of channels rotated
    by `undo` (halves, then neighbours; real parts, then imaginary parts), and their number. Grid (heads, parts).
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    first = (part * rows) // parts
    last = ((part + 1) * rows) // parts
    d = tl.arange(0, DIM_PAD)
    i = tl.arange(0, PAIRS_PAD)
    count = 0.0
    total = tl.zeros([DIM_PAD], tl.float32)
    spread = tl.zeros([DIM_PAD], tl.float32)
    halves_real = tl.zeros([PAIRS_PAD], tl.float32)
    halves_imaginary = tl.zeros([PAIRS_PAD], tl.float32)
    next_real = tl.zeros([PAIRS_PAD], tl.float32)
    next_imaginary = tl.zeros([PAIRS_PAD], tl.float32)
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        sequence = (row // tokens).to(tl.int64)
        token = (row % tokens).to(tl.int64)
        counts = row < last
        if MASK:
            counts = counts & (tl.load(valid + sequence * valid_b + token * valid_t, mask=counts, other=0) != 0)
        at = (keys + sequence * key_b + head.to(tl.int64) * key_h + token * key_t)[:, None]
        x = tl.load(at + d[None, :], mask=counts[:, None] & (d < DIM)[None, :], other=0).to(tl.float32)
        here = tl.sum(counts.to(tl.float32), axis=0)
        tile_total = tl.sum(x, axis=0)
        # Rounded like the mean below, so that equal keys have no spread.
        tile_mean = tl.div_rn(tile_total, tl.maximum(here, 1.0))
        away = tl.where(counts[:, None], x - tile_mean[None, :], 0.0)
        # Squares of the union: the squares of each, plus that of the distance between their means.
        distance = tile_mean - tl.div_rn(total, tl.maximum(count, 1.0))
        spread += tl.sum(away * away, axis=0) + distance * distance * (count * here / tl.maximum(count + here, 1.0))
        total += tile_total
        count += here
        if PAIRS > 0:
            mask = counts[:, None] & (i < PAIRS)[None, :]
            real = tl.load(undo + (token[:, None] * PAIRS + i[None, :]) * 2, mask=mask, other=0)
            imaginary = tl.load(undo + (token[:, None] * PAIRS + i[None, :]) * 2 + 1, mask=mask, other=0)
            x = tl.load(at + i[None, :], mask=mask, other=0).to(tl.float32)
            y = tl.load(at + PAIRS + i[None, :], mask=mask, other=0).to(tl.float32)
            halves_real += tl.sum(x * real - y * imaginary, axis=0)
            halves_imaginary += tl.sum(x * imaginary + y * real, axis=0)
            x = tl.load(at + 2 * i[None, :], mask=mask, other=0).to(tl.float32)
            y = tl.load(at + 2 * i[None, :] + 1, mask=mask, other=0).to(tl.float32)
            next_real += tl.sum(x * real - y * imaginary, axis=0)
            next_imaginary += tl.sum(x * imaginary + y * real, axis=0)
    to = sums + (part * tl.num_programs(0) + head) * ROWS * DIM
    tl.store(to + d, total, mask=d < DIM)
    tl.store(to + DIM + d, spread, mask=d < DIM)
    if PAIRS > 0:
        tl.store(to + 2 * DIM + i, halves_real, mask=i < PAIRS)
        tl.store(to + 3 * DIM + i, halves_imaginary, mask=i < PAIRS)
        tl.store(to + 4 * DIM + i, next_real, mask=i < PAIRS)
        tl.store(to + 5 * DIM + i, next_imaginary, mask=i < PAIRS)
    tl.store(to + 6 * DIM, count)


@triton.jit
def _sum_parts(at, stride, mask, PARTS: tl.constexpr):
    out = tl.load(at, mask=mask, other=0)
    for part in tl.static_range(1, PARTS):
        out += tl.load(at + part * stride, mask=mask, other=0)
    return out


@triton.jit(do_not_specialize=["heads", "counts", "least_tokens"])
def finish_kernel(
    sums, query_energy, turn, different, mean_out, scale_out, found_out, heads, counts, least_tokens, least_energy,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Statistics from the sums, in one program: all heads together decide if pairs are halves or neighbours."""
    h = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DIM_PAD)[None, :]
    inside = (h < heads) & (d < DIM)
    stride = heads * ROWS * DIM
    of_head = sums + h * ROWS * DIM
    count = 0.0
    for part in tl.static_range(PARTS):
        count += tl.load(sums + part * stride + 6 * DIM)
    tokens = tl.maximum(count, 1.0)
    mean = tl.div_rn(_sum_parts(of_head + d, stride, inside, PARTS), tokens)
    energy = _sum_parts(of_head + DIM + d, stride, inside, PARTS)
    for part in tl.static_range(PARTS):
        here = tl.load(sums + part * stride + 6 * DIM)
        total = tl.load(of_head + part * stride + d, mask=inside, other=0)
        away = tl.div_rn(total, tl.maximum(here, 1.0)) - mean
        energy += here * away * away
    energy /= tokens
    best = mean
    if PAIRS > 0:
        paired = inside & (d < 2 * PAIRS)
        lost = tl.zeros([HEADS, DIM_PAD], tl.float32)
        left = tl.sum(tl.sum(tl.where(paired, mean * mean, 0.0), axis=1), axis=0)
        for layout in tl.static_range(2):
            if layout == 0:
                pair = d % PAIRS
                second = d >= PAIRS
                other = (d + PAIRS) % (2 * PAIRS)
            else:
                pair = d // 2
                second = d % 2 == 1
                other = d ^ 1
            row = of_head + (2 + 2 * layout) * DIM + pair
            real = _sum_parts(row, stride, paired, PARTS) / tokens
            imaginary = _sum_parts(row + DIM, stride, paired, PARTS) / tokens
            other_mean = _sum_parts(of_head + other, stride, paired, PARTS) / tokens
            turn_real = tl.load(turn + pair * 2, mask=d < 2 * PAIRS, other=0)
            turn_imaginary = tl.load(turn + pair * 2 + 1, mask=d < 2 * PAIRS, other=0)
            found_real = real * turn_real - imaginary * turn_imaginary
            found_imaginary = real * turn_imaginary + imaginary * turn_real
            found = tl.where(paired, tl.where(second, found_imaginary, found_real), mean)
            less = mean * mean + other_mean * other_mean - found_real * found_real - found_imaginary * found_imaginary
            # Every pair occurs twice.
            remains = tl.where(paired, (real * real + imaginary * imaginary) * 0.5, 0.0)
            remains = tl.sum(tl.sum(remains, axis=1), axis=0)
            better = remains > left
            best = tl.where(better, found, best)
            lost = tl.where(better, tl.where(paired, tl.maximum(less, 0.0) * 0.5, 0.0), lost)
            left = tl.maximum(remains, left)
        energy += lost
    centred = _all(inside, tl.abs(best) < float("inf")) & (count > 0)
    tl.store(mean_out + h * DIM + d, tl.where(centred, best, 0.0), mask=inside)
    tl.store(found_out, centred.to(tl.int32))
    enough = 0
    for start in range(0, counts, 128):
        at = start + tl.arange(0, 128)
        enough += tl.sum(tl.load(different + at, mask=at < counts, other=0), axis=0)
    enough = enough >= least_tokens
    scaled = centred & False
    if SCALE:
        of_queries = _floor(tl.load(query_energy + h * DIM + d, mask=inside, other=0), least_energy, DIM)
        scale = tl.sqrt_rn(tl.sqrt_rn(of_queries / _floor(energy, least_energy, DIM)))
        # The overall factor is free: keep norms about as they were.
        log = tl.where(inside, tl.log(scale), 0.0)
        scale = scale / tl.exp(tl.sum(log, axis=1) / DIM)[:, None]
        scaled = centred & enough & _all(inside, (scale > 0) & (scale < float("inf")))
        tl.store(scale_out + h * DIM + d, tl.where(scaled, scale, 1.0), mask=inside)
    tl.store(found_out + 1, scaled.to(tl.int32))
    tl.store(found_out + 2, enough.to(tl.int32))
    tl.store(found_out + 3, count.to(tl.int32))


@triton.jit
def _all(inside, condition):
    return tl.min(tl.min(tl.where(inside, condition.to(tl.int32), 1), axis=1), axis=0) == 1


@triton.jit
def _floor(energy, least, DIM: tl.constexpr):
    return tl.maximum(energy, least * (tl.sum(energy, axis=1) / DIM)[:, None])
