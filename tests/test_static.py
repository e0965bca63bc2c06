"""Static capacity: the same tokens as the cache that grows, in memory that stays, by steps that are compiled once."""

import copy
import pickle
import sys
from functools import lru_cache
from weakref import WeakKeyDictionary

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
)
from transformers.cache_utils import StaticSlidingWindowLayer
from transformers.generation import CompileConfig

from hf_turboquant import QuantizedStates, TurboQuantCache, TurboQuantConfig, arena, conditioning, fixed, ops
from hf_turboquant._supported import cache_name
from hf_turboquant.hybrid import TurboQuantHybridLayer
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.states import LayerStates

SHAPE = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=99, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
SLIDING = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=64, query_pre_attn_scalar=32)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"] * 2, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=16,
    mamba_d_ssm=128,
)  # fmt: skip
PROMPT, NEW = 150, 30


def states(tokens, batch=2, heads=2, head_dim=32, seed=0, value_dim=64):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    return keys, torch.randn(batch, heads, tokens, value_dim, generator=generator)


def feed(layer, keys, values, pieces, start=0):
    for piece in pieces:
        out = layer.update(keys[:, :, start : start + piece], values[:, :, start : start + piece])
        start += piece
    return out


def held(layer):
    """All keys and values, without the room for others."""
    layer.measure()
    pairs = (layer.keys, layer.values)
    plain = [x.dequantize() if isinstance(x, QuantizedStates) else x for x in pairs]
    return [x[:, :, : layer.tokens.length] for x in plain]


def test_a_batch_operation_that_finds_no_memory_changes_nothing(monkeypatch):
    layer = TurboQuantLayer(TurboQuantConfig(max_cache_len=300, condition="none"), 0)
    keys, values = states(202)
    feed(layer, keys, values, [200])
    given = layer.update(keys[:, :, 200:201], values[:, :, 200:201])
    before = [x.dequantize() for x in given]

    def fail(*_):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(fixed, "new_arena", fail)
    for operation in (lambda: layer.batch_repeat_interleave(2), lambda: layer.batch_select_indices([0])):
        with pytest.raises(torch.OutOfMemoryError):
            operation()
        # what the last update returned is valid until the next one
        assert all(torch.equal(x.dequantize(), y) for x, y in zip(given, before, strict=True))
    assert layer.update(keys[:, :, 201:], values[:, :, 201:])[0].shape[0] == 2
    assert layer.get_seq_length() == 202


def new_layer(capacity=400, **options):
    options = {"condition": "none", **options}
    return TurboQuantLayer(TurboQuantConfig(max_cache_len=capacity, **options), 0)


def assert_same_tokens(layer, other):
    for ours, theirs in zip(held(layer), held(other), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"residual_length": 0}, {"sink_length": 0, "residual_length": 7}], ids=str)
@pytest.mark.parametrize(
    "condition, pieces",
    [
        ("none", [1] * 160),
        ("none", [3, 90, 1, 1, 70, 1]),
        ("center", [200, *[1] * 20]),
        ("center", [100, *[1] * 50, 60, 1, 1]),
    ],
)
def test_the_same_as_the_layer_that_grows(condition, pieces, options):
    options = {"residual_length": 16, "condition": condition, **options}
    layer, grows = new_layer(**options), TurboQuantLayer(TurboQuantConfig(**options), 0)
    keys, values = states(sum(pieces))
    feed(layer, keys[:, :, :1], values[:, :, :1], [1])
    address = layer.tokens.arena.data_ptr()
    layer.reset()
    feed(layer, keys, values, pieces)
    feed(grows, keys, values, pieces)
    assert layer.get_seq_length() == sum(pieces)
    assert_same_tokens(layer, grows)
    assert layer.tokens.quantized == grows.tokens.quantized > 0
    assert layer.condition == grows.condition == condition
    assert layer.tokens.arena.data_ptr() == address


def test_a_step_returns_handles_of_the_whole_room():
    layer = new_layer(300)
    keys, values = states(202)
    feed(layer, keys, values, [200, 1])
    ours, theirs = feed(layer, keys, values, [1], start=201)
    assert ours.shape == (2, 2, 300, 32) and theirs.shape == (2, 2, 300, 64)
    plain = ours.dequantize()
    assert plain.shape == ours.shape and not plain[:, :, 202:].any()
    assert torch.equal(plain[:, :, -100 - 100 : 202], keys[:, :, 100:202])


def test_nothing_is_written_beyond_the_capacity():
    layer = new_layer(160, residual_length=16)
    keys, values = states(200)
    for pieces in ([161], [160]):
        if pieces == [161]:
            with pytest.raises(ValueError, match="max_cache_len=160.* got 161 after 0"):
                feed(layer, keys, values, pieces)
            assert layer.get_seq_length() == 0 and layer.tokens.arena is None
        else:
            feed(layer, keys, values, pieces)
    before = held(layer)
    for tokens in (1, 2, 17):
        with pytest.raises(ValueError, match=f"max_cache_len=160.* got {tokens} after 160"):
            layer.update(keys[:, :, :tokens], values[:, :, :tokens])
        with pytest.raises(ValueError, match="max_cache_len=160"):
            layer.get_mask_sizes(tokens)
    assert layer.get_seq_length() == 160
    for now, then in zip(held(layer), before, strict=True):
        assert torch.equal(now, then)


def test_reset_keeps_the_memory_for_the_same_batch():
    layer = new_layer(300, condition="center")
    keys, values = states(200)
    feed(layer, 5 + keys, values, [190, 1])
    address = layer.tokens.arena.data_ptr()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.condition is None
    feed(layer, keys, values, [190, 1])
    fresh = new_layer(300, condition="center")
    feed(fresh, keys, values, [190, 1])
    assert layer.tokens.arena.data_ptr() == address
    assert_same_tokens(layer, fresh)
    layer.reset()
    # Lengths and statistics of the last sequence are still there, and must not count.
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    assert layer.keys.shape[2] == layer.get_seq_length() == 0
    layer.reset()
    feed(layer, keys, values, [3])
    layer.settle()
    neutral = layer.tokens.states.quantizers["keys"]
    assert layer.get_seq_length() == 3 and not neutral.mean.any() and (neutral.scale == 1).all()
    layer.reset()
    feed(layer, keys[:1], values[:1], [190, 1])
    assert layer.get_seq_length() == 191 and held(layer)[0].shape[0] == 1


def test_a_crop_into_the_sinks_forgets_what_keys_would_be_conditioned_by():
    layer = new_layer(300, condition="center", sink_length=64, residual_length=8)
    keys, values = states(400)
    feed(layer, 5 + keys, values, [150])
    layer.settle()
    layer.crop(-130)
    feed(layer, 5 + keys, values, [40], start=20)
    layer.settle()
    for token in range(60, 260):
        # as a graph that somebody replays without telling
        ops.append(layer.tokens.states, *(x[:, :, token : token + 1] for x in (keys, values)))
    layer.measure()
    assert layer.tokens.quantized > 0 and not layer.conditioning.waits
    assert (layer.condition == "center") == bool(layer.tokens.states.quantizers["keys"].mean.any())


@pytest.mark.parametrize("length", [20, 100, 250])
def test_crop_reorder_repeat_and_select(length):
    options = {"residual_length": 16}
    layer, grows = new_layer(**options), TurboQuantLayer(TurboQuantConfig(condition="none", **options), 0)
    keys, values = states(300)
    for each in (layer, grows):
        feed(each, keys, values, [length, 1, 1])
        each.crop(-9)
        feed(each, keys, values, [1] * 4, start=length)
    assert_same_tokens(layer, grows)
    address = layer.tokens.arena.data_ptr()
    for each in (layer, grows):
        each.reorder_cache(torch.tensor([1, 0]))
    assert layer.tokens.arena.data_ptr() == address
    assert_same_tokens(layer, grows)
    for each in (layer, grows):
        each.batch_repeat_interleave(3)
        each.batch_select_indices(torch.tensor([0, 4, 5]))
        feed(each, *states(20, batch=3), [1] * 20)
    assert held(layer)[0].shape[0] == 3
    assert_same_tokens(layer, grows)


@pytest.mark.parametrize("capacity", [300, None])
def test_a_copy_made_in_inference_mode_goes_on_outside(capacity):
    keys, values = states(202)
    layer = TurboQuantLayer(TurboQuantConfig(max_cache_len=capacity, condition="center"), 0)
    feed(layer, keys, values, [200])
    layer.settle()
    with torch.inference_mode():
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for each in (layer, *twins):
        feed(each, keys, values, [1, 1], start=200)
        assert_same_tokens(each, layer)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_has_memory_of_its_own(twin):
    layer = new_layer(300, condition="center")
    keys, values = states(210)
    feed(layer, keys, values, [200, 1])
    other = twin(layer)
    assert_same_tokens(layer, other)
    before = held(layer)
    feed(other, keys, values, [1] * 9, start=201)
    for now, then in zip(held(layer), before, strict=True):
        assert torch.equal(now, then)
    feed(layer, keys, values, [1] * 9, start=201)
    assert layer.condition == other.condition == "center"
    assert_same_tokens(layer, other)


@pytest.mark.parametrize("prompt", [2, 30, 80])
@pytest.mark.parametrize("told", [True, False])
def test_a_short_prompt_and_steps_condition_what_steps_quantize(prompt, told):
    layer = new_layer(300, condition="center")
    keys, values = states(200)
    keys = keys + 10
    if told:
        feed(layer, keys, values, [prompt, *[1] * (200 - prompt)])
    else:
        # whoever replays a graph without a word fills the slots: then the prompt alone has to do
        feed(layer, keys, values, [prompt])
        layer.settle()
        for at in range(prompt, 200):
            ops.append(layer.tokens.states, keys[:, :, at : at + 1], values[:, :, at : at + 1])
    layer.measure()
    known = 132 if told else prompt
    assert layer.condition == ("center" if known > 4 else "none")
    mean = keys[:, :, 4:known].mean((0, 2), keepdim=True)[0] if known > 4 else torch.zeros(2, 1, 32)
    assert torch.allclose(layer.tokens.quantizers["keys"].mean, mean, atol=1e-5)
    error = (held(layer)[0] - keys)[:, :, 4:60].norm() / (keys - 10)[:, :, 4:60].norm()
    assert 0 < error < (0.3 if known > 4 else 5)
    # and so it goes on
    assert layer.tokens.step_room == 300 and layer.get_seq_length() == 200


@pytest.mark.parametrize("first", [8, 16, 40])
def test_memory_before_tokens_is_no_prompt(first):
    """`early_initialization` makes all layers' memory before the first prompt, as exporters do."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids, logits = torch.randint(3, 99, (2, 190)), []
    for early in (False, True):
        cache = TurboQuantCache(model.config, max_cache_len=256)
        if early:
            cache.early_initialization(2, 2, 32, torch.float32, "cpu")
            assert cache.is_initialized and cache.get_seq_length() == 0 and cache.get_mask_sizes(5, 0) == (5, 0)
        with torch.no_grad():
            for start, stop in ((0, first), *((at, at + 1) for at in range(first, 150)), (150, 190)):
                out = model(ids[:, start:stop], **{cache_name(model): cache}).logits
        assert [layer.condition for layer in cache.layers] == ["attention"] * 4
        logits.append(out)
    assert torch.equal(*logits)


@pytest.mark.parametrize("window, nbits", [(128, 4), (16, 4), (0, 4), (16, 8)])
def test_compiled_steps_after_a_short_prompt(window, nbits, monkeypatch):
    """They wait, learn and go on as uncompiled ones; no graph is made for it, and the host looks once a layer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 2})).eval()
    found = []
    for options in ({}, compiled("aot_eager")):
        cache = TurboQuantCache(model.config, max_cache_len=300, residual_length=window, nbits=nbits)
        found.append(generate(model, cache, tokens=150, prompt=20, **options))
        assert all(
            layer.condition == "attention" and layer.conditioning.found.tokens == 256 - 7 + 4 for layer in cache.layers
        )
    assert torch.equal(*found)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    fetched = []
    measured = LayerStates.measured
    monkeypatch.setattr(LayerStates, "measured", lambda states: fetched.append(states) or measured(states))
    cache = TurboQuantCache(model.config, max_cache_len=300, residual_length=window, nbits=nbits, backend="triton")
    counts = []
    with torch.no_grad():
        model(torch.randint(3, 99, (1, 120)), **{cache_name(model): cache})
        for _ in range(20):
            fetched.clear()
            model(torch.full((1, 1), 5), **{cache_name(model): cache})
            counts.append(len(fetched))
    assert counts == [0] * 12 + [2] + [0] * 7


def test_memory_is_counted_and_does_not_change():
    config = LlamaConfig(**SHAPE)
    reports = []
    for tokens in (150, 450):
        cache = TurboQuantCache(config, max_cache_len=500, condition="none")
        for index in range(4):
            feed(cache.layers[index], *states(tokens + 20, value_dim=32), [tokens, *[1] * 20])
        reports.append(cache.memory())
        assert reports[-1].total_bytes == sum(
            layer.tokens.arena.nbytes + sum(q.nbytes for q in layer.tokens.quantizers.values())
            for layer in cache.layers
        )
    assert reports[0].total_bytes == reports[1].total_bytes
    assert 0 < reports[0].codes_bytes < reports[1].codes_bytes and reports[1].slack_bytes < reports[0].slack_bytes
    grows = TurboQuantCache(config, condition="none")
    for index in range(4):
        grows.update(*states(470, value_dim=32), index)
    assert reports[1].codes_bytes == grows.memory().codes_bytes


def models():
    yield "llama", LlamaForCausalLM, LlamaConfig(**SHAPE)
    yield "turboquant", LlamaForCausalLM, LlamaConfig(**SHAPE, attn_implementation="turboquant")
    yield "qwen3", Qwen3ForCausalLM, Qwen3Config(**SHAPE)
    yield "gemma3", Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, **SLIDING)
    yield "softcap", Gemma2ForCausalLM, Gemma2Config(**SHAPE, **SLIDING, attn_implementation="turboquant")
    yield "qwen3-next", Qwen3NextForCausalLM, Qwen3NextConfig(**SHAPE, **LINEAR)
    yield "falcon-h1", FalconH1ForCausalLM, FalconH1Config(**SHAPE, **MAMBA2)


@pytest.fixture(scope="module", params=list(models()), ids=lambda case: case[0])
def model(request):
    _, kind, config = request.param
    torch.manual_seed(0)
    model = kind(config).eval()
    # otherwise all tokens are alike to a tiny model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def generate(model, cache, tokens=NEW, prompt=PROMPT, **options):
    ids = torch.randint(3, 99, (2, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **{cache_name(model): cache}, **options)[:, prompt:]


def compiled(backend="eager"):
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    # otherwise only GPUs compile
    config._compile_all_devices = True
    torch.compiler.reset()
    counters.clear()
    return {"compile_config": config}


def test_generate_gives_the_tokens_of_the_cache_that_grows(model):
    new_cache = lambda: TurboQuantCache(model.config, max_cache_len=PROMPT + NEW)  # noqa: E731
    expected = generate(model, TurboQuantCache(model.config))
    assert torch.equal(generate(model, new_cache()), expected)
    # the number of graphs is held to transformers' own cache
    generate(model, StaticCache(model.config, max_cache_len=PROMPT + NEW), **compiled())
    graphs = counters["stats"]["unique_graphs"]
    options = compiled()
    cache = new_cache()
    assert cache.is_compileable
    assert torch.equal(generate(model, cache, **options), expected)
    # sliding layers count on the host, and have transformers compile once more
    assert counters["stats"]["unique_graphs"] == graphs == (1 if not any(cache.is_sliding) else 2)
    # neither does another cache, nor the same one again
    assert torch.equal(generate(model, new_cache(), **options), expected)
    cache.reset()
    assert torch.equal(generate(model, cache, **options), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_thousand_steps_are_compiled_once():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})).eval()
    options = compiled("aot_eager")
    generate(model, TurboQuantCache(model.config, max_cache_len=1200), tokens=1000, **options)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_compiled_steps_fetch_no_length(monkeypatch):
    fetched = []
    measure = TurboQuantLayer.measure
    monkeypatch.setattr(TurboQuantLayer, "measure", lambda layer: fetched.append(layer) or measure(layer))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    counts = []
    for tokens in (5, 25):
        # the last tokens fill the cache
        cache = TurboQuantCache(model.config, max_cache_len=PROMPT + 24)
        fetched.clear()
        generate(model, cache, tokens=tokens, **compiled())
        counts.append(len(fetched))
    assert counts[0] == counts[1]
    # steps that nobody has heard of: asked often enough, the layer looks
    layer = cache.layers[0]
    layer.crop(-2)
    for _ in range(4):
        assert layer.get_mask_sizes(1) == (PROMPT + 24, 0)
    assert layer.tokens.length == PROMPT + 22


def test_no_step_asks_the_host_for_anything(monkeypatch):
    """Neither `generate` nor the bare model, compiled or not; the bound on the host is the length all the same."""
    fetched = []
    measured = LayerStates.measured
    monkeypatch.setattr(LayerStates, "measured", lambda states: fetched.append(states) or measured(states))
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})).eval()
    cache = TurboQuantCache(model.config, max_cache_len=PROMPT + 20, backend="triton")
    generate(model, cache, tokens=2)
    fetched.clear()
    with torch.no_grad():
        for tokens in (1, 3):
            model(torch.full((2, tokens), 5), **{cache_name(model): cache})
        # no mask is asked for here
        for layer in cache.layers:
            layer.update(*states(2, value_dim=32))
    assert not fetched
    assert [layer.tokens.most_tokens for layer in cache.layers] == [PROMPT + 1 + 4 + 2]
    # the device counts what nobody told the host; whoever tells it afterwards is believed until it looks
    cache.layers[0].count(3)
    assert cache.layers[0].tokens.most_tokens == PROMPT + 10 and cache.get_seq_length() == PROMPT + 7
    cache.layers[0].measure()
    assert cache.layers[0].tokens.most_tokens == cache.layers[0].tokens.length == PROMPT + 7 and fetched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_of_the_bare_model_gives_the_tokens_of_steps():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).cuda().eval()
    ids = torch.randint(3, 99, (2, PROMPT), device="cuda")
    results = []
    for captured in (False, True):
        cache = TurboQuantCache(model.config, max_cache_len=PROMPT + 40)
        with torch.no_grad():
            token = model(ids, **{cache_name(model): cache}).logits[:, -1].argmax(-1, keepdim=True)

            def step(token=token, cache=cache):
                token.copy_(model(token, **{cache_name(model): cache}).logits[:, -1].argmax(-1, keepdim=True))

            # what the first step compiles and allocates is not for a graph
            step()
            tokens = [token.clone()]
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            for _ in range(30):
                graph.replay() if captured else step()
                tokens.append(token.clone())
        results.append(torch.cat(tokens, dim=1))
        assert cache.get_seq_length() == PROMPT + 31
    assert torch.equal(*results)
    # the host has not heard of the replayed steps, and the device refuses what is too much
    layer = cache.layers[0]
    assert layer.tokens.most_tokens < PROMPT + 31
    layer.measure()
    assert layer.tokens.length == PROMPT + 31
    for _ in range(20):
        graph.replay()
    with pytest.raises(ValueError, match="got more by compiled"):
        layer.measure()


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str)
def test_other_ways_of_generating(way):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(3, 99, (1, 150), generator=torch.Generator().manual_seed(0))
    out = []
    for cache, options in (
        (TurboQuantCache(model.config), {}),
        (TurboQuantCache(model.config, max_cache_len=250), {}),
        (TurboQuantCache(model.config, max_cache_len=250), compiled()),
    ):
        torch.manual_seed(0)
        options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, **way, **options}
        out.append(model.generate(ids, **{cache_name(model): cache}, **options))
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    # transformers does not compile beam search, and from some release on a model with a draft
    assert counters["stats"]["unique_graphs"] > 0 or "do_sample" not in way


def test_a_chat_goes_on_with_compiled_steps():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    conversations = []
    for cache, options in (
        (TurboQuantCache(model.config), {}),
        (TurboQuantCache(model.config, max_cache_len=400), compiled()),
    ):
        ids = torch.randint(3, 99, (1, 140), generator=torch.Generator().manual_seed(0))
        for turn in range(3):
            ids = model.generate(
                ids, **{cache_name(model): cache}, max_new_tokens=20, min_new_tokens=20, do_sample=False, **options
            )
            ids = torch.cat([ids, torch.full((1, 15 + turn), 7)], dim=1)
        conversations.append(ids)
    assert torch.equal(*conversations)


def test_generate_says_when_the_room_is_used_up():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for options in ({}, compiled()):
        cache = TurboQuantCache(model.config, max_cache_len=PROMPT + 5)
        with pytest.raises(ValueError, match=f"max_cache_len={PROMPT + 5}"):
            generate(model, cache, tokens=10, **options)
        assert cache.get_seq_length() == PROMPT + 5
    with pytest.raises(ValueError, match="max_cache_len=100.* got 150 after 0"):
        generate(model, TurboQuantCache(model.config, max_cache_len=100))


@pytest.mark.parametrize("implementation, tokens", [("eager", 1), ("flex_attention", 1), ("sdpa", 17)])
def test_what_cannot_be_compiled_says_so(implementation, tokens):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    cache = TurboQuantCache(model.config, max_cache_len=300)
    with torch.no_grad():
        model(torch.full((1, 150), 5), **{cache_name(model): cache})
        step = torch.compile(model, backend="eager", fullgraph=True)
        # not by `set_attn_implementation`: the mask of flex attention would break the graph
        for layer in model.model.layers:
            layer.self_attn.config = copy.copy(model.config)
            layer.self_attn.config._attn_implementation = implementation
        with pytest.raises(Exception, match="attn_implementation='sdpa'|Only steps of a few tokens without gradients"):
            step(torch.full((1, tokens), 5), **{cache_name(model): cache})


def test_what_a_static_cache_refuses():
    config = LlamaConfig(**SHAPE)
    cache = TurboQuantCache(config, max_cache_len=300)
    cache.update(*states(150), 0)
    with pytest.raises(ValueError, match="stay on its device"):
        cache.layers[0].offload()
    with pytest.raises(ValueError, match="model.config"):
        TurboQuantCache(max_cache_len=300)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="max_cache_len"):
            TurboQuantConfig(max_cache_len=bad)


def test_layers_come_from_the_config():
    cache = TurboQuantCache(Gemma3TextConfig(**SHAPE, **SLIDING), max_cache_len=300, skip_layers=(1,))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["StaticSlidingLayer", "StaticLayer", "StaticSlidingLayer", "TurboQuantLayer"]
    assert cache.layers[3].fixed
    assert isinstance(cache.layers[0], StaticSlidingWindowLayer) and cache.get_max_length() == 300
    assert "room for 300 tokens" in repr(cache)
    assert not TurboQuantCache(LlamaConfig(**SHAPE)).is_compileable
    for options in ({"nbits": 2.5}, {"nbits": 8}, {"value_bits": 8}):
        assert TurboQuantCache(LlamaConfig(**SHAPE), max_cache_len=300, **options).is_compileable
    # what the torch reference has to do is not for CUDA graphs
    assert not TurboQuantCache(LlamaConfig(**SHAPE), max_cache_len=300, backend="torch").is_compileable


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_what_no_graph_can_take_runs_uncompiled_or_says_so():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 32})).cuda()
    cache = TurboQuantCache(model.config, nbits=8, max_cache_len=PROMPT + NEW, backend="torch")
    expected = generate(model, TurboQuantCache(model.config, nbits=8, backend="torch"))
    assert torch.equal(generate(model, cache), expected)
    # of the heads the cache learns only from the first prefill
    narrow = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 24})).cuda()
    with pytest.raises(ValueError, match="disable_compile=True"):
        generate(narrow, TurboQuantCache(narrow.config, max_cache_len=PROMPT + NEW))
    generate(narrow, TurboQuantCache(narrow.config, max_cache_len=PROMPT + NEW), disable_compile=True)


def test_a_hybrid_layer_has_both_parts():
    model = FalconH1ForCausalLM(FalconH1Config(**SHAPE, **MAMBA2)).eval()
    cache = TurboQuantCache(model.config, max_cache_len=300)
    assert {(type(layer), layer.fixed) for layer in cache.layers} == {(TurboQuantHybridLayer, True)}
    assert cache.is_compileable and cache.get_max_length() == 300
    expected = generate(model, cache)
    recurrent = cache.layers[0].conv_states[0].data_ptr()
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        # the memory of both parts is kept, and nothing that it held
        each.reset()
        assert each.get_seq_length() == 0 and torch.equal(generate(model, each), expected)
    assert cache.layers[0].conv_states[0].data_ptr() == recurrent
    rows = torch.tensor([1, 0])
    cache.reorder_cache(rows)
    cache.batch_select_indices(torch.tensor([0]))
    for held, before in ((cache, twin),):
        keys = [each.layers[0].keys.dequantize() for each in (held, before)]
        assert torch.equal(keys[0], keys[1][1:])
        assert torch.equal(held.layers[0].recurrent_states[0], before.layers[0].recurrent_states[0][1:])


# two for each layer and setting, whatever the requests
UNBOUNDED = {("hf_turboquant.quantizer", "_create")}


def tables():
    """The size of everything that the package remembers across calls, by module and name."""
    found = {}
    for name, module in list(sys.modules.items()):
        for variable, value in vars(module).items() if name.split(".")[0] == "hf_turboquant" else ():
            if hasattr(value, "cache_info"):
                bound = value.cache_info().maxsize
                assert (bound is None) == ((name, variable) in UNBOUNDED), f"{name}.{variable} has no bound"
                found[name, variable] = value.cache_info().currsize
            elif isinstance(value, (dict, set, list, WeakKeyDictionary, WeakIdKeyDictionary)):
                found[name, variable] = len(value)
    return found


def test_requests_of_many_lengths_leave_nothing(monkeypatch):
    """Both kinds of cache; what the kernels' own tables grow by is in `tests/ops/test_quantize_kernel.py`."""
    assert ("hf_turboquant.arena", "_layout") in tables()
    # the same with less room, which is full soon
    monkeypatch.setattr(arena, "_layout", lru_cache(maxsize=20)(arena._Layout))
    monkeypatch.setattr(arena, "_describe", lru_cache(maxsize=20)(arena._describe.__wrapped__))
    monkeypatch.setattr(conditioning, "_turns", lru_cache(maxsize=4)(conditioning._turns.__wrapped__))
    config, seen = LlamaConfig(**{**SHAPE, "num_hidden_layers": 2}), []
    for request in range(40):
        length, batch = 140 + 3 * request, 1 + request % 3
        for room in ({}, {"max_cache_len": length + 1 + request}):
            cache = TurboQuantCache(config, residual_length=16, backend="torch", **room)
            for layer in range(2):
                cache.update(*states(length, batch=batch), layer)
                keys, values = cache.update(*states(1, batch=batch), layer)
                torch.nn.functional.scaled_dot_product_attention(torch.randn(batch, 2, 1, 32), keys, values)
        seen.append(tables())
    # by then each table has met every kind of request
    assert seen[19] == seen[39]


@pytest.mark.parametrize("before", [10, 0], ids=["a later chunk", "the first prompt"])
def test_a_mask_fits_the_step_after_tokens_that_nobody_read(before):
    layer, sdpa = new_layer(150, condition="attention"), torch.nn.functional.scaled_dot_product_attention
    if before:
        sdpa(torch.ones(2, 2, before, 32), *layer.update(*states(before)))
    layer.update(*states(20))
    assert layer.pending is not None
    columns, _ = layer.get_mask_sizes(1)
    keys, values = layer.update(*states(1))
    assert columns == keys.shape[2] == 150
    mask = torch.ones(1, 1, 1, columns, dtype=torch.bool)
    assert sdpa(torch.ones(2, 2, 1, 32), keys, values, attn_mask=mask).isfinite().all()
    assert layer.get_seq_length() == before + 21
    layer.update(*states(20))
    with pytest.raises(ValueError, match="must get no more tokens"):
        layer.get_mask_sizes(110)


def test_a_layer_that_grows_has_room():
    """Whoever drives steps need not ask which kind a layer is."""
    layer = new_layer(None)
    for tokens in (200, 1):
        layer.find_room(tokens)
        layer.make_room(tokens)
        layer.update(*states(tokens))
        layer.count(tokens)
    assert layer.get_seq_length() == 201


def test_memory_is_opened_once_more():
    """What was returned before keeps what it reads."""
    layer = new_layer(None, condition="none")
    layer.update(*states(200))
    held = layer.keys
    before = held.dequantize().clone()
    layer.lazy_initialization(*(x[:, :, :0] for x in states(1)))
    assert layer.get_seq_length() == 0
    assert layer.update(*states(40))[0].shape[2] == layer.get_seq_length() == 40
    assert torch.equal(held.dequantize(), before)
