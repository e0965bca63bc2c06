"""Attention through a compressed cache, layer by layer, on the keys, values and queries of a real text."""

from typing import NamedTuple

import torch

from .._supported import cache_name
from ..cache import TurboQuantCache
from ..config import TurboQuantConfig
from ..layer import TurboQuantLayer
from .caches import new_cache

# Number of queries, at the end of the text, for which attention is compared.
QUERIES = 16
# Cosine and top-1 by bits, as published in https://ai-muninn.com/en/blog/turboquant-kv-cache-benchmark-gx10.
BENCHMARK = {4: ("0.9982", "0.847"), 3: ("0.9943", "0.806"), 2: ("0.9846", "0.694")}
DIFFERENCES = (
    "Published of Qwen2.5-3B-Instruct, which reads a paragraph again and again: all tokens are in codes, the last key "
    "asks in place of a query, and the cosine is of scores as they are. In the second table the last key in codes asks "
    "in the same way; in the first the last queries ask, and the cosine is of scores less their mean."
)


class LayerInputs(NamedTuple):
    """The inputs of one layer's attention: tensors of shape `[1, heads, tokens, head_dim]`."""

    layer_idx: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class _RecordingLayer(TurboQuantLayer):
    """Keeps the states and the query of the first prefill, which the layer's handles see anyway."""

    seen = None

    def observe(self, query, attention_mask):
        if query is not None and self.seen is None and self.pending is not None:
            self.seen = LayerInputs(self.layer_idx, query.detach(), *self.pending.values())
        super().observe(query, attention_mask)


@torch.inference_mode()
def capture(model, ids: torch.Tensor) -> list[LayerInputs]:
    """
    Captures queries, keys and values of all layers that a `TurboQuantCache` compresses, for ids of shape `[1, tokens]`.
    A `ValueError` if the queries cannot be seen.
    """
    cache = TurboQuantCache(model.config, condition="attention")
    for index, layer in enumerate(cache.layers):
        if type(layer) is TurboQuantLayer:
            cache.layers[index] = _RecordingLayer(cache.options, index)
    model(ids.to(model.device), **{cache_name(model): cache}, logits_to_keep=1)
    recorded = [layer.seen for layer in cache.layers if isinstance(layer, _RecordingLayer)]
    if not recorded or None in recorded:
        raise ValueError(
            "Fidelity needs layers of full attention whose queries can be seen, got none. Load the model with "
            "`attn_implementation='sdpa'`, or leave this part out."
        )
    return recorded


@torch.inference_mode()
def compare(config, inputs: LayerInputs, options: dict, length: int) -> dict[str, float]:
    """
    Compares attention of the last queries among the first `length` tokens through a cache with exact attention.

    Returns:
        `cosine` of the logits over tokens, mean over queries, and `top1`, how often the same token has the largest
        logit: among the tokens that a cache with default options holds in codes, for every kind of cache, because exact
        tokens would flatter the result. `all_cosine` and `all_top1`: among all tokens that a query sees, as in use.
        `key_cosine` and `key_top1`: the last key in codes serves as the query, see `DIFFERENCES`. `output_error`:
        |o - ô| / |o| of the attention's output.

    Raises:
        `ValueError`: `length` leaves no token in codes, or is longer than the text.
    """
    first, last = TurboQuantConfig.sink_length, length - TurboQuantConfig.residual_length - QUERIES
    if not first < last or length > inputs.keys.shape[2]:
        raise ValueError(
            f"The lengths of the fidelity part must be from {first + 1 + length - last} to {inputs.keys.shape[2]}, the "
            f"tokens of the text that was read, got {length}."
        )
    cache, index, read = new_cache(config, options), inputs.layer_idx, length - QUERIES
    query, keys, values = (states[:, :, :length] for states in (inputs.query, inputs.keys, inputs.values))
    cache.update(keys[:, :, :read].contiguous(), values[:, :, :read].contiguous(), index)
    if isinstance(cache.layers[index], TurboQuantLayer):
        cache.layers[index].settle(query[:, :, :read])
    held = cache.update(keys[:, :, read:], values[:, :, read:], index)
    query, asking = query[:, :, read:].float(), keys[:, :, last - 1 : last].float()
    # Handles dequantize here.
    keys, values, held_keys, held_values = (states.float() for states in (keys, values, *held))
    exact, exact_output = _attend(query, keys, values)
    logits, output = _attend(query, held_keys, held_values)
    coded = slice(first, last)
    by_key = [asking @ states[:, :, coded].mT for states in (keys, held_keys)]
    found = _agreement("", _centred(exact[..., coded]), _centred(logits[..., coded]))
    found |= _agreement("all_", _centred(exact[..., : read + 1]), _centred(logits[..., : read + 1]))
    found |= _agreement("key_", *by_key)
    return found | {"output_error": ((output - exact_output).norm() / exact_output.norm()).item()}


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _agreement(name: str, exact: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    cosine = torch.cosine_similarity(exact, logits, dim=-1).mean().item()
    return {f"{name}cosine": cosine, f"{name}top1": (exact.argmax(-1) == logits.argmax(-1)).float().mean().item()}


def _attend(query, keys, values) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits before masking and outputs; query i is the token at position `kv_len - query_length + i`."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
    logits = query @ keys.mT * query.shape[-1] ** -0.5
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(keys.shape[2] - query.shape[2] + 1).to(logits.device)
    return logits, logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values
