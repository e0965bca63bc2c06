"""Codes back to vectors by Triton, for operations that need plain tensors and for long queries."""

import torch
import triton
import triton.language as tl

from ..packing import BLOCK
from ..quantizer import Quantizer
from ..storage import TokenBuffer
from .attention_plan import Launcher, constants_of
from .launch import DTYPES, INTERPRETED, stream_of

_launchers: dict[tuple, Launcher] = {}


def supports(buffer: TokenBuffer, quantizer: Quantizer, out: torch.Tensor) -> str | None:
    """`None` if the kernel can write to `out`, else the reason why not, in words."""
    if quantizer.nbits not in (2, 3, 4) or not quantizer.code_bits:
        return f"the kernel reads 2, 3 and 4 bits, and the {quantizer.role} have {quantizer.nbits}"
    if quantizer.head_dim % 16 or quantizer.head_dim > 256:
        return f"the kernel takes a head_dim of 16 to 256 in steps of 16, and the {quantizer.role} have {out.shape[-1]}"
    if out.dtype not in DTYPES or out.stride(3) != 1 or any(n % 16 for n in (out.data_ptr(), *out.stride()[:3])):
        return f"the output is {out.dtype} of strides {out.stride()}, or not aligned to 16 bytes"
    if out.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {out.device.type}"
    return None


def dequantize(buffer: TokenBuffer, quantizer: Quantizer, out: torch.Tensor) -> None:
    """[`ops.dequantize`] in one launch."""
    if not out.numel():
        return
    batch, heads, tokens, head_dim = out.shape
    constants = constants_of(quantizer)
    # half the bytes of a matrix that every tile reads; it is rounded no more than the output is
    operator_dtype = torch.float32 if INTERPRETED or out.dtype == torch.float32 else torch.float16
    key = (quantizer.role, quantizer.nbits, quantizer.estimator, head_dim, quantizer.mean is None, out.dtype)
    key += (quantizer.scale is None, buffer["scales"].dtype, out.device)
    padded = triton.next_power_of_2(head_dim)
    tile = BLOCK if padded <= 128 else BLOCK // 2
    if key not in _launchers:
        options = {
            "KEYS": quantizer.role == "keys",
            "CODE_BITS": quantizer.code_bits,
            "QJL": quantizer.estimator == "qjl",
            "DIM": head_dim,
            "DIM_PAD": padded,
            "CHUNK": min(padded, 32),
            "SCALE": quantizer.scale is not None,
            "MEAN": quantizer.mean is not None,
            "T": tile,
        }
        _launchers[key] = Launcher(dequantize_kernel, options, num_warps=8)
    planes = [tensor for name, tensor in buffer.tensors.items() if name.startswith("plane")]
    args = (
        planes[0],
        planes[-1],
        buffer["scales"],
        buffer.tensors.get("residual_norms", buffer["scales"]),
        quantizer.centroids,
        constants.decode_operators(quantizer, operator_dtype),
        quantizer.centroids if quantizer.scale is None else quantizer.scale,
        quantizer.centroids if quantizer.mean is None else quantizer.mean,
        out,
        *out.stride()[:3],
        tokens,
        heads,
        buffer.capacity // BLOCK,
        constants.heads,
        1 if quantizer.scale is None else len(quantizer.scale),
        1 if quantizer.mean is None else len(quantizer.mean),
        constants.scale,
    )
    launcher, grid = _launchers[key], (-(-tokens // tile), batch * heads, 1)
    with torch.cuda.device_of(out):
        launcher(grid, stream_of(out.device), args, launcher.fix(())[0])


@triton.jit
def _field(plane, block, token, d, WIDTH: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, mask):
    """The `WIDTH`-bit fields of tokens of a block at dimensions `d`: the bit pictures of `packing`."""
    if KEYS:
        if WIDTH > 1:
            PER_BYTE: tl.constexpr = 8 // WIDTH
            byte = token * (DIM // PER_BYTE) + d // PER_BYTE
            shift = d % PER_BYTE * WIDTH
        else:
            byte = token % 64 * (DIM // 4) + d // 4
            shift = d % 2 + d % 4 // 2 * 4 + tl.where(token < 64, 2, 0)
    elif WIDTH == 4:
        nibble = token // 64 * 4 + token % 4
        byte = d * 64 + token % 64 // 4 * 4 + nibble // 2
        shift = nibble % 2 * 4
    else:
        word = token % 32 // 4 * 4
        position = token // 32 % 2 * 8 + token % 4 * 2 + token // 64
        if WIDTH == 2:
            byte = d * 32 + word + position // 4
            shift = position % 4 * 2
        else:
            byte = d % (DIM // 2) * 32 + word + position // 4
            shift = position // 2 % 2 * 4 + position % 2 + tl.where(d < DIM // 2, 2, 0)
    # the 1-bit plane holds 8 vectors in the bytes of one
    BYTES: tl.constexpr = 128 * DIM * WIDTH // 8
    value = tl.load(plane + block * BYTES + byte, mask=mask, other=0).to(tl.int32)
    return (value >> shift) & ((1 << WIDTH) - 1)


# strides are multiples of 16, which `supports` sees to
@triton.jit(do_not_specialize=["length", "heads", "blocks", "operator_heads", "scale_heads", "mean_heads"])
def dequantize_kernel(
    wide, one, scales, residual_norms, centroids, operators, scale, mean, out,
    out_b, out_h, out_t, length, heads, blocks, operator_heads, scale_heads, mean_heads, level_scale,
    KEYS: tl.constexpr, CODE_BITS: tl.constexpr, QJL: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    CHUNK: tl.constexpr, SCALE: tl.constexpr, MEAN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """
    x̂ = (s c[codes] + |z| |r| (κS)ᵀ signs) A⁻ᵀ / t + μ for `T` tokens of a sequence. Grid (⌈length / T⌉, batch · heads).

    Scales come after the products with `operators`: A⁻ᵀ and, with `QJL`, κS A⁻ᵀ.
    """
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.program_id(1) % heads
    first = tl.program_id(0) * T
    block = sequence * blocks + first // 128
    within = first % 128 + tl.arange(0, T)
    n = tl.arange(0, DIM_PAD)
    OPERAND: tl.constexpr = operators.dtype.element_ty
    NBITS: tl.constexpr = CODE_BITS + QJL
    WIDE: tl.constexpr = 4 if NBITS == 4 else 2
    product = tl.zeros([T, DIM_PAD], tl.float32)
    sketch_product = tl.zeros([T, DIM_PAD], tl.float32)
    for start in range(0, DIM, CHUNK):
        k = start + tl.arange(0, CHUNK)
        # with the index that runs along memory last
        if KEYS:
            token = within[:, None]
            d = k[None, :]
        else:
            token = within[None, :]
            d = k[:, None]
        code = _field(wide, block, token, d, WIDE, KEYS, DIM, d < DIM)
        if NBITS == 3:
            code = code | _field(one, block, token, d, 1, KEYS, DIM, d < DIM) << 2
        # multiples of 1/2 up to 127.5: exact in 16 bits
        x = (tl.load(centroids + (code & ((1 << CODE_BITS) - 1))) / level_scale).to(OPERAND)
        if not KEYS:
            x = tl.trans(x)
        m_mask = (k < DIM)[:, None] & (n < DIM)[None, :]
        at = operators + (head % operator_heads).to(tl.int64) * DIM * DIM + k[:, None] * DIM + n[None, :]
        product = tl.dot(x, tl.load(at, mask=m_mask, other=0), product, input_precision="ieee")
        if QJL:
            signs = ((code >> CODE_BITS) * 2 - 1).to(OPERAND)
            if not KEYS:
                signs = tl.trans(signs)
            m = tl.load(at + operator_heads.to(tl.int64) * DIM * DIM, mask=m_mask, other=0)
            sketch_product = tl.dot(signs, m, sketch_product, input_precision="ieee")
    token = first + tl.arange(0, T)
    exists = token < length
    at = sequence * blocks * 128 + token
    result = product * (tl.load(scales + at, mask=exists, other=0).to(tl.float32) * level_scale)[:, None]
    if QJL:
        result += sketch_product * tl.load(residual_norms + at, mask=exists, other=0).to(tl.float32)[:, None]
    inner = n < DIM
    if SCALE:
        result /= tl.load(scale + head % scale_heads * DIM + n, mask=inner, other=1)[None, :]
    if MEAN:
        result += tl.load(mean + head % mean_heads * DIM + n, mask=inner, other=0)[None, :]
    to = out + (sequence // heads) * out_b + (sequence % heads) * out_h + token.to(tl.int64) * out_t
    tl.store(to[:, None] + n[None, :], result.to(out.dtype.element_ty), mask=exists[:, None] & inner[None, :])
