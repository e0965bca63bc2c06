"""Dequantizes codes with Triton, for operations that need plain tensors and for long queries."""

import torch
import triton
import triton.language as tl

from ..packing import BLOCK
from ..quantizer import Quantizer
from ..storage import TokenBuffer
from .attention_plan import constants_of
from .codes import code_at, codes_per_byte, value_token
from .launch import DTYPES, INTERPRETED, run


def supports(buffer: TokenBuffer, quantizer: Quantizer, out: torch.Tensor) -> str | None:
    """`None` if the kernel can write to `out`, else the reason why not, in words."""
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
    made = constants_of(quantizer)
    # Halves the bytes of a matrix that every tile reads; it is rounded no more than the output.
    operator_dtype = torch.float32 if INTERPRETED or out.dtype == torch.float32 else torch.float16
    keys, padded = quantizer.role == "keys", triton.next_power_of_2(head_dim)
    # Dimensions of one product. All of these choices were fastest on an H100.
    chunk = 32 if operator_dtype == torch.float32 else 64 if keys or padded > 128 else 128
    constants = {
        "KEYS": keys,
        "CODE_BITS": quantizer.code_bits,
        "QJL": quantizer.estimator == "qjl",
        "DIM": head_dim,
        "DIM_PAD": padded,
        "CHUNK": min(padded, chunk),
        "SCALE": quantizer.scale is not None,
        "MEAN": quantizer.mean is not None,
    }
    planes = [tensor for name, tensor in buffer.tensors.items() if name.startswith("plane")]
    args = (
        planes[0],
        planes[-1],
        buffer["scales"],
        buffer.tensors.get("residual_norms", buffer["scales"]),
        made.decode_levels(quantizer, operator_dtype),
        made.decode_operators(quantizer, operator_dtype),
        quantizer.centroids if quantizer.scale is None else quantizer.scale,
        quantizer.centroids if quantizer.mean is None else quantizer.mean,
        out,
        *out.stride()[:3],
        tokens,
        heads,
        buffer.capacity // BLOCK,
        1 if quantizer.scale is None else len(quantizer.scale),
        1 if quantizer.mean is None else len(quantizer.mean),
        made.scale,
    )
    # Strides have 64 bits only where they need them.
    wide = max(out.stride()) >= 2**31
    key = dequantize_kernel, *constants.values(), quantizer.nbits, out.dtype, buffer["scales"].dtype, out.device, wide
    grid, options = (-(-tokens // BLOCK), batch * heads, 1), {"num_warps": 4 if padded <= 128 else 8, "num_stages": 2}
    with torch.cuda.device_of(out):
        run(dequantize_kernel, key, grid, out.device, args, options, constants)


# Strides are multiples of 16, which `supports` ensures.
@triton.jit(do_not_specialize=["length", "heads", "blocks", "scale_heads", "mean_heads"])
def dequantize_kernel(
    wide, one, scales, residual_norms, levels, operators, scale, mean, out,
    out_b, out_h, out_t, length, heads, blocks, scale_heads, mean_heads, level_scale,
    KEYS: tl.constexpr, CODE_BITS: tl.constexpr, QJL: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    CHUNK: tl.constexpr, SCALE: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """
    x̂ = (s c[codes] + |z| |r| (κS)ᵀ signs) A⁻ᵀ / t + μ for a block of a sequence. Grid (⌈length / 128⌉, batch · heads).

    Every byte is read once and its codes are put next to each other: those of keys are then in the order of dimensions,
    those of values in an order of tokens. The operators are A⁻ᵀ and, with `QJL`, κS A⁻ᵀ.
    """
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.program_id(1) % heads
    block = sequence * blocks + tl.program_id(0)
    n = tl.arange(0, DIM_PAD)
    OPERAND: tl.constexpr = operators.dtype.element_ty
    NBITS: tl.constexpr = CODE_BITS + QJL
    COUNT: tl.constexpr = codes_per_byte(NBITS)
    within = tl.arange(0, 128)
    if not KEYS:
        within = value_token(within % COUNT, within // COUNT, COUNT)
    token = tl.program_id(0) * 128 + within
    exists = token < length
    unit = tl.load(scales + block * 128 + within, mask=exists, other=0).to(tl.float32) * level_scale
    if QJL:
        # Signs in units of the levels, so that one product covers both; a zero vector has no residual either.
        sign = tl.load(residual_norms + block * 128 + within, mask=exists, other=0).to(tl.float32)
        sign = (sign / tl.where(unit > 0, unit, 1)).to(OPERAND)[:, None]
    product = tl.zeros([128, DIM_PAD], tl.float32)
    for start in range(0, DIM, CHUNK):
        k = start + tl.arange(0, CHUNK)
        if KEYS:
            byte = start // COUNT + tl.arange(0, CHUNK // COUNT)[None, :]
            row = within[:, None]
            mask = byte < DIM // COUNT
            at = wide + (block * 128 + row) * (DIM // COUNT) + byte
            at_one = one + (block * 64 + row % 64) * (DIM // COUNT) + byte
            upper = row >= 64
        else:
            byte = tl.arange(0, 128 // COUNT)[None, :]
            row = k[:, None]
            mask = row < DIM
            at = wide + (block * DIM + row) * (128 // COUNT) + byte
            at_one = one + (block * (DIM // 2) + row % (DIM // 2)) * (128 // COUNT) + byte
            upper = row >= DIM // 2
        fields = tl.load(at, mask=mask, other=0).to(tl.int32)
        bits = fields
        if NBITS == 3:
            bits = tl.load(at_one, mask=mask, other=0).to(tl.int32) >> tl.where(upper, 0, 2)
        if COUNT == 1:
            code = fields
        elif COUNT == 2:
            code = tl.join(code_at(fields, bits, 0, NBITS), code_at(fields, bits, 1, NBITS))
        else:
            code = tl.join(
                tl.join(code_at(fields, bits, 0, NBITS), code_at(fields, bits, 2, NBITS)),
                tl.join(code_at(fields, bits, 1, NBITS), code_at(fields, bits, 3, NBITS)),
            )
        code = tl.reshape(code, (128, CHUNK) if KEYS else (CHUNK, 128))
        # Multiples of 1/2 up to 127.5 are exact in 16 bits.
        if NBITS == 8:
            x = code.to(tl.int8).to(OPERAND)
        else:
            x = tl.load(levels + (code & ((1 << CODE_BITS) - 1)))
        if not KEYS:
            x = tl.trans(x)
        m_mask = (k < DIM)[:, None] & (n < DIM)[None, :]
        at = operators + k[:, None] * DIM + n[None, :]
        product = tl.dot(x, tl.load(at, mask=m_mask, other=0), product, input_precision="ieee")
        if QJL:
            m = tl.load(at + DIM * DIM, mask=m_mask, other=0)
            signs = tl.where(code < 1 << CODE_BITS, -sign, sign)
            product = tl.dot(signs, m, product, input_precision="ieee")
    result = product * unit[:, None]
    inner = n < DIM
    if SCALE:
        result /= tl.load(scale + head % scale_heads * DIM + n, mask=inner, other=1)[None, :]
    if MEAN:
        result += tl.load(mean + head % mean_heads * DIM + n, mask=inner, other=0)[None, :]
    to = out + (sequence // heads) * out_b + (sequence % heads) * out_h + token.to(tl.int64) * out_t
    tl.store(to[:, None] + n[None, :], result.to(out.dtype.element_ty), mask=exists[:, None] & inner[None, :])
