"""
The attention and scores kernels against the fp32 reference: in Triton's interpreter without a GPU, else on it.

Tolerance: at most twice the error of torch's own attention in the same dtype on the dequantized states.
"""

import dataclasses
import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from layer_states import check, random_states, relative_error

from hf_turboquant.config import TurboQuantConfig
from hf_turboquant.ops import attend as kernels
from hf_turboquant.ops import reference
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.states import AttentionOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
# without inline assembly, and on a GPU with it; the interpreter has no assembly
PORTABLE = [False, True] if DEVICE == "cuda" else [True]


def make(kv_len=300, head_dim=64, batch=1, kv_heads=2, seed=0, **options):
    options = {"residual_length": 40, "dtype": DTYPES[0], **options}
    return random_states(batch, kv_heads, kv_len, head_dim, device=DEVICE, seed=seed, **options)


def make_query(states, heads=4, length=1, seed=0):
    batch, _, _, head_dim = states.shape("keys")
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    # as models hand it over: heads next to each other
    query = torch.randn((batch, length, heads, head_dim), generator=generator, device=DEVICE)
    return query.to(states.exact["keys"].dtype).transpose(1, 2)


def assert_close(states, query, portable=PORTABLE[-1], **options):
    options = {"scaling": query.shape[-1] ** -0.5, **options}
    error, plain = check(query, states, portable=portable, **options)
    assert error <= 2 * plain


@pytest.mark.parametrize("portable", PORTABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("key_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("estimator", ["qjl", "rescaled"])
def test_bits(key_bits, value_bits, estimator, dtype, portable):
    states = make(key_bits=key_bits, value_bits=value_bits, key_estimator=estimator, dtype=dtype)
    assert_close(states, make_query(states), portable)


@pytest.mark.parametrize("portable", PORTABLE)
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (80, 80), (96, 96), (128, 64), (192, 128), (256, 256)])
def test_head_dims(head_dim, value_dim, nbits, portable):
    if DEVICE == "cpu" and head_dim > 128 and nbits == 4:
        pytest.skip("slow in the interpreter")
    states = make(200, head_dim, nbits=nbits, value_dim=value_dim, kv_heads=1)
    assert_close(states, make_query(states, heads=1), portable)


@pytest.mark.parametrize("portable", PORTABLE)
@pytest.mark.parametrize("nbits", [3, 4, 8])
@pytest.mark.parametrize("codes", [1, 63, 64, 127, 128, 129, 255, 256, 257])
def test_lengths_around_tile_edges(codes, nbits, portable):
    states = make(4 + codes + 3, residual_length=3, nbits=nbits)
    assert_close(states, make_query(states), portable)


@pytest.mark.parametrize("sinks, window, tail", [(0, 0, 0), (4, 0, 0), (0, 40, 40), (4, 40, 17), (70, 130, 130)])
def test_exact_tokens(sinks, window, tail):
    states = make(400, sink_length=sinks, residual_length=window, tail=tail)
    assert_close(states, make_query(states))


@pytest.mark.parametrize("heads, length", [(2, 1), (14, 1), (32, 1), (4, 2), (4, 5), (2, 16)])
def test_groups_and_queries(heads, length):
    states = make(180, residual_length=8)
    assert_close(states, make_query(states, heads, length), is_causal=True)


@pytest.mark.parametrize("kind", ["boolean", "additive", "left padding", "strided", "per head"])
@pytest.mark.parametrize("length", [1, 3])
def test_masks(kind, length):
    kv_len = 200
    states = make(kv_len, batch=2, nbits=2)
    query = make_query(states, length=length)
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    if kind == "boolean":
        # longer than the sequence, as static shapes have it
        mask = torch.rand((2, 1, length, kv_len + 5), generator=generator, device=DEVICE) > 0.3
    elif kind == "left padding":
        start = torch.tensor([0, 100], device=DEVICE).view(2, 1, 1, 1)
        mask = (torch.arange(kv_len, device=DEVICE) >= start).expand(2, 1, length, kv_len)
    elif kind == "strided":
        mask = torch.rand((2, 1, length, 2 * kv_len), generator=generator, device=DEVICE)[..., ::2] > 0.3
    elif kind == "additive":
        mask = torch.rand((1, 1, length, kv_len), generator=generator, device=DEVICE) > 0.3
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    else:
        mask = torch.randn((2, 4, length, kv_len), generator=generator, device=DEVICE).to(query.dtype)
    assert_close(states, query, attention_mask=mask, is_causal=length > 1)


def test_a_row_that_sees_nothing_is_zero():
    states = make(300, batch=2)
    mask = torch.ones((2, 1, 1, 300), dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out = kernels.attention(make_query(states), states, AttentionOptions(scaling=0.1, attention_mask=mask))
    assert not out[1].any() and out[0].isfinite().all()


@pytest.mark.parametrize("softcap, with_sinks", [(30.0, False), (2.0, True), (None, True)])
def test_softcap_and_attention_sinks(softcap, with_sinks):
    states = make(300)
    sinks = torch.tensor([-3.0, 0.0, 2.0, 9.0], device=DEVICE) if with_sinks else None
    assert_close(states, make_query(states), softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("peak", [0.02, 8.0])
def test_flat_and_peaky_softmax(peak):
    states = make(1500, peak=peak, kv_heads=1, nbits=2)
    assert_close(states, make_query(states, heads=2))


def test_zero_values_and_keys():
    # scales of zero, in exact tokens' company and alone
    states = make(300)
    for role in ("keys", "values"):
        states.codes[role]["scales"].view(1, 2, -1)[:, :, :150] = 0
    assert_close(states, make_query(states))
    states.codes["values"]["scales"].zero_()
    assert_close(states, make_query(states))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_means_and_scales_per_head(softcap):
    states = make(300, seed=3)
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    for role in ("keys", "values"):
        quantizer = states.quantizers[role]
        # a matrix that is neither orthogonal nor of signs
        noise = torch.randn((1, 64, 64), generator=generator, device=DEVICE)
        mean = torch.randn((2, 1, 64), generator=generator, device=DEVICE)
        states.quantizers[role] = dataclasses.replace(quantizer, mean=mean, dual=quantizer.dual + 0.05 * noise)
    scale = torch.rand((2, 1, 64), generator=generator, device=DEVICE) + 0.5
    states.quantizers["keys"] = dataclasses.replace(states.quantizers["keys"], scale=scale)
    query = make_query(states)
    assert_close(states, query, softcap=softcap)
    got = kernels.scores(query, states, AttentionOptions(scaling=0.1, softcap=softcap))
    assert relative_error(got, reference.scores(query, states, AttentionOptions(scaling=0.1, softcap=softcap))) < 1e-3


@pytest.mark.parametrize("portable", PORTABLE)
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("estimator", ["qjl", "rescaled"])
def test_scores(nbits, estimator, portable):
    states = make(300, nbits=nbits, key_estimator=estimator, tail=33)
    query = make_query(states, length=3)
    options = {"scaling": 0.3, "is_causal": True, "softcap": 20.0}
    got = kernels.scores(query, states, AttentionOptions(**options), portable=portable)
    truth = reference.scores(query, states, AttentionOptions(**options))
    assert got.dtype == torch.float32 and got.shape == (1, 4, 3, 300)
    assert torch.equal(got.isinf(), truth.isinf())
    assert relative_error(got[got.isfinite()], truth[truth.isfinite()]) < 2e-4


@pytest.mark.parametrize("default", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_torch_defaults_do_not_matter(default):
    # a seed of its own: constants are kept
    states = make(200, seed=5, **{"nbits": 4})
    config = TurboQuantConfig(nbits=4, seed=len(str(default)))
    states.quantizers["keys"] = Quantizer.create(config, "keys", 0, 64, DEVICE)
    query = make_query(states)
    expected = reference.attention(query.float(), states, AttentionOptions(scaling=0.1))
    before = torch.get_default_dtype(), torch.get_default_device()
    try:
        torch.set_default_dtype(default.get("dtype", before[0]))
        torch.set_default_device(default.get("device", before[1]))
        out = kernels.attention(query, states, AttentionOptions(scaling=0.1))
    finally:
        torch.set_default_dtype(before[0])
        torch.set_default_device(None)
    assert relative_error(out, expected) < 1e-3


def test_supports_says_why_not():
    states = make(300)
    query = make_query(states)
    assert kernels.supports(query, states) is None
    assert "float64" in kernels.supports(query.double(), states)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_call_can_be_replayed():
    states = make(3000, 128, batch=2)
    query = make_query(states)
    expected = kernels.attention(query, states, AttentionOptions(scaling=0.1))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernels.attention(query, states, AttentionOptions(scaling=0.1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = kernels.attention(query, states, AttentionOptions(scaling=0.1))
        out.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
