"""The kernels that condition keys against the torch reference: in Triton's interpreter without a GPU, else on it."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from hf_turboquant import TurboQuantConfig, ops
from hf_turboquant.conditioning import MIN_ENERGY, MIN_TOKENS, _turns, condition, learned
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.ops import reference
from hf_turboquant.ops import statistics as kernels
from hf_turboquant.quantizer import Quantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_keys(batch, heads, tokens, dim, dtype=torch.float32, layout=None, pairs=0, seed=0):
    """Keys of uneven channels with means, which a rotary embedding of that layout has turned; and their turns."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(heads, 1, dim, generator=generator) + 0.1
    keys = torch.randn(batch, heads, tokens, dim, generator=generator) * spread
    keys += 2 * torch.randn(heads, 1, dim, generator=generator)
    frequencies = tuple(10_000 ** (-i / max(pairs, 1)) for i in range(pairs))
    if layout is not None:
        x, y = (
            (slice(pairs), slice(pairs, 2 * pairs))
            if layout == "halves"
            else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        )
        turned = torch.complex(keys[..., x], keys[..., y]) * _turns(frequencies, 4, 4 + tokens, 1, "cpu")[0].conj()
        keys[..., x], keys[..., y] = turned.real, turned.imag
    turns = _turns(frequencies, 4, 4 + tokens, 1, torch.device(DEVICE)) if pairs else None
    energy = torch.rand(heads, dim, generator=generator) ** 4
    # as models have them: heads next to each other
    keys = keys.to(DEVICE, dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return keys, energy.to(DEVICE), turns


def assert_same(keys, energy, valid, turns, tolerance=2e-4, values=None):
    """Returns whether there are a mean, a scale, and enough different tokens, and how many there are."""
    if values is None:
        # keys and values may differ in dtype, shape of a head, and layout
        values = torch.randn(*keys.shape[:3], 48, generator=torch.Generator().manual_seed(9)).to(keys.device)
    args = keys, values, energy, valid, turns, MIN_TOKENS, MIN_ENERGY
    assert kernels.supports(*args) is None
    mean, scale, found = reference.channel_statistics(*args)
    got_mean, got_scale, got_found = kernels.channel_statistics(*args)
    assert got_mean.shape == mean.shape and got_found.dtype == found.dtype and torch.equal(got_found, found)
    size = mean.abs().max() + 1e-6
    torch.testing.assert_close(got_mean / size, mean / size, rtol=0, atol=1e-5)
    if energy is None:
        assert scale is None and got_scale is None
    else:
        torch.testing.assert_close(got_scale, scale, rtol=tolerance, atol=0)
    return found.tolist()


@pytest.mark.parametrize("layout", (None, "halves", "neighbours"))
@pytest.mark.parametrize("heads, dim, pairs", ((1, 64, 32), (3, 80, 40), (8, 128, 64), (2, 96, 16), (2, 256, 128)))
def test_layouts_and_shapes(heads, dim, pairs, layout):
    keys, energy, turns = random_keys(2, heads, 130, dim, layout=layout, pairs=pairs)
    assert assert_same(keys, energy, None, turns) == [1, 1, 1, 260]


# the interpreter does not round to bf16, but it reads it
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("tokens", (64, 67, 500))
def test_dtypes_and_lengths(tokens, dtype):
    keys, energy, turns = random_keys(1, 2, tokens, 64, dtype, "halves", 32)
    # as sampled keys come: every third token, but for the sinks
    assert_same(keys[:, :, 4::3], energy, None, None)
    assert_same(keys, energy, None, turns)
    assert_same(keys, None, None, turns)


@pytest.mark.parametrize("turned", (False, True))
def test_padding_does_not_count(turned):
    keys, energy, turns = random_keys(3, 2, 90, 64, layout="halves", pairs=32)
    valid = torch.ones(3, 90, dtype=torch.bool, device=DEVICE)
    valid[0, :40], valid[2, 50:] = False, False
    keys.transpose(1, 2)[~valid] = torch.nan
    assert assert_same(keys, energy, valid, turns if turned else None) == [1, 1, 1, 190]
    # every second token, of a mask that has other strides; keys channel by channel
    assert_same(keys[:, :, ::2], energy, valid[:, ::2], None)
    assert_same(keys.transpose(2, 3).contiguous().transpose(2, 3), energy, valid, None)
    valid[1:] = False
    assert assert_same(keys, energy, valid, None) == [1, 0, 0, 50]
    valid[:] = False
    assert assert_same(keys, energy, valid, None) == [0, 0, 0, 0]


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_one_mask_may_serve_all_sequences(backend):
    keys, energy, _ = random_keys(3, 2, 150, 64)
    valid = torch.ones(1, 150, dtype=torch.bool, device=DEVICE)
    valid[:, :40] = False
    plain = Quantizer.create(TurboQuantConfig(), "keys", 0, 64, DEVICE)
    values = torch.randn_like(keys)
    told, found = condition(plain, keys, values, energy, valid, backend=backend)
    expected, _ = condition(plain, keys[:, :, 40:], values[:, :, 40:], energy, None, backend="torch")
    assert learned(found) == (True, True, True, 330)
    torch.testing.assert_close((told.mean, told.scale), (expected.mean, expected.scale), rtol=1e-4, atol=1e-5)


def test_degenerate_keys_change_nothing():
    keys, energy, turns = random_keys(1, 2, 80, 64, layout="halves", pairs=32)
    assert assert_same(torch.full_like(keys, 3.0), energy, None, None) == [1, 0, 1, 80]
    assert assert_same(keys, torch.zeros_like(energy), None, turns) == [1, 0, 1, 80]
    keys[0, 1, 70, 5] = torch.inf
    assert assert_same(keys, energy, None, turns) == [0, 0, 1, 80]


def test_a_mean_far_above_the_spread():
    """Squares are summed around the mean: a difference of large sums would leave nothing."""
    keys, energy, _ = random_keys(1, 2, 400, 64)
    assert assert_same(keys + 1000, energy, None, None, tolerance=2e-3) == [1, 1, 1, 400]


def periodic(period, tokens, batch=1, dim=64, noise=0.0, dtype=torch.float32):
    """Values of a few tokens in turns, up to rounding, as models have them: heads next to each other."""
    generator = torch.Generator().manual_seed(period)
    kinds = torch.randn(period, 3, dim, generator=generator)
    noises = torch.randn(batch, tokens, 3, dim, generator=generator)
    values = kinds[torch.arange(tokens) % period].expand(batch, -1, -1, -1) + noise * noises
    return values.to(DEVICE, dtype).transpose(1, 2)


@pytest.mark.parametrize("noise, dtype", [(0.0, torch.float32), (0.05, torch.bfloat16)])
@pytest.mark.parametrize("period, enough", [(1, 0), (4, 0), (64, 1)])
@pytest.mark.parametrize("tokens, batch, dim", [(200, 1, 80), (256, 3, 96), (530, 2, 256)])
def test_a_few_tokens_over_and_over_are_not_enough(tokens, batch, dim, period, enough, noise, dtype):
    keys, energy, _ = random_keys(batch, 2, tokens, 64)
    values = periodic(period, tokens, batch, dim, noise, dtype)
    assert assert_same(keys, energy, None, None, values=values) == [1, enough, enough, batch * tokens]
    # unless there are others among them
    values[0, :, 10:80] = torch.randn(3, 70, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    assert assert_same(keys, energy, None, None, values=values) == [1, 1, 1, batch * tokens]


def test_padding_is_not_another_token():
    """Neither among what is counted nor among what it is compared with."""
    keys, energy, _ = random_keys(2, 2, 300, 64)
    valid = torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
    valid[:, :250] = False
    values = torch.randn(2, 3, 300, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values[:, :, 0] = torch.nan
    assert assert_same(keys, energy, valid, None, values=values) == [1, 1, 1, 100]
    values[:, :, 250:] = values[:1, :, 250:251]
    assert assert_same(keys, energy, valid, None, values=values) == [1, 0, 0, 100]


def test_the_layer_takes_the_backend_it_was_told(monkeypatch):
    keys, _, _ = random_keys(1, 2, 200, 64)
    calls = []
    for backend in ("triton", "torch"):
        module = kernels if backend == "triton" else reference
        original = module.channel_statistics

        def spy(*args, backend=backend, original=original):
            # on a GPU, kernels are compiled ahead by a call of their own
            calls.extend([] if ops.is_only_compiling() else [backend])
            return original(*args)

        monkeypatch.setattr(module, "channel_statistics", spy)
        layer = TurboQuantLayer(TurboQuantConfig(backend=backend), 0)
        layer.update(keys, keys)
        layer.settle(torch.cat([keys, keys], dim=1))
        assert layer.condition == "attention"
    assert calls == ["triton", "torch"]
    with pytest.raises(ValueError, match=r"need \[1, 200\], got \[1, 199\]"):
        ops.channel_statistics(
            keys, keys, None, torch.ones(1, 199, dtype=torch.bool, device=DEVICE), None, MIN_TOKENS, MIN_ENERGY
        )
    with pytest.raises(ValueError, match="float64"):
        ops.channel_statistics(keys.double(), keys, None, None, None, MIN_TOKENS, MIN_ENERGY, "triton")
