"""The operations on codes. Only this module checks arguments and picks the backend."""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from ..quantizer import ROLES, Quantizer
from ..states import AttentionOptions, LayerStates
from ..storage import TokenBuffer, reserve_all
from . import reference

try:
    from . import attend as attention_kernels
    from . import decode as dequantize_kernels
    from . import encode as quantize_kernels
    from . import launch
    from . import statistics as statistics_kernels
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    attention_kernels = dequantize_kernels = launch = quantize_kernels = statistics_kernels = None

logger = logging.getLogger(__name__)

# Longer queries would read every code many times: for them the layer is dequantized once per call.
MAX_KERNEL_QUERIES = 16


def quantize(*parts: tuple[torch.Tensor, Quantizer, TokenBuffer], backend: str = "auto") -> None:
    """
    Quantizes keys, values or both, and appends the codes to their buffers in place: all or none. Earlier codes do not
    change. A single token of both takes a single launch.

    Args:
        parts (`tuple`):
            States, fp32, fp16 or bf16, of shape `[batch, heads, tokens, head_dim]`, their quantizer, and a buffer that
            its `new_buffer` made, which grows if necessary. With two parts, their numbers of tokens are equal.
        backend (`str`): see [`TurboQuantConfig`].

    Raises:
        `ValueError`: states don't fit the quantizer or the buffer, or the backend cannot do it. The buffers are left
            unchanged.
    """
    functions = {_pick_quantize(*part, backend) for part in parts}
    buffers = [buffer for _, _, buffer in parts]
    before = [buffer.length for buffer in buffers]
    reserve_all(buffers, max(before) + parts[0][0].shape[2])
    try:
        # If the kernels support only one of the parts, the reference quantizes both.
        (functions.pop() if len(functions) == 1 else reference.quantize)(*parts)
    except BaseException:
        # Codes beyond the length are ignored, so restoring the length undoes all writes.
        for buffer, length in zip(buffers, before, strict=True):
            buffer.length = length
        raise


def append(states: LayerStates, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """
    Runs one step in place: quantizes the token that leaves the recent tokens, if one does, and writes the new token to
    its exact slot. The kernels need one launch, and the host waits for nothing. The buffers must have the capacity, and
    the caller must update the lengths.

    With a fixed capacity the lengths are in device memory and are updated there; several tokens may be given, which
    are appended one by one.

    Args:
        states (`LayerStates`): before the step.
        key_states, value_states (`torch.Tensor`): of shape `[batch, heads, tokens, head_dim]`, few tokens; stored in
            the dtypes of the exact slots.

    Raises:
        `ValueError`: shapes don't fit, the requested backend cannot do it or, with the reference, the capacity is used
            up. Nothing is written in that case. The kernels can't raise errors: beyond the capacity they write
            nothing, and attention is NaN until the layer is reset.
    """
    if states.plans and quantize_kernels.append_again(states, key_states, value_states):
        return
    new = {"keys": key_states, "values": value_states}
    for role, state in new.items():
        batch, heads, _, head_dim = states.exact[role].shape
        if tuple(state.shape) != (batch, heads, key_states.shape[2], head_dim):
            raise ValueError(
                f"The {role} of a step must be of shape [{batch}, {heads}, {key_states.shape[2]}, {head_dim}], got "
                f"{list(state.shape)}."
            )
    new = {role: state.to(states.exact[role].dtype) for role, state in new.items()}
    kernels = {
        _pick(states.backend, state.device, quantize_kernels, "append", state, states.quantizers[role])
        for role, state in new.items()
    }
    (kernels.pop() if len(kernels) == 1 else reference.append)(states, new)


def start_compiler() -> None:
    """Starts, in other threads, what Triton does before it compiles its first kernel, if a GPU is in use."""
    if launch is not None and not launch.INTERPRETED and torch.cuda.is_initialized():
        launch.start_compiler()


def compile_in_background(work: Callable[[], None], device: torch.device) -> None:
    """
    Compiles the kernels that `work` would launch on `device`, in other threads. The first launch of a kernel waits for
    them. Does nothing where there are no kernels, or Triton cannot compile in threads.
    """
    if launch is not None and not launch.INTERPRETED and hasattr(launch.triton, "AsyncCompileMode"):
        launch.compile_in_background(work, device)


def is_only_compiling() -> bool:
    """Whether launches of this thread only compile."""
    return launch is not None and launch.is_only_compiling()


def warm(states: LayerStates) -> None:
    """Makes the kernels' constants for `states` in advance, so that no captured graph allocates them in its pool."""
    if attention_kernels is not None and states.exact["keys"].device.type == "cuda":
        attention_kernels.warm(states)


def _pick_quantize(states: torch.Tensor, quantizer: Quantizer, buffer: TokenBuffer, backend: str):
    batch, heads, head_dim = (*buffer["scales"].shape[:2], quantizer.head_dim)
    if states.dim() != 4 or states.shape != (batch, heads, states.shape[2], head_dim) or not states.is_floating_point():
        raise ValueError(
            f"`states` must be a floating-point tensor of shape [{batch}, {heads}, tokens, {head_dim}], "
            f"got {states.dtype} of shape {list(states.shape)}."
        )
    return _pick(backend, states.device, quantize_kernels, "quantize", states, quantizer)


def channel_statistics(
    keys: torch.Tensor,
    values: torch.Tensor,
    query_energy: torch.Tensor | None,
    valid: torch.Tensor | None,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    least_tokens: int,
    least_energy: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    Computes the mean and scale of key channels for [`conditioning.condition`], without waiting for the device.

    Args:
        keys, values (`torch.Tensor`):
            Of shape `[batch, heads, tokens, head_dim]`; values only tell which tokens are repetitions, and may differ
            in head_dim. See `reference_statistics.different_tokens`.
        query_energy (`torch.Tensor`, *optional*): E q² up to a factor, fp32 `[heads, head_dim]`.
        valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, tokens]`; false for tokens that do not count.
        turns (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            For every pair of channels that rotary embeddings rotate, complex64: the factor that undoes the rotation,
            `[tokens, pairs]`, and the factor of its mean over all positions of the horizon, `[pairs]`. See
            `reference_statistics.future_mean`.
        least_tokens (`int`): with fewer different tokens than this there is no scale.
        least_energy (`float`): every channel counts as having at least this fraction of the average energy.
        backend (`str`): see [`TurboQuantConfig`].

    Returns:
        Mean and scale, fp32 `[heads, 1, head_dim]` (the scale is `None` without `query_energy`), and int32 `[4]` on
        the device: whether the mean is valid, whether the scale is, whether there were enough different tokens, and how
        many tokens the mean is of. An invalid mean is zero, an invalid scale is one.

    Raises:
        `ValueError`: shapes don't fit, or the requested backend cannot do it.
    """
    batch, heads, tokens, head_dim = keys.shape
    shapes = [(values[..., 0], (batch, heads, tokens)), (query_energy, (heads, head_dim)), (valid, (batch, tokens))]
    if turns is not None:
        pairs = min(len(turns[1]), head_dim // 2)
        shapes += [(turns[0], (tokens, pairs)), (turns[1], (pairs,))]
    for given, shape in shapes:
        if given is not None and given.shape != shape:
            raise ValueError(
                f"Statistics of keys of shape {list(keys.shape)} need {list(shape)}, got {list(given.shape)}."
            )
    args = keys, values, query_energy, valid, turns, least_tokens, least_energy
    return _pick(backend, keys.device, statistics_kernels, "channel_statistics", *args)(*args)


def dequantize(buffer: TokenBuffer, quantizer: Quantizer, out: torch.Tensor, backend: str = "auto") -> None:
    """
    Dequantizes all tokens of `buffer` into `out`.

    Args:
        out (`torch.Tensor`): of shape `[batch, heads, buffer.length, head_dim]`, any floating-point dtype; may be a
            view. Numbers too large for its dtype become inf.
        backend (`str`): see [`TurboQuantConfig`].

    Raises:
        `ValueError`: `out` has another shape, or the requested backend cannot do it.
    """
    expected = (*buffer["scales"].shape[:2], buffer.length, quantizer.head_dim)
    if tuple(out.shape) != expected:
        raise ValueError(f"`out` must be of shape {list(expected)}, got {list(out.shape)}.")
    _pick(backend, out.device, dequantize_kernels, "dequantize", buffer, quantizer, out)(buffer, quantizer, out)


def _check_current(states: LayerStates) -> None:
    if states.outdated:
        raise ValueError(
            "Keys and values that `update` returned must be read before the next update or reset of their layer, "
            "got a later read. Keep a `.clone()`, or take `cache.layers[i].keys`, which stay what they were."
        )


def dequantize_all(states: LayerStates, role: str) -> torch.Tensor:
    """
    All keys or values of a layer in the model's dtype, of shape `[batch, num_key_value_heads, kv_len, head_dim]`; exact
    tokens as they are, and zeros for tokens to come. Raises a `ValueError` if the states are outdated.
    """
    if states.counters is not None:
        plain = dequantize_all(states.measured(), role)
        return torch.nn.functional.pad(plain, (0, 0, 0, states.kv_len - plain.shape[2]))
    _check_current(states)
    exact = states.exact[role]
    out = exact.new_empty(states.shape(role))
    buffer = states.codes[role].snapshot()
    buffer.length = states.quantized
    coded = out[:, :, states.sink_length : states.recent_start]
    dequantize(buffer, states.quantizers[role], coded, states.backend)
    for position, run in states.exact_runs():
        piece = exact[:, :, run]
        out[:, :, position : position + piece.shape[2]] = piece
    if states.training is not None:
        new = states.training[role]
        out = torch.cat([out[:, :, : -new.shape[2]], new], dim=2)
    return out


def attention(query: torch.Tensor, states: LayerStates, **options) -> torch.Tensor:
    """
    Attends to the exact tokens and codes of one layer without dequantizing the codes to memory.

    Args:
        query (`torch.Tensor`): of shape `[batch, num_attention_heads, query_length, head_dim]`.
        states (`LayerStates`): what the layer holds, and the backend to use.
        **options: see [`AttentionOptions`].

    Returns:
        `torch.Tensor` of shape `[batch, num_attention_heads, query_length, value_head_dim]` in the dtype of the query.
        A row that may attend to nothing is zero.

    Raises:
        `ValueError`: shapes don't fit, the states are outdated, or the requested backend cannot do it.
    """
    options = AttentionOptions(**options)
    _check_current(states)
    differentiable = trains(query) or states.training is not None
    if states.plans and options.attention_mask is None and not differentiable:
        out = attention_kernels.attention_again(query, states, options)
        if out is not None:
            return out
    _check_query(query, states, options)
    if not query.numel():
        return query.new_empty((*query.shape[:3], states.shape("values")[-1]))
    plain = options.softcap is None and options.sinks is None
    if plain and (differentiable or query.shape[2] > MAX_KERNEL_QUERIES):
        return _dequantized_attention(query, states.measured(), options)
    return _pick(states.backend, query.device, attention_kernels, "attention", query, states)(query, states, options)


def trains(*tensors: torch.Tensor) -> bool:
    """Whether gradients are wanted for one of these: codes have none, nor do the kernels compute any."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def scores(query: torch.Tensor, states: LayerStates, **options) -> torch.Tensor:
    """
    The logits themselves, before the softmax: with `"qjl"` and `"rescaled"` keys, unbiased estimates of
    ⟨query, key⟩ · scaling.

    Arguments and errors as for [`attention`]; attention sinks are no logits of tokens, and are ignored.

    Returns:
        fp32 `torch.Tensor` of shape `[batch, num_attention_heads, query_length, kv_len]`.
    """
    options = AttentionOptions(**options)._replace(sinks=None)
    _check_query(query, states, options)
    _check_current(states)
    if states.counters is not None:
        return reference.scores(query, states, options)
    return _pick(states.backend, query.device, attention_kernels, "scores", query, states)(query, states, options)


def _check_query(query: torch.Tensor, states: LayerStates, options: AttentionOptions) -> None:
    batch, heads, kv_len, head_dim = states.shape("keys")
    if query.dim() != 4 or query.shape[0] != batch or query.shape[1] % heads or query.shape[3] != head_dim:
        raise ValueError(
            f"`query` must be of shape [{batch}, a multiple of {heads}, query_length, {head_dim}], "
            f"got {list(query.shape)}."
        )
    mask = options.attention_mask
    if mask is not None and (mask.dim() != 4 or mask.shape[-1] < kv_len):
        raise ValueError(
            f"`attention_mask` must have four dimensions, the last of at least {kv_len}, got {list(mask.shape)}."
        )


def _dequantized_attention(query: torch.Tensor, states: LayerStates, options: AttentionOptions) -> torch.Tensor:
    mask = None if options.attention_mask is None else options.attention_mask[..., : states.kv_len]
    if options.is_causal:
        positions = torch.arange(states.kv_len, device=query.device)
        visible = positions <= positions[-query.shape[2] :].unsqueeze(-1)
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
    keys, values = (dequantize_all(states, role).to(query.dtype) for role in ROLES)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1 and mask is not None and query.is_cuda:
        # With groups and a mask, torch may offer only its slowest kernel, which holds all logits.
        keys, values, groups = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), 1
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=options.scaling, enable_gqa=groups > 1
    )


def _pick(backend: str, device: torch.device, kernels, name: str, *args):
    """The function `name` of the kernels or the reference; a `ValueError` if requested kernels cannot run."""
    if backend == "torch":
        return getattr(reference, name)
    if kernels is None:
        reason = "triton is not installed"
    elif backend == "auto" and device.type != "cuda":
        # Triton's interpreter is for tests, which request it.
        reason = f"the tensors are on {device.type}"
    else:
        reason = kernels.supports(*args)
    if reason is None:
        _log_choice(logging.INFO, name, "Triton kernels", "")
        return getattr(kernels, name)
    if backend == "triton":
        raise ValueError(f"`backend='triton'` cannot run `{name}` here: {reason}. Use `backend='auto'` or `'torch'`.")
    # On a GPU the reference is many times slower, which deserves a warning.
    level = logging.WARNING if device.type == "cuda" else logging.INFO
    _log_choice(level, name, "the torch reference", reason)
    return getattr(reference, name)


@lru_cache(maxsize=64)
def _log_choice(level: int, name: str, choice: str, reason: str) -> None:
    logger.log(level, "%s runs on %s%s.", name, choice, f": {reason}" if reason else "")
