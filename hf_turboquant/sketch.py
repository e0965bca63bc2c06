"""QJL: the 1-bit sketch of the residual (arXiv 2406.03482; TurboQuant, Algorithm 2)."""

import numpy as np
from scipy.special import gammaln

from .rotation import rotation_matrix


def sketch_matrix(kind: str, head_dim: int, generator: np.random.Generator) -> np.ndarray:
    """
    κ S of shape `[head_dim, head_dim]`, float64: the sketch matrix with its constant folded in, once and for all.

    A residual r is stored as signs = sign(S r) and |r|, and for every vector q

        E ⟨q, κ |r| Sᵀ signs⟩ = ⟨q, r⟩,

    where the expectation is over S. For `"gaussian"` S (independent N(0, 1) entries) κ = √(π/2) / d (QJL,
    definition 3.1 and lemma 3.2). For `"orthogonal"` S (a Haar matrix, rows of norm 1) a row is a Gaussian row divided
    by its norm, about √d, so κ = √(π/2) / √d · (1 + O(1/d)); exactly, 1 / (d · E|t|) for a coordinate t of a unit
    vector. Orthogonal rows have 2.75 times less variance.
    """
    if kind == "gaussian":
        return np.sqrt(np.pi / 2) / head_dim * generator.standard_normal((head_dim, head_dim))
    # E|t| = Γ(d/2) / (√π Γ((d+1)/2))
    mean_abs = np.exp(gammaln(head_dim / 2) - gammaln((head_dim + 1) / 2)) / np.sqrt(np.pi)
    return rotation_matrix("haar", head_dim, generator) / (head_dim * mean_abs)
