"""Random states of a layer for the kernels that read them, and the same attention in plain torch."""

import torch
import torch.nn.functional as F

from hf_turboquant import ops
from hf_turboquant.config import TurboQuantConfig
from hf_turboquant.ops import attend as kernels
from hf_turboquant.ops import attention_plan as plan
from hf_turboquant.ops import reference
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.states import AttentionOptions, LayerStates


def random_states(
    batch, kv_heads, kv_len, head_dim, *, value_dim=None, dtype=torch.float16, device="cuda", seed=0, peak=1.0,
    tail=None, **options,
):  # fmt: skip
    """
    A `LayerStates` of random codes (every code is valid). Memory beyond the length is poisoned.

    Args:
        peak (`float`): factor of the keys; large ones make the softmax peaky.
        tail (`int`, *optional*): tokens in the recent window, all of it by default.
    """
    config = TurboQuantConfig(**options)
    generator = torch.Generator(device=device).manual_seed(seed)
    ring = config.residual_length
    tail = ring if tail is None else tail
    length = kv_len - config.sink_length - tail
    quantizers, codes, exact = {}, {}, {}
    for role, dim in (("keys", head_dim), ("values", value_dim or head_dim)):
        quantizer = quantizers[role] = Quantizer.create(config, role, 0, dim, device)
        buffer = codes[role] = quantizer.new_buffer(batch, kv_heads)
        buffer.reserve(max(length, 1))
        buffer.length = length
        norm = dim**0.5 * (peak if role == "keys" else 1.0)
        # That of random codes, in units of their scale.
        norm /= 74 * dim**0.5 if quantizer.nbits == 8 else 1.0
        for name, tensor in buffer.tensors.items():
            if name.startswith("plane"):
                tensor.random_(0, 256, generator=generator)
            else:
                # A residual is about 2^-bits of its vector.
                share = 1.0 if name == "scales" else 2.0**-quantizer.code_bits
                tensor.uniform_(0.5 * norm * share, 1.5 * norm * share, generator=generator)
                tensor.view(batch, kv_heads, -1)[:, :, length:] = torch.nan
        slots = torch.randn((batch, kv_heads, config.sink_length + ring, dim), generator=generator, device=device)
        exact[role] = (slots * (peak if role == "keys" else 1.0)).to(dtype)
    phase = length % ring if ring else 0
    states = LayerStates(quantizers, codes, exact, kv_len, length, config.sink_length, ring, phase)
    valid = torch.zeros(config.sink_length + ring, dtype=torch.bool, device=device)
    for _, slots in states.exact_runs():
        valid[slots] = True
    for tensor in exact.values():
        tensor[:, :, ~valid] = torch.nan
    return states


def torch_attention(query, states, scaling, attention_mask=None, is_causal=False, softcap=None, sinks=None):
    """The same attention in the query's own dtype, on dequantized states."""
    keys, values = (ops.dequantize_all(states, role).to(query.dtype) for role in ("keys", "values"))
    kv_len, length = states.kv_len, query.shape[2]
    bias = torch.zeros((1, 1, length, kv_len), device=query.device)
    if is_causal:
        positions = torch.arange(kv_len, device=query.device)
        bias = bias.masked_fill(positions > positions[-length:, None], -torch.inf)
    if attention_mask is not None:
        mask = attention_mask[..., :kv_len]
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    if softcap is None and sinks is None:
        bias = bias.to(query.dtype) if is_causal or attention_mask is not None else None
        return F.scaled_dot_product_attention(query, keys, values, bias, scale=scaling, enable_gqa=True)
    groups = query.shape[1] // keys.shape[1]
    logits = query @ keys.repeat_interleave(groups, dim=1).mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits.dtype)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :kv_len]
    return weights @ values.repeat_interleave(groups, dim=1)


def relative_error(x, truth) -> float:
    return float((x.float() - truth).norm() / truth.norm())


def poison_scratch() -> None:
    """Fills scratch memory with NaN (integers with noise), to show that all of it is written before it is read."""
    for scratch in plan.SCRATCH.values():
        for tensor in scratch.tensors.values():
            tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.random_()


def check(query, states, portable=None, **options) -> tuple[float, float]:
    """Relative errors of the kernels and of torch in the query's dtype, both against the fp32 reference."""
    poison_scratch()
    out = kernels.attention(query, states, AttentionOptions(**options), portable=portable)
    truth = reference.attention(query.float(), states, AttentionOptions(**options))
    return relative_error(out, truth), relative_error(torch_attention(query, states, **options), truth)
