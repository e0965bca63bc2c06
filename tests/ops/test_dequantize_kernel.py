"""The dequantizing kernel against the torch reference: in Triton's interpreter without a GPU, else on it."""

import importlib.util
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from layer_states import random_states, relative_error

from hf_turboquant import ops
from hf_turboquant.ops import decode as kernels
from hf_turboquant.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_right(role, dtype=torch.float32, heads=2, change=None, kv_len=300, dim=64, **options):
    """Right to the rounding of `dtype`, all tokens written, and nothing beyond them."""
    states = random_states(2, heads, kv_len, dim, device=DEVICE, sink_length=0, residual_length=0, **options)
    buffer, quantizer = states.codes[role], states.quantizers[role]
    quantizer = quantizer if change is None else change(quantizer)
    expected = torch.empty(states.shape(role), device=DEVICE)
    reference.dequantize(buffer, quantizer, expected)
    # a view into something larger, as the caller's is
    around = torch.full((2, heads, kv_len + 8, dim), torch.nan, dtype=dtype, device=DEVICE)
    out = around[:, :, 3 : kv_len + 3]
    assert kernels.supports(buffer, quantizer, out) is None
    kernels.dequantize(buffer, quantizer, out)
    rounding = relative_error(expected.to(dtype), expected)
    # fp32 products add up in another order
    # a matrix in fp16 is rounded as much as an output in fp16
    assert relative_error(out, expected) <= 1.5 * rounding + 1e-6
    assert around[:, :, :3].isnan().all() and around[:, :, kv_len + 3 :].isnan().all()


# the interpreter does not round to bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("role, estimator", [("keys", "qjl"), ("keys", "rescaled"), ("values", "rescaled")])
def test_bits(role, estimator, nbits, dtype):
    assert_right(role, dtype, nbits=nbits, key_estimator=estimator)


@pytest.mark.parametrize("nbits", [3, 8])
@pytest.mark.parametrize("dim", [16, 80, 128, 192, 256])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_head_dims(role, dim, nbits):
    assert_right(role, heads=1, kv_len=140, dim=dim, nbits=nbits)


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_tile_edges(kv_len):
    assert_right("values", kv_len=kv_len, nbits=4)


def test_mean_and_scale_of_every_head():
    def change(quantizer):
        generator = torch.Generator(device=DEVICE).manual_seed(1)
        mean, scale, noise = (torch.randn(2, 1, 64, generator=generator, device=DEVICE) for _ in range(3))
        # a matrix that is not orthogonal
        dual = quantizer.dual + 0.05 * noise[:1]
        return replace(quantizer, mean=mean, scale=scale.abs() + 0.1, dual=dual)

    assert_right("keys", change=change)


def test_strides_of_64_bits_have_a_kernel_of_their_own(monkeypatch):
    states, used = random_states(1, 1, 200, 64, device=DEVICE), set()
    buffer, quantizer = states.codes["keys"], states.quantizers["keys"]
    monkeypatch.setattr(kernels, "run", lambda kernel, key, *_: used.add(key))
    for stride, expected in ((2**14, 1), (2**15, 1), (2**31, 2)):
        strides = stride, 2**13, 64, 1
        out = torch.empty_strided((2, 1, buffer.length, 64), strides, dtype=torch.float16, device="meta")
        kernels.dequantize(buffer, quantizer, out)
        assert len(used) == expected


def test_the_backend_is_the_one_asked_for(monkeypatch):
    states = random_states(1, 1, 200, 64, device=DEVICE)
    calls = []
    monkeypatch.setattr(kernels, "dequantize", lambda *args: calls.append("triton"))
    monkeypatch.setattr(reference, "dequantize", lambda *args: calls.append("torch"))
    for backend in ("triton", "torch"):
        ops.dequantize_all(replace(states, backend=backend), "keys")
    assert calls == ["triton", "torch"]
    out = torch.empty(1, 1, states.codes["keys"].length, 64, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        ops.dequantize(states.codes["keys"], states.quantizers["keys"], out, backend="triton")
