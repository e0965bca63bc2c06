"""Quantizer: what it takes to turn the keys or the values of one layer into codes and back."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .codebook import Codebook, lloyd_max
from .config import TurboQuantConfig
from .packing import BLOCK, plane_shapes
from .rotation import rotation_matrix
from .sketch import sketch_matrix
from .storage import TokenBuffer

# before rounding, in search of the codes closest in direction; a fine search leaves 5 % less error at 4 bits, 1 % at 3
STRETCHES = tuple(1 + step * 3 / 32 for step in (-2, -1, 0, 1, 2))
# beyond, nobody feels the difference, and which factor is best is decided by rounding errors
MAX_SEARCHED_BITS = 5

# rounds of the joint search of codes and signs: 4 leave 7-10 % more error, 12 leave 2-3 % less
ROUNDS = 8

# a two-byte scale costs under .1 % of the distortion up to 4 bits, but 6 % of it at 8
TWO_BYTE_SCALE_BITS = 4


@dataclass(frozen=True)
class Annealing:
    """
    How codes and signs are searched together: soft at first, hard at the end. Widths are those of the ramps in place of
    steps, from the first round to the last.

    Args:
        grid (`float`): factor of the levels while searching.
        amplitude (`float`): of a sign while searching, times √d.
        code_widths (`tuple[float, float]`): of the ramp between two levels, in parts of their distance.
        sign_widths (`tuple[float, float]`): of the ramp between two signs, in parts of theirs.
        overshoots (`tuple[float, float]`): how far codes and signs go beyond the soft values, away from the hard ones.
    """

    grid: float
    amplitude: float
    code_widths: tuple[float, float]
    sign_widths: tuple[float, float]
    overshoots: tuple[float, float]

    def widths(self, progress: float) -> tuple[float, float]:
        """Of the ramps of codes and signs; `progress` goes from 0 in the first round to 1 in the last."""
        return tuple(first + (last - first) * progress for first, last in (self.code_widths, self.sign_widths))


# by bits of the codes: found by Nelder-Mead on random directions, the same for every head_dim
ANNEALINGS = {
    1: Annealing(0.83, 0.63, (0.86, 0.255), (0.62, 0.275), (0.31, 0.28)),
    2: Annealing(0.847, 0.352, (0.52, 0.28), (0.70, 0.37), (0.30, 0.346)),
    3: Annealing(0.935, 0.177, (0.33, 0.30), (0.66, 0.33), (0.34, 0.34)),
}


@dataclass(frozen=True, eq=False)
class Quantizer:
    """
    The constants of one role (`"keys"` or `"values"`) of one layer.

    A vector x is stored as codes of y = z / |z|, z = A (x - μ), with one scale s, and with the `"qjl"` estimator the
    signs of the sketched residual r = y - f c[codes] and its norm |z| |r|:

        "mse"        s = |z|                 ẑ = s c[codes]                                   (TurboQuant, Algorithm 1)
        "rescaled"   s = |z| / ⟨y, c⟩        ẑ = s c[codes]                                (EDEN, arXiv 2105.08339)
        "qjl"        s = f |z|               ẑ = s c[codes] + |z| |r| (κS)ᵀ signs             (TurboQuant, Algorithm 2)

    and x̂ = A⁻¹ ẑ + μ. Scores need no x̂: ⟨q, x̂⟩ = ⟨A⁻ᵀ q, ẑ⟩ + ⟨q, μ⟩, and softmax ignores the last term.

    The codes are the nearest to y and f is 1, as the papers have it; with `search` they are, of the nearest to αy for
    all `stretches` α, those with the largest cosine ⟨y, c⟩ / |c|, and f is ⟨y, c⟩ / |c|², which leaves the smallest
    residual. Both estimators stay unbiased whatever the codes: what c has beside z has no preferred direction under a
    random rotation, and what the sketch sees is the residual that the codes leave.

    Args:
        role (`str`): `"keys"` or `"values"`; also the packing layout.
        nbits (`int`): bits of one coordinate, sketch included.
        estimator (`str`): `"qjl"`, `"rescaled"` or `"mse"`.
        codebook (`Codebook`): of `code_bits` bits.
        centroids, boundaries, ranks_to_codes (`torch.Tensor`): the codebook on the device, fp32, fp32, uint8.
        transform (`torch.Tensor` of shape `[1 or num_key_value_heads, head_dim, head_dim]`, fp32): A.
        dual (`torch.Tensor`, same shape, fp32): A⁻ᵀ, what queries go through.
        sketch (`torch.Tensor` of shape `[head_dim, head_dim]`, fp32, *optional*): κS, with `"qjl"` only.
        mean (`torch.Tensor` of shape `[1 or num_key_value_heads, 1, head_dim]`, fp32, *optional*): μ; `None` is zero.
        scale (`torch.Tensor`, same shape, fp32, *optional*): a factor of every channel, before A: see `conditioning`.
        search (`bool`): whether codes are searched, see above.
        prefix (`str`): of the names of its planes and scales, where a buffer holds those of two quantizers.
    """

    role: str
    nbits: int
    estimator: str
    codebook: Codebook
    centroids: torch.Tensor
    boundaries: torch.Tensor
    ranks_to_codes: torch.Tensor
    transform: torch.Tensor
    dual: torch.Tensor
    sketch: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    search: bool = False
    prefix: str = ""

    @classmethod
    def create(
        cls, config: TurboQuantConfig, role: str, layer_idx: int, head_dim: int, device=None, part: int | None = None
    ) -> "Quantizer":
        """
        The quantizer of one layer: the same for equal (`config.seed`, `layer_idx`, `role`, `head_dim`, `part`),
        whatever the device and process. Caches share it. Its bits are whole numbers: see [`SplitQuantizer`] for others,
        whose outliers are `part` 0 and whose rest is `part` 1.

        Raises:
            `ValueError`: `head_dim` is under 16 or not a multiple of 8.
        """
        nbits, estimator = (
            (config.key_bits, config.key_estimator) if role == "keys" else (config.value_bits, config.value_estimator)
        )
        device = torch.device("cpu" if device is None else device)
        seeds = config.seed, layer_idx, ("keys", "values").index(role), head_dim, *(() if part is None else (part,))
        prefix = "outlier_" if part == 0 else ""
        return _create(nbits, estimator, config.sketch, config.rotation, seeds, role, head_dim, device, prefix)

    def __deepcopy__(self, memo) -> "Quantizer":
        return self

    @property
    def parts(self) -> tuple["Quantizer", ...]:
        """What the coordinates of z are split into: here nothing else."""
        return (self,)

    @property
    def head_dim(self) -> int:
        return self.transform.shape[-1]

    @property
    def stretches(self) -> tuple[float, ...]:
        """Factors of y of which the best is taken before rounding, see above; none where y itself is rounded."""
        return STRETCHES if self.search and 1 < self.code_bits <= MAX_SEARCHED_BITS else ()

    @property
    def annealing(self) -> Annealing:
        """How codes and signs are searched together, where they are."""
        return ANNEALINGS[min(self.code_bits, 3)]

    @property
    def joint(self) -> bool:
        """Whether codes and signs are chosen together."""
        return self.estimator == "qjl" and self.search and self.code_bits in ANNEALINGS

    @property
    def code_bits(self) -> int:
        """Bits of the codes alone."""
        return self.nbits - (self.estimator == "qjl")

    @property
    def nbytes(self) -> int:
        """Bytes of the constants, those that are one tensor counted once."""
        tensors = {id(t): t.nbytes for t in self.__dict__.values() if isinstance(t, torch.Tensor)}
        return sum(tensors.values())

    def buffer_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of one block of everything that is stored: see `packing` for the planes."""
        shapes = {
            name: (torch.uint8, shape) for name, shape in plane_shapes(self.nbits, self.role, self.head_dim).items()
        }
        scale_dtype = torch.bfloat16 if self.nbits <= TWO_BYTE_SCALE_BITS else torch.float32
        shapes["scales"] = (scale_dtype, (BLOCK,))
        if self.estimator == "qjl":
            shapes["residual_norms"] = (scale_dtype, (BLOCK,))
        return {self.prefix + name: shape for name, shape in shapes.items()}

    def new_buffer(self, batch: int, heads: int) -> TokenBuffer:
        """An empty buffer for the codes and scales of `batch * heads` sequences."""
        return TokenBuffer(self.buffer_shapes(), BLOCK, batch, heads, self.transform.device)


# a prefill of another sequence finds what the last one made: drawing matrices takes longer than quantising with them
@lru_cache(maxsize=1024)
def _create(nbits, estimator, sketch, rotation, seeds, role, head_dim, device, prefix) -> Quantizer:
    codebook = lloyd_max(nbits - 1 if estimator == "qjl" else nbits, head_dim)
    plane_shapes(nbits, role, head_dim)
    # numpy draws the same stream on every machine; torch's generators differ between devices
    generator = np.random.default_rng(seeds)
    # ordinary tensors, also if the first prefill runs in inference mode
    with torch.inference_mode(False):
        matrix = _tensor(rotation_matrix(rotation, head_dim, generator)[None], device)
        return Quantizer(
            role=role,
            nbits=nbits,
            estimator=estimator,
            codebook=codebook,
            centroids=_tensor(codebook.centroids, device),
            boundaries=_tensor(codebook.boundaries, device),
            ranks_to_codes=torch.from_numpy(codebook.ranks_to_codes).to(device),
            transform=matrix,
            # the inverse transpose of a rotation is itself
            dual=matrix,
            sketch=_tensor(sketch_matrix(sketch, head_dim, generator), device) if estimator == "qjl" else None,
            search=estimator == "rescaled" or (estimator == "qjl" and sketch != "gaussian"),
            prefix=prefix,
        )


def _tensor(array: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)
