"""Conditioning: a mean and a scale for every key channel, so that channels with large queries get small errors."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from . import ops
from .config import TurboQuantConfig
from .ops.reference_statistics import energy, fill
from .quantizer import Quantizer
from .tokens import ROLES, Tokens

# A scale from fewer different tokens predicts too little about later tokens.
MIN_TOKENS = 64
# A sample of this many evenly spaced tokens is as good as all of them and takes little memory.
MAX_TOKENS = 4_096
# With fewer tokens than this, the mean is extrapolated to this many positions.
HORIZON = 2_048
# Every channel counts as having at least this fraction of the average energy: keeps scales within a factor of ten.
MIN_ENERGY = 1e-4


class Learned(NamedTuple):
    """
    What conditioning found.

    Args:
        centred, scaled (`bool`): whether keys have a mean and a scale. Without a query, or where statistics are
            degenerate, there is no scale; there is no mean of keys that are not finite.
        enough (`bool`): whether there were enough different tokens for a scale.
        tokens (`int`): number of tokens in the statistics, all sequences together.
    """

    centred: bool
    scaled: bool
    enough: bool
    tokens: int

    @property
    def condition(self) -> str:
        """`"attention"` (mean and scale), `"center"` (mean only) or `"none"`, as the option of that name."""
        return "attention" if self.scaled else "center" if self.centred else "none"

    def __str__(self) -> str:
        if self.condition == "none":
            return "not conditioned"
        return f"{'conditioned' if self.scaled else 'centred'} by {self.tokens:,} tokens"


# Of layers that do not condition keys, or have not yet.
NOT_CONDITIONED = Learned(False, False, True, 0)


class Conditioning:
    """
    What a layer knows of its tokens until it conditions keys by them, and what was found then.

    Args:
        config (`TurboQuantConfig`): options of the cache.
        layer_idx (`int`): index of the layer in the model.
        frequencies (`list[float]`, *optional*): of the rotary embedding of its keys: see [`rotary_frequencies`].
        verdict (`dict`): shared by the layers of a cache: see [`differ`].
    """

    def __init__(self, config: TurboQuantConfig, layer_idx: int, frequencies: list[float] | None, verdict: dict):
        self.config, self.layer_idx, self.frequencies, self.verdict = config, layer_idx, frequencies, verdict
        # What was found, possibly on the device only; None while there is too little to learn from.
        self.found: Learned | torch.Tensor | None = NOT_CONDITIONED if config.condition == "none" else None
        # With a fixed capacity, what would be found if the next token were quantized.
        self.provisional: Learned | torch.Tensor = NOT_CONDITIONED
        # What that takes: squares of the queries so far, and which of the tokens so far are no padding.
        self.query_energy: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether keys still wait to be conditioned."""
        return self.found is None

    @property
    def condition(self) -> str | None:
        """What was found: see [`Learned.condition`]; `None` while keys wait."""
        if self.waits:
            return None
        self.found = learned(self.found)
        return self.found.condition

    def add_query(self, query: torch.Tensor, valid: torch.Tensor | None, heads: int, kv_len: int) -> None:
        """Counts the query of the last of `kv_len` tokens; arguments as for [`energy_of_queries`]."""
        if self.config.condition == "attention":
            # In the first prefill queries are padded like keys; of later queries, all count.
            energy = energy_of_queries(query, valid if query.shape[2] == kv_len else None, heads)
            self.query_energy = energy if self.query_energy is None else energy + self.query_energy

    def add_mask(self, valid: torch.Tensor | None, batch: int, tokens: int) -> None:
        """Notes which tokens are no padding, boolean `[batch, tokens]`; without a mask, all that were not noted yet."""
        if valid is not None:
            self.valid = valid.expand(batch, -1).clone()
        elif self.valid is not None:
            self.valid = torch.nn.functional.pad(self.valid, (0, tokens - self.valid.shape[1]), value=True)

    def apply(self, quantizer: Quantizer, states: dict[str, torch.Tensor]) -> tuple[Quantizer, torch.Tensor]:
        """The quantizer of keys, conditioned by `states` (all tokens so far) without sinks, and what was found."""
        sinks, valid = self.config.sink_length, None
        if self.valid is not None:
            valid = self.valid[:, sinks : states["keys"].shape[2]]
        # Constants must be ordinary tensors even if the first prefill runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            plain = replace(quantizer, mean=None, scale=None)
            seen = *(states[role][:, :, sinks:] for role in ROLES), self.query_energy, valid
            return condition(plain, *seen, self.frequencies, sinks, self.config.backend)

    def differ(self, found: torch.Tensor, length: int) -> bool:
        """
        Whether enough of the first `length` tokens differ. To know, the host must wait for the device: it does so in
        the first layer of a model only, and the others follow its verdict.
        """
        if self.layer_idx <= self.verdict.get("layer_idx", self.layer_idx) or self.verdict["length"] != length:
            self.verdict.update(layer_idx=self.layer_idx, length=length, enough=learned(found).enough)
        return self.verdict["enough"]

    def learn(self, tokens: Tokens, states: dict[str, torch.Tensor], coming: int = 0) -> Tokens | None:
        """
        What `tokens` become when keys are conditioned by `states`, all tokens so far, of which none is quantized yet.
        `None` if they are too few or, as long as the exact slots have room for `coming` more, too few of them differ.
        """
        length = states["keys"].shape[2]
        beside = length + coming - tokens.sinks
        if beside <= self.config.held_length:
            return None
        keys, found = self.apply(tokens.quantizers["keys"], states)
        if beside <= tokens.exact.ring and not self.differ(found, length):
            return None
        conditioned = tokens.emptied()
        conditioned.quantizers = {**tokens.quantizers, "keys": keys}
        conditioned.append(states)
        self.finish(found)
        return conditioned

    def finish(self, found: Learned | torch.Tensor) -> None:
        """Keeps what was found, and drops what it was found from."""
        self.found, self.query_energy, self.valid = found, None, None


def learned(found: torch.Tensor | Learned) -> Learned:
    """What [`condition`] found, on the host; waits for the device."""
    if isinstance(found, Learned):
        return found
    centred, scaled, enough, tokens = found.tolist()
    return Learned(bool(centred), bool(scaled), bool(enough), tokens)


def energy_of_queries(query: torch.Tensor, valid: torch.Tensor | None, heads: int) -> torch.Tensor:
    """
    Sum of squared queries for each KV head and channel, fp32 `[heads, head_dim]`.

    Args:
        query (`torch.Tensor`): of shape `[batch, num_attention_heads, query_length, head_dim]`.
        valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, query_length]`; false for padding.
        heads (`int`): number of KV heads; the query heads of one KV head are consecutive.
    """
    query, valid = _sample(query, valid)
    return energy(fill(query, valid).unflatten(1, (heads, -1)))


def condition(
    quantizer: Quantizer,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_energy: torch.Tensor | None,
    valid: torch.Tensor | None,
    frequencies: list[float] | None = None,
    first: int = 0,
    backend: str = "auto",
) -> tuple[Quantizer, torch.Tensor]:
    """
    Gives the quantizer of keys a mean μ and a scale t per KV head and channel: y = Π t (k - μ), queries Π q / t.

    Scores don't change: q·μ is the same for all keys, and (q / t)·(t k) = q·k. The error of a score is proportional to
    (Σ_c E q_c² / t_c²) (Σ_c t_c² E k_c²), for centred k, and smallest if t_c⁴ = E q_c² / E k_c² (Cauchy-Schwarz). Both
    expectations are over the tokens so far, without padding and without sinks, which stay exact.

    Rotary embeddings slowly rotate the mean of low-frequency pairs of channels as positions advance. With fewer than
    `HORIZON` tokens, μ is the expected mean over that many positions, and the deviation from it counts as energy: see
    `future_mean` in `ops.reference_statistics`.

    A scale needs `MIN_TOKENS` different tokens, see `different_tokens` there: one token, or a few, over and over
    (newlines, a warm-up) say nothing about the spread of channels. A mean is taken from whatever there is.

    Args:
        quantizer (`Quantizer`): without mean and scale.
        keys, values (`torch.Tensor`): of shape `[batch, num_key_value_heads, tokens, head_dim]`, at least one token.
        query_energy (`torch.Tensor`, *optional*): E q² up to a factor, of shape `[num_key_value_heads, head_dim]`.
        valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, tokens]`; false for padding.
        frequencies (`list[float]`, *optional*): ω of each pair of channels: see [`rotary_frequencies`].
        first (`int`): position of the first of `keys`.
        backend (`str`): `"auto"`, `"triton"` or `"torch"`: see [`TurboQuantConfig`].

    Returns:
        The quantizer, and what [`learned`] reads. Nothing here waits for the device, except when the first layer copies
        the rotations of its positions there.
    """
    stop, step = first + keys.shape[2], _step(keys)
    # All sequences may share one mask.
    keys, valid = _sample(keys, None if valid is None else valid.expand(keys.shape[0], -1))
    # An embedding of more channels than the keys have does not belong to them.
    turned = frequencies and stop < HORIZON and 2 * len(frequencies) <= keys.shape[3]
    turns = _turns(tuple(frequencies), first, stop, step, keys.device) if turned else None
    seen = keys, _sample(values, None)[0], query_energy, valid, turns
    mean, scale, found = ops.channel_statistics(*seen, MIN_TOKENS, MIN_ENERGY, backend)
    return replace(quantizer, mean=mean, scale=scale), found


# All layers of a model on one device need the same tensors.
@lru_cache(maxsize=32)
def _turns(frequencies: tuple[float, ...], first: int, stop: int, step: int, device) -> tuple[torch.Tensor, ...]:
    """For every pair, e^(-iωp) at the positions, `[positions, pairs]`, and (e^(iωH) - 1) / (iωH), `[pairs]`."""
    angles = np.arange(first, stop, step)[:, None] * np.array(frequencies)
    half = HORIZON * np.array(frequencies) / 2
    # sinc (a sine over its angle) also handles ω = 0.
    turns = np.exp(-1j * angles), np.exp(1j * half) * np.sinc(half / np.pi)
    return tuple(torch.from_numpy(turn.astype(np.complex64)).to(device) for turn in turns)


def valid_tokens(attention_mask: torch.Tensor | None, kv_len: int) -> torch.Tensor | None:
    """Boolean of shape `[batch, kv_len]`: the tokens that the last query may attend to; `None` if all count."""
    shape = () if attention_mask is None else attention_mask.shape
    if len(shape) != 4 or shape[2] == 0 or shape[3] < kv_len:
        return None
    last = attention_mask[:, 0, -1, :kv_len]
    # Additive masks hide tokens with the dtype's lowest value or -inf.
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def _sample(states: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most `MAX_TOKENS` tokens of `[batch, heads, tokens, head_dim]`, evenly spaced, and which of them count."""
    step, states = _step(states), states.detach()
    return (states, valid) if step == 1 else (states[:, :, ::step], None if valid is None else valid[:, ::step])


def _step(states: torch.Tensor) -> int:
    return max(-(-states.shape[0] * states.shape[2] // MAX_TOKENS), 1)


def head_dim(config: PreTrainedConfig, layer_idx: int = 0) -> int:
    """Dimensions of a head of a layer, derived if the config does not give them."""
    layer = _layer_config(config, layer_idx)
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def known_head_dims(config: PreTrainedConfig, layer_idx: int) -> list[int]:
    """`[head_dim]` of a layer as its config tells, or nothing: latents (MLA) have widths of their own."""
    try:
        return [] if getattr(_layer_config(config, layer_idx), "kv_lora_rank", None) else [head_dim(config, layer_idx)]
    except (AttributeError, TypeError, ZeroDivisionError):
        return []


def layer_kinds(config: PreTrainedConfig, count: int) -> list:
    """For each of `count` layers, what those with the same head_dim and rotary embedding have in common."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_heterogeneous", False):
        return list(range(count))
    kinds = list(getattr(text, "layer_types", None) or ())[:count]
    return kinds + [None] * (count - len(kinds))


def _layer_config(config: PreTrainedConfig, layer_idx: int) -> PreTrainedConfig:
    text = config.get_text_config(decoder=True)
    # Where layers differ, the whole config refuses to give one value for all of them.
    return text.per_layer_config[layer_idx] if getattr(text, "is_heterogeneous", False) else text


def rotary_frequencies(config: PreTrainedConfig, layer_idx: int) -> list[float] | None:
    """
    Radians by which each pair of channels rotates from one position to the next; `None` if the config does not tell.
    """
    text = _layer_config(config, layer_idx)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = getattr(text, "layer_types", None) or ()
    kind = kinds[layer_idx] if layer_idx < len(kinds) else None
    # Either one entry per type of layer, or one for all.
    by_kind = isinstance(rope.get(kind), dict)
    parameters = rope[kind] if by_kind else rope
    try:
        if parameters.get("rope_type", "default") != "default":
            make = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
            return make(text, torch.device("cpu"), layer_type=kind if by_kind else None)[0].tolist()
        width = int(head_dim(config, layer_idx) * parameters.get("partial_rotary_factor", 1.0))
        return [parameters["rope_theta"] ** (-i / width) for i in range(0, width, 2)]
    except (AttributeError, KeyError, TypeError, ValueError):
        # There is no such embedding, or only the model's code understands it.
        return None
