"""Compares predictions through a compressed cache with those through a full one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from .._supported import cache_name
from .caches import FULL, bits_per_coordinate, held_bytes, new_cache


@dataclass
class Quality:
    """Sums over the scored tokens; the properties are their means."""

    tokens: int = 0
    nll_sum: float = 0.0
    agreement_sum: float = 0.0
    bits_sum: float = 0.0
    kls: list[float] = field(default_factory=list)
    compression_ratio: float = 1.0
    total_bits: float = 16.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the text's own next token."""
        return math.exp(self.nll_sum / self.tokens)

    @property
    def kl(self) -> float:
        """Mean KL(full || compressed) of the next-token distributions, in nats."""
        return sum(self.kls) / self.tokens

    @property
    def kl_p99(self) -> float:
        """The 99th percentile of the KL, in nats."""
        return torch.tensor(self.kls).quantile(0.99).item()

    @property
    def agreement(self) -> float:
        """Fraction of tokens after which both caches predict the same most likely next token."""
        return self.agreement_sum / self.tokens

    @property
    def bits(self) -> float:
        """Mean bits per coordinate of all tokens, exact ones included."""
        return self.bits_sum / self.tokens

    def add(self, full: torch.Tensor, log_probs: torch.Tensor, targets: torch.Tensor, bits: float = 0.0) -> None:
        """Adds a block: log-probabilities `[batch, tokens, vocab]` of both caches, next tokens `[batch, tokens]`."""
        self.tokens += targets.numel()
        self.bits_sum += bits * targets.numel()
        self.nll_sum -= log_probs.gather(-1, targets[..., None]).sum().item()
        self.kls += (full.exp() * (full - log_probs)).sum(-1).flatten().tolist()
        self.agreement_sum += (full.argmax(-1) == log_probs.argmax(-1)).sum().item()

    def __add__(self, other: "Quality") -> "Quality":
        names = "tokens", "nll_sum", "agreement_sum", "bits_sum", "kls"
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Quality(**sums, compression_ratio=other.compression_ratio, total_bits=other.total_bits)


class Full:
    """
    What the full cache predicts of windows, ids of shape `[batch, length]`: its [`Quality`], log-probabilities by
    scored block, on the CPU, and its bytes. For `blocks` see [`measure`].
    """

    def __init__(self, model, ids: torch.Tensor, **blocks):
        self.predict = partial(_predict, model, ids, **blocks)
        cache, self.quality, self.log_probs = new_cache(model.config, FULL), Quality(), []
        for log_probs, targets in self.predict(cache):
            self.quality.add(log_probs, log_probs, targets, bits=16.0)
            self.log_probs.append(log_probs.cpu())
        self.nbytes = held_bytes(cache)

    def compare(self, cache) -> Quality:
        """Reads the same windows through another cache, an empty one."""
        quality = Quality()
        for expected, (log_probs, targets) in zip(self.log_probs, self.predict(cache), strict=True):
            bits = bits_per_coordinate(cache, with_exact=True)
            quality.add(expected.to(log_probs.device), log_probs, targets, bits)
        quality.compression_ratio, quality.total_bits = self.nbytes / held_bytes(cache), bits_per_coordinate(cache)
        return quality


def split_windows(tokenizer, text: str, length: int, count: int) -> torch.Tensor:
    """The first windows of a text, ids of shape `[count, length]`; a `ValueError` if the text is too short."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise ValueError(
            f"The text must hold {count} windows of {length} tokens, got {len(ids)} tokens. "
            "Take a longer text, fewer windows or shorter ones."
        )
    return ids[: count * length].view(count, length)


@torch.inference_mode()
def _predict(model, ids, cache, block=32, prefill=None, score_from=0) -> Iterator[tuple]:
    """Reads `ids` block by block; yields log-probabilities and next tokens of every scored block."""
    starts = [0, *range(block if prefill is None else prefill, ids.shape[1], block)]
    for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        # The window's last token has no next one.
        targets = ids[:, start + 1 : stop + 1]
        logits = model(ids[:, start:stop], **{cache_name(model): cache}).logits[:, : targets.shape[1]]
        if start >= score_from:
            yield logits.float().log_softmax(-1), targets


def measure(model, windows: torch.Tensor, configurations: list[dict], batch: int = 4, **blocks):
    """
    Compares compressed caches with the full one on the same text: a [`Quality`] of the full one, then one for each.

    Windows of the text are fed in small blocks that attend to the cache, so that all predictions but those of the first
    block depend on it. Host memory holds the full cache's predictions of a batch, four bytes a word and scored token.

    Args:
        windows (`torch.Tensor`): token ids of shape `[windows, length]`.
        configurations (`list[dict]`): options of the caches, see [`caches.new_cache`].
        batch (`int`): windows fed at a time; they share a cache, its conditioning and its constants.
        blocks: `block` (`int`, 32), tokens fed at a time; `prefill` (`int`, `block`), tokens of the first block;
            `score_from` (`int`, 0), position of the first block whose predictions count.
    """
    total = None
    for ids in windows.to(model.device).split(batch):
        full = Full(model, ids, **blocks)
        found = [full.quality, *(full.compare(new_cache(model.config, options)) for options in configurations)]
        total = [sum_ + new for sum_, new in zip(total, found, strict=True)] if total else found
    return total
