"""What `torch.compile` sees of a layer of fixed capacity: three operators, and a handle that is not a tensor."""

import torch

from . import ops
from .arena import head_dims, open_arena
from .quantizer import ROLES


@torch.library.custom_op("hf_turboquant::append", mutates_args={"arena"})
def append(arena: torch.Tensor, description: str, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """[`ops.append`] to an arena."""
    ops.append(open_arena(arena, description), key_states, value_states)


@append.register_fake
def _(arena, description, key_states, value_states):
    return None


@torch.library.custom_op("hf_turboquant::attend", mutates_args=())
def attend(
    arena: torch.Tensor,
    description: str,
    query: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[`ops.attention`] to the tokens of an arena."""
    options = {"scaling": scaling, "attention_mask": attention_mask, "softcap": softcap, "sinks": sinks}
    out = ops.attention(query, open_arena(arena, description), **options)
    # Return the strides that the fake implementation promises.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attend.register_fake
def _(arena, description, query, scaling, attention_mask, softcap, sinks):
    # Do not open the arena here: views of fake tensors must not be kept.
    batch, heads, query_length, _ = query.shape
    return query.new_empty((batch, query_length, heads, head_dims(description)["values"])).transpose(1, 2)


@torch.library.custom_op("hf_turboquant::seq_length", mutates_args=())
def seq_length(arena: torch.Tensor, description: str) -> torch.Tensor:
    """Number of tokens in an arena, int64."""
    return open_arena(arena, description).counters[0, 0, 0].to(torch.int64)


@seq_length.register_fake
def _(arena, description):
    return arena.new_empty((), dtype=torch.int64)


_ONLY_ATTENTION = (
    "A compiled step over a cache with `max_cache_len` must attend by torch's scaled_dot_product_attention or by "
    "'turboquant', got another operation on keys or values. Load the model with `attn_implementation='sdpa'` or "
    "`'turboquant'`."
)


class TracedStates:
    """
    Stands for keys or values of shape `[batch, num_key_value_heads, max_cache_len, head_dim]` while `torch.compile`
    traces a model. Like [`QuantizedStates`], but a plain object, which tracing can follow; it supports only attention.

    Args:
        arena (`torch.Tensor`), description (`str`): those of the layer.
        role (`str`): `"keys"` or `"values"`.
        shape (`tuple[int, ...]`), dtype, device: those of the tensor that it stands for.
    """

    def __init__(self, arena, description, role, shape, dtype, device):
        self.arena, self.description, self.role = arena, description, role
        self.shape, self.dtype, self.device = shape, dtype, device

    def _like(self, *shape) -> "TracedStates":
        return TracedStates(self.arena, self.description, self.role, shape, self.dtype, self.device)

    # The steps of transformers' `repeat_kv`.
    def __getitem__(self, index) -> "TracedStates":
        batch, heads, kv_len, head_dim = self.shape
        return self._like(batch, heads, 1, kv_len, head_dim)

    def expand(self, *shape) -> "TracedStates":
        return self._like(*shape)

    def reshape(self, *shape) -> "TracedStates":
        return self._like(*shape)

    def size(self, dim: int | None = None):
        """As `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def attend(self, query, scaling, attention_mask=None, softcap=None, sinks=None) -> torch.Tensor:
        """[`ops.attention`]."""
        return attend(self.arena, self.description, query, scaling, attention_mask, softcap, sinks)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _sdpa(*args, **(kwargs or {}))
        raise ValueError(_ONLY_ATTENTION)

    def __getattr__(self, name: str):
        # Eager attention ends up here, because it transposes the keys first.
        raise AttributeError(_ONLY_ATTENTION)


def handles_of(arena, description, kv_len: int, *states: torch.Tensor) -> tuple[TracedStates, ...]:
    """Handles of `kv_len` keys and values of an arena; new keys and values, `states`, tell dtypes and other sizes."""
    return tuple(
        TracedStates(arena, description, role, (*x.shape[:2], kv_len, x.shape[3]), x.dtype, x.device)
        for role, x in zip(ROLES, states, strict=True)
    )


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p or is_causal:
        raise ValueError(
            f"A compiled step must attend without dropout and `is_causal`, got {dropout_p} and {is_causal}. Call "
            "`model.eval()`, and compile steps of one token."
        )
    return key.attend(query, query.shape[-1] ** -0.5 if scale is None else scale, attn_mask)
