"""
The papers' claims about the method, on random vectors: distortion, and bias and variance of inner products.

Tables show published numbers beside ours. Those of the paper come from TurboQuant, arXiv 2504.19874, theorems 1 and 2;
those of a benchmark come from https://ai-muninn.com/en/blog/turboquant-kv-cache-benchmark-gx10, which ran
https://github.com/tonbistudio/turboquant-pytorch.
"""

import math

import torch

from ..config import TurboQuantConfig
from ..ops.reference import decode, encode
from ..quantizer import Quantizer

# As printed in the paper, by bits: the distortion, and the variance of inner products times the dimension.
PAPER_DISTORTION = {2: "0.117", 3: "0.03", 4: "0.009"}
PAPER_VARIANCE = {(2, "qjl", "gaussian"): "0.56", (3, "qjl", "gaussian"): "0.18", (4, "qjl", "gaussian"): "0.047"}
# By bits and dimension: the distortion of a coordinate, there the limit of wide vectors.
BENCHMARK_DISTORTION = {(3, 128): "0.000270", (3, 256): "0.000135"}


def distortion(nbits: int, head_dim: int, samples: int = 4096, seed: int = 0) -> dict[str, float]:
    """
    Squared error of unit vectors through Algorithm 1 (TurboQuant, theorems 1 and 3).

    Returns:
        `measured`; `codebook`, the codebook's expected distortion; `upper_bound` √3 π/2 · 4⁻ᵇ and `lower_bound` 4⁻ᵇ.
    """
    x = _unit_vectors(samples, head_dim, seed)
    decoded, quantizer = _through(x, nbits, "mse", seed)
    return {
        "measured": (x - decoded).square().sum(-1).mean().item(),
        "codebook": quantizer.codebook.distortion,
        "upper_bound": math.sqrt(3) * math.pi / 2 * 4.0**-nbits,
        "lower_bound": 4.0**-nbits,
    }


def inner_product(
    estimator: str, nbits: int, head_dim: int, sketch: str = "orthogonal", samples: int = 512, seeds: int = 16
) -> dict[str, float]:
    """
    How ⟨q, x̂⟩ relates to ⟨q, x⟩ over random unit vectors q and x, and over rotations and sketches.

    Returns:
        `slope` of the regression of ⟨q, x̂⟩ on ⟨q, x⟩ through zero (1 if the estimator is unbiased), and `variance`,
        the mean squared error times `head_dim`.
    """
    products = products_error = squares = 0.0
    for seed in range(seeds):
        x, q = (_unit_vectors(samples, head_dim, 2 * seed + i) for i in range(2))
        exact, estimated = q @ x.T, q @ _through(x, nbits, estimator, seed, sketch)[0].T
        products += (exact * estimated).sum().item()
        squares += exact.square().sum().item()
        products_error += (estimated - exact).square().mean().item()
    return {"slope": products / squares, "variance": head_dim * products_error / seeds}


def _through(x: torch.Tensor, nbits: int, estimator: str, seed: int, sketch: str = "orthogonal"):
    """Vectors of shape `[tokens, head_dim]` as codes give them back, and their quantizer."""
    config = TurboQuantConfig(nbits=nbits, key_estimator=estimator, sketch=sketch, rotation="haar", seed=seed)
    quantizer = Quantizer.create(config, "keys", 0, x.shape[-1])
    return (decode(*encode(x[None, None], quantizer), quantizer) @ quantizer.dual)[0, 0], quantizer


def _unit_vectors(count: int, head_dim: int, seed: int) -> torch.Tensor:
    x = torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)
