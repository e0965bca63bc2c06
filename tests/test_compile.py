"""A compiled model with a cache that grows: the same tokens, and nothing is compiled anew as the cache grows."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from hf_turboquant import TurboQuantCache, TurboQuantConfig
from hf_turboquant._supported import cache_name
from hf_turboquant.layer import TurboQuantLayer

STEPS = 10
pytestmark = pytest.mark.usefixtures("early_learning")


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    # transformers wraps several functions in one: their graphs count towards one limit
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ("sdpa", "turboquant"))
def test_no_compilation_per_step(dynamo, attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=99, initializer_range=0.1, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 99, (1, 80))

    def generate():
        cache, tokens, graphs, out = TurboQuantCache(config, residual_length=8), prompt, [], []
        with torch.no_grad():
            for _ in range(STEPS):
                tokens = model.forward(tokens, **{cache_name(model): cache}).logits[:, -1:].argmax(-1)
                out.append(int(tokens))
                graphs.append(counters["stats"]["unique_graphs"])
        assert all(layer.tokens.quantized == 80 + STEPS - 1 - 12 for layer in cache.layers)
        return out, graphs

    expected, _ = generate()
    model.forward = torch.compile(model.forward, dynamic=True, backend="eager")
    tokens, graphs = generate()
    assert tokens == expected
    # the prefill, the first step, and that is all
    assert 0 < graphs[0] < graphs[1] == graphs[-1]
    # and a second cache finds what was compiled for the first
    assert generate() == (expected, [graphs[-1]] * STEPS)


def test_a_layer_within_an_export_that_is_not_traced_by_dynamo():
    """`is_compiling` is true there, and stays so in functions that dynamo leaves out."""

    class Model(torch.nn.Module):
        def forward(self, x):
            # constants of its own, because they are fake tensors
            layer = TurboQuantLayer(TurboQuantConfig(condition="none", sink_length=1, residual_length=2), 9_999)
            return torch.nn.functional.scaled_dot_product_attention(x, *layer.update(x, x))

    x = torch.randn(1, 7, 8, 48)
    out = torch.export.export(Model(), (x,), strict=False).module()(x)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(x, x, x), atol=1e-6)
