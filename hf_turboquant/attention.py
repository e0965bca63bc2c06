"""The attention function `"turboquant"`: what `attn_implementation="turboquant"` runs."""

import torch
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from . import ops
from .handle import QuantizedStates, are_pair, plain
from .quantizer import ROLES
from .states import AttentionOptions, ExactStates
from .traced import TracedStates

NAME = "turboquant"

# Query rows whose logits are in memory at a time, if torch's own attention does not support the call.
QUERY_TILE = 256

# Arguments of sparse attention (DSA, MiniMax M3) and of Inkling 2 that change what is attended to: ignoring them would
# silently change the model.
_SELECTIONS = {"indices", "block_indices", "sinks"}


def turboquant_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attends straight from the codes if the layer's cache is quantized, and exactly otherwise: in the first prefill, in
    layers that are not compressed, and in models without a cache.

    Args:
        query (`torch.Tensor`): of shape `[batch, num_attention_heads, query_length, head_dim]`.
        key, value (`torch.Tensor`): of shape `[batch, num_key_value_heads, kv_len, head_dim]`, plain or
            [`QuantizedStates`].
        attention_mask (`torch.Tensor`, *optional*): boolean or additive, as `sdpa` gets it.
        scaling (`float`, *optional*): factor of the logits, 1/√head_dim by default.
        dropout (`float`), is_causal (`bool`, *optional*): as `sdpa` gets them; dropout is applied only where that runs.
        softcap (`float`, *optional*), s_aux (`torch.Tensor`, *optional*): `softcap`, `sinks` of [`AttentionOptions`].
        position_bias (`torch.Tensor`, *optional*): added to the logits (T5).
        output_attentions (`bool`): also return the probabilities.

    Returns:
        The output, of shape `[batch, query_length, num_attention_heads, value_head_dim]`, and `None` or the
        probabilities, of shape `[batch, num_attention_heads, query_length, kv_len]`, both in the query's dtype.

    Raises:
        `ValueError`: the model selects tokens in a way that is not known here, or a compiled step wants probabilities.
    """
    _refuse_selections(module, kwargs)
    if are_pair(key, value) and isinstance(key.states, ExactStates):
        options = {"position_bias": position_bias, "output_attentions": output_attentions, **kwargs}
        how = attention_mask, scaling, dropout, softcap, s_aux, is_causal
        out = turboquant_attention_forward(module, query, key.dequantize(), value.dequantize(), *how, **options)
        # Last, so that only a query and a mask that attention has accepted are counted.
        key.states.observe(query, attention_mask)
        return out
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_length = query.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # As with sdpa: a missing mask means plain causal attention, and a single query sees everything.
    is_causal = bool(is_causal) and attention_mask is None and query_length > 1
    key, value, attention_mask = _plain_where_needed(query, key, value, attention_mask)
    if position_bias is not None:
        attention_mask = create_position_bias_mask(position_bias, attention_mask, is_causal, query, key)
        is_causal = False
    options = {"scaling": scaling, "attention_mask": attention_mask, "is_causal": is_causal, "softcap": softcap}
    if isinstance(key, TracedStates):
        if output_attentions:
            raise ValueError("A compiled step must not be asked for `output_attentions`. Pass `disable_compile=True`.")
        return key.attend(query, scaling, attention_mask, softcap, s_aux).transpose(1, 2).contiguous(), None
    if are_pair(key, value):
        out = ops.attention(query, key.states, sinks=s_aux, **options)
        weights = _probabilities(ops.scores(query, key.states, **options), s_aux) if output_attentions else None
    elif softcap is None and s_aux is None and not output_attentions:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )
    else:
        out, weights = _exact_attention(query, key, value, AttentionOptions(**options, sinks=s_aux), output_attentions)
    weights = None if weights is None else weights.to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _refuse_selections(module: torch.nn.Module, kwargs: dict) -> None:
    for name in _SELECTIONS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`attn_implementation='turboquant'` does not know the `{name}` that {type(module).__name__} attends "
                "with. Load the model with another, such as 'eager'."
            )


def _plain_where_needed(query, key, value, attention_mask):
    """Keys, values and mask, plain where gradients flow: codes have none."""
    if are_pair(key, value) and (key.states.training is not None or ops.trains(query)):
        states = key.states.measured()
        key, value = (ops.dequantize_all(states, role) for role in ROLES)
        attention_mask = None if attention_mask is None else attention_mask[..., : states.kv_len]
    return key, value, attention_mask


_flex_attention_forward = ALL_ATTENTION_FUNCTIONS["flex_attention"]


def flex_attention_forward(module, query, key, value, *args, **kwargs):
    """`"flex_attention"` of transformers, which gives keys and values to a compiled operator: it gets plain ones."""
    key, value = (plain(x) if isinstance(x, QuantizedStates) else x for x in (key, value))
    return _flex_attention_forward(module, query, key, value, *args, **kwargs)


def _hiding_handles(forward):
    """`forward`, uncompiled where it gets handles: a graph that looked into them would be compiled at every step."""
    uncompiled = torch.compiler.disable(forward)

    def registered(module, query, key, *args, **kwargs):
        hide = torch.compiler.is_compiling() and isinstance(key, QuantizedStates)
        return (uncompiled if hide else forward)(module, query, key, *args, **kwargs)

    return registered


def _exact_attention(query, key, value, options: AttentionOptions, output_attentions: bool):
    """Attention with softcap, attention sinks or probabilities on plain tensors, some query rows at a time."""
    groups, length, kv_len = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs, weights = [], []
    for start in range(0, length, QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        mask = options.attention_mask
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        products = (query[:, :, rows] @ key.mT).float()
        logits = options._replace(attention_mask=mask).finish(products, kv_len - length + start)
        probabilities = _probabilities(logits, options.sinks).to(query.dtype)
        outputs.append(probabilities @ value)
        if output_attentions:
            weights.append(probabilities)
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=2) if output_attentions else None


def _probabilities(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is not None:
        sinks = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    # Rows that may attend to nothing get zero probabilities.
    return torch.where(logits.amax(-1, keepdim=True) == -torch.inf, 0.0, logits.softmax(-1))


def turboquant_mask(*args, config=None, **kwargs) -> torch.Tensor | None:
    """
    The mask of `sdpa`, or of `eager` for models without sdpa: they may add the mask to logits that they compute
    themselves, where a boolean one would mask nothing.
    """
    model = MODEL_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    function = sdpa_mask if getattr(model, "_supports_sdpa", True) else eager_mask
    return function(*args, config=config, **kwargs)


def register() -> None:
    """
    Registers `attn_implementation="turboquant"` with transformers, and its mask, without which transformers would make
    none. Other implementations stay what they are, but `"flex_attention"` gets plain tensors in place of handles.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, _hiding_handles(turboquant_attention_forward))
    ALL_ATTENTION_FUNCTIONS.register("flex_attention", _hiding_handles(flex_attention_forward))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, turboquant_mask)
