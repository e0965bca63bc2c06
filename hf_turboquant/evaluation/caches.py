"""The caches that are compared, as plain options: what to build, what to call it, how many bits it takes."""

import itertools
from contextlib import contextmanager

import torch
from transformers import DynamicCache, QuantizedCache

from ..cache import TurboQuantCache
from ..layer import TurboQuantLayer
from ..rotary import head_dim

KINDS = ("turboquant", "dynamic", "quanto", "hqq", "fp8")


def parse(spec: str) -> list[dict]:
    """
    `"turboquant:nbits=4/3,key_estimator=qjl"` -> two sets of options, one for each of the values between slashes.

    Raises:
        `ValueError`: the spec has another form, or names an unknown kind of cache.
    """
    kind, _, rest = spec.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if kind not in KINDS or any(not name or not values for name, _, values in pairs):
        raise ValueError(
            f"A cache must be given as KIND:OPTION=VALUE/VALUE,..., KIND one of {', '.join(KINDS)}, got {spec!r}. "
            "Try `turboquant:nbits=4/3,key_estimator=rescaled`."
        )
    choices = [[(name, _value(value)) for value in values.split("/")] for name, _, values in pairs]
    return [{"cache": kind, **dict(chosen)} for chosen in itertools.product(*choices)]


def _value(text: str):
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


def label(options: dict) -> str:
    """A name for people: `"turboquant 4 bits qjl"`, what is not usual behind it."""
    rest = {name: value for name, value in options.items() if name not in ("cache", "nbits", "key_estimator")}
    words = [options.get("cache", "turboquant")]
    words += [f"{options['nbits']} bits"] if "nbits" in options else []
    words += [options["key_estimator"]] if "key_estimator" in options else []
    return " ".join([*words, *(f"{name}={value}" for name, value in rest.items())])


def new_cache(config, options: dict):
    """
    An empty cache.

    Args:
        config (`PreTrainedConfig`): the model's.
        options (`dict`): `"cache"` (one of `KINDS`, `"turboquant"` if it is missing) and the arguments of that cache.
            Integer caches take groups of `head_dim` along a vector unless told: a scale and a zero point for every
            vector, as many bits in all as keys of Algorithm 2 with their two norms. HQQ's 3 bits cannot: their groups
            run across tokens, as they do where `axis_key` and `axis_value` are 0.

    Raises:
        `ValueError`: the options don't fit, or the cache cannot hold this model or needs a package.
    """
    options = dict(options)
    kind = options.pop("cache", "turboquant")
    if kind in ("turboquant", "dynamic"):
        try:
            return (
                TurboQuantCache(config, **options) if kind == "turboquant" else DynamicCache(config=config, **options)
            )
        except TypeError as error:
            raise ValueError(f"A {kind} cache must be given options that it has: {error}.") from None
    if kind != "fp8":
        size = options.setdefault("q_group_size", head_dim(config.get_text_config(decoder=True)))
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`q_group_size` must be a positive integer, got {size!r}.")
    if kind == "hqq":
        # its other axis takes values of different tokens and heads for a group; 3 bits are packed in tens, padded, and
        # transformers' HQQ takes the padding off right along that axis only
        usual = 0 if options.get("nbits") == 3 else 1
        axes = {name: options.setdefault(name, usual) for name in ("axis_key", "axis_value")}
        if not usual and any(axes.values()):
            raise ValueError(f"HQQ's 3 bits must have `axis_key` and `axis_value` 0, got {axes}. Take 4 or 2 bits.")
    try:
        return QuantizedCache(kind, config, **options)
    except (ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers' {kind} cache must fit this model and be installed: {reason}") from None


@contextmanager
def named(options: dict):
    """
    What runs in it reads and writes a cache with these options.

    Raises:
        `ValueError`: transformers' cache does not take these tokens; says which cache it is.
    """
    try:
        yield
    except (AssertionError, ValueError) as error:
        if options.get("cache", "turboquant") == "turboquant":
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"transformers' {label(options)} cannot hold these tokens: {reason}. Take another `q_group_size`, other "
            "axes, or lengths that fit them."
        ) from None


def held_bytes(cache) -> int:
    """Bytes of every tensor in a cache of any kind."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))


def held_bits(tree) -> int:
    """Bits of every tensor in a tree of tuples and dicts; floats count two bytes at most, as in a 16-bit model."""
    return sum(8 * t.numel() * (min(t.itemsize, 2) if t.is_floating_point() else t.itemsize) for t in _tensors(tree))


def bits_per_coordinate(cache) -> float:
    """
    Bits in all, scales and zero points included, of a coordinate that is held in codes: exact tokens and spare capacity
    are left out, and scales count two bytes, as a 16-bit model keeps them (where they are wider by design they count in
    full). 16 for full precision.
    """
    bits = coordinates = 0
    for layer in cache.layers:
        if isinstance(layer, TurboQuantLayer):
            for role, buffer in layer.codes.items():
                heads, dim = layer.exact[role].shape[1], layer.exact[role].shape[3]
                bits += 8 * buffer.used_nbytes
                coordinates += layer.exact[role].shape[0] * heads * dim * buffer.length
        elif getattr(layer, "_quantized_keys", None) is not None:
            for states in (layer._quantized_keys, layer._quantized_values):
                bits += held_bits(states)
                coordinates += layer._dequantize(states).numel()
    return bits / coordinates if coordinates else 16.0


def _tensors(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif hasattr(tree, "__tensor_flatten__"):
        # a wrapper: what it holds counts, not what it stands for
        for name in tree.__tensor_flatten__()[0]:
            yield from _tensors(getattr(tree, name))
    elif isinstance(tree, torch.Tensor):
        yield tree
