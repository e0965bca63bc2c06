"""Quantizer: everything needed to encode and decode the keys or the values of one layer."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from .codebook import INT8, Codebook, lloyd_max
from .config import TurboQuantConfig
from .packing import BLOCK, plane_shapes
from .rotation import rotation_matrix, sketch_matrix
from .search import ANNEALINGS, STRETCHES, Annealing
from .storage import TokenBuffer

ROLES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class Quantizer:
    """
    The constants of one role (`"keys"` or `"values"`) of one layer.

    A vector x is stored as codes of y = z / |z|, z = A (x - μ), with one scale s, and with the `"qjl"` estimator the
    signs of a sketch and a second scale:

        "mse"               s = |z|               ẑ = s c[codes]                             (TurboQuant, Algorithm 1)
        "rescaled"          s = |z| / ⟨y, c⟩      ẑ = s c[codes]                          (EDEN, arXiv 2105.08339)
        "qjl", Gaussian     s = |z|               ẑ = s c[codes] + |z| |r| (κS)ᵀ signs       (TurboQuant, Algorithm 2)
        "qjl", orthogonal   s, ρ: see below       ẑ = s c[codes] + ρ (S/√d)ᵀ signs
        "int8"              s = max |z| / 127     ẑ = s codes                                (8 bits)

    and x̂ = A⁻¹ ẑ + μ. Scores need no x̂: ⟨q, x̂⟩ = ⟨A⁻ᵀ q, ẑ⟩ + ⟨q, μ⟩, and softmax ignores the last term.

    Algorithms 1 and 2 take the codes nearest to y and, with the Gaussian sketch, the signs of S r, r = y - c[codes].
    For rescaled codes, αy is rounded to the nearest levels for every α in `stretches`, and the codes with the largest
    cosine win.

    With the orthogonal sketch, codes and signs are chosen together: levels in one orthonormal basis and signs in
    another form an additive vector quantizer. Given the signs, the best codes come from rounding; given the codes, the
    best signs are those of S (y - c). `annealing` alternates between both, softly at first. (s, ρ) are the
    least-squares scales of the two parts, multiplied so that ⟨ẑ, z⟩ = |z|². At 2 and 3 bits, and at 4 from head_dim
    128 on, the bit of the sketch is then worth more than another bit of codes.

    8 bits are int8 numbers, z / s rounded. s is rounded to bf16 first, so that its two bytes cost nothing. Scores are
    unbiased, because rounding errors so small do not depend on the number. The squared error over |z|² is 3.6, 4.2 and
    4.9 · 10⁻⁵ at head_dim 64, 128 and 256; 256 Lloyd-Max levels have 3.9, 4.0 and 4.1.

    Rescaled and jointly chosen codes stay unbiased whatever the search finds: under a random rotation, the component
    of ẑ that is orthogonal to z has no preferred direction.

    Args:
        role (`str`): `"keys"` or `"values"`; also selects the packing layout.
        nbits (`int`): bits of one coordinate, sketch included.
        estimator (`str`): `"qjl"`, `"rescaled"` or `"mse"`; at 8 bits always `"int8"`.
        codebook (`Codebook`): of `code_bits` bits.
        centroids, boundaries, ranks_to_codes (`torch.Tensor`):
            The codebook on the device, fp32, fp32, uint8; the last two are `None` at 8 bits.
        transform (`torch.Tensor` of shape `[1 or num_key_value_heads, head_dim, head_dim]`, fp32): A.
        dual (`torch.Tensor`, same shape, fp32): A⁻ᵀ, applied to queries.
        sketch (`torch.Tensor` of shape `[head_dim, head_dim]`, fp32, *optional*): κS or S/√d, with `"qjl"` only.
        mean (`torch.Tensor` of shape `[1 or num_key_value_heads, 1, head_dim]`, fp32, *optional*): μ; `None` is zero.
        scale (`torch.Tensor`, same shape, fp32, *optional*): one factor per channel, before A: see `conditioning`.
        stretches (`tuple[float, ...]`): factors of y to try before rounding, see above.
        annealing (`Annealing`, *optional*): how codes and signs are chosen together, if they are.
    """

    role: str
    nbits: int
    estimator: str
    codebook: Codebook
    centroids: torch.Tensor
    boundaries: torch.Tensor | None
    ranks_to_codes: torch.Tensor | None
    transform: torch.Tensor
    dual: torch.Tensor
    sketch: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    stretches: tuple[float, ...] = ()
    annealing: Annealing | None = None

    @classmethod
    def create(cls, config: TurboQuantConfig, role: str, layer_idx: int, head_dim: int, device="cpu") -> "Quantizer":
        """
        The quantizer of one layer: equal for equal (`config.seed`, `layer_idx`, `role`, `head_dim`) on every device
        and in every process. Caches share it.

        Raises:
            `ValueError`: `head_dim` is under 16 or not a multiple of 4.
        """
        nbits, estimator = (
            (config.key_bits, config.key_estimator) if role == "keys" else (config.value_bits, config.value_estimator)
        )
        # Neither another estimator nor a sketch would improve 8 bits.
        estimator = "int8" if nbits == 8 else estimator
        shared = config.sketch, config.rotation, config.seed, layer_idx, head_dim, torch.device(device)
        return _create(role, nbits, estimator, *shared)

    def __deepcopy__(self, memo) -> "Quantizer":
        return self

    @property
    def head_dim(self) -> int:
        return self.transform.shape[-1]

    @property
    def code_bits(self) -> int:
        """Bits of the codes alone."""
        return self.nbits - (self.estimator == "qjl")

    @property
    def nbytes(self) -> int:
        """Bytes of the constants; a tensor that serves as several of them counts once."""
        tensors = {id(t): t.nbytes for t in self.__dict__.values() if isinstance(t, torch.Tensor)}
        return sum(tensors.values())

    @cached_property
    def buffer_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of one block of every stored tensor: see `packing` for the planes."""
        planes = plane_shapes(self.nbits, self.role, self.head_dim)
        scales = ("scales", "residual_norms") if self.estimator == "qjl" else ("scales",)
        codes = {name: (torch.uint8, shape) for name, shape in planes.items()}
        return codes | dict.fromkeys(scales, (torch.bfloat16, (BLOCK,)))

    def new_buffer(self, batch: int, heads: int) -> TokenBuffer:
        """An empty buffer for codes and scales of `batch` sequences and `heads` KV heads."""
        return TokenBuffer(self.buffer_shapes, BLOCK, batch, heads, self.transform.device)


# Never freed: graphs that torch.compile captured read these constants, and run again for an arena at the address of a
# freed one. There are two for each layer and setting, however many requests come.
@cache
def _create(role, nbits, estimator, sketch, rotation, seed, layer_idx, head_dim, device) -> Quantizer:
    sketched, code_bits = estimator == "qjl", nbits - (estimator == "qjl")
    codebook = INT8 if estimator == "int8" else lloyd_max(code_bits, head_dim)
    # Raises the error for a head_dim that cannot be packed.
    plane_shapes(nbits, role, head_dim)
    # numpy draws the same stream on every machine; torch's generators differ between devices.
    generator = np.random.default_rng((seed, layer_idx, ROLES.index(role), head_dim))

    def tensor(array: np.ndarray | None, dtype: type = np.float32) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array.astype(dtype)).to(device)

    # Ordinary tensors even if the first prefill runs in inference mode.
    with torch.inference_mode(False):
        matrix = tensor(rotation_matrix(rotation, head_dim, generator)[None])
        return Quantizer(
            role=role,
            nbits=nbits,
            estimator=estimator,
            codebook=codebook,
            centroids=tensor(codebook.centroids),
            boundaries=tensor(codebook.boundaries),
            ranks_to_codes=tensor(codebook.ranks_to_codes, np.uint8),
            transform=matrix,
            # A rotation is its own inverse transpose.
            dual=matrix,
            sketch=tensor(sketch_matrix(sketch, head_dim, generator)) if sketched else None,
            stretches=STRETCHES if estimator == "rescaled" else (),
            annealing=ANNEALINGS[code_bits] if sketched and sketch == "orthogonal" else None,
        )
