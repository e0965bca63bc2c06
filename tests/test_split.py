"""Bits between two whole numbers: two quantizers of one head."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hf_turboquant import TurboQuantConfig, ops
from hf_turboquant.codebook import lloyd_max
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.split import SplitQuantizer, create_quantizer

CPU = torch.device("cpu")
# another order of channels in every head, spread over two decades
SPREAD = torch.stack([torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(h))]
                      for h in range(2)]).unsqueeze(1)  # fmt: skip


def states(tokens=600, batch=2, seed=0):
    return SPREAD * torch.randn(batch, 2, tokens, 64, generator=torch.Generator().manual_seed(seed))


def split(role="keys", **options):
    quantizer = create_quantizer(TurboQuantConfig(**options), role, 0, 64, CPU)
    assert isinstance(quantizer, SplitQuantizer)
    return quantizer


def round_trip(x, quantizer, pieces=None):
    buffer = quantizer.new_buffer(*x.shape[:2])
    for piece in x.split(pieces or x.shape[2], dim=2):
        ops.quantize(piece, quantizer, buffer)
    out = torch.full(x.shape, torch.nan)
    ops.dequantize(buffer, quantizer, out)
    return out, buffer


def test_whole_bits_need_no_split():
    assert isinstance(create_quantizer(TurboQuantConfig(nbits=3.0), "keys", 0, 64, CPU), Quantizer)


@pytest.mark.parametrize("role", ("keys", "values"))
@pytest.mark.parametrize(("nbits", "outliers"), [(2.25, 16), (2.5, 32), (3.5, 32), (3.75, 48)])
def test_each_part_has_the_distortion_of_its_bits_and_dimension(role, nbits, outliers):
    x = states(2000)
    options = {"nbits": nbits, "key_estimator": "mse", "value_estimator": "mse", "rotation": "haar"}
    quantizer = split(role, **options).choose(x, None)
    error = (round_trip(x, quantizer)[0] - x).square()
    for head in range(2):
        largest = SPREAD[head, 0].argsort(descending=True)
        assert set(quantizer.channels[head, :outliers].tolist()) == set(largest[:outliers].tolist())
        for channels, bits in ((largest[:outliers], int(nbits) + 1), (largest[outliers:], int(nbits))):
            relative = error[:, head][..., channels].sum() / x[:, head][..., channels].square().sum()
            # the codebook is the one of a sphere of so many dimensions
            assert relative.item() == pytest.approx(lloyd_max(bits, len(channels)).distortion, rel=0.06)


@pytest.mark.parametrize("estimator", ("qjl", "rescaled"))
def test_scores_are_unbiased(estimator):
    estimates, x, y = [], states(300), states(300, seed=1)
    for seed in range(24):
        quantizer = split(nbits=2.5, key_estimator=estimator, seed=seed, rotation="haar").choose(x, None)
        estimates.append((y * round_trip(x, quantizer)[0]).sum(-1))
    exact = (y * x).sum(-1)
    slope = (torch.stack(estimates).mean(0) * exact).sum() / exact.square().sum()
    assert slope.item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("nbits", "estimator", "bits"), [(2.25, "rescaled", 2.75), (2.5, "rescaled", 3.0), (3.5, "qjl", 4.5)]
)
def test_the_bit_budget_is_exact(nbits, estimator, bits):
    # two scales of 16 bits on 64 coordinates are half a bit, four of them one
    _, buffer = round_trip(states(256), split(nbits=nbits, key_estimator=estimator))
    assert buffer.nbytes * 8 == bits * 2 * 2 * buffer.capacity * 64


@pytest.mark.parametrize("role", ("keys", "values"))
def test_appending_token_by_token_gives_the_same_bytes(role):
    x = states(200)
    quantizer = split(role, nbits=3.25).choose(x, None)
    assert torch.equal(round_trip(x, quantizer)[0], round_trip(x, quantizer, pieces=1)[0])


def test_padding_and_broken_tokens_choose_nothing():
    x, valid = states(), torch.ones(2, 600, dtype=torch.bool)
    chosen = split(nbits=2.5).choose(x, None).channels
    x[0, :, :50], valid[0, :50] = 1e6 / SPREAD.square(), False
    x[1, :, 7] = torch.nan
    assert torch.equal(split(nbits=2.5).choose(x, valid).channels, chosen)
    assert not torch.equal(split(nbits=2.5).choose(x, None).channels, chosen)


def test_outliers_are_those_of_the_conditioned_basis():
    # a mean that says nothing, and channels that queries don't look at
    quantizer = dataclasses.replace(split(nbits=2.5), mean=100 / SPREAD, scale=1 / SPREAD.square())
    chosen = quantizer.choose(states() + 100 / SPREAD, None)
    for head in range(2):
        assert set(chosen.channels[head, :32].tolist()) == set(SPREAD[head, 0].argsort()[:32].tolist())


@pytest.mark.parametrize("condition", ("attention", "center", "none"))
@pytest.mark.parametrize("window", (0, 16))
def test_a_layer_of_split_codes(condition, window):
    keys, values, query = states(400), states(400, seed=1), torch.randn(2, 4, 400, 64)
    options = {"key_bits": 3.5, "value_bits": 2.25, "residual_length": window, "condition": condition}
    layer = TurboQuantLayer(TurboQuantConfig(**options), 0)
    sdpa(query[:, :, :300], *layer.update(keys[:, :, :300], values[:, :, :300]), enable_gqa=True)
    handles = layer.update(keys[:, :, 300:310], values[:, :, 300:310])
    assert layer.codes["keys"].length == 306 - window and layer.quantizers["values"].channels is not None
    assert "keys 3.5 bits" in repr(layer) and "values 2.25 bits" in repr(layer)
    out = sdpa(query[:, :, 300:310], *handles, enable_gqa=True)
    plain = [handle.dequantize().repeat_interleave(2, dim=1) for handle in handles]
    torch.testing.assert_close(out, sdpa(query[:, :, 300:310], *plain), rtol=1e-3, atol=1e-3)
    # every way of moving tokens
    twin = copy.deepcopy(layer)
    twin.batch_repeat_interleave(2)
    twin.reorder_cache(torch.tensor([0, 3]))
    twin.batch_select_indices(torch.tensor([1, 0]))
    for role in ("keys", "values"):
        assert torch.equal(getattr(twin, role).dequantize(), getattr(layer, role).dequantize().flip(0))
    before = layer.keys.dequantize()
    layer.crop(-3)
    assert torch.equal(layer.keys.dequantize(), before[:, :, :-3])


@pytest.mark.parametrize("head_dim", (32, 40))
def test_head_dims_that_cannot_be_split(head_dim):
    with pytest.raises(ValueError, match=rf"parts of at least 16 channels, multiples of 8; got .* of {head_dim}"):
        create_quantizer(TurboQuantConfig(nbits=2.25), "keys", 0, head_dim, CPU)


def test_the_kernels_decline_in_words():
    pytest.importorskip("triton")
    layer = TurboQuantLayer(TurboQuantConfig(nbits=2.5, residual_length=0, backend="triton", condition="none"), 0)
    with pytest.raises(ValueError, match="cannot run `quantize` here: the kernel writes 2, 3 and 4 bits, and the keys"):
        layer.update(states(), states())
    assert layer.get_seq_length() == 0
