"""QJL: the 1-bit sketch of the residual (arXiv 2406.03482; TurboQuant, Algorithm 2)."""

import numpy as np
from scipy.linalg import hadamard

from .rotation import rotation_matrix


def sketch_matrix(kind: str, head_dim: int, generator: np.random.Generator) -> np.ndarray:
    """
    The sketch matrix of shape `[head_dim, head_dim]`, float64, with its constant folded in, once and for all.

    `"orthogonal"` is S / √d: the sketch of a vector is a vector of unit norm, and signs and codes are chosen together
    (see [`Quantizer`]). S is symmetric, so that one product serves both ways: D H D with a Hadamard matrix H and random
    signs D where `head_dim` is a power of two, else a Haar reflection through half of the dimensions.

    `"gaussian"` is κS with independent N(0, 1) entries and κ = √(π/2) / d. A residual r is stored as signs = sign(S r)
    and |r|, and over the draw of S every vector q has E ⟨q, κ |r| Sᵀ signs⟩ = ⟨q, r⟩ (QJL, definition 3.1, lemma 3.2).
    """
    if kind == "gaussian":
        return np.sqrt(np.pi / 2) / head_dim * generator.standard_normal((head_dim, head_dim))
    signs = generator.choice([-1.0, 1.0], size=head_dim)
    if head_dim & (head_dim - 1):
        basis = rotation_matrix("haar", head_dim, generator)
        symmetric = (basis * np.where(np.arange(head_dim) % 2, 1.0, -1.0)) @ basis.T
    else:
        symmetric = hadamard(head_dim) * np.outer(signs, signs) / np.sqrt(head_dim)
    return symmetric / np.sqrt(head_dim)
