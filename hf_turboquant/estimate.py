"""Estimates the memory of a model's cache from its config alone, without making or reading weights."""

import copy
import functools
from bisect import bisect
from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, AutoModel, PreTrainedConfig

from ._supported import cache_name
from .cache import TurboQuantCache, check_config
from .config import TurboQuantConfig
from .layer import TurboQuantLayer
from .memory import MemoryReport, layer_memory
from .quantizer import ROLES

# The search for the longest context stops here.
MAX_CONTEXT = 2**40
KINDS = {
    "DynamicLayer": "full attention",
    "TurboQuantLayer": "full attention",
    "DynamicSlidingWindowLayer": "sliding window",
    "DynamicIndexedLayer": "sparse attention",
    "LinearAttentionLayer": "linear attention",
    "LinearAttentionAndFullAttentionLayer": "full attention beside a recurrent part",
    "TurboQuantHybridLayer": "full attention beside a recurrent part",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding window beside a recurrent part",
    "DummyLayer": "no cache of its own",
}


@dataclass(frozen=True)
class LayerCost:
    """
    What one layer of a model keeps for one sequence.

    Args:
        kind (`str`): in words, see `KINDS`.
        token_bytes (`int`): bytes of one token, in the model's dtype.
        state_bytes (`int`): bytes that do not depend on the context: the state of linear attention.
        window (`int`, *optional*): tokens of a sliding window, as model cards give it: the current token is one of
            them, and is not kept. Without a window, all tokens are kept.
        shapes (`tuple`): (num_key_value_heads, head_dim) of keys and of values; `()` if the layer has none.
        compressed (`bool`): whether a [`TurboQuantCache`] holds it in codes.
    """

    kind: str
    token_bytes: int
    state_bytes: int
    window: int | None
    shapes: tuple[tuple[int, int], ...]
    compressed: bool

    def __str__(self) -> str:
        parts = [self.kind + (f" of {self.window:,} tokens" if self.window else "")]
        if self.shapes:
            (heads, keys), (_, values) = self.shapes
            dims = f"of {keys}" if keys == values else f"with keys of {keys} and values of {values}"
            parts.append(f"{heads} KV head{'s' * (heads > 1)} {dims}")
        if self.kind.startswith("full") and not self.compressed:
            # Layers that attend to an image, say, hold nothing here.
            parts.append("cannot be packed" if self.shapes else "empty for text alone")
        return ", ".join(parts)

    def full_bytes(self, context: int) -> int:
        """Bytes of keys and values in the model's dtype, for one sequence."""
        return self.token_bytes * (context if self.window is None else min(context, self.window - 1))

    def fixed_bytes(self, max_cache_len: int) -> int:
        """Bytes allocated for a fixed capacity of `max_cache_len` tokens, for one sequence."""
        return self.token_bytes * min(max_cache_len, self.window or max_cache_len)


@dataclass(frozen=True)
class Estimate:
    """
    What the cache of a model takes, compressed or not.

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
            `ValueError`: `config` is no config or not of a decoder-only model, or transformers cannot run that model.
        """
        check_config(config)
        try:
            one, two = (_run(config, tokens, dtype) for tokens in (1, 2))
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ValueError(
                "`config` must be of a decoder-only model that transformers can make, got "
                f"{config.model_type!r}: {reason}. If it generates text, count from `cache.memory()` of a real run, or "
                "update transformers."
            ) from None
        layers = []
        for first, second in zip(one.layers, two.layers, strict=True):
            one_token, two_tokens = (layer_memory(layer).full_bytes for layer in (first, second))
            # Layers with recurrent states alone have no keys.
            held = [states for states in (getattr(second, role, None) for role in ROLES) if states is not None]
            layers.append(
                LayerCost(
                    kind=KINDS[type(second).__name__],
                    token_bytes=two_tokens - one_token,
                    state_bytes=2 * one_token - two_tokens,
                    window=getattr(second, "sliding_window", None),
                    shapes=tuple((states.shape[1], states.shape[3]) for states in held),
                    compressed=isinstance(second, TurboQuantLayer) and bool(held),
                )
            )
        return cls(config, layers, dtype)

    @property
    def state_bytes(self) -> int:
        """The states of linear attention, for one sequence of any length."""
        return sum(layer.state_bytes for layer in self.layers)

    def compressed(self, **options) -> list[int]:
        """The layers that a [`TurboQuantCache`] with these options compresses."""
        skipped = TurboQuantCache(self.config, **options).skipped
        return [index for index, cost in enumerate(self.layers) if cost.compressed and index not in skipped]

    def full_bytes(self, context: int, batch: int = 1, fp8: bool = False) -> int:
        """
        Bytes of keys and values in a `DynamicCache`, without the states of linear attention. With `fp8`, a byte per
        coordinate, in sliding windows too.
        """
        full = batch * sum(layer.full_bytes(context) for layer in self.layers)
        return full // self.dtype.itemsize if fp8 else full

    def memory(self, context: int, batch: int = 1, **options) -> MemoryReport:
        """
        What `cache.memory()` reports after a prefill of `context` tokens: real layers reserve their buffers on the
        `meta` device.

        Args:
            context (`int`), batch (`int`): tokens of each sequence, and number of sequences.
            **options: see [`TurboQuantConfig`].

        Raises:
            `ValueError`: an option is out of range, or `max_cache_len` is less than `context`.
        """
        compressed, total = self.compressed(**options), MemoryReport()
        capacity = TurboQuantConfig(**options).max_cache_len
        # Layers that differ only in their index hold the same.
        filled = functools.cache(lambda cost: _filled(cost, context, batch, self.dtype, options))
        for index, cost in enumerate(self.layers):
            kept = cost.full_bytes(context) if capacity is None else cost.fixed_bytes(capacity)
            held = batch * (cost.state_bytes + (0 if index in compressed else kept))
            total += MemoryReport(other_bytes=held, full_bytes=held)
            if index in compressed:
                total += filled(cost)
        return total

    def longest_context(self, budget_bytes: int, batch: int = 1, **options) -> int:
        """
        Tokens of each sequence that fit the budget, spare capacity included; without options, in a `DynamicCache`. At
        most `max_cache_len` or, without that, `MAX_CONTEXT`: a cache may not grow at all.
        """

        def fits(context: int) -> bool:
            if options:
                return self.memory(context, batch, **options).total_bytes <= budget_bytes
            return self.full_bytes(context, batch) + batch * self.state_bytes <= budget_bytes

        most = TurboQuantConfig(**options).max_cache_len or MAX_CONTEXT
        # The number of contexts that fit is the longest of them.
        return bisect(range(1, most + 1), False, key=lambda context: not fits(context))


def _run(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> TurboQuantCache:
    """
    The cache after `tokens` tokens of one sequence, all of them exact, on the `meta` device; raises a `ValueError` if
    the model has no growing cache of its own tokens alone.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ValueError("its decoder caches the states of an encoder too")
    # Some text models have a class only as part of the whole model.
    source = text if type(text) in MODEL_MAPPING else config
    if type(source) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no model of its own for {type(source).__name__}")
    # Some models look for padding in the tokens, which have no values here. Some configs refuse to have none.
    vars(text)["pad_token_id"] = None
    # Gemma 3n computes a threshold from values too.
    if getattr(text, "activation_sparsity_pattern", None):
        text.activation_sparsity_pattern = [0.0] * text.num_hidden_layers
    with torch.device("meta"):
        # The default for mixtures of experts checks for a dtype that suits a GPU.
        model = AutoModel.from_config(source, dtype=dtype, experts_implementation="batched_mm").eval()
    name = cache_name(model)
    # Models that read images may see all of a prompt at once.
    seen = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    if seen == {False} and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError("its attention sees later tokens, as that of an encoder does")
    cache = TurboQuantCache(config, condition="none")
    # Without these the cache takes any head_dim; its layers tell what cannot be packed.
    cache.model_fields = None
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True, **{name: cache})
    if not any(layer_memory(layer).full_bytes for layer in cache.layers):
        raise ValueError("it leaves its cache empty")
    # Two tokens say too little about how layers of other kinds grow.
    own = sorted({type(layer).__name__ for layer in cache.layers} - KINDS.keys())
    if own:
        raise ValueError(f"its cache has layers of its own kind, {own[0]}")
    return cache


def _filled(cost: LayerCost, context: int, batch: int, dtype: torch.dtype, options: dict) -> MemoryReport:
    """The report of a compressed layer after a prefill of `context` tokens."""
    layer = TurboQuantLayer(TurboQuantConfig(**options), 0)
    states = [torch.empty(batch, heads, 0, dim, dtype=dtype, device="meta") for heads, dim in cost.shapes]
    layer.lazy_initialization(*states)
    layer.make_room(context)
    config, tokens, (heads, dim), constants = layer.config, layer.tokens, cost.shapes[0], 0
    if context > config.sink_length + config.held_length:
        tokens = layer.tokens = tokens.emptied()
        # Conditioning adds the mean and scale of every channel, in fp32; a fixed capacity has room for them anyway.
        learned = 0 if layer.fixed else {"attention": 2, "center": 1, "none": 0}[config.condition]
        constants = learned * heads * dim * 4
    tokens.length, tokens.quantized = context, max(context - tokens.sinks - tokens.window, 0)
    tokens.exact.reserve(min(context, tokens.sinks + tokens.window), limit=tokens.sinks + tokens.exact.ring)
    for buffer in tokens.codes.values():
        buffer.reserve(buffer.length)
    return layer_memory(layer) + MemoryReport(constants_bytes=constants)
