"""The handle: answers for its shape, reaches attention, and is a plain tensor to everything else."""

import copy
import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hf_turboquant import QuantizedStates, TurboQuantConfig, ops
from hf_turboquant.handle import ReadOnly, _log_dequantize
from hf_turboquant.layer import TurboQuantLayer

pytestmark = pytest.mark.usefixtures("early_learning")


@pytest.fixture
def handles():
    torch.manual_seed(0)
    layer = TurboQuantLayer(TurboQuantConfig(nbits=4, residual_length=16), 0)
    layer.update(torch.randn(2, 2, 100, 32), torch.randn(2, 2, 100, 32))
    # the first tokens wait for a query, the next update stores them
    return layer.update(torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32))


@pytest.fixture
def dequantized(monkeypatch):
    """Counts the dequantizations of whole layers."""
    calls = []
    dequantize = ops.dequantize_all

    def count(states, role):
        calls.append(role)
        return dequantize(states, role)

    monkeypatch.setattr(ops, "dequantize_all", count)
    return calls


def test_metadata_reads_no_code(handles, dequantized):
    key, _ = handles
    assert isinstance(key, QuantizedStates) and isinstance(key, torch.Tensor)
    assert key.shape == (2, 2, 101, 32) and key.size(2) == 101 and key.dim() == key.ndim == 4
    assert key.dtype == torch.float32 and key.device.type == "cpu" and key.is_floating_point()
    assert key.numel() == 2 * 2 * 101 * 32 and key.stride() == (2 * 101 * 32, 101 * 32, 32, 1)
    assert "QuantizedStates(keys, 4 bits" in repr(key)
    assert dequantized == []


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.mT,
        lambda x: x + 1,
        lambda x: torch.ones(2, 2, 1, 32) @ x.transpose(-1, -2),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: x[:, :, 5:9],
        lambda x: x.reshape(4, 101, 32),
        lambda x: x.to(torch.float16),
        lambda x: torch.nn.functional.softmax(x, dim=-1),
        lambda x: x.repeat_interleave(3, dim=1),
        lambda x: torch.einsum("bhld->bhd", x),
        lambda x: copy.deepcopy(x),
        lambda x: torch.tensor(x.tolist()),
    ],
)
def test_any_other_operation_sees_the_dequantized_tensor(handles, dequantized, operation):
    key, _ = handles
    expected = operation(key.dequantize())
    dequantized.clear()
    out = operation(key)
    assert type(out) in (torch.Tensor, ReadOnly) and torch.equal(out, expected)
    assert dequantized


WRITES = {
    "keys[...] =": lambda x: x.__setitem__((slice(None), slice(None), 5), 0),
    "slice": lambda x: x[:, :, 5:6].zero_(),
    "view of a view": lambda x: x.transpose(1, 2)[0].select(0, 5).mul_(0),
    "one of several": lambda x: x.split(5, dim=2)[1].fill_(0),
    "+=": lambda x: x.__iadd__(1),
    "slice +=": lambda x: x[:, :, 5].__iadd__(1),
    "data": lambda x: x.data[:, :, 5].zero_(),
    "detach": lambda x: x.detach().zero_(),
    "data =": lambda x: setattr(x, "data", torch.zeros(x.shape)),
    "data of a slice": lambda x: setattr(x[:, :, 5], "data", torch.zeros(1)),
    "out=": lambda x: torch.mul(x, 2, out=x),
    "copy_": lambda x: x.copy_(torch.zeros(x.shape)),
    "inplace=": lambda x: torch.nn.functional.relu(x, inplace=True),
    "foreach": lambda x: torch._foreach_mul_([x], 0),
    "init": lambda x: torch.nn.init.zeros_(x),
    "same dtype": lambda x: x.float().zero_(),
    "operator": lambda x: torch.ops.aten.zero_(x),
    "numpy": lambda x: x[:, :, 5].numpy().fill(0),
}


@pytest.mark.parametrize("no_gradients", (torch.no_grad, torch.inference_mode, torch.enable_grad))
@pytest.mark.parametrize("name", WRITES)
def test_a_write_raises(handles, name, no_gradients):
    held = handles[0].dequantize()
    message = "read-only" if name == "numpy" else "must not be written to.* Write to a `.clone\\(\\)`"
    with no_gradients(), pytest.raises(ValueError, match=message):
        WRITES[name](handles[0])
    # to a copy one may write, and what is written from a handle is read
    copied = handles[0][:, :, 5].clone().zero_()
    assert not copied.any() and torch.equal(torch.empty(held.shape).copy_(handles[0]), held)
    assert torch.equal(handles[0].dequantize(), held)


@pytest.mark.parametrize("name", [name for name in WRITES if name != "data of a slice"])
def test_a_write_to_exact_tokens_is_one_to_the_cache(name):
    layer = TurboQuantLayer(TurboQuantConfig(), 0)
    layer.update(-torch.ones(2, 2, 101, 32), torch.ones(2, 2, 101, 32))
    WRITES[name](layer.keys)
    assert not (layer.keys == -1).all()
    before = layer.keys.clone()
    with pytest.raises(ValueError, match="`data` must keep its shape"):
        layer.keys.data = torch.zeros(1)
    # what it gave is not the cache's any more
    given = layer.keys
    layer.update(torch.ones(2, 2, 1, 32), torch.ones(2, 2, 1, 32))
    given.zero_()
    assert torch.equal(layer.keys[:, :, :101], before)


def test_falling_back_is_said_once(handles, caplog):
    _log_dequantize.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_turboquant.handle"):
        for _ in range(3):
            handles[0].mT  # noqa: B018
            handles[0] * 2
    assert len(caplog.records) == 1
    assert "attn_implementation='sdpa'" in caplog.text


def mask_of(kind, query_length):
    if kind is None:
        return None
    mask = torch.rand(2, 1, query_length, 101, generator=torch.Generator().manual_seed(1)) > 0.3
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


@pytest.mark.parametrize("mask", (None, "bool", "additive"))
@pytest.mark.parametrize("query_length", (1, 3, 40))
def test_sdpa_runs_on_the_codes(handles, dequantized, mask, query_length):
    query, mask = torch.randn(2, 6, query_length, 32), mask_of(mask, query_length)
    expected = sdpa(query, *(h.dequantize() for h in handles), attn_mask=mask, scale=0.3, enable_gqa=True)
    dequantized.clear()
    out = sdpa(query, *handles, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    # a long query reads every code often: there one layer is dequantized, for that call
    assert dequantized == ([] if query_length <= ops.MAX_KERNEL_QUERIES else ["keys", "values"])


def test_repeated_heads_still_run_on_the_codes(handles, dequantized):
    from transformers.models.llama.modeling_llama import repeat_kv

    query = torch.randn(2, 6, 2, 32)
    repeated = [repeat_kv(handle, 3) for handle in handles]
    assert all(isinstance(handle, QuantizedStates) and handle.shape == (2, 6, 101, 32) for handle in repeated)
    out = sdpa(query, *repeated)
    assert dequantized == []
    plain = [repeat_kv(handle.dequantize(), 3) for handle in handles]
    torch.testing.assert_close(out, sdpa(query, *plain), rtol=1e-4, atol=1e-5)
    # and are a plain tensor to everything else, at every step of the repetition
    assert torch.equal(repeated[0] + 0, plain[0])
    assert torch.equal(handles[0][:, :, None, :, :] + 0, handles[0].dequantize()[:, :, None])
    assert torch.equal(handles[0][:, :, None, :, :].sum(2), handles[0].dequantize())


@pytest.mark.parametrize("options", ({"is_causal": True}, {"dropout_p": 0.5}))
def test_what_sdpa_means_differently_is_dequantized(handles, dequantized, options):
    query = torch.randn(2, 6, 2, 32)
    torch.manual_seed(0)
    out = sdpa(query, *handles, enable_gqa=True, **options)
    assert dequantized == ["keys", "values"]
    torch.manual_seed(0)
    assert torch.equal(out, sdpa(query, *(h.dequantize() for h in handles), enable_gqa=True, **options))


def test_scores_are_the_logits(handles):
    query = torch.randn(2, 6, 2, 32)
    logits = ops.scores(query, handles[0].states, scaling=0.5)
    keys = handles[0].dequantize().repeat_interleave(3, dim=1)
    torch.testing.assert_close(logits, query @ keys.mT * 0.5, rtol=1e-4, atol=1e-4)


def test_queries_that_do_not_fit(handles):
    layer_states = handles[0].states
    with pytest.raises(ValueError, match=r"`query` must be of shape \[2, a multiple of 2, query_length, 32\]"):
        ops.attention(torch.zeros(2, 3, 1, 32), layer_states, scaling=1.0)
    with pytest.raises(ValueError, match="`attention_mask` must have four dimensions, the last of at least 101"):
        ops.attention(torch.zeros(2, 2, 1, 32), layer_states, scaling=1.0, attention_mask=torch.zeros(2, 1, 1, 100))
