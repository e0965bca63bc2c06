"""All options of the cache, in one place and checked once."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import signature

# A half of `nbits` means that keys get one bit more than values.
BITS = {"nbits": (2, 2.5, 3, 3.5, 4, 8), "key_bits": (2, 3, 4, 8), "value_bits": (2, 3, 4, 8)}
CHOICES = {
    "key_estimator": ("qjl", "rescaled", "mse"),
    "value_estimator": ("rescaled", "mse"),
    "sketch": ("orthogonal", "gaussian"),
    "rotation": ("hadamard", "haar"),
    "condition": ("attention", "center", "none"),
    "backend": ("auto", "triton", "torch"),
}
# Keys are conditioned by at least this many tokens, besides the sinks.
LEARNED_TOKENS = 128

PRESETS = {
    "cautious": {"key_bits": 8, "value_bits": 4},
    "quality": {"nbits": 4},
    "balanced": {"nbits": 3},
    "small": {"nbits": 2},
    # Algorithms 1 and 2 as printed
    "paper": {
        "key_estimator": "qjl",
        "value_estimator": "mse",
        "sketch": "gaussian",
        "rotation": "haar",
        "condition": "none",
        "residual_length": 0,
        "sink_length": 0,
    },
}


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raises a `ValueError` that names the nearest option if one of those `given` is not `known`."""
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, known, 1)
            advice = f"Did you mean `{nearest[0]}`?" if nearest else f"Take one of {', '.join(known)}."
            raise ValueError(f"Options must be those of the cache, got `{name}`. {advice}")


def _with_checked_names(kind):
    original = kind.__init__

    @wraps(original)
    def init(self, *args, **options):
        check_names(options, kind.__dataclass_fields__)
        original(self, *args, **options)

    kind.__init__ = init
    return kind


@_with_checked_names
@dataclass(frozen=True)
class TurboQuantConfig:
    """
    Options of a [`TurboQuantCache`].

    Args:
        nbits (`int` or `float`, defaults to 4):
            Bits per coordinate of keys and values, including the sketch but not the one or two two-byte scales per
            vector. 2, 3, 4 or 8; 2.5 gives the keys 3 bits and the values 2, 3.5 gives them 4 and 3. At 8 bits
            coordinates become whole multiples of the vector's scale; estimators and sketches do not apply.
        key_bits, value_bits (`int`, *optional*):
            Bits of the keys or the values alone: 2, 3, 4 or 8. They override `nbits`.
        key_estimator (`str`, defaults to `"qjl"`):
            `"qjl"`: `key_bits - 1` bits of codes and the 1-bit QJL sketch (Algorithm 2 of TurboQuant, arXiv
            2504.19874), chosen together if the sketch is orthogonal; has the least error at 2 and 3 bits. `"rescaled"`
            spends all bits on the codes (EDEN, arXiv 2105.08339), needs one scale less per key, and quantizes faster
            on a CPU. Both give unbiased scores. `"mse"` is Algorithm 1 as printed.
        value_estimator (`str`, defaults to `"rescaled"`):
            `"rescaled"` or `"mse"`.
        sketch (`str`, defaults to `"orthogonal"`):
            `"orthogonal"`, or `"gaussian"` with the nearest codes, as printed in Algorithm 2.
        rotation (`str`, defaults to `"hadamard"`):
            `"hadamard"` (randomised) or `"haar"` (uniform over all rotations).
        condition (`str`, defaults to `"attention"`):
            What the quantizer of keys learns from the first tokens, frozen when the first token is quantized:
            `"attention"` takes a mean and a scale per channel from keys and queries, `"center"` the mean only,
            `"none"` nothing. Unless it is `"none"`, all tokens stay exact until there are 128 besides the sinks. See
            `conditioning`.
        residual_length (`int`, defaults to 128):
            The number of recent tokens, which stay in the model's dtype.
        sink_length (`int`, defaults to 4):
            The number of first tokens that stay in the model's dtype.
        skip_layers (`tuple[int, ...]`, defaults to `()`):
            Layers kept in full precision; negative indices count from the last layer.
        max_cache_len (`int`, *optional*):
            Capacity in tokens, allocated at once. `generate` then compiles decode steps (on GPUs with CUDA graphs),
            except with the torch reference. Without it the cache grows with its tokens and steps are not compiled.
        seed (`int`, defaults to 0):
            Seed of rotations and sketches.
        backend (`str`, defaults to `"auto"`):
            `"triton"` runs the kernels and raises an error where it cannot, `"torch"` runs the reference, `"auto"` runs
            the kernels where they can run.

    Raises:
        `ValueError`: an option is out of range. The message says what is required, what was given and what to do.
    """

    nbits: int | float = 4
    key_bits: int | None = None
    value_bits: int | None = None
    key_estimator: str = "qjl"
    value_estimator: str = "rescaled"
    sketch: str = "orthogonal"
    rotation: str = "hadamard"
    condition: str = "attention"
    residual_length: int = 128
    sink_length: int = 4
    skip_layers: tuple[int, ...] = ()
    max_cache_len: int | None = None
    seed: int = 0
    backend: str = "auto"

    @classmethod
    def from_preset(cls, preset: str, **options) -> "TurboQuantConfig":
        """
        Returns the options of a preset, overridden by `options`. `docs/quality.md` says what bits cost.

        Args:
            preset (`str`): `"quality"`, `"balanced"` or `"small"`, with 4, 3 and 2 bits; `"cautious"`, with 8 bits for
                keys and 4 for values; `"paper"`, with the settings of the TurboQuant paper (no conditioning, no exact
                tokens), which are worse, and with the `nbits` in `options`; estimators do not apply at 8 bits.

        Raises:
            `ValueError`: there is no such preset, or an option is out of range.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            got = repr(preset) if isinstance(preset, str) else type(preset).__name__
            raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {got}.")
        return cls(**(PRESETS[preset] | options))

    @property
    def held_length(self) -> int:
        """Recent tokens that stay exact as long as keys cannot be conditioned: at least `residual_length`."""
        return self.residual_length if self.condition == "none" else max(self.residual_length, LEARNED_TOKENS)

    def __post_init__(self):
        self._check_bits("nbits", None)
        self._check_bits("key_bits", math.ceil(self.nbits))
        self._check_bits("value_bits", math.floor(self.nbits))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("residual_length", "sink_length"):
            _check_integer(name, getattr(self, name), 0, 2**31 - 1, "Use 0 for none.")
        _check_integer("seed", self.seed, 0, 2**31 - 1, "Leave it out for the usual rotations.")
        if self.max_cache_len is not None:
            _check_integer("max_cache_len", self.max_cache_len, 1, 2**30 - 1, "Leave it out to let the cache grow.")
        try:
            skip_layers = tuple(self.skip_layers)
        except TypeError:
            raise ValueError(f"`skip_layers` must be a sequence of layer indices, got {self.skip_layers!r}.") from None
        for layer in skip_layers:
            _check_integer("skip_layers", layer, -(2**31), 2**31 - 1, "Give layer indices, such as `(0, -1)`.")
        object.__setattr__(self, "skip_layers", skip_layers)

    def _check_bits(self, name: str, default: int | None) -> None:
        value, choices = getattr(self, name), BITS[name]
        value = default if value is None else value
        if not isinstance(value, (int, float)) or value not in choices:
            *others, last = choices
            raise ValueError(
                f"`{name}` must be {', '.join(map(str, others))} or {last}, got {value!r}. Take the nearest of them, "
                "or `DynamicCache` for full precision."
            )
        # 4.0 becomes 4.
        object.__setattr__(self, name, choices[choices.index(value)])


def _refuse(self, name: str, value) -> None:
    raise ValueError(
        f"The options of a cache must stay as they are, got {name}={value!r}. Make another cache. To export a model, "
        "take a `DynamicCache`: an exported graph cannot hold codes."
    )


# transformers' exporters begin by assigning to everything that a cache holds, its options first.
TurboQuantConfig.__setattr__ = _refuse

# The options as parameters, for the signatures of functions that take them.
KEYWORDS = tuple(option.replace(kind=option.KEYWORD_ONLY) for option in signature(TurboQuantConfig).parameters.values())


def _check_integer(name: str, value, low: int, high: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {value!r}. {advice}")
