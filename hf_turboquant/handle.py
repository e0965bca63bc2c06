"""QuantizedStates: the tensor handle that a layer's `update` returns in place of keys or values."""

import logging
from functools import lru_cache

import torch
from torch.utils._pytree import tree_map_only

from . import ops
from .states import ExactStates, LayerStates

logger = logging.getLogger(__name__)

# What a handle can answer without reading a single code.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_nested")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size")
}


class QuantizedStates(torch.Tensor):
    """
    Stands for the keys or the values of a layer: a tensor of shape `[batch, num_key_value_heads, kv_len, head_dim]`
    in the model's dtype, of which only the codes exist, or which is quantized once a query has attended to it. Valid
    until the layer's next update.

    Shape, dtype and device are those of that tensor. `scaled_dot_product_attention` with both handles runs on the
    codes; repeating KV heads as transformers may do before it (index, expand, reshape) returns a handle. Any other
    operation runs on a dequantized tensor, made for that operation alone; one that writes to it, or to a view of it,
    raises a `ValueError`.

    Args:
        states (`LayerStates` or `ExactStates`): what the layer holds.
        role (`str`): `"keys"` or `"values"`.
        repeats (`int`): number of consecutive query heads that share each head.
        shape (`tuple[int, ...]`, *optional*): while heads are being repeated, the shape of that step.
    """

    @staticmethod
    def __new__(
        cls, states: LayerStates | ExactStates, role: str, repeats: int = 1, shape: tuple[int, ...] | None = None
    ):
        exact = states.exact[role]
        shape = states.shape(role) if shape is None else torch.Size(shape)
        handle = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=exact.dtype, device=exact.device)
        handle.states, handle.role, handle.repeats, handle._shape = states, role, repeats, shape
        return handle

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor; read several times a step, so it bypasses `__torch_function__`."""
        return self._shape

    def dequantize(self) -> torch.Tensor:
        """The keys or values as a plain tensor."""
        exact = isinstance(self.states, ExactStates)
        plain = self.states.exact[self.role] if exact else ops.dequantize_all(self.states, self.role)
        if plain.shape == self.shape:
            return plain
        batch, heads, kv_len, head_dim = plain.shape
        plain = plain[:, :, None].expand(batch, heads, self.repeats, kv_len, head_dim)
        return plain.reshape(self.shape)

    def __repr__(self, **kwargs) -> str:
        exact = isinstance(self.states, ExactStates)
        width = "exact" if exact else f"{self.states.quantizers[self.role].nbits} bits"
        return f"QuantizedStates({self.role}, {width}, shape={list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        function = cls._untraced_function if torch.compiler.is_compiling() else cls._function
        return function(func, args, kwargs or {})

    @classmethod
    @torch.compiler.disable
    def _untraced_function(cls, func, args, kwargs):
        # Unprotected: what is traced after this gets plain tensors.
        return cls._function(func, args, kwargs, protect=False)

    @classmethod
    def _function(cls, func, args, kwargs, protect=True):
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            call = _attention_call(*args, **kwargs)
            if call is not None and isinstance(call["states"], LayerStates):
                return ops.attention(**call)
            if call is not None:
                # Attention writes to no argument and returns memory of its own: it needs no checks of `_call_plain`.
                args = [x.dequantize() if isinstance(x, cls) else x for x in args]
                out = func(*args, **{name: x.dequantize() if isinstance(x, cls) else x for name, x in kwargs.items()})
                # Last, so that only a query and a mask that attention has accepted are counted.
                call["states"].observe(call["query"], call["attention_mask"])
                return out
        elif func is torch.Tensor.to and isinstance(args[0], cls):
            # Models that share a layer's states move them to the device that they are already on.
            like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
            if like.to(*args[1:], **kwargs) is like:
                return args[0]
        elif func in _REPEAT_STEPS and isinstance(args[0], cls) and not kwargs:
            handle = args[0]._repeat_step(func, args[1:])
            if handle is not None:
                return handle
        elif func == _SET_DATA and args[0].is_writable:
            return args[0]._write(args[1])
        return _call_plain(func, args, kwargs, cls, protect)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Reached where torch's C++ side skips the function override.
        return _call_plain(func, args, kwargs or {}, cls, protect=False)

    @property
    def is_writable(self) -> bool:
        """Whether a write changes what the layer holds; codes cannot be written to."""
        return isinstance(self.states, ExactStates) and self.states.writable

    def _write(self, new: torch.Tensor) -> None:
        """Assigns to `data`, while the layer holds exact tokens alone."""
        if tuple(new.shape) != tuple(self.shape):
            raise ValueError(f"`data` must keep its shape {list(self.shape)}, got {list(new.shape)}.")
        self.dequantize().copy_(new)

    def _repeat_step(self, func, args) -> "QuantizedStates | None":
        """One step of `repeat_kv`: x[:, :, None, :, :] -> expand -> reshape; `None` for anything else."""
        batch, heads, kv_len, head_dim = self.states.shape(self.role)
        shape, repeats = tuple(self.shape), self.repeats
        if func is torch.Tensor.__getitem__:
            everything = slice(None)
            if args[0] != (everything, everything, None, everything, everything) or len(shape) != 4 or repeats != 1:
                return None
            shape = (batch, heads, 1, kv_len, head_dim)
        else:
            requested = tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else args
            if func is torch.Tensor.expand:
                if shape != (batch, heads, 1, kv_len, head_dim) or len(requested) != 5:
                    return None
                repeats = requested[2]
                expected = (batch, heads, repeats, kv_len, head_dim)
            else:
                expected = (batch, heads * repeats, kv_len, head_dim)
            if requested != expected:
                return None
            shape = expected
        return QuantizedStates(self.states, self.role, repeats, shape)


def handles(states: LayerStates | ExactStates) -> tuple[QuantizedStates, QuantizedStates]:
    """Handles of the keys and of the values."""
    return QuantizedStates(states, "keys"), QuantizedStates(states, "values")


def are_pair(key, value) -> bool:
    """Whether these are the handles of the keys and values of the same tokens, as the cache returned them."""
    if not isinstance(key, QuantizedStates) or not isinstance(value, QuantizedStates):
        return False
    if key.role != "keys" or value.role != "values":
        return False
    if key.states is value.states:
        return True
    both_codes = isinstance(key.states, LayerStates) and isinstance(value.states, LayerStates)
    return both_codes and key.states.same_tokens(value.states)


_REPEAT_STEPS = {torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.reshape}


def _attention_call(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> dict | None:
    """Arguments of `ops.attention` for a call of torch's attention, or `None` if only plain tensors will do."""
    if not are_pair(key, value):
        return None
    # torch aligns `is_causal` with the first key, which is never what a caller with cached tokens needs.
    codes = isinstance(key.states, LayerStates)
    if (codes and (dropout_p or is_causal)) or isinstance(query, QuantizedStates) or query.dim() != 4:
        return None
    # The handle is between two steps of `repeat_kv`.
    if len(key.shape) != 4:
        return None
    # torch lets all query heads share a single KV head.
    if not enable_gqa and key.shape[1] not in (1, query.shape[1]):
        return None
    return {
        "query": query,
        "states": key.states,
        "scaling": query.shape[-1] ** -0.5 if scale is None else scale,
        "attention_mask": attn_mask,
    }


@lru_cache(maxsize=1)
def _log_dequantize() -> None:
    logger.warning(
        "Quantized keys or values were dequantized for an operation that does not read codes: the result is right, but "
        "takes the memory of full precision. Load the model with `attn_implementation='sdpa'` or `'turboquant'` to "
        "attend straight from the codes."
    )


def plain(handle: QuantizedStates) -> torch.Tensor:
    """The tensor that `handle` stands for, for an operation other than attention; stores waiting tokens."""
    if isinstance(handle.states, ExactStates):
        handle.states.observe(None, None)
    else:
        _log_dequantize()
    # An ordinary tensor even in inference mode: its version shows whether it was written to.
    with torch.inference_mode(False):
        return handle.dequantize()


class ReadOnly(torch.Tensor):
    """
    Shares memory with a tensor that was dequantized for one operation, as a slice of keys does. A write to it would be
    lost, so it raises a `ValueError`; everything else gives plain tensors.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        function = _untraced_call if torch.compiler.is_compiling() else _call_plain
        return function(func, args, kwargs or {}, cls)


_SET_DATA = torch.Tensor.data.__set__
_TO_NUMPY = torch.Tensor.numpy, torch.Tensor.__array__


def _call_plain(func, args, kwargs, kind: type, protect: bool = True):
    """
    Calls `func` with plain tensors in place of those of `kind`: handles, or [`ReadOnly`]. These are copies that nobody
    else has, so a write to one would be lost, and raises a `ValueError`. With `protect`, results that share memory with
    one become [`ReadOnly`].
    """
    name, copies = getattr(func, "__name__", str(func)), []

    def convert(item: torch.Tensor) -> torch.Tensor:
        if isinstance(item, QuantizedStates):
            copy = plain(item)
            if item.is_writable:
                return copy
        else:
            with torch._C.DisableTorchFunctionSubclass():
                copy = item.as_subclass(torch.Tensor)
        copies.append((copy, copy._version))
        return copy

    def replaced(item):
        # Most arguments are not trees, and searching a tree takes longer than everything else here.
        if isinstance(item, (tuple, list, dict)):
            return tree_map_only(kind, convert, item)
        return convert(item) if isinstance(item, kind) else item

    args, kwargs = [replaced(item) for item in args], {key: replaced(item) for key, item in kwargs.items()}
    # The setter of an attribute, which would change the copy alone.
    written = name == "__set__"
    if written:
        name = f"{func.__self__.__name__} = ..."
    out = None if written else func(*args, **kwargs)
    if written or any(copy._version != version for copy, version in copies):
        raise ValueError(
            f"Keys and values of a TurboQuantCache that are codes must not be written to, got `{name}`, which would "
            "change a dequantized copy alone. Write to a `.clone()`; to change what a cache holds, `update` a new one "
            "with the changed tensors."
        )
    if not copies or not protect:
        return out
    if func in _TO_NUMPY:
        out.flags.writeable = False
    memory = {copy.untyped_storage()._cdata for copy, _ in copies}

    def protected(item: torch.Tensor) -> torch.Tensor:
        shared = item.layout is torch.strided and item.untyped_storage()._cdata in memory
        return item.as_subclass(ReadOnly) if shared and type(item) is torch.Tensor else item

    # Searching a tree of numbers, such as `tolist` returns, would take long.
    several = isinstance(out, (tuple, list)) and len(out) and isinstance(out[0], torch.Tensor)
    return tree_map_only(torch.Tensor, protected, out) if several or isinstance(out, torch.Tensor) else out


_untraced_call = torch.compiler.disable(_call_plain)


@lru_cache(maxsize=1)
def log_cut_off() -> None:
    logger.warning(
        "Gradients flow to the keys and values of a call's own tokens, and to none of earlier calls: a TurboQuantCache "
        "holds these as codes. Pass all tokens in one call or use a `DynamicCache` to train with them, and call the "
        "model under `torch.no_grad()` if nothing is trained."
    )
