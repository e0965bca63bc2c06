"""Static capacity: the tokens of the dynamic mode, one graph for all lengths, and clear words beyond the capacity."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    FalconH1Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hf_turboquant import TurboQuantCache
from hf_turboquant.static import TurboQuantStaticLayer

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIG = LlamaConfig(**SIZES)
FAMILIES = {
    "llama": (LlamaForCausalLM, CONFIG),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES, sliding_window=32, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig(
            **SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
}  # fmt: skip
# the recent window is shorter than the prompt and the steps, so that tokens leave it in both
OPTIONS = {"residual_length": 8, "nbits": 4}


def build(family="llama", attention="sdpa"):
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    return kind(config).eval()


def prompt(tokens=80, batch=2):
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(1))


def generate(model, cache, ids, mask=None, new=12):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False
    )


def compressed(cache):
    return [layer for layer in cache.layers if isinstance(layer, TurboQuantStaticLayer)]


@pytest.mark.parametrize("padding", (0, 17))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_the_dynamic_mode(family, padding):
    model, ids = build(family), prompt()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = generate(model, TurboQuantCache(model.config, **OPTIONS), ids, mask)
    cache = TurboQuantCache(model.config, max_cache_len=128, **OPTIONS)
    assert torch.equal(generate(model, cache, ids, mask), expected)
    layers = compressed(cache)
    assert len(layers) == (2 if family in ("llama", "qwen3") else 1)
    for layer in layers:
        # the last token is not fed
        assert layer.states.measured().kv_len == 80 + 11
        assert layer.states.measured().codes["keys"].length == 80 + 11 - 8 - 4


@pytest.mark.parametrize("condition", ("attention", "center", "none"))
@pytest.mark.parametrize("tokens", (2, 8, 40, 100))
def test_prompts_of_any_length(tokens, condition):
    model, ids = build(), prompt(tokens)
    options = {**OPTIONS, "condition": condition}
    first, again = (
        generate(model, cache, ids, new=30)
        for cache in (
            TurboQuantCache(CONFIG, max_cache_len=140, **options),
            TurboQuantCache(CONFIG, max_cache_len=512, **options),
        )
    )
    assert torch.equal(first, again)
    if tokens in (2, 100) or condition == "none":
        # else the dynamic mode learns from the steps as well
        assert torch.equal(first, generate(model, TurboQuantCache(CONFIG, **options), ids, new=30))


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# transformers' sliding layers count on the host until their window is full: a second cache costs them a graph
@pytest.mark.parametrize(
    "family, attention, graphs", [("llama", "sdpa", 1), ("llama", "turboquant", 1), ("gemma3", "sdpa", 2)]
)
def test_one_graph_for_all_lengths(dynamo, family, attention, graphs):
    model, ids = build(family, attention), prompt()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for cache in (TurboQuantCache(model.config, max_cache_len=160, **OPTIONS) for _ in range(2)):
        reference = TurboQuantCache(model.config, max_cache_len=160, **OPTIONS)
        with torch.no_grad():
            plain = model(ids, past_key_values=reference).logits[:, -1:].argmax(-1)
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            for position in range(80, 110):
                positions = torch.tensor([[position]])
                mask = {"attention_mask": torch.ones(2, position + 1, dtype=torch.long)}
                full_mask = torch.nn.functional.pad(mask["attention_mask"], (0, 160 - position - 1))
                plain = model(plain, past_key_values=reference, position_ids=positions, **mask)
                token = step(token, past_key_values=cache, position_ids=positions, attention_mask=full_mask)
                torch.testing.assert_close(token.logits, plain.logits)
                plain, token = plain.logits.argmax(-1), token.logits.argmax(-1)
                assert torch.equal(token, plain)
        assert compressed(cache)[0].states.measured().kv_len == 110
    # a second cache of the same size finds what was compiled for the first
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_too_many_tokens_are_refused_and_nothing_is_written():
    model, ids = build(), prompt(60)
    cache = TurboQuantCache(CONFIG, max_cache_len=64, **OPTIONS)
    model(ids, past_key_values=cache)
    layer = cache.layers[0]
    before = layer.arena.clone()
    states = torch.randn(2, 2, 5, 16)
    with pytest.raises(ValueError, match="`max_cache_len=64` must get no more tokens than that, got 5 after 60"):
        layer.update(states, states)
    assert torch.equal(layer.arena, before)
    for _ in range(4):
        layer.update(states[:, :, :1], states[:, :, :1])
    with pytest.raises(ValueError, match="got 1 after 64"):
        layer.update(states[:, :, :1], states[:, :, :1])
    assert int(layer.get_seq_length()) == 64


def test_reset_keeps_the_memory_and_forgets_the_tokens():
    model = build()
    cache = TurboQuantCache(CONFIG, max_cache_len=128, **OPTIONS)
    first = generate(model, cache, prompt())
    address = compressed(cache)[0].arena.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, cache, prompt()), first)
    assert compressed(cache)[0].arena.data_ptr() == address


def test_crop_reorder_and_select_as_in_the_dynamic_mode():
    model, ids = build(), prompt()
    caches = TurboQuantCache(CONFIG, max_cache_len=128, **OPTIONS), TurboQuantCache(CONFIG, **OPTIONS)
    outs = []
    for cache in caches:
        with torch.no_grad():
            model(ids, past_key_values=cache)
            for token in range(5):
                model(ids[:, token : token + 1], past_key_values=cache)
            cache.crop(-7)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3, 2]))
            assert int(cache.get_seq_length()) == 78
            outs.append(model(prompt(9, batch=3), past_key_values=cache).logits)
            outs.append(model(prompt(1, batch=3), past_key_values=cache).logits)
    torch.testing.assert_close(outs[0], outs[2])
    torch.testing.assert_close(outs[1], outs[3])


def test_several_turns():
    model, ids = build(), prompt(200)
    texts = []
    for cache in (TurboQuantCache(CONFIG, max_cache_len=300, **OPTIONS), TurboQuantCache(CONFIG, **OPTIONS)):
        text = generate(model, cache, ids[:, :100])
        text = generate(model, cache, torch.cat([text, ids[:, 100:130]], dim=1))
        texts.append(text)
    assert torch.equal(*texts)


def test_what_it_says_and_holds():
    cache = TurboQuantCache(CONFIG, max_cache_len=4096, **OPTIONS)
    assert cache.is_compileable and not TurboQuantCache(CONFIG).is_compileable
    generate(build(), cache, prompt())
    assert "room for 4,096 tokens" in repr(cache)
    memory = cache.memory()
    held = sum(layer.arena.nbytes for layer in compressed(cache))
    assert memory.total_bytes == held + memory.constants_bytes
    assert memory.full_bytes == 2 * 91 * 2 * 2 * 2 * 16 * 4
    # a filled one is as small as the dynamic kind
    assert held < 2 * 2 * 4096 * 2 * 16 * 4 * 2 / 5


def test_what_it_refuses(tmp_path):
    cache = TurboQuantCache(CONFIG, max_cache_len=128)
    with pytest.raises(ValueError, match="to be saved, got TurboQuantStaticLayer"):
        cache.save_pretrained(tmp_path / "cache")
    with pytest.raises(ValueError, match="`max_cache_len` needs the model's `config`"):
        TurboQuantCache(max_cache_len=128)
    with pytest.raises(ValueError, match="whole numbers with `max_cache_len`"):
        TurboQuantCache(CONFIG, max_cache_len=128, nbits=2.5)
    with pytest.raises(ValueError, match="`max_cache_len` must be an integer from 1"):
        TurboQuantCache(CONFIG, max_cache_len=0)
    with pytest.raises(ValueError, match="must stay on its device"):
        TurboQuantCache(CONFIG, max_cache_len=128).layers[0].offload()
    hybrid = FalconH1Config(**{**SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16})
    with pytest.raises(ValueError, match="a recurrent part in one layer"):
        TurboQuantCache(hybrid, max_cache_len=128)
