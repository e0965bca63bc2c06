import numpy as np
import pytest
import torch

from hf_turboquant import TurboQuantConfig
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.rotation import rotation_matrix, sketch_matrix


@pytest.mark.parametrize("kind", ("haar", "hadamard"))
@pytest.mark.parametrize("head_dim", (16, 17, 64, 80, 96, 112, 128, 192, 576))
def test_rotations_are_orthogonal(kind, head_dim):
    rotation = rotation_matrix(kind, head_dim, np.random.default_rng(0))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(head_dim), atol=1e-12)


@pytest.mark.parametrize("kind", ("haar", "hadamard"))
@pytest.mark.parametrize("head_dim", (64, 80, 96))
def test_rotations_spread_an_outlier_channel(kind, head_dim):
    # a channel that holds all the energy must not stay one: no coordinate keeps a tenth of it on average
    one_hot = np.zeros(head_dim)
    one_hot[3] = 1
    peaks = [(rotation_matrix(kind, head_dim, np.random.default_rng(s)) @ one_hot).max() ** 2 for s in range(50)]
    assert np.mean(peaks) < 0.2


def test_haar_is_uniform_in_sign():
    # without the sign fix of the QR decomposition the diagonal would be biased
    diagonal = np.mean([np.diag(rotation_matrix("haar", 16, np.random.default_rng(s))) for s in range(400)])
    assert abs(diagonal) < 4 * np.sqrt(1 / 16 / 400 / 16)


def test_quantizers_are_deterministic_and_differ():
    config = TurboQuantConfig()
    first = Quantizer.create(config, "keys", 3, 64)
    again = Quantizer.create(config, "keys", 3, 64)
    assert torch.equal(first.transform, again.transform) and torch.equal(first.sketch, again.sketch)
    for other in (
        Quantizer.create(config, "keys", 4, 64),
        Quantizer.create(config, "values", 3, 64),
        Quantizer.create(TurboQuantConfig(seed=1), "keys", 3, 64),
    ):
        assert not torch.equal(first.transform, other.transform)


def test_stream_is_pinned():
    # codes written by one machine are read by another: these numbers may never change
    signs = Quantizer.create(TurboQuantConfig(), "keys", 0, 64).transform[0, 0, :8].sign().int().tolist()
    assert signs == [-1, 1, 1, -1, -1, -1, -1, -1]


def test_sketch_constant():
    # ⟨q, κ |r| Sᵀ sign(S r)⟩ averages to ⟨q, r⟩; a constant that is off by 1 % fails
    rng = np.random.default_rng(0)
    head_dim, r = 64, np.random.default_rng(1).standard_normal(64)
    estimates = []
    for _ in range(400):
        scaled = sketch_matrix("gaussian", head_dim, rng)
        estimates.append(r @ scaled.T @ np.sign(scaled @ r) * np.linalg.norm(r) / (r @ r))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert error < 0.005
    assert np.mean(estimates) == pytest.approx(1, abs=4 * error)


@pytest.mark.parametrize("head_dim", (64, 80, 96))
def test_signs_in_an_orthogonal_basis_have_norm_one(head_dim):
    sketch = sketch_matrix("orthogonal", head_dim, np.random.default_rng(0))
    np.testing.assert_allclose(sketch @ sketch.T * head_dim, np.eye(head_dim), atol=1e-12)
