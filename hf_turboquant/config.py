"""All options of the cache in one place, checked once."""

from dataclasses import dataclass

KEY_ESTIMATORS = ("qjl", "rescaled", "mse")
VALUE_ESTIMATORS = ("rescaled", "mse")
SKETCHES = ("orthogonal", "gaussian")
ROTATIONS = ("hadamard", "haar")
CONDITIONS = ("attention", "center", "none")
BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class TurboQuantConfig:
    """
    Options of a [`TurboQuantCache`].

    Args:
        nbits (`int`, defaults to 4):
            Bits per coordinate of keys and values, sketch included; one or two two-byte scales per vector come on top.
        key_bits, value_bits (`int`, *optional*):
            Bits of the keys or the values alone; `nbits` where not given. 1 to 8 (keys with `"qjl"`: 2 to 8).
        key_estimator (`str`, defaults to `"qjl"`):
            `"qjl"` is Algorithm 2 of TurboQuant (arXiv 2504.19874): `key_bits - 1` bits of codes and the 1-bit QJL
            sketch of the residual, unbiased scores. `"rescaled"` spends all bits on the codes and scales them so that
            scores are unbiased (EDEN, arXiv 2105.08339). `"mse"` is Algorithm 1 as printed.
        value_estimator (`str`, defaults to `"rescaled"`):
            `"rescaled"` or `"mse"`.
        sketch (`str`, defaults to `"orthogonal"`):
            `"orthogonal"` (2.75 times less variance) or `"gaussian"` (what Algorithm 2 prints).
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
            Room for so many tokens is taken at once, and `generate` compiles decode steps, on GPUs with CUDA graphs.
            Without it the cache grows with its tokens, and steps are not compiled.
        seed (`int`, defaults to 0):
            Seed of rotations and sketches.
        backend (`str`, defaults to `"auto"`):
            `"triton"` runs the kernels and raises where it cannot, `"torch"` the reference, `"auto"` the kernels where
            they can run.

    Raises:
        `ValueError`: an option is out of range; the message says what must hold, what came and what to do.
    """

    nbits: int = 4
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

    def __post_init__(self):
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.nbits)
        for name in ("nbits", "key_bits", "value_bits"):
            _check_integer(name, getattr(self, name), 1, 8, "Use `DynamicCache` for full precision.")
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
        try:
            skip_layers = tuple(self.skip_layers)
        except TypeError:
            raise ValueError(f"`skip_layers` must be a sequence of layer indices, got {self.skip_layers!r}.") from None
        for layer in skip_layers:
            _check_integer("skip_layers", layer, -(2**31), 2**31 - 1, "Give layer indices, such as `(0, -1)`.")
        object.__setattr__(self, "skip_layers", skip_layers)


def _check_integer(name: str, value, low: int, high: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {value!r}. {advice}")
