"""Estimates the memory of a model's cache from its config alone, without making or reading weights."""

import copy
import warnings
from bisect import bisect
from dataclasses import dataclass

import torch
from transformers import AutoModel, DynamicCache, PreTrainedConfig

from .cache import TurboQuantCache
from .layer import TurboQuantLayer
from .memory import MemoryReport, layer_memory

# The search for the longest context stops here.
MAX_CONTEXT = 2**40
KINDS = {
    "DynamicLayer": "full attention",
    "DynamicSlidingWindowLayer": "sliding window",
    "DynamicIndexedLayer": "sparse attention",
    "LinearAttentionLayer": "linear attention",
    "LinearAttentionAndFullAttentionLayer": "full attention beside a recurrent part",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding window beside a recurrent part",
    "DummyLayer": "no cache of its own",
}


@dataclass(frozen=True)
class LayerCost:
    """
    What one layer of a model keeps for one sequence.

    Args:
        kind (`str`): in words, see `KINDS`.
        token_bytes (`int`): bytes of every token, in the model's dtype.
        state_bytes (`int`): bytes that do not depend on the context: the state of linear attention.
        window (`int`, *optional*): the number of tokens that are kept; without one, all of them.
        shapes (`tuple`): (num_key_value_heads, head_dim) of keys and of values; `()` if the layer has none.
    """

    kind: str
    token_bytes: int
    state_bytes: int
    window: int | None
    shapes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        shapes = {f"{heads} KV heads of {dim}" if heads > 1 else f"1 KV head of {dim}" for heads, dim in self.shapes}
        if len(shapes) > 1:
            (heads, keys), (_, values) = self.shapes
            shapes = {f"{heads} KV head{'s' * (heads > 1)} with keys of {keys} and values of {values}"}
        window = f" of {self.window} tokens" if self.window else ""
        return ", ".join([self.kind + window, *shapes])

    def full_bytes(self, context: int) -> int:
        """Bytes of keys and values in the model's dtype, for one sequence."""
        return self.token_bytes * (context if self.window is None else min(context, self.window))


@dataclass(frozen=True)
class Estimate:
    """
    The caches of a model.

    Args:
        config (`PreTrainedConfig`): the model's.
        layers (`list[LayerCost]`): of the whole model, in order.
        dtype (`torch.dtype`): of the model.
    """

    config: PreTrainedConfig
    layers: list[LayerCost]
    dtype: torch.dtype

    @classmethod
    def from_config(cls, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> "Estimate":
        """
        Runs the model itself on the `meta` device, where tensors have shapes but no memory, with one token and then
        with two. The caches show what each token adds and what is constant.

        Raises:
            `ValueError`: transformers cannot make or run the model from this config.
        """
        try:
            one, two = (_run(config, tokens, dtype) for tokens in (1, 2))
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(
                f"`config` must be of a decoder-only model that transformers can make, got {config.model_type!r}: "
                f"{reason}. Update transformers, or count from `cache.memory()` of a real run."
            ) from None
        layers = []
        for first, second in zip(one.layers, two.layers, strict=True):
            token_bytes = layer_memory(second).full_bytes - layer_memory(first).full_bytes
            keys_values = [second.keys, second.values] if getattr(second, "keys", None) is not None else []
            window = getattr(second, "sliding_window", None)
            layers.append(
                LayerCost(
                    kind=KINDS.get(type(second).__name__, type(second).__name__),
                    token_bytes=token_bytes,
                    state_bytes=layer_memory(first).full_bytes - token_bytes,
                    # The window includes the current token, which the layer need not keep.
                    window=None if window is None else window - 1,
                    shapes=tuple((states.shape[1], states.shape[3]) for states in keys_values),
                )
            )
        return cls(config, layers, dtype)

    @property
    def state_bytes(self) -> int:
        """The states of linear attention, for one sequence of any length."""
        return sum(layer.state_bytes for layer in self.layers)

    def compressed(self, **options) -> list[int]:
        """The layers that a [`TurboQuantCache`] with these options compresses, according to the cache itself."""
        layers = TurboQuantCache(self.config, **options).layers
        return [index for index, layer in enumerate(layers) if isinstance(layer, TurboQuantLayer)]

    def full_bytes(self, context: int, batch: int = 1, fp8: bool = False) -> int:
        """
        Bytes of keys and values in a `DynamicCache`, without the states of linear attention. With `fp8`, the layers
        that a `TurboQuantCache` compresses take one byte per coordinate.
        """
        size, shrunk = self.dtype.itemsize, self.compressed() if fp8 else ()
        return batch * sum(
            layer.full_bytes(context) // (size if index in shrunk else 1) for index, layer in enumerate(self.layers)
        )

    def memory(self, context: int, batch: int = 1, **options) -> MemoryReport:
        """
        What `cache.memory()` reports after a prefill of `context` tokens: real layers reserve their buffers on the
        `meta` device.

        Args:
            context (`int`), batch (`int`): tokens of each sequence, and number of sequences.
            **options: see [`TurboQuantConfig`].
        """
        cache, total, known = TurboQuantCache(self.config, **options), MemoryReport(), {}
        for layer, cost in zip(cache.layers, self.layers, strict=True):
            other = MemoryReport(other_bytes=batch * cost.state_bytes, full_bytes=batch * cost.state_bytes)
            if not isinstance(layer, TurboQuantLayer):
                held = batch * cost.full_bytes(context)
                total += other + MemoryReport(other_bytes=held, full_bytes=held)
                continue
            if cost not in known:
                # Layers that differ only in their index hold the same.
                known[cost] = _filled(TurboQuantLayer(layer.config, 0), cost, context, batch, self.dtype)
            total += other + known[cost]
        return total

    def longest_context(self, budget_bytes: int, batch: int = 1, **options) -> int:
        """
        Tokens that fit the budget, spare capacity included; without options, in a `DynamicCache`. `MAX_CONTEXT` if the
        cache does not grow.
        """

        def fits(context: int) -> bool:
            if options:
                return self.memory(context, batch, **options).total_bytes <= budget_bytes
            return self.full_bytes(context, batch) + batch * self.state_bytes <= budget_bytes

        # The number of contexts that fit is the longest of them.
        return bisect(range(1, MAX_CONTEXT + 1), False, key=lambda context: not fits(context))


def _run(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> DynamicCache:
    """The cache after `tokens` tokens of one sequence, on the `meta` device."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    # Some models look for padding in the tokens, which have no values here.
    text.pad_token_id = None
    # Gemma 3n computes a threshold from values too.
    if getattr(text, "activation_sparsity_pattern", None):
        text.activation_sparsity_pattern = [0.0] * text.num_hidden_layers
    with torch.device("meta"):
        # The default for mixtures of experts checks for a dtype that suits a GPU.
        model = AutoModel.from_config(text, dtype=dtype, experts_implementation="batched_mm").eval()
    cache = DynamicCache(config=config)
    # State space models have another name for the cache.
    name = "cache_params" if text.model_type in ("mamba", "mamba2") else "past_key_values"
    with torch.no_grad(), warnings.catch_warnings():
        # Newer releases of transformers name the argument `cache`.
        warnings.simplefilter("ignore", FutureWarning)
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True, **{name: cache})
    return cache


def _filled(layer: TurboQuantLayer, cost: LayerCost, context: int, batch: int, dtype: torch.dtype) -> MemoryReport:
    """The report of a layer after a prefill of `context` tokens."""
    states = [torch.empty(batch, heads, 0, dim, dtype=dtype, device="meta") for heads, dim in cost.shapes]
    layer.lazy_initialization(*states)
    exact = layer.config.sink_length + layer.config.residual_length
    if context <= layer.config.sink_length + layer.config.held_length:
        # Too few to condition keys by: none is quantised yet.
        exact = context
    for buffer in layer.codes.values():
        buffer.reserve(max(context - exact, 0))
        buffer.length = max(context - exact, 0)
    layer.exact.reserve(min(context, exact), limit=exact)
    layer.length = context
    learned = {"attention": 2, "center": 1, "none": 0}[layer.config.condition]
    (heads, dim), _ = cost.shapes
    # Conditioning adds the mean and scale of every channel, in fp32.
    return layer_memory(layer) + MemoryReport(constants_bytes=learned * heads * dim * 4)
