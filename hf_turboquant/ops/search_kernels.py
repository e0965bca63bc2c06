"""How kernels choose codes: the nearest, the closest in direction, or together with the signs of a sketch."""

import triton
import triton.language as tl


@triton.jit
def dimensions(columns, D: tl.constexpr, DP: tl.constexpr):
    # A padded tile pads both halves of the dimensions, because the 1-bit plane of values pairs d with d + D / 2.
    if D == DP:
        dims = columns
        valid = columns >= 0
    else:
        within = columns % (DP // 2)
        dims = columns // (DP // 2) * (D // 2) + within
        valid = within < D // 2
    return dims, valid


@triton.jit
def nearest_codes(y, boundaries, centroids, CODE_BITS: tl.constexpr):
    """Codes (int32) and values of the nearest centroids. By symmetry, |y| needs only half of the boundaries."""
    HALF: tl.constexpr = 1 << (CODE_BITS - 1)
    # Codes are sign and magnitude at 4 bits, and ascend with the values at fewer bits.
    SMALLEST: tl.constexpr = 0 if CODE_BITS == 4 else HALF
    size = tl.abs(y)
    # One select per boundary finds both: the index is in the last three bits of the value, an error under 2^-20 of it.
    best = tl.zeros(y.shape, tl.int32) + (tl.load(centroids + SMALLEST).to(tl.int32, bitcast=True) & -8)
    for i in tl.static_range(1, HALF):
        value = tl.load(centroids + SMALLEST + i).to(tl.int32, bitcast=True)
        best = tl.where(size > tl.load(boundaries + HALF + i - 1), (value & -8) | i, best)
    index, value = best & 7, best.to(tl.float32, bitcast=True)
    negative = y <= 0
    if CODE_BITS == 4:
        codes = tl.where(negative, index + HALF, index)
    else:
        codes = tl.where(negative, HALF - 1 - index, HALF + index)
    return codes, tl.where(negative, -value, value)


@triton.jit
def int8_codes(z):
    """For every row, codes (int32, bytes in two's complement) and their scale: see `reference._encode_int8`."""
    scale = tl.max(tl.abs(z), axis=1) * (1 / 127)
    # Rounds to the nearest bf16 by hand, because codes beyond 127 would come of cutting.
    bits = scale.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    scale = tl.where(scale == scale, rounded, scale)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    y = z * (1 / tl.where(scale == 0, 1.0, scale))[:, None]
    # What is not finite has no code.
    codes = tl.where(tl.abs(y) < 128, tl.floor(y + 0.5), 0.0).to(tl.int32) & 255
    return codes, scale


@triton.jit
def best_stretch(
    y, valid, boundaries, centroids, CODE_BITS: tl.constexpr,
    COUNT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """For every row, the factor before rounding that gives the codes closest in direction."""
    best = tl.full([y.shape[0]], 1.0, tl.float32)
    largest = tl.zeros([y.shape[0]], tl.float32)
    # Exact in fp32, so that the reference uses the same factors.
    stretch = tl.full([y.shape[0]], FIRST, tl.float32)
    for _ in range(COUNT):
        _, nearest = nearest_codes(y * stretch[:, None], boundaries, centroids, CODE_BITS)
        nearest = tl.where(valid[None, :], nearest, 0.0)
        cosine = tl.sum(y * nearest, axis=1) / tl.sqrt_rn(tl.sum(nearest * nearest, axis=1))
        better = cosine > largest
        best = tl.where(better, stretch, best)
        largest = tl.where(better, cosine, largest)
        stretch += SECOND - FIRST
    return best


@triton.jit
def _soft_codes(target, centroids, unit, width, CODE_BITS: tl.constexpr):
    """Sum of clamps around all boundaries, each a ramp of `width` half distances, in units of 1 / `unit`."""
    HALF: tl.constexpr = 1 << (CODE_BITS - 1)
    SMALLEST: tl.constexpr = 0 if CODE_BITS == 4 else HALF
    lowest = tl.load(centroids + SMALLEST) * unit
    out = tl.clamp(target, -width * lowest, width * lowest)
    if HALF > 1:
        # Boundaries lie symmetrically around zero, so |target| needs only half of them.
        size = tl.abs(target)
        total = tl.zeros(target.shape, tl.float32)
        offset = 0.0
        for i in tl.static_range(1, HALF):
            low = tl.load(centroids + SMALLEST + i - 1) * unit
            high = tl.load(centroids + SMALLEST + i) * unit
            start = (low + high - width * (high - low)) / 2
            total += tl.clamp(size, start, start + width * (high - low))
            offset += start
        total -= offset
        out += tl.where(target < 0, -total, total)
    return out


@triton.jit
def _sketch_rows(x, matrix, T: tl.constexpr):
    """x Sᵀ: rows for rows `[T, DP]`, but a column for a single row, so that S need not be transposed for either."""
    if T == 1:
        out = tl.sum(matrix.to(tl.float32) * x, axis=1)[:, None]
    else:
        out = tl.dot(x.to(matrix.dtype), tl.trans(matrix), input_precision="ieee")
    return out


@triton.jit
def _unsketch(signs, matrix, T: tl.constexpr):
    """signs S, the transpose of `_sketch_rows`."""
    if T == 1:
        out = tl.sum(matrix.to(tl.float32) * signs, axis=0)[None, :]
    else:
        out = tl.dot(signs.to(matrix.dtype), matrix, input_precision="ieee")
    return out


@triton.jit
def _rounded(
    y, part, matrix, boundaries, centroids, unit: tl.constexpr, sign_unit: tl.constexpr, CODE_BITS: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Codes and values nearest to y without `part`, the sketch of what these leave, and the part that its signs add."""
    codes, nearest = nearest_codes((y.to(tl.float32) - part) * (1 / unit), boundaries, centroids, CODE_BITS)
    sketched = _sketch_rows(y.to(tl.float32) - nearest * unit, matrix, T)
    part = _unsketch(tl.where(sketched >= 0, 1.0, -1.0), matrix, T) * sign_unit
    return codes, nearest, sketched, part


@triton.jit
def choose_jointly(
    y, valid, sketch, boundaries, centroids, CODE_BITS: tl.constexpr, ANNEALING: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """
    Codes (int32, with the sign of the sketch) and the two scales of unit vectors y `[T, DP]`: see
    `reference._choose_jointly`. Here y has norm √d, so that 16 bits are precise enough for the search.
    """
    GRID: tl.constexpr = ANNEALING[0]
    AMPLITUDE: tl.constexpr = ANNEALING[1]
    ROUNDS: tl.constexpr = ANNEALING[9] if T == 1 else ANNEALING[8]
    size: tl.constexpr = D**0.5
    dims, _ = dimensions(tl.arange(0, DP), D, DP)
    mask = valid[:, None] & valid[None, :]
    # S √d has entries of size one.
    matrix = tl.load(sketch + dims[:, None] * D + dims[None, :], mask=mask, other=0.0).to(OPERAND)
    y = (y * size).to(OPERAND)
    part = tl.zeros((T, DP), tl.float32)
    for index in range(ROUNDS):
        progress = index * (1.0 / (ROUNDS - 1))
        code_width = ANNEALING[2] + (ANNEALING[4] - ANNEALING[2]) * progress
        sign_width = ANNEALING[3] + (ANNEALING[5] - ANNEALING[3]) * progress
        target = y.to(tl.float32) - part
        soft = _soft_codes(target, centroids, size * GRID, code_width, CODE_BITS)
        soft = soft * ((1 + ANNEALING[6]) / code_width) - target * ANNEALING[6]
        # √d times the coordinates in an orthonormal basis.
        sketched = _sketch_rows(y.to(tl.float32) - soft, matrix, T)
        reach = AMPLITUDE * sign_width * size
        signs = tl.clamp(sketched, -reach, reach) * ((1 + ANNEALING[7]) / sign_width) - sketched * ANNEALING[7]
        part = _unsketch(signs * (1 / size), matrix, T) * (1 / size)
    codes = tl.zeros((T, DP), tl.int32)
    nearest = tl.zeros((T, DP), tl.float32)
    sketched = tl.zeros((DP, 1) if T == 1 else (T, DP), tl.float32)
    # Not unrolled, because products take long to compile.
    for _ in range(2):
        codes, nearest, sketched, part = _rounded(
            y, part, matrix, boundaries, centroids, size * GRID, AMPLITUDE / size, CODE_BITS, T
        )
    y = y.to(tl.float32) * (1 / size)
    # Both have norm one.
    part = tl.where(valid[None, :], part * (1 / (AMPLITUDE * size)), 0.0)
    nearest = tl.where(valid[None, :], nearest, 0.0)
    cc = tl.sum(nearest * nearest, axis=1)
    cs = tl.sum(nearest * part, axis=1)
    yc = tl.sum(y * nearest, axis=1)
    ys = tl.sum(y * part, axis=1)
    scale = yc - cs * ys
    sign_scale = cc * ys - cs * yc
    norm = scale * yc + sign_scale * ys
    if T == 1:
        sketched = tl.trans(sketched)
    codes = tl.where(sketched >= 0, codes | (1 << CODE_BITS), codes)
    return codes, scale / norm, sign_scale / norm
