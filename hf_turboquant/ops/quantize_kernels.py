"""The kernel that rotates, encodes, sketches, packs and appends; `quantize` launches it."""

import triton
import triton.language as tl

from .search_kernels import best_stretch, choose_jointly, dimensions, int8_codes, nearest_codes


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _precise_dot(x, matrix, acc, OPERAND: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x @ matrix, `[T, K]` by `[K, N]`; x is split into `TERMS` terms of `OPERAND`, the matrix into two."""
    if OPERAND == tl.float32:
        return tl.dot(x.to(tl.float32), matrix, acc, input_precision=PRECISION)
    high = matrix.to(OPERAND)
    low = (matrix - high.to(tl.float32)).to(OPERAND)
    x_high = x.to(OPERAND)
    acc = tl.dot(x_high, low, acc)
    if TERMS == 2:
        x_low = (x - x_high.to(tl.float32)).to(OPERAND)
        acc = tl.dot(x_low, high, acc)
    return tl.dot(x_high, high, acc)


@triton.jit
def _rotated(
    states, strides, transform, mean, factors, token, has_token,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = A (factors · (x - μ)) of shape `[T, DP]`, fp32, zero where there is no token or dimension."""
    dims, valid = dimensions(tl.arange(0, DP), D, DP)
    # 16-bit states stay as they are, and A (factors · μ) is subtracted from their product.
    LATE: tl.constexpr = mean is not None and T > 1 and OPERAND != tl.float32
    if T == 1:
        products = tl.zeros((DP, BK), tl.float32)
    else:
        z = tl.zeros((T, DP), tl.float32)
    if LATE:
        offset = tl.zeros((DP,), tl.float32)
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)
        mask = has_token[:, None] & (k < D)[None, :]
        x = tl.load(states + token[:, None] * strides[2] + k[None, :] * strides[3], mask=mask, other=0.0)
        if OPERAND == tl.float32 or T == 1:
            x = x.to(tl.float32)
            if mean is not None:
                x = tl.where(mask, x - tl.load(mean + k, mask=k < D, other=0.0)[None, :], 0.0)
        if T == 1:
            mask = valid[:, None] & (k < D)[None, :]
            matrix = tl.load(transform + dims[:, None] * D + k[None, :], mask=mask, other=0.0)
            if factors is not None:
                matrix *= tl.load(factors + k, mask=k < D, other=0.0)[None, :]
            products += matrix * x
        else:
            mask = valid[None, :] & (k < D)[:, None]
            matrix = tl.load(transform + dims[None, :] * D + k[:, None], mask=mask, other=0.0)
            if factors is not None:
                # Scale the matrix, so that the states stay exact in their dtype.
                matrix *= tl.load(factors + k, mask=k < D, other=0.0)[:, None]
            if LATE:
                offset += tl.sum(matrix * tl.load(mean + k, mask=k < D, other=0.0)[:, None], axis=0)
            z = _precise_dot(x, matrix, z, OPERAND, 1, PRECISION)
    if LATE:
        z = tl.where(has_token[:, None], z - offset[None, :], 0.0)
    if T == 1:
        z = tl.sum(products, axis=1)[None, :]
    return z


@triton.jit
def _sketched(
    r, sketch, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S r over the columns of r from `FIRST` on, of shape `[T, DP]`. Only its sign counts, so any scale will do."""
    e, e_valid = dimensions(tl.arange(0, DP), D, DP)
    d, d_valid = dimensions(FIRST + tl.arange(0, COLUMNS), D, DP)
    if T == 1:
        mask = e_valid[:, None] & d_valid[None, :]
        matrix = tl.load(sketch + e[:, None] * D + d[None, :], mask=mask, other=0.0)
        return tl.sum(matrix * r, axis=1)[None, :]
    mask = e_valid[None, :] & d_valid[:, None]
    matrix = tl.load(sketch + e[None, :] * D + d[:, None], mask=mask, other=0.0)
    # Both factors are far under one: the scales keep their low terms out of fp16's subnormals.
    return _precise_dot(r * 256, matrix * 256, tl.zeros((T, DP), tl.float32), OPERAND, 2, PRECISION)


@triton.jit
def _merge(pointers, packed, mask, shared):
    # Bits 0-7 of `packed` are new, bits 8-15 tell which of them to write; the others belong to earlier tokens.
    old = tl.load(pointers, mask=mask & (tl.zeros((1, 1), tl.int32) < shared), other=0).to(tl.int32)
    tl.store(pointers, (packed | (old & ~(packed >> 8))).to(tl.uint8), mask=mask)


@triton.jit
def _store_keys(
    plane, fields, block, base, shared, keep,
    WIDTH: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Packs fields `[T, DP]` of a block's tokens from `base` on; see the bit pictures in `packing`."""
    COUNT: tl.constexpr = 8 // WIDTH if WIDTH > 1 else 4
    position = base + tl.arange(0, T)
    column = tl.arange(0, DP)
    offset, valid = dimensions(tl.arange(0, DP // COUNT), D // COUNT, DP // COUNT)
    if WIDTH > 1:
        packed = tl.sum(tl.reshape(fields << (WIDTH * (column % COUNT))[None, :], (T, DP // COUNT, COUNT)), axis=2)
        pointers = plane + (block * 128 + position)[:, None] * (D // COUNT) + offset[None, :]
        tl.store(pointers, packed.to(tl.uint8), mask=keep[:, None] & valid[None, :])
    else:
        # Tokens r and r + 64 share a byte.
        PAIR: tl.constexpr = 2 if T == 128 else 1
        shift = (column % 2 + column % 4 // 2 * 4)[None, :] + (2 - position // 64 * 2)[:, None]
        packed = tl.sum(tl.reshape(fields << shift, (PAIR, T // PAIR, DP // 4, 4)), axis=3)
        packed = tl.sum(packed, axis=0)
        row = base % 64 + tl.arange(0, T // PAIR)
        pointers = plane + (block * 64 + row)[:, None] * (D // 4) + offset[None, :]
        _merge(pointers, packed, (row >= 0)[:, None] & valid[None, :], shared)


@triton.jit
def _store_values(
    plane, fields, block, base, shared, WIDTH: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Like `_store_keys`, for values: a byte holds tokens of one dimension (at one bit, of two)."""
    TILE: tl.constexpr = T > 1
    column = tl.arange(0, DP)
    position = base + tl.arange(0, T)
    odd = position % 2
    high = position // 64
    if WIDTH == 4:
        # h j ih il d -> d | j h ih
        packed = tl.reshape(fields << (4 * odd)[:, None], (2, 16, 2, 2, DP) if TILE else (1, 1, 1, 1, DP))
        packed = tl.permute(tl.sum(packed, axis=3), (3, 1, 0, 2))
        BYTES: tl.constexpr = 64
        first = base % 64 // 4 * 4 + base // 64 * 2 + base // 2 % 2
    else:
        # oh ol j ih il (h) d -> (h) d | j ol ih
        BYTES: tl.constexpr = 32
        first = base % 32 // 4 * 4 + base // 32 % 2 * 2 + base // 2 % 2
        if WIDTH == 2:
            shift = (4 * odd + 2 * high)[:, None]
            packed = tl.reshape(fields << shift, (2, 2, 8, 2, 2, DP) if TILE else (1, 1, 1, 1, 1, DP))
        else:
            shift = (4 * odd + high)[:, None] + (2 - column // (DP // 2) * 2)[None, :]
            packed = tl.reshape(fields << shift, (2, 2, 8, 2, 2, 2, DP // 2) if TILE else (1, 1, 1, 1, 1, 2, DP // 2))
            packed = tl.sum(packed, axis=5)
        packed = tl.permute(tl.sum(tl.sum(packed, axis=4), axis=0), (3, 1, 0, 2))
    ROWS: tl.constexpr = DP if WIDTH > 1 else DP // 2
    D_ROWS: tl.constexpr = D if WIDTH > 1 else D // 2
    packed = tl.reshape(packed, (ROWS, BYTES if TILE else 1))
    if WIDTH > 1:
        row, valid = dimensions(tl.arange(0, ROWS), D, DP)
    else:
        row = tl.arange(0, ROWS)
        valid = row < D_ROWS
    byte = first + tl.arange(0, BYTES if TILE else 1)
    pointers = plane + (block * D_ROWS + row)[:, None] * BYTES + byte[None, :]
    _merge(pointers, packed, valid[:, None] & (byte >= 0)[None, :], shared)


@triton.jit
def append_tile(states, side, tile, sequence, length, tokens, blocks, heads, SPEC: tl.constexpr, T: tl.constexpr):
    """Quantizes those of `tokens` tokens that are in tile `tile` of `sequence` (batch · heads + head)."""
    strides, buffers, constants = side
    planes, scales, residual_norms = buffers
    transform, transform_stride, mean, mean_stride, factors, factors_stride, sketch, boundaries, centroids = constants
    KEYS: tl.constexpr = SPEC[0]
    NBITS: tl.constexpr = SPEC[1]
    ESTIMATOR: tl.constexpr = SPEC[2]
    D: tl.constexpr = SPEC[3]
    DP: tl.constexpr = SPEC[4]
    BK: tl.constexpr = SPEC[5]
    OPERAND: tl.constexpr = SPEC[6]
    SKETCH_OPERAND: tl.constexpr = SPEC[7]
    PRECISION: tl.constexpr = SPEC[8]
    STRETCHES: tl.constexpr = SPEC[9]
    ANNEALING: tl.constexpr = SPEC[12]
    CODE_BITS: tl.constexpr = NBITS if sketch is None else NBITS - 1

    batch, head = sequence // heads, sequence % heads
    first = tile * T
    position = first + tl.arange(0, T)
    token = (position - length).to(tl.int64)
    # Positions after the last token are encoded too, because contents beyond the length are undefined.
    new = token >= 0
    has_token = new & (token < tokens)
    block = sequence * blocks + first // 128
    if T == 128:
        base = 0
    else:
        base = first % 128

    z = _rotated(
        states + batch * strides[0] + head * strides[1], strides, transform + head * transform_stride,
        mean if mean is None else mean + head * mean_stride,
        factors if factors is None else factors + head * factors_stride,
        token, has_token, T, D, DP, BK, OPERAND, PRECISION,
    )  # fmt: skip
    norm = tl.sqrt_rn(tl.sum(z * z, axis=1))
    # A zero vector has no direction: any will do, because its scale is zero.
    y = z * (1 / tl.maximum(norm, 1.1754943508222875e-38))[:, None]
    _, valid = dimensions(tl.arange(0, DP), D, DP)
    scale_offset = block * 128 + base + tl.arange(0, T)
    if ESTIMATOR == "int8":
        codes, scale = int8_codes(z)
    elif ANNEALING is not None:
        codes, scale, second_scale = choose_jointly(
            y, valid, sketch, boundaries, centroids, CODE_BITS, ANNEALING, T, D, DP, SKETCH_OPERAND
        )
        # ⟨ẑ, z⟩ = |z|². Without a direction, the scale found may be anything.
        scale = tl.where(norm == 0, 0.0, scale * norm)
        second_scale = tl.where(norm == 0, 0.0, second_scale * norm)
    else:
        if STRETCHES > 0:
            # From here on the norm of y is `stretch`.
            stretch = best_stretch(y, valid, boundaries, centroids, CODE_BITS, STRETCHES, SPEC[10], SPEC[11])
            y *= stretch[:, None]
        codes, nearest = nearest_codes(y, boundaries, centroids, CODE_BITS)
        scale = norm
        if ESTIMATOR == "rescaled":
            product = tl.sum(y * nearest, axis=1)
            if STRETCHES > 0:
                product /= stretch
            scale = norm / tl.where(norm == 0, 1.0, product)
        if sketch is not None:
            r = tl.where(valid[None, :], y - nearest, 0.0)
            # The y of a vector whose squares underflow may be huge.
            second_scale = tl.where(norm == 0, 0.0, norm * tl.sqrt_rn(tl.sum(r * r, axis=1)))
            if DP == 256:
                left, right = _halves(r, T, DP)
                product = _sketched(left, sketch, 0, 128, T, D, DP, SKETCH_OPERAND, PRECISION)
                product += _sketched(right, sketch, 128, 128, T, D, DP, SKETCH_OPERAND, PRECISION)
            else:
                product = _sketched(r, sketch, 0, DP, T, D, DP, SKETCH_OPERAND, PRECISION)
            codes = tl.where(product >= 0, codes | (1 << CODE_BITS), codes)
    tl.store(scales + scale_offset, scale.to(scales.dtype.element_ty, fp_downcast_rounding="rtne"), mask=has_token)
    if sketch is not None:
        second_scale = second_scale.to(residual_norms.dtype.element_ty, fp_downcast_rounding="rtne")
        tl.store(residual_norms + scale_offset, second_scale, mask=has_token)

    # Positive if bytes of this tile hold earlier tokens too.
    if T == 128:
        shared = length - first
    else:
        shared = 1
    if NBITS == 8:
        # Every byte is one token's.
        dims, _ = dimensions(tl.arange(0, DP), D, DP)
        row = base + tl.arange(0, T)
        if KEYS:
            at = (block * 128 + row)[:, None] * D + dims[None, :]
        else:
            at = (block * D + dims)[None, :] * 128 + row[:, None]
        tl.store(planes[0] + at, codes.to(tl.uint8), mask=has_token[:, None] & valid[None, :])
    elif NBITS == 3:
        low = tl.where(new[:, None], (codes & 3) | (3 << 8), 0)
        high = tl.where(new[:, None], (codes >> 2) | (1 << 8), 0)
        if KEYS:
            _store_keys(planes[0], low, block, base, shared, has_token, 2, T, D, DP)
            _store_keys(planes[1], high, block, base, shared, has_token, 1, T, D, DP)
        else:
            _store_values(planes[0], low, block, base, shared, 2, T, D, DP)
            _store_values(planes[1], high, block, base, shared, 1, T, D, DP)
    else:
        fields = tl.where(new[:, None], codes | ((1 << NBITS) - 1 << 8), 0)
        if KEYS:
            _store_keys(planes[0], fields, block, base, shared, has_token, NBITS, T, D, DP)
        else:
            _store_values(planes[0], fields, block, base, shared, NBITS, T, D, DP)


@triton.jit(do_not_specialize=["length", "tokens", "blocks", "heads"])
def quantize_kernel(
    first, second, length, tokens, blocks, heads, FIRST: tl.constexpr, SECOND: tl.constexpr, T: tl.constexpr
):
    """
    Appends tokens of one or two roles. Grid (tiles, batch · heads, roles).

    Args:
        first, second (tuple): states `[batch, heads, tokens, D]` and their side: strides, buffers, constants.
    """
    tile = length // T + tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    if SECOND is None:
        append_tile(first[0], first[1], tile, sequence, length, tokens, blocks, heads, FIRST, T)
    elif tl.program_id(2) == 0:
        append_tile(first[0], first[1], tile, sequence, length, tokens, blocks, heads, FIRST, T)
    else:
        append_tile(second[0], second[1], tile, sequence, length, tokens, blocks, heads, SECOND, T)
