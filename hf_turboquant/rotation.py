"""Random matrices, drawn from a seeded generator: rotations, and the sketches of QJL."""

import numpy as np
from scipy.linalg import hadamard


def rotation_matrix(kind: str, head_dim: int, generator: np.random.Generator) -> np.ndarray:
    """
    A random orthogonal matrix Π of shape `[head_dim, head_dim]`, float64 (TurboQuant, Algorithm 1, line 2).

    `"haar"` is uniform over all of them: the Q of a Gaussian matrix, its columns' signs fixed (Mezzadri,
    arXiv math-ph/0609050). `"hadamard"` is H · diag(random signs); where `head_dim` = 2^k · m with m odd, H is the
    Kronecker product of the 2^k Hadamard matrix with a Haar matrix of size m. It is kept dense: up to a few hundred
    dimensions one matrix product is as fast as a transform, and one code path serves every rotation.
    """
    if kind == "haar":
        q, r = np.linalg.qr(generator.standard_normal((head_dim, head_dim)))
        return q * np.sign(np.diag(r))
    power = head_dim & -head_dim
    mixing = hadamard(power) / np.sqrt(power)
    if power < head_dim:
        mixing = np.kron(mixing, rotation_matrix("haar", head_dim // power, generator))
    return mixing * generator.choice([-1.0, 1.0], size=head_dim)


def sketch_matrix(kind: str, head_dim: int, generator: np.random.Generator) -> np.ndarray:
    """
    The sketch matrix of shape `[head_dim, head_dim]`, float64, with its constant folded in.

    `"orthogonal"` is S / √d, where S is a randomised Hadamard matrix: signs and codes are chosen together (see
    [`Quantizer`]), and the signs add a vector of fixed norm.

    `"gaussian"` is κS with independent N(0, 1) entries and κ = √(π/2) / d. A residual r is stored as signs = sign(S r)
    and |r|, and over the draw of S every vector q has E ⟨q, κ |r| Sᵀ signs⟩ = ⟨q, r⟩ (QJL, arXiv 2406.03482,
    definition 3.1, lemma 3.2).
    """
    if kind == "gaussian":
        return np.sqrt(np.pi / 2) / head_dim * generator.standard_normal((head_dim, head_dim))
    return rotation_matrix("hadamard", head_dim, generator) / np.sqrt(head_dim)
