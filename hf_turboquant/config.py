"""All options of the cache in one place, checked once."""

from dataclasses import dataclass

KEY_ESTIMATORS = ("qjl", "rescaled", "mse")
VALUE_ESTIMATORS = ("rescaled", "mse")
SKETCHES = ("orthogonal", "gaussian")
ROTATIONS = ("hadamard", "haar")
CONDITIONS = ("attention", "center", "none")
BACKENDS = ("auto", "triton", "torch")
# that the kernels read and write; the torch reference takes all
KERNEL_BITS = (2, 3, 4)

# the paper's own settings. 2.5 bits are its 32 outlier channels of 128 with 3 bits, the rest with 2, and their two
# scales; for 3.5 bits it names no split: half of the channels have 4 bits here
_PAPER = {
    "key_estimator": "qjl",
    "value_estimator": "mse",
    "sketch": "gaussian",
    "rotation": "haar",
    "condition": "none",
    "residual_length": 0,
    "sink_length": 0,
}
PRESETS = {
    "quality": {"nbits": 4, "key_estimator": "rescaled"},
    "balanced": {"nbits": 3, "key_estimator": "rescaled"},
    "small": {"nbits": 2, "key_estimator": "rescaled"},
    "paper-2.5": {"nbits": 2.25, **_PAPER},
    "paper-3.5": {"nbits": 3.5, **_PAPER},
}


@dataclass(frozen=True)
class TurboQuantConfig:
    """
    Options of a [`TurboQuantCache`].

    Args:
        nbits (`int` or `float`, defaults to 4):
            Bits per coordinate of keys and values, sketch included; one or two two-byte scales per vector come on top.
            2.5 gives half of the channels of every head, those with most energy, 3 bits and the others 2, each half
            with scales of its own; 2.25 a quarter of them (see [`SplitQuantizer`]; not in the Triton kernels).
        key_bits, value_bits (`int` or `float`, *optional*):
            Bits of the keys or the values alone; `nbits` where not given. 1 to 8 (keys with `"qjl"`: 2 to 8).
        key_estimator (`str`, defaults to `"qjl"`):
            `"qjl"` is Algorithm 2 of TurboQuant (arXiv 2504.19874): `key_bits - 1` bits of codes and the 1-bit QJL
            sketch of the residual, unbiased scores. `"rescaled"` spends all bits on the codes and scales them so that
            scores are unbiased (EDEN, arXiv 2105.08339). `"mse"` is Algorithm 1 as printed.
        value_estimator (`str`, defaults to `"rescaled"`):
            `"rescaled"` or `"mse"`.
        sketch (`str`, defaults to `"orthogonal"`):
            `"orthogonal"` (2.75 times less variance) or `"gaussian"`, with the nearest codes: what Algorithm 2 prints.
        rotation (`str`, defaults to `"hadamard"`):
            `"hadamard"` (randomised) or `"haar"` (uniform over all rotations).
        condition (`str`, defaults to `"attention"`):
            What the first tokens teach the quantiser of keys, frozen when the first token is quantised: `"attention"`
            takes a mean and a scale per channel from keys and queries, `"center"` the mean, `"none"` nothing. See
            `conditioning`.
        residual_length (`int`, defaults to 128):
            Length of the recent window: so many of the latest tokens stay in the model's dtype.
        sink_length (`int`, defaults to 4):
            So many of the first tokens stay in the model's dtype.
        skip_layers (`tuple[int, ...]`, defaults to `()`):
            Layers kept in full precision; negative indices count from the last layer.
        max_cache_len (`int`, *optional*):
            Room for so many tokens is taken at once, and `generate` compiles decode steps, on GPUs with CUDA graphs,
            but for the torch reference. Without it the cache grows with its tokens, and steps are not compiled.
        seed (`int`, defaults to 0):
            Seed of rotations and sketches.
        backend (`str`, defaults to `"auto"`):
            `"triton"` runs the kernels and raises where it cannot, `"torch"` the reference, `"auto"` the kernels where
            they can run.

    Raises:
        `ValueError`: an option is out of range; the message says what must hold, what came and what to do.
    """

    nbits: int | float = 4
    key_bits: int | float | None = None
    value_bits: int | float | None = None
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
        The options of a preset, with `options` over them. The README has what each costs and saves.

        Args:
            preset (`str`): `"quality"`, `"balanced"` or `"small"`; `"paper-2.5"` or `"paper-3.5"` for the literal
                settings of the TurboQuant paper (no conditioning, no exact tokens), which are worse.

        Raises:
            `ValueError`: there is no such preset, or an option is out of range.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {preset!r}.")
        return cls(**{**PRESETS[preset], **options})

    def __post_init__(self):
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.nbits)
        for name in ("nbits", "key_bits", "value_bits"):
            object.__setattr__(self, name, _check_bits(name, getattr(self, name)))
        for name, choices in (
            ("key_estimator", KEY_ESTIMATORS),
            ("value_estimator", VALUE_ESTIMATORS),
            ("sketch", SKETCHES),
            ("rotation", ROTATIONS),
            ("condition", CONDITIONS),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if self.key_estimator == "qjl" and self.key_bits < 2:
            raise ValueError(
                "`key_bits` must be at least 2 with `key_estimator='qjl'` (one bit is the sketch), "
                f"got {self.key_bits}. Use `key_estimator='rescaled'` for 1-bit keys."
            )
        for name in ("residual_length", "sink_length", "seed"):
            _check_integer(name, getattr(self, name), 0, 2**31 - 1, "Use 0 for none.")
        if self.max_cache_len is not None:
            _check_integer("max_cache_len", self.max_cache_len, 1, 2**30 - 1, "Leave it out to let the cache grow.")
            if self.key_bits % 1 or self.value_bits % 1:
                raise ValueError(
                    f"`key_bits` and `value_bits` must be whole numbers with `max_cache_len`, got {self.key_bits} and "
                    f"{self.value_bits}. Leave `max_cache_len` out, or take other bits."
                )
        try:
            skip_layers = tuple(self.skip_layers)
        except TypeError:
            raise ValueError(f"`skip_layers` must be a sequence of layer indices, got {self.skip_layers!r}.") from None
        for layer in skip_layers:
            _check_integer("skip_layers", layer, -(2**31), 2**31 - 1, "Give layer indices, such as `(0, -1)`.")
        object.__setattr__(self, "skip_layers", skip_layers)


def _check_bits(name: str, value) -> int | float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # quarters of a head_dim are parts that can be packed
    if not number or not 1 <= value <= 8 or 4 * value != int(4 * value):
        raise ValueError(
            f"`{name}` must be a number from 1 to 8 in steps of a quarter, got {value!r}. Use `DynamicCache` for full "
            "precision."
        )
    return int(value) if value == int(value) else value


def _check_integer(name: str, value, low: int, high: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {value!r}. {advice}")
