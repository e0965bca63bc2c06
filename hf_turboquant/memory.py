"""MemoryReport: the bytes of a cache, counted from its tensors."""

import math
from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from torch.utils._pytree import tree_leaves

from .layer import TurboQuantLayer
from .packing import BLOCK
from .tokens import Tokens


@dataclass(frozen=True)
class MemoryReport:
    """
    Bytes of a cache, every tensor counted.

    Args:
        codes_bytes (`int`): packed codes and sketch signs of the tokens held.
        scales_bytes (`int`): scales and residual norms of the tokens held.
        exact_bytes (`int`): sinks, recent tokens, and all others until keys are conditioned.
        slack_bytes (`int`): allocated for later tokens.
        constants_bytes (`int`): rotations, sketches, codebooks, mean and scale; independent of the sequence length.
        other_bytes (`int`): layers that are not compressed.
        full_bytes (`int`): what a `DynamicCache` holds for the same tokens.
        smaller_from (`int`): about how many tokens a sequence must have to be smaller than in a `DynamicCache`; 0 if
            it never is.
    """

    codes_bytes: int = 0
    scales_bytes: int = 0
    exact_bytes: int = 0
    slack_bytes: int = 0
    constants_bytes: int = 0
    other_bytes: int = 0
    full_bytes: int = 0
    smaller_from: int = field(default=0, compare=False)

    @property
    def total_bytes(self) -> int:
        """Everything the cache holds."""
        return sum(getattr(self, name) for name in _PARTS)

    @property
    def compression_ratio(self) -> float:
        """Bytes in full precision / bytes stored; 1 for an empty cache."""
        return self.full_bytes / self.total_bytes if self.total_bytes else 1.0

    def __add__(self, other: "MemoryReport") -> "MemoryReport":
        sums = (getattr(self, name) + getattr(other, name) for name in (*_PARTS, "full_bytes"))
        return MemoryReport(*sums, max(self.smaller_from, other.smaller_from))

    def __str__(self) -> str:
        held = {name.removesuffix("_bytes"): getattr(self, name) for name in _PARTS}
        parts = ", ".join(f"{name} {readable(count)}" for name, count in held.items() if count)
        ratio = f"{self.compression_ratio:.2f} times smaller" if self.full_bytes else "no tokens"
        if 0 < self.compression_ratio < 1:
            later = f"; smaller from about {self.smaller_from:,} tokens on" if self.smaller_from else ""
            ratio = f"{1 / self.compression_ratio:.1f} times larger{later}"
        return f"{readable(self.total_bytes)} in place of {readable(self.full_bytes)}: {ratio} ({parts or 'empty'})"


_PARTS = tuple(part.name for part in fields(MemoryReport))[:-2]


def layer_memory(layer) -> MemoryReport:
    """The report of one layer of a cache, of any kind."""
    if isinstance(layer, TurboQuantLayer):
        layer._store_deferred()
    # Of a compressed layer, these are recurrent states and waiting tokens: all else is counted from its `tokens`.
    leaves = tree_leaves(vars(layer))
    held = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
    if not isinstance(layer, TurboQuantLayer) or not layer.is_initialized:
        return MemoryReport(other_bytes=held, full_bytes=held)
    layer.make_memory()
    layer.measure()
    tokens, per_token = layer.tokens, _token_bytes(layer.tokens)
    codes, scales = (int(per_token[kind] * tokens.quantized) for kind in ("codes", "scales"))
    exact = int(per_token["exact"] * (tokens.length - tokens.quantized))
    constants = sum(quantizer.nbytes for quantizer in tokens.quantizers.values())
    return MemoryReport(
        codes_bytes=codes,
        scales_bytes=scales,
        exact_bytes=exact,
        slack_bytes=layer.nbytes - codes - scales - exact,
        constants_bytes=constants,
        other_bytes=held,
        full_bytes=int(per_token["exact"] * tokens.length) + held,
        smaller_from=_smaller_from(layer, per_token, constants),
    )


def _token_bytes(tokens: Tokens) -> Counter:
    """Bytes of one token if exact, of its codes and of its scales. Codes of 3 bits may end within a byte."""
    per_token = Counter()
    for buffer in (tokens.exact, *tokens.codes.values()):
        for name, t in buffer.tensors.items():
            kind = "exact" if buffer is tokens.exact else "codes" if name.startswith("plane") else "scales"
            per_token[kind] += math.prod((*t.shape[:2], *t.shape[3:])) * t.itemsize / buffer.block
    return per_token


def _smaller_from(layer: TurboQuantLayer, per_token: Counter, constants: int) -> int:
    """Tokens whose codes have saved as much as the constants and a block of spare codes take."""
    config, exact, coded = layer.config, per_token["exact"], per_token["codes"] + per_token["scales"]
    if config.max_cache_len is not None:
        tokens = math.ceil((layer.nbytes + constants) / exact)
        return tokens if tokens <= config.max_cache_len else 0
    saved = math.ceil((constants + BLOCK * coded) / (exact - coded))
    # Until keys are conditioned, all tokens are exact.
    return config.sink_length + max(config.residual_length + saved, config.held_length + 1)


def readable(count: int) -> str:
    """`168_100_000` -> `"168 MB"`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
