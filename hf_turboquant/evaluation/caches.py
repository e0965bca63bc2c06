"""The compared caches as plain options: how to make one, what to call it, how many bits it takes."""

import itertools
import math
from contextlib import suppress
from functools import partial

import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, QuantizedCache, StaticCache

from ..cache import TurboQuantCache
from ..conditioning import head_dim
from ..config import TurboQuantConfig
from ..layer import TurboQuantLayer
from ..memory import layer_memory
from ..quantizer import ROLES

FULL = {"cache": "dynamic"}
KINDS = ("turboquant", "dynamic", "static", "quanto", "hqq", "fp8")
# How a label words each option, in this order; options that are not listed follow under their own names.
_WORDS = {"cache": "{}", "nbits": "{} bits", "key_bits": ", keys {} bits", "key_estimator": "{}", "sketch": "{}"}
_WORDS |= {"value_bits": ", values {} bits", "value_estimator": "{}", "condition": ", {}"}
_WORDS |= {"residual_length": ", window {}", "sink_length": ", {} sinks"}
_CONDITIONS = {"none": "plain", "center": "centred", "attention": "conditioned"}


def parse(*specs: str) -> list[dict]:
    """
    `"turboquant:nbits=4/3,key_estimator=qjl"` -> two sets of options, one for each of the values between slashes.

    Raises:
        `ValueError`: a spec has another form, names an unknown kind of cache, or has options that ours refuses.
    """
    found = []
    for spec in specs:
        kind, _, rest = spec.partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        if kind not in KINDS or any(not name or not values for name, _, values in pairs):
            raise ValueError(
                f"A cache must be given as KIND:OPTION=VALUE/VALUE,..., KIND one of {', '.join(KINDS)}, got {spec!r}. "
                "Try `turboquant:nbits=4/3,key_estimator=rescaled`."
            )
        choices = [[(name, parse_value(value)) for value in values.split("/")] for name, _, values in pairs]
        found += [{"cache": kind, **dict(chosen)} for chosen in itertools.product(*choices)]
    for options in found:
        if options["cache"] == "turboquant":
            TurboQuantConfig(**{k: v for k, v in options.items() if k != "cache" and "offload" not in k})
    return found


def parse_value(text: str) -> int | float | str:
    """`"4"` -> 4, `"2.5"` -> 2.5, and a word as it is."""
    for convert in (int, float):
        with suppress(ValueError):
            return convert(text)
    return text


def label(options: dict) -> str:
    """The name of a cache in tables and results: `"turboquant 4 bits qjl, window 32"`."""
    options = {"cache": "turboquant", **options}
    if "condition" in options:
        options["condition"] = _CONDITIONS.get(options["condition"], options["condition"])
    names = [*_WORDS, *(name for name in options if name not in _WORDS)]
    words = [_WORDS.get(name, f", {name} {{}}").format(options[name]) for name in names if name in options]
    return " ".join(words).replace(" ,", ",")


def lines(caches: list[dict]) -> dict[str, list[dict]]:
    """The caches that differ in nothing but their bits, for a line of a plot, by the words that they share."""
    groups: dict[frozenset, list[dict]] = {}
    for options in caches:
        others = frozenset(option for option in options.items() if option[0] not in ("nbits", "key_bits", "value_bits"))
        groups.setdefault(others, []).append(options)
    shared = ({k: v for k, v in first.items() if all(o.get(k) == v for o in rest)} for first, *rest in groups.values())
    return dict(zip(map(label, shared), groups.values(), strict=True))


class IntegerCache(QuantizedCache):
    """transformers' cache of integers or fp8, in whose errors `name` stands."""

    name = ""

    def update(self, *states, **arguments):
        try:
            return super().update(*states, **arguments)
        except (AssertionError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            advice = "Take another `q_group_size`, other axes, or lengths that fit them."
            raise ValueError(f"transformers' {self.name} cannot hold these tokens: {reason}. {advice}") from None


def new_cache(config, options: dict):
    """
    An empty cache for a model's config. `options` are `"cache"` (one of `KINDS`, `"turboquant"` if it is missing) and
    the arguments of that cache. Integer caches by default take groups of `head_dim` along a vector: a scale and a zero
    point for every vector, which gives as many bits as keys of Algorithm 2 with their two norms.

    Raises:
        `ValueError`: the options don't fit, the cache cannot hold this model, or a package is missing. Its `update`
            raises one if transformers' cache cannot hold the tokens.
    """
    name, options = label(options), dict(options)
    kind = options.pop("cache", "turboquant")
    if kind == "turboquant":
        return TurboQuantCache(config, **options)
    if kind in ("quanto", "hqq"):
        size = options.setdefault("q_group_size", head_dim(config))
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`q_group_size` must be a positive integer, got {size!r}.")
    if kind == "hqq":
        # Axis 0 groups values of different tokens and heads.
        options = {"axis_key": 1, "axis_value": 1, **options}
        if options.get("nbits") == 3:
            raise ValueError("HQQ's `nbits` must not be 3, whose padding transformers does not remove. Take 4 or 2.")
    try:
        theirs = {"dynamic": DynamicCache, "static": StaticCache}.get(kind, partial(IntegerCache, kind))
        cache = theirs(config=config, **options)
        cache.name = name
        return cache
    except (ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers' {kind} cache must fit this model and be installed: {reason}") from None


def held_bytes(cache) -> int:
    """Bytes that a cache of any kind holds: ours counts its own, in others every tensor counts."""
    if hasattr(cache, "memory"):
        return cache.memory().total_bytes
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))


def bits_per_coordinate(cache, with_exact: bool = False) -> float:
    """
    Bits per coordinate held in codes, scales and zero points included. With `with_exact`, bits per coordinate of all
    tokens, where exact ones, in windows and elsewhere, take 16 bits, as in a 16-bit model. Spare capacity is left out,
    and scales count two bytes, as in such a model (if they are wider by design, they count in full).
    """
    bits = coordinates = exact = 0
    for layer in cache.layers:
        if not getattr(layer, "is_initialized", False):
            continue
        held = vars(layer)
        if isinstance(layer, TurboQuantLayer):
            memory, itemsize = layer_memory(layer), layer.dtype.itemsize
            bits += 8 * (memory.codes_bytes + memory.scales_bytes)
            exact += memory.exact_bytes // itemsize
            coordinates += (memory.full_bytes - memory.other_bytes - memory.exact_bytes) // itemsize
        else:
            quantized = [held[name] for name in ("_quantized_keys", "_quantized_values") if name in held]
            for t in _tensors(quantized):
                bits += 8 * t.numel() * (min(t.itemsize, 2) if t.is_floating_point() else t.itemsize)
            coordinates += sum(map(_count, quantized))
            exact += sum(held[name].numel() for name in ROLES if name in held)
    if with_exact or not coordinates:
        bits, coordinates = bits + 16 * exact, coordinates + exact
    return bits / coordinates if coordinates else 16.0


def _count(states) -> int:
    """The number of states before quantization: HQQ stores them with a description, fp8 with a scale."""
    if not isinstance(states, tuple):
        return states.numel()
    return math.prod(states[1]["shape"]) if isinstance(states[1], dict) else states[0].numel()


def _tensors(tree):
    for leaf in tree_leaves(tree):
        if hasattr(leaf, "__tensor_flatten__"):
            # For a wrapper, count the tensors that it holds and not the one that it represents.
            yield from _tensors([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, torch.Tensor):
            yield leaf
