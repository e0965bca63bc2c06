"""
The reference implementation of all operations in plain torch: runs everywhere, and the kernels are tested against it.

It works tile by tile, so that scratch memory does not grow with the sequence.
"""

from functools import wraps

import torch

from ..packing import BLOCK, pack, unpack
from ..quantizer import ROLES, Quantizer
from ..states import AttentionOptions, LayerStates
from ..storage import TokenBuffer

# Every operation has its reference in this module.
from .reference_statistics import channel_statistics  # noqa: F401

TILE = 32 * BLOCK


def full_precision(function):
    """`function`, one of whose arguments is a tensor, outside of autocast, which would round products to 16 bits."""

    @wraps(function)
    def run(*args, **kwargs):
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def encode(states: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Encodes by Algorithm 1 or 2 of TurboQuant, or with rescaled codes: see [`Quantizer`].

    Args:
        states (`torch.Tensor`): of shape `[batch, heads, tokens, head_dim]`.

    Returns:
        uint8 codes of the same shape (with `"qjl"` the sign of the sketch, 1 for +, is the highest bit), and the fp32
        `scales` and, with `"qjl"`, `residual_norms`, of shape `[batch, heads, tokens]`.
    """
    x = states.float()
    if quantizer.mean is not None:
        x = x - quantizer.mean
    if quantizer.scale is not None:
        x = x * quantizer.scale
    return _encode(x @ quantizer.transform.mT, quantizer)


def _encode(z: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if quantizer.estimator == "int8":
        return _encode_int8(z)
    norms = torch.linalg.vector_norm(z, dim=-1)
    # A zero vector has no direction: any will do, because its scale is zero.
    y = (z / norms.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).nan_to_num_()
    if quantizer.annealing is not None:
        return _encode_jointly(y, norms, quantizer)
    codes, nearest = _nearest(y * _stretch(y.abs(), quantizer), quantizer)
    if quantizer.estimator == "mse":
        return codes, {"scales": norms}
    if quantizer.estimator == "rescaled":
        product = torch.linalg.vecdot(y, nearest)
        return codes, {"scales": torch.where(norms == 0, norms, norms / product)}
    residual = y - nearest
    codes = _add_signs(codes, residual @ quantizer.sketch.mT, quantizer)
    return codes, {"scales": norms, "residual_norms": norms * torch.linalg.vector_norm(residual, dim=-1)}


def _encode_int8(z: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The nearest whole multiples of a scale that two bytes hold: see [`Quantizer`]."""
    # Rounding it to the nearest cannot take a code beyond 127, because 127 (1 + 2⁻⁸) is under 127.5.
    scale = (z.abs().amax(-1) * (1 / 127)).bfloat16().float()
    # Smaller ones have no inverse.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    levels = (z * (1 / torch.where(scale == 0, 1.0, scale)).unsqueeze(-1) + 0.5).floor_()
    return levels.nan_to_num_(0).to(torch.int8).view(torch.uint8), {"scales": scale}


def _encode_jointly(y, norms, quantizer: Quantizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and signs chosen together, and the scales that minimise the error of their sum: see [`Quantizer`]."""
    codes, nearest, sketched, signs = _choose_jointly(y, quantizer)
    # It has norm one, like y.
    part = signs @ quantizer.sketch
    pairs = (nearest, nearest), (nearest, part), (y, nearest), (y, part)
    cc, cs, yc, ys = (torch.linalg.vecdot(*pair) for pair in pairs)
    scale, sign_scale = yc - cs * ys, cc * ys - cs * yc
    # ⟨ẑ, z⟩ = |z|²
    factor = norms / (scale * yc + sign_scale * ys)
    scales = {"scales": scale * factor, "residual_norms": sign_scale * factor}
    scales = {name: torch.where(norms == 0, norms, value) for name, value in scales.items()}
    return _add_signs(codes, sketched, quantizer), scales


def _choose_jointly(y: torch.Tensor, quantizer: Quantizer):
    """Codes, their values, S (y - c) and its signs, found in the rounds of `quantizer.annealing`."""
    annealing, size = quantizer.annealing, quantizer.head_dim**-0.5
    rounds = annealing.rounds if y.shape[-2] > 1 else annealing.single_rounds
    S = quantizer.sketch / size
    amplitude = annealing.amplitude * size
    values = (quantizer.centroids.sort().values * annealing.grid).tolist()
    ramps = [((low + high) / 2, (high - low) / 2) for low, high in zip(values, values[1:], strict=False)]
    code_overshoot, sign_overshoot = annealing.overshoots
    part = torch.zeros_like(y)
    for index in range(rounds):
        progress = index / (rounds - 1)
        code_width, sign_width = (a + (b - a) * progress for a, b in zip(annealing.first, annealing.last, strict=True))
        target = y - part
        # A soft step between two levels is a clamp. All steps lie symmetrically around zero, so their offsets cancel.
        codes = torch.zeros_like(y)
        for middle, half in ramps:
            codes += target.clamp(middle - code_width * half, middle + code_width * half)
        codes = codes.mul_((1 + code_overshoot) / code_width).sub_(target, alpha=code_overshoot)
        sketched = (y - codes) @ S.mT
        reach = amplitude * sign_width
        signs = sketched.clamp(-reach, reach).mul_((1 + sign_overshoot) / sign_width)
        part = signs.sub_(sketched, alpha=sign_overshoot) @ S
    for _ in range(2):
        codes, nearest = _nearest((y - part) / annealing.grid, quantizer)
        sketched = (y - annealing.grid * nearest) @ S.mT
        # `torch.where` would give them the default dtype.
        signs = (sketched >= 0).float() * 2 - 1
        part = amplitude * signs @ S
    return codes, nearest, sketched, signs


def _add_signs(codes: torch.Tensor, sketched: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    return codes | ((sketched >= 0).to(torch.uint8) << quantizer.code_bits)


def _nearest(y: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values of the nearest centroids."""
    rank = _rank(y.abs(), quantizer)
    # A codebook is symmetric.
    positive = len(quantizer.boundaries) // 2
    rank = torch.where(y > 0, rank + positive + 1, positive - rank)
    codes = quantizer.ranks_to_codes[rank]
    return codes, quantizer.centroids[codes.int()]


def _rank(size: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """The number of positive boundaries below each of `size`, which must not be negative; int32."""
    rank = torch.zeros(size.shape, dtype=torch.int32, device=size.device)
    # There are seven at most: on a CPU this is several times as fast as `bucketize`.
    for boundary in quantizer.boundaries[len(quantizer.boundaries) // 2 + 1 :]:
        rank += size > boundary
    return rank


def _stretch(size: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """For every vector, the factor before rounding that gives the codes closest in direction, of shape `[..., 1]`."""
    best = torch.ones_like(size[..., :1])
    largest = torch.zeros_like(best)
    values = quantizer.centroids.sort().values[len(quantizer.centroids) // 2 :]
    for stretch in quantizer.stretches:
        nearest = values[_rank(size * stretch, quantizer)]
        cosine = torch.linalg.vecdot(size, nearest) / torch.linalg.vector_norm(nearest, dim=-1)
        better = cosine.unsqueeze(-1) > largest
        best, largest = torch.where(better, stretch, best), torch.where(better, cosine.unsqueeze(-1), largest)
    return best


def decode(codes: torch.Tensor, scales: dict[str, torch.Tensor], quantizer: Quantizer) -> torch.Tensor:
    """Inverts [`encode`] up to quantization; returns ẑ, still transformed and centred, fp32, shaped like `codes`."""
    norms = scales["scales"].float().unsqueeze(-1)
    if quantizer.estimator != "qjl":
        return quantizer.centroids[codes.int()] * norms
    signs = (codes >> quantizer.code_bits).float() * 2 - 1
    nearest = quantizer.centroids[(codes & (2**quantizer.code_bits - 1)).int()]
    nearest *= norms
    return nearest + (signs @ quantizer.sketch) * scales["residual_norms"].float().unsqueeze(-1)


def quantize(*parts: tuple[torch.Tensor, Quantizer, TokenBuffer]) -> None:
    """[`ops.quantize`] to buffers that have the capacity. Their lengths change last."""
    for part in parts:
        _quantize(*part)


@full_precision
def _quantize(states: torch.Tensor, quantizer: Quantizer, buffer: TokenBuffer) -> None:
    for tile in states.split(TILE, dim=2):
        codes, scales = encode(tile, quantizer)
        first, offset = divmod(buffer.length, BLOCK)
        tokens = codes.shape[2]
        if offset:
            # A partly filled block is read, completed and written back; this is exact, because codes are integers.
            started = {name: plane[:, :, first : first + 1] for name, plane in _planes(buffer).items()}
            started = unpack(started, quantizer.nbits, quantizer.role, quantizer.head_dim)
            codes = torch.cat([started[:, :, :offset], codes], dim=2)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[2] % BLOCK))
        for name, plane in pack(codes, quantizer.nbits, quantizer.role).items():
            buffer[name][:, :, first : first + plane.shape[2]] = plane
        for name, scale in scales.items():
            # A view, not `flatten`, which could write to a copy.
            by_token = buffer[name].view(*buffer[name].shape[:2], -1)
            by_token[:, :, buffer.length : buffer.length + tokens] = scale
        buffer.length += tokens


def append(states: LayerStates, new: dict[str, torch.Tensor]) -> None:
    """[`ops.append`], with lengths fetched from the device."""
    tokens, capacity, length = new["keys"].shape[2], states.kv_len, states.measured().kv_len
    if states.counters is not None and length + tokens > capacity:
        raise ValueError(
            f"A cache with `max_cache_len={capacity}` must get no more tokens than that, got {tokens} after {length}. "
            "Make a larger one, or `reset()` it."
        )
    # Without detach, buffers would keep every autograd graph alive.
    new = {role: state.detach() for role, state in new.items()}
    for index in range(tokens):
        _append_one(states, {role: state[:, :, index : index + 1] for role, state in new.items()})


def _append_one(states: LayerStates, new: dict[str, torch.Tensor]) -> None:
    sinks, ring = states.sink_length, states.ring
    now = states.measured()
    quantized = now.quantized
    leaves = now.kv_len + 1 - sinks - (ring if now.window is None else now.window) > quantized
    if leaves:
        # If no recent tokens stay exact, the new token itself leaves.
        slot = sinks + quantized % ring if sinks + quantized < now.kv_len else None
        for role, state in new.items():
            leaving = state if slot is None else states.exact[role][:, :, slot : slot + 1]
            # The caller updates its length, or it is in the counters.
            buffer = now.codes[role].snapshot()
            buffer.length = quantized
            _quantize(leaving, states.quantizers[role], buffer)
    if now.kv_len < sinks or ring:
        # Everything that can run out of memory is done: the new token may now overwrite the slot of the one that left.
        slot = now.kv_len if now.kv_len < sinks else sinks + (now.kv_len - sinks) % ring
        for role, state in new.items():
            states.exact[role][:, :, slot : slot + 1] = state
    if states.counters is not None:
        states.counters[..., 0] += 1
        states.counters[..., 1] += leaves


def codes_of(buffer: TokenBuffer, quantizer: Quantizer, start: int, stop: int):
    """Codes and scales of tokens `start` to `stop`, as [`encode`] returns them (scales in their stored dtype)."""
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    planes = {name: plane[:, :, blocks] for name, plane in _planes(buffer).items()}
    codes = unpack(planes, quantizer.nbits, quantizer.role, quantizer.head_dim)
    offset = blocks.start * BLOCK
    scales = {
        name: tensor.flatten(2)[:, :, start:stop] for name, tensor in buffer.tensors.items() if "plane" not in name
    }
    return codes[:, :, start - offset : stop - offset], scales


@full_precision
def dequantize(buffer: TokenBuffer, quantizer: Quantizer, out: torch.Tensor) -> None:
    """Dequantizes the tokens of `buffer` into `out`, of shape `[batch, heads, buffer.length, head_dim]`, any dtype."""
    for start in range(0, buffer.length, TILE):
        stop = min(start + TILE, buffer.length)
        codes, scales = codes_of(buffer, quantizer, start, stop)
        x = decode(codes, scales, quantizer) @ quantizer.dual
        x = x if quantizer.scale is None else x / quantizer.scale
        out[:, :, start:stop] = x if quantizer.mean is None else x + quantizer.mean


@full_precision
def scores(query: torch.Tensor, states: LayerStates, options: AttentionOptions) -> torch.Tensor:
    """The logits of [`ops.scores`], fp32."""
    if states.counters is not None:
        capacity, states = states.kv_len, states.measured()
        out = scores(query, states, options)
        return torch.nn.functional.pad(out, (0, capacity - states.kv_len), value=-torch.inf)
    out = query.new_empty((*query.shape[:3], states.kv_len), dtype=torch.float32)
    for start, logits, _, _ in _pieces(query, states, options):
        out[..., start : start + logits.shape[-1]] = logits
    return out


@full_precision
def attention(query: torch.Tensor, states: LayerStates, options: AttentionOptions) -> torch.Tensor:
    """The output of [`ops.attention`], tile by tile with an online softmax (arXiv 2205.14135), in fp32 throughout."""
    states = states.measured()
    shape = (*query.shape[:3], states.exact["values"].shape[-1])
    # For every row, the largest logit and the sums of exponentials and weighted values, for exact tokens and for codes.
    largest = query.new_full((*shape[:3], 1), -torch.inf, dtype=torch.float32)
    totals = [torch.zeros_like(largest), torch.zeros_like(largest)]
    outputs = [query.new_zeros(shape, dtype=torch.float32) for _ in range(2)]
    if options.sinks is not None:
        largest = largest.maximum(options.sinks.float().view(1, -1, 1, 1))
        totals[False] += 1
    for _, logits, values, coded in _pieces(query, states, options):
        new_largest = largest.maximum(logits.amax(-1, keepdim=True))
        # A row that has seen nothing yet has no finite maximum.
        finite = torch.where(new_largest == -torch.inf, 0, new_largest)
        decay, weights = (largest - finite).exp(), (logits - finite).exp_()
        for part in (*totals, *outputs):
            part *= decay
        totals[coded] += weights.sum(-1, keepdim=True)
        outputs[coded] += (weights.reshape(*values.shape[:2], -1, values.shape[2]) @ values).reshape(shape)
        largest = new_largest
    quantizer = states.quantizers["values"]
    decoded = outputs[True].reshape(*states.exact["values"].shape[:2], -1, shape[-1]) @ quantizer.dual
    out = outputs[False] + decoded.reshape(shape)
    if quantizer.mean is not None:
        out += totals[True] * quantizer.mean.repeat_interleave(shape[1] // quantizer.mean.shape[0], dim=0)
    # A row that may attend to nothing gives zeros.
    total = totals[False] + totals[True]
    return torch.where(total == 0, 0, out / total).to(query.dtype)


def _pieces(query: torch.Tensor, states: LayerStates, options: AttentionOptions):
    """
    Yields, tile by tile: position, masked logits `[batch, num_attention_heads, query_length, tokens]`, values `[batch,
    num_key_value_heads, tokens, head_dim]` in fp32, and whether they come from codes (such values are still
    transformed).
    """
    quantizer = states.quantizers["keys"]
    shape = query.shape[:3]
    # The queries of one KV head are rows of one matrix.
    rows = query.float().reshape(query.shape[0], states.exact["keys"].shape[1], -1, query.shape[-1])

    def finish(products: torch.Tensor, start: int) -> torch.Tensor:
        return options.finish(products.reshape(*shape, -1), states.kv_len - shape[2], start)

    for position, run in states.exact_runs():
        values = states.exact["values"][:, :, run].float()
        yield position, finish(rows @ states.exact["keys"][:, :, run].float().mT, position), values, False
    turned = (rows if quantizer.scale is None else rows / quantizer.scale) @ quantizer.dual.mT
    sketched = None if quantizer.sketch is None else turned @ quantizer.sketch.mT
    offset = 0.0 if quantizer.mean is None else (rows * quantizer.mean).sum(-1, keepdim=True)
    length = states.quantized
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        key_codes, value_codes = (codes_of(states.codes[role], states.quantizers[role], start, stop) for role in ROLES)
        logits = _score(turned, sketched, *key_codes, quantizer) + offset
        position = states.sink_length + start
        yield position, finish(logits, position), decode(*value_codes, states.quantizers["values"]), True


def _score(turned, sketched, codes, scales, quantizer) -> torch.Tensor:
    """⟨q', ẑ⟩ = s ⟨q', c⟩ + |z| |r| ⟨κS q', signs⟩ with q' = A⁻ᵀ q: the query is rotated and sketched once."""
    nearest = quantizer.centroids[(codes & (2**quantizer.code_bits - 1)).int()]
    logits = (turned @ nearest.mT) * scales["scales"].float().unsqueeze(-2)
    if sketched is None:
        return logits
    signs = (codes >> quantizer.code_bits).float() * 2 - 1
    return logits + (sketched @ signs.mT) * scales["residual_norms"].float().unsqueeze(-2)


def _planes(buffer: TokenBuffer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in buffer.tensors.items() if "plane" in name}
