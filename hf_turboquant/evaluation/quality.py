"""Compares predictions through a compressed cache with those through a full one."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from .._supported import cache_name
from .caches import bits_per_coordinate, held_bytes, named, new_cache


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
        """Mean of what `weigh` returned for the cache."""
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


def split_windows(tokenizer, text: str, length: int, count: int) -> torch.Tensor:
    """
    The first `count` windows of the text, as token ids of shape `[count, length]`.

    Raises:
        `ValueError`: the text is too short.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise ValueError(
            f"The text must hold {count} windows of {length} tokens, got {len(ids)} tokens. "
            "Take a longer text, fewer windows or shorter ones."
        )
    return ids[: count * length].view(count, length)


@torch.inference_mode()
def measure(
    model,
    windows: torch.Tensor,
    configurations: list[dict | Callable],
    block: int = 32,
    batch: int = 4,
    prefill: int | None = None,
    score_from: int = 0,
    advance: Callable[[int], object] = lambda tokens: None,
    weigh: Callable[[object], float] = lambda cache: 0.0,
) -> list[Quality]:
    """
    Compares compressed caches with the full one on the same text.

    Windows of the text are fed in small blocks that attend to the cache, so that all predictions but those of the first
    block depend on it. The full cache and all compressed ones read each block in turn, so that each is run once and
    only one block of full logits is in memory.

    Args:
        model: a causal language model.
        windows (`torch.Tensor`): token ids of shape `[windows, length]`.
        configurations (`list[dict | Callable]`): options of the caches, see [`caches.new_cache`]; or functions that
            make any other cache from the model's config.
        block (`int`): tokens fed at a time.
        batch (`int`): windows fed at a time; they share a cache, its conditioning and its constants.
        prefill (`int`, *optional*): tokens of the first block, `block` by default.
        score_from (`int`): position of the first block whose predictions count.
        advance (`Callable`): called with the number of tokens done, after every block of every cache.
        weigh (`Callable`): called with every cache after every scored block; [`Quality.bits`] is the mean.

    Returns:
        A [`Quality`] for the full cache, then one for each configuration.
    """
    qualities = [Quality() for _ in range(1 + len(configurations))]
    for ids in windows.to(model.device).split(batch):
        caches = [DynamicCache(config=model.config)]
        caches += [
            options(model.config) if callable(options) else new_cache(model.config, options)
            for options in configurations
        ]
        starts = [0, *range(block if prefill is None else prefill, ids.shape[1], block)]
        for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            inputs = ids[:, start:stop]
            # The window's last token has no next one.
            targets = ids[:, start + 1 : stop + 1]
            full = None
            for cache, quality, options in zip(caches, qualities, [{}, *configurations], strict=True):
                with nullcontext() if callable(options) else named(options):
                    logits = model(inputs, **{cache_name(model): cache}).logits[:, : targets.shape[1]]
                log_probs = logits.float().log_softmax(-1)
                full = log_probs if full is None else full
                if start >= score_from:
                    quality.add(full, log_probs, targets, weigh(cache))
                advance(inputs.numel())
        full_bytes = held_bytes(caches[0])
        for cache, quality in zip(caches[1:], qualities[1:], strict=True):
            counted = cache.memory().total_bytes if hasattr(cache, "memory") else held_bytes(cache)
            quality.compression_ratio = full_bytes / counted
            quality.total_bits = bits_per_coordinate(cache)
    return qualities


def total(units: dict[str, dict], windows: int) -> dict[str, Quality]:
    """The [`Quality`] of every cache by name, summed over the saved windows of a run."""
    sums: dict[str, Quality] = {}
    for index in range(windows):
        for name, found in units[f"quality: window {index}"].items():
            sums[name] = sums.get(name, Quality()) + Quality(**found)
    return sums
