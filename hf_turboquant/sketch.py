"""QJL: the 1-bit sketch of the residual (arXiv 2406.03482; TurboQuant, Algorithm 2)."""

import numpy as np

from .rotation import rotation_matrix


def sketch_matrix(kind: str, head_dim: int, generator: np.random.Generator) -> np.ndarray:
    """
    The sketch matrix of shape `[head_dim, head_dim]`, float64, with its constant folded in.

    `"orthogonal"` is S / √d, where S is a randomised Hadamard matrix: signs and codes are chosen together (see
    [`Quantizer`]), and the signs add a vector of fixed norm.

    `"gaussian"` is κS with independent N(0, 1) entries and κ = √(π/2) / d. A residual r is stored as signs = sign(S r)
    and |r|, and over the draw of S every vector q has E ⟨q, κ |r| Sᵀ signs⟩ = ⟨q, r⟩ (QJL, definition 3.1, lemma 3.2).
    """
    if kind == "gaussian":
        return np.sqrt(np.pi / 2) / head_dim * generator.standard_normal((head_dim, head_dim))
    return rotation_matrix("hadamard", head_dim, generator) / np.sqrt(head_dim)
