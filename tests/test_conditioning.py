"""What the first tokens teach the quantizer of keys, and that nothing but their precision changes."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import (
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hf_turboquant.layer
from hf_turboquant import QuantizedStates, TurboQuantCache, TurboQuantConfig, ahead, ops
from hf_turboquant._supported import cache_name
from hf_turboquant.attention import turboquant_attention_forward
from hf_turboquant.conditioning import HORIZON, condition, energy_of_queries, learned, rotary_frequencies, valid_tokens
from hf_turboquant.config import LEARNED_TOKENS
from hf_turboquant.layer import STEP_TOKENS, TurboQuantLayer
from hf_turboquant.memory import layer_memory
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.tokens import MAX_WAITING_TOKENS


def skewed_states(tokens, batch=1, heads=2, seed=0):
    """Keys far from the origin with unequal channels, and queries that look at other channels."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 1, 64)
    mean = 20 * torch.randn(heads, 1, 64, generator=torch.Generator().manual_seed(99))
    keys = mean + spread * torch.randn(batch, heads, tokens, 64, generator=generator)
    query = torch.randn(batch, 2 * heads, tokens, 64, generator=generator) / spread
    return query, keys, torch.randn(batch, heads, tokens, 64, generator=generator)


def plain_quantizer(**options):
    return Quantizer.create(TurboQuantConfig(**options), "keys", 0, 64)


def learn(keys, query_energy, valid, *args):
    """The quantizer conditioned by keys of different tokens, and what was learned."""
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(5))
    quantizer, found = condition(plain_quantizer(), keys, values, query_energy, valid, *args)
    return quantizer, learned(found)


def energy_of(query, heads=2, valid=None):
    return energy_of_queries(query, valid, heads)


def test_the_scale_is_optimal():
    query, keys, _ = skewed_states(2000)
    quantizer, kind = learn(keys, energy_of(query), None)
    assert kind.condition == "attention" and quantizer.scale.shape == quantizer.mean.shape == (2, 1, 64)
    torch.testing.assert_close(quantizer.mean, keys.mean((0, 2)).unsqueeze(1))
    # the optimality condition: t⁴ E k² = E q² in every channel, up to one factor
    key_energy = (keys - keys.mean(2, keepdim=True)).square().mean((0, 2))
    of_queries = query.square().mean((0, 2)).view(2, 2, 64).mean(1)
    balance = quantizer.scale.squeeze(1) ** 4 * key_energy / of_queries
    assert (balance / balance.mean(-1, keepdim=True) - 1).abs().max() < 1e-3

    # and no other scale does better
    def cost(scale):
        return (of_queries / scale**2).sum() * (scale**2 * key_energy).sum()

    best = quantizer.scale.squeeze(1)
    for seed in range(20):
        other = best * (0.1 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))).exp()
        assert cost(other) > cost(best)


@pytest.mark.parametrize("estimator", ("qjl", "rescaled", "mse"))
def test_scores_stay_what_they_were_and_get_better(estimator):
    query, keys, values = skewed_states(800)
    errors = {}
    for kind in ("none", "center", "attention"):
        layer = TurboQuantLayer(
            TurboQuantConfig(nbits=3, key_estimator=estimator, residual_length=32, condition=kind), 0
        )
        sdpa(query[:, :, :700], *layer.update(keys[:, :, :700], values[:, :, :700]), enable_gqa=True)
        handle = layer.update(keys[:, :, 700:710], values[:, :, 700:710])[0]
        assert layer.condition == kind
        exact = query[:, :, -5:] @ keys[:, :, :710].repeat_interleave(2, dim=1).mT
        logits = ops.scores(query[:, :, -5:], handle.states, scaling=1.0)
        dequantized = query[:, :, -5:] @ handle.dequantize().repeat_interleave(2, dim=1).mT
        # scores from the codes and from dequantized keys are one thing, mean and scale included
        torch.testing.assert_close(logits, dequantized, rtol=1e-3, atol=1e-2)
        assert torch.allclose(logits[..., :4], exact[..., :4], atol=1e-2)
        assert torch.allclose(logits[..., -32:], exact[..., -32:], atol=1e-2)
        errors[kind] = (logits - exact).norm().item()
    assert errors["attention"] < 0.5 * errors["center"] < 0.25 * errors["none"]


def test_attention_of_all_paths_agrees_after_conditioning():
    query, keys, values = skewed_states(400, batch=2)
    layer = TurboQuantLayer(TurboQuantConfig(nbits=4, residual_length=16), 0)
    sdpa(query[:, :, :300], *layer.update(keys[:, :, :300], values[:, :, :300]), enable_gqa=True)
    handles = layer.update(keys[:, :, 300:301], values[:, :, 300:301])
    assert layer.condition == "attention"
    out = ops.attention(query[:, :, 300:301], handles[0].states, scaling=0.1, softcap=5.0)
    logits = query[:, :, 300:301] @ handles[0].dequantize().repeat_interleave(2, dim=1).mT * 0.1
    # softcap sees the absolute logit: the mean must not be left out
    expected = (5 * torch.tanh(logits / 5)).softmax(-1) @ handles[1].dequantize().repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def test_the_first_prefill_is_quantized_once_its_query_was_seen():
    query, keys, values = skewed_states(300)
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 0)
    handles = layer.update(keys, values)
    assert all(isinstance(handle, QuantizedStates) for handle in handles)
    assert layer.get_seq_length() == 300 and layer.tokens.quantized == 0
    out = sdpa(query, *handles, is_causal=True, enable_gqa=True)
    # attention itself was exact
    assert torch.equal(out, sdpa(query, keys, values, is_causal=True, enable_gqa=True))
    assert layer.tokens.quantized == 280 and layer.pending is None and layer.condition == "attention"


@pytest.mark.parametrize("step", (lambda handle: handle.mT, lambda handle: handle.repeat_interleave(2, dim=1)))
def test_without_a_query_keys_are_centred(step):
    _, keys, values = skewed_states(300)
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 0)
    step(layer.update(keys, values)[0])
    assert layer.condition == "center" and layer.tokens.quantized == 280
    assert "centred" in repr(layer)


def test_an_update_stores_what_nobody_looked_at():
    _, keys, values = skewed_states(300)
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 0)
    layer.update(keys[:, :, :200], values[:, :, :200])
    layer.update(keys[:, :, 200:], values[:, :, 200:])
    assert layer.condition == "center" and layer.get_seq_length() == 300


def new_layer(capacity=None, **options):
    return TurboQuantLayer(TurboQuantConfig(max_cache_len=capacity, **options), 0)


def feed(layer, pieces, query, keys, values, start=0):
    """Updates of so many tokens, each of which its query attends to; yields the length after each."""
    for piece in pieces:
        part = slice(start, start + piece)
        handles = layer.update(keys[:, :, part], values[:, :, part])
        sdpa(query[:, :, part], *handles, enable_gqa=True)
        start += piece
        layer.measure()
        yield start


PIECES = ([30, *[1] * 170], [1] * 200, [2, *[7] * 28, 2], [90, 110], [5, 5, 190])


@pytest.mark.parametrize("pieces", PIECES, ids=lambda pieces: f"{pieces[0]}-{pieces[1]}")
@pytest.mark.parametrize("options", ({}, {"residual_length": 32}, {"residual_length": 0, "sink_length": 0}), ids=str)
@pytest.mark.parametrize("capacity", (None, 260))
def test_keys_wait_until_there_is_enough_to_learn_from(capacity, options, pieces):
    states = skewed_states(200)
    layer = new_layer(capacity, **options)
    sinks, window = layer.config.sink_length, layer.config.residual_length
    for length in feed(layer, pieces, *states):
        exact = layer.keys.dequantize() if isinstance(layer.keys, QuantizedStates) else layer.keys
        if length <= sinks + LEARNED_TOKENS:
            assert layer.condition is None and layer.tokens.quantized == 0
            assert torch.equal(exact[:, :, :length], states[1][:, :, :length])
            assert f"not conditioned yet, {length} tokens wait" in repr(layer)
        else:
            assert layer.condition == "attention"
            # a step that comes to a static layer is too late to be learned from
            assert layer.tokens.quantized == max(length - sinks - window, 0)
    # slots that cannot take the tokens of a step are learned from before it comes
    least = LEARNED_TOKENS - (min(pieces[1], STEP_TOKENS) - 1 if capacity is not None else 0)
    assert (
        layer.conditioning.found.tokens >= least
        and f"conditioned by {layer.conditioning.found.tokens} tokens" in repr(layer)
    )
    # nothing is kept for a wait that is over
    assert capacity is not None or layer.tokens.exact.capacity == sinks + window
    assert layer.conditioning.valid is None and layer.conditioning.query_energy is None
    # as good as a layer that had everything at once
    whole = new_layer(capacity, **options)
    list(feed(whole, [200], *states))
    errors = [(x.keys.dequantize()[:, :, :200] - states[1]).norm() for x in (layer, whole)]
    assert 0 < errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("capacity", (None, 700))
@pytest.mark.parametrize("kinds, others, expected", [(1, 75, "attention"), (3, 75, "attention"), (1, 20, None)])
def test_repetitions_teach_nothing(kinds, others, expected, capacity):
    query, keys, values = skewed_states(200 + others)
    values[:, :, :200] = values[:, :, torch.arange(200) % kinds]
    layer = new_layer(capacity, residual_length=32)
    list(feed(layer, [200], query, keys, values))
    if capacity is not None:
        # there is no room to wait in
        assert (
            layer.condition == "center"
            and layer.conditioning.found.tokens == 196
            and not layer.conditioning.found.enough
        )
        return
    # a mask that hides nothing, and a batch of other order, change nothing
    assert layer.condition is None and "200 tokens wait" in repr(layer)
    layer.reorder_cache(torch.tensor([0]))
    list(feed(layer, [others], query, keys, values, start=200))
    assert layer.condition == expected
    assert layer.tokens.quantized == (others + 200 - 36 if expected else 0)


def test_waiting_ends():
    """However long one token is repeated, not more than 512 tokens beside the sinks stay exact."""
    query, keys, values = skewed_states(560)
    values[:] = values[:, :, :1]
    layer = new_layer(residual_length=32)
    for length in feed(layer, [40] * 14, query, keys, values):
        assert (layer.condition is None) == (length - 4 <= MAX_WAITING_TOKENS)
    assert layer.condition == "center" and layer.tokens.exact.capacity == 36 and "centred by" in repr(layer)


def test_the_host_waits_in_the_first_layer_alone(monkeypatch):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = 5
    model = LlamaForCausalLM(config).eval()
    waits = []
    known = hf_turboquant.conditioning.learned
    monkeypatch.setattr(hf_turboquant.conditioning, "learned", lambda found: waits.append(found) or known(found))
    for prompt, expected in ((100, 0), (200, 1), (700, 0)):
        cache = TurboQuantCache(config, residual_length=8)
        waits.clear()
        with torch.no_grad():
            model(torch.randint(3, 99, (1, prompt)), **{cache_name(model): cache})
        assert len(waits) == expected and all(
            (layer.conditioning.found is None) == (prompt == 100) for layer in cache.layers
        )
    # and there again for another prompt of the same length
    cache = TurboQuantCache(config, residual_length=8)
    for kind in (5, None):
        cache.reset()
        ids = torch.randint(3, 99, (1, 200)) if kind is None else torch.full((1, 200), kind)
        with torch.no_grad():
            model(ids, **{cache_name(model): cache})
        assert [layer.condition for layer in cache.layers] == [None if kind else "attention"] * 5


@pytest.mark.parametrize("capacity", (None, 300))
@pytest.mark.parametrize("way", ("same", "reordered", "selected", "repeated", "copied", "cropped", "saved"))
def test_padding_is_remembered_while_keys_wait(way, capacity, tmp_path):
    """Only the first prompt comes with a mask; what happens to the rows happens to what is known of them."""
    query, keys, values = skewed_states(200, batch=2)
    keys[0, :, :20], rows = 1e4, torch.tensor([0, 1])
    cache = TurboQuantCache(copy.deepcopy(CONFIG64), max_cache_len=capacity, condition="center")
    cache.update(keys[:, :, :40], values[:, :, :40], 0)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[0, ..., :20] = False
    cache.layers[0].settle(query[:, :, :40], mask)
    if way == "reordered":
        rows = torch.tensor([1, 0])
        cache.reorder_cache(rows)
    elif way == "selected":
        rows = torch.tensor([0])
        cache.batch_select_indices(rows)
    elif way == "repeated":
        rows = torch.tensor([0, 0, 1, 1])
        cache.batch_repeat_interleave(2)
    elif way == "copied":
        cache = copy.deepcopy(cache)
    elif way == "cropped":
        cache.update(keys[:, :, :5], values[:, :, :5], 0)
        cache.crop(-5)
    elif way == "saved":
        cache.save_pretrained(tmp_path / "saved")
        cache = TurboQuantCache.from_pretrained(tmp_path / "saved")
    layer = cache.layers[0]
    for at in range(40, 200):
        layer.update(keys[rows, :, at : at + 1], values[rows, :, at : at + 1])
    assert layer.condition == "center"
    told = torch.cat([keys[row, :, 20 if row == 0 else 4 : 132] for row in rows], dim=1).mean(1, keepdim=True)
    torch.testing.assert_close(layer.tokens.quantizers["keys"].mean, told, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("capacity", (None, 300))
@pytest.mark.parametrize("removed", (-1000, -200))
def test_crop_to_nothing_forgets_what_was_learned(removed, capacity):
    query, keys, values = skewed_states(200)
    layer, fresh = new_layer(capacity), new_layer(capacity)
    list(feed(layer, [200], query, keys, values))
    assert layer.condition == "attention"
    layer.crop(removed)
    assert layer.condition is None and layer.get_seq_length() == 0 and layer.is_initialized
    # also with other tokens than before, which have another mean
    for each in (layer, fresh):
        list(feed(each, [10, 160, *[1] * 20], query, keys - 40, values))
    assert layer.condition == fresh.condition == "attention"
    assert torch.equal(layer.keys.dequantize(), fresh.keys.dequantize())
    assert torch.equal(layer.tokens.quantizers["keys"].mean, fresh.tokens.quantizers["keys"].mean)


def test_padding_does_not_count():
    query, keys, values = skewed_states(300, batch=2)
    padded_query, padded_keys = query.clone(), keys.clone()
    padded_query[0, :, :150], padded_keys[0, :, :150] = 1e4, 1e4
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[0, :150] = False
    causal = torch.ones(300, 300, dtype=torch.bool).tril() & valid[:, None, None, :]
    quantizers = []
    for mask in (causal, torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)):
        layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 0)
        sdpa(padded_query, *layer.update(padded_keys, values), attn_mask=mask, enable_gqa=True)
        quantizers.append(layer.tokens.quantizers["keys"])
    rows = torch.cat([keys[0, :, 150:], keys[1, :, 4:]], dim=1)
    for quantizer in quantizers:
        torch.testing.assert_close(quantizer.mean, rows.mean(1, keepdim=True), rtol=1e-3, atol=1e-2)
        assert torch.equal(quantizer.scale, quantizers[0].scale)
        assert quantizer.scale.max() / quantizer.scale.min() > 50


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda q, k: (q, k[:, :, :30]), "center"),
        (lambda q, k: (q, torch.full_like(k, torch.nan)), "none"),
        (lambda q, k: (torch.full_like(q, torch.inf), k), "center"),
        (lambda q, k: (torch.zeros_like(q), k), "center"),
        (lambda q, k: (q, torch.ones_like(k)), "center"),
        (lambda q, k: (q, torch.where(torch.arange(64) == 3, 7.0, k)), "attention"),
    ],
    ids=("short", "nan keys", "inf queries", "zero queries", "constant keys", "constant channel"),
)
def test_degenerate_statistics_fall_back(spoil, kind):
    query, keys, _ = skewed_states(200)
    query, keys = spoil(query, keys)
    quantizer, got = learn(keys, energy_of(query), None)
    assert got.condition == kind
    # what is not to be trusted changes nothing
    assert (quantizer.mean is None or not quantizer.mean.any()) == (kind == "none")
    assert (quantizer.scale is None or bool((quantizer.scale == 1).all())) == (kind != "attention")
    if kind == "attention":
        assert quantizer.scale.isfinite().all() and quantizer.scale.max() / quantizer.scale.min() < 1e3


def test_masks_that_say_nothing():
    assert valid_tokens(None, 5) is None
    assert valid_tokens(torch.ones(1, 1, 0, 5, dtype=torch.bool), 5) is None
    assert valid_tokens(torch.ones(1, 1, 1, 3, dtype=torch.bool), 5) is None


CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=99, eos_token_id=2,
)  # fmt: skip
CONFIG64 = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


@pytest.mark.parametrize(
    ("implementation", "expected"), [("sdpa", "attention"), ("turboquant", "attention"), ("eager", "center")]
)
@pytest.mark.parametrize("padded", (False, True))
def test_models_show_their_queries(implementation, expected, padded):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    model.set_attn_implementation(implementation)
    ids, mask = torch.randint(3, 99, (2, 200)), torch.ones(2, 200, dtype=torch.long)
    mask[0, : 9 if padded else 0] = 0
    cache = TurboQuantCache(CONFIG, residual_length=8)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{cache_name(model): cache})
    assert [layer.condition for layer in cache.layers] == [expected] * 2
    assert {"attention": "conditioned", "center": "centred"}[expected] in repr(cache)


def test_a_model_that_collapses_is_cured():
    """Biases of k_proj far larger than the spread of keys, in channels that hardly turn with the position (Qwen2)."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, max_position_embeddings=1024, rope_theta=1e6, initializer_range=0.07,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(3, 99, (2, 600))
    spreads = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _, inputs, out: spreads.append(out.std()))
    with torch.no_grad():
        model(ids)
        for layer, spread in zip(model.model.layers, spreads, strict=True):
            layer.self_attn.k_proj.bias.view(2, 32)[:, [13, 14, 15, 29, 30, 31]] = 30 * spread
        kl, full = {}, None
        for kind in ("full", "none", "attention"):
            cache = DynamicCache(config=config) if kind == "full" else TurboQuantCache(config, nbits=3, condition=kind)
            model(ids[:, :400], **{cache_name(model): cache})
            log_probs = model(ids[:, 400:], **{cache_name(model): cache}).logits.log_softmax(-1)
            full = log_probs if full is None else full
            kl[kind] = (full.exp() * (full - log_probs)).sum(-1).mean().item()
    assert kl["attention"] < kl["none"] / 10 and kl["none"] > 1e-4


def test_it_travels_with_the_cache_and_reset_forgets_it():
    query, keys, values = skewed_states(300)
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 0)
    sdpa(query, *layer.update(keys, values), enable_gqa=True)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.tokens.quantizers["keys"].scale, layer.tokens.quantizers["keys"].scale)
    assert torch.equal(twin.keys.dequantize(), layer.keys.dequantize())
    layer.reset()
    assert layer.condition is None and layer.conditioning.query_energy is None and layer.pending is None


FREQUENCIES = tuple(10_000 ** (-i / 32) for i in range(32))


def rotated_states(start, stop, layout, seed=0):
    """Keys `[1, 2, tokens, 64]` whose mean before the rotary embedding stays what it is."""
    keys = 0.3 * torch.randn(1, 2, stop - start, 64, generator=torch.Generator().manual_seed(seed))
    keys += torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(99))
    angles = torch.arange(start, stop)[:, None] * torch.tensor(FREQUENCIES)
    x, y = (slice(32), slice(32, 64)) if layout == "halves" else (slice(0, 64, 2), slice(1, 64, 2))
    turned = torch.empty_like(keys)
    turned[..., x] = keys[..., x] * angles.cos() - keys[..., y] * angles.sin()
    turned[..., y] = keys[..., y] * angles.cos() + keys[..., x] * angles.sin()
    return turned


@pytest.mark.parametrize("layout", ("halves", "neighbours"))
@pytest.mark.parametrize("padded", (False, True))
def test_the_mean_is_that_of_positions_to_come(layout, padded):
    whole = rotated_states(0, HORIZON, layout)
    prompt, valid = rotated_states(4, 300, layout, seed=1), None
    if padded:
        valid = torch.ones(1, 296, dtype=torch.bool)
        valid[:, :40] = False
        prompt[:, :, :40] = torch.nan
    energy = torch.ones(2, 64)
    early, _ = learn(prompt, energy, valid)
    told, kind = learn(prompt, energy, valid, FREQUENCIES, 4)
    expected = whole.mean((0, 2)).unsqueeze(1)
    assert kind.condition == "attention"
    assert (told.mean - expected).norm() < 0.1 * (early.mean - expected).norm()
    # and so is the energy, near enough (both channels of a pair get the same): scales are those of the whole text
    known, _ = learn(whole, energy, None)
    assert (told.scale / known.scale).log().std() < 0.5 * (early.scale / known.scale).log().std()


def test_an_embedding_of_more_channels_than_there_are_is_passed_over():
    _, keys, _ = skewed_states(100)
    plain, _ = learn(keys, torch.ones(2, 64), None)
    told, _ = learn(keys, torch.ones(2, 64), None, FREQUENCIES + FREQUENCIES, 4)
    assert torch.equal(told.mean, plain.mean)


def test_keys_without_the_embedding_keep_their_mean():
    _, keys, _ = skewed_states(300)
    plain, _ = learn(keys, torch.ones(2, 64), None)
    told, _ = learn(keys, torch.ones(2, 64), None, FREQUENCIES, 4)
    torch.testing.assert_close((told.mean, told.scale), (plain.mean, plain.scale))


def test_long_prompts_are_taken_as_they_are():
    keys = rotated_states(4, HORIZON, "halves")
    plain, _ = learn(keys, torch.ones(2, 64), None)
    told, _ = learn(keys, torch.ones(2, 64), None, FREQUENCIES, 4)
    assert torch.equal(told.mean, plain.mean)


def test_frequencies_come_from_the_config():
    llama = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_theta": 100.0})
    assert rotary_frequencies(llama, 0) == pytest.approx([100 ** (-i / 8) for i in range(8)])
    parameters = {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}
    scaled = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=parameters)
    assert rotary_frequencies(scaled, 0) == pytest.approx([100 ** (-i / 8) / 4 for i in range(8)])
    # another one for each type of layer
    gemma = Gemma3TextConfig(num_hidden_layers=6)
    local, far = rotary_frequencies(gemma, 0), rotary_frequencies(gemma, 5)
    assert gemma.layer_types[0] != gemma.layer_types[5] and local[-1] > 10 * far[-1]
    assert rotary_frequencies(GPT2Config(), 0) is None
    cache = TurboQuantCache(llama, nbits=4)
    assert cache.layers[3].frequencies == rotary_frequencies(llama, 3)


def test_refused_states_do_not_store_what_waits():
    """The prompt still gets the scale that the query which attends to it gives."""
    query, keys, values = skewed_states(300)
    layer = new_layer()
    held = layer.update(keys, values)
    for refused in (keys.repeat(2, 1, 1, 1), keys[..., :32], keys[0], keys.long(), keys[:, :, :0, :60]):
        with pytest.raises(ValueError, match="states"):
            layer.update(refused, refused)
    assert layer.get_seq_length() == 300 and layer.condition is None
    sdpa(query, *held, enable_gqa=True)
    assert layer.condition == "attention"


@pytest.mark.parametrize("capacity", [None, 300])
def test_a_layer_tells_its_bytes_at_any_time(capacity):
    query, keys, values = skewed_states(200)
    layer = new_layer(capacity)
    assert layer.nbytes == 0
    held = layer.update(keys, values)
    # what waits is counted apart; a fixed capacity is allocated at once
    assert (layer.nbytes > 0) == (capacity is not None) and layer_memory(layer).other_bytes == 2 * keys.nbytes
    sdpa(query, *held, enable_gqa=True)
    stored = layer.nbytes
    assert stored > 0
    layer.reset()
    assert layer.nbytes == pytest.approx(stored if capacity else 0, abs=2048)


def test_memory_made_by_hand_holds_what_the_next_sequence_needs():
    query, keys, values = skewed_states(300)
    layer, fresh = new_layer(residual_length=16), new_layer(residual_length=16)
    list(feed(layer, [300], query, keys, values))
    for each in (layer, fresh):
        each.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        assert each.condition is None and each.tokens.window == max(MAX_WAITING_TOKENS, LEARNED_TOKENS)
        list(feed(each, [60, 100, *[1] * 5], query, keys, values))
    assert torch.equal(layer.keys.dequantize(), fresh.keys.dequantize())


@pytest.fixture
def deferring(monkeypatch):
    """Prompts are quantized at the next update, as on a GPU."""
    monkeypatch.setattr(TurboQuantLayer, "_defers", lambda layer: True)


def test_a_deferred_prompt_is_stored_before_anybody_looks(deferring):
    def new():
        layer = new_layer()
        list(feed(layer, [200], *skewed_states(200)))
        assert layer.observed is not None and layer.tokens.length == 0
        return layer

    assert "conditioned by 196 tokens" in repr(new()) and new().condition == "attention"
    for copied in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        layer = new()
        twin = copied(layer)
        # neither keeps the prompt in full precision
        assert layer.pending is None and twin.pending is None and twin.tokens.quantized == 200 - 4 - 128
    report = layer_memory(new())
    assert report.other_bytes == 0 and report.codes_bytes > 0


def test_kernels_are_compiled_when_the_prompt_is_stored(deferring, monkeypatch):
    """By then the first token is out, which Triton's front end, in Python, would have delayed."""
    started = []
    monkeypatch.setattr(
        "hf_turboquant.layer.compile_ahead",
        lambda layer, states, *query: started.append((states["keys"].shape[2], *query, layer.tokens.length)),
    )
    layer = new_layer()
    queries, keys, values = skewed_states(200)
    list(feed(layer, [199], queries, keys, values))
    assert layer.observed is not None and not started
    layer.update(keys[:, :, 199:], values[:, :, 199:])
    # before the first launch
    assert started == [(199, queries.shape[1], queries.dtype, False, 0)] and layer.tokens.length == 200


@pytest.mark.parametrize("capacity", [None, 300])
def test_layers_that_are_alike_compile_once(capacity, monkeypatch):
    started, gpu, dtype = [], torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(ahead, "_start", lambda *kind: started.append(kind))
    cache = TurboQuantCache(LlamaConfig(hidden_size=64, num_hidden_layers=3, head_dim=64), max_cache_len=capacity)
    sizes = {"keys": (1, 2, 40, 64), "values": (1, 2, 40, 32)}
    states = {role: SimpleNamespace(device=gpu, shape=torch.Size(size), dtype=dtype) for role, size in sizes.items()}
    for layer, masked in zip(cache.layers, (False, False, True), strict=True):
        ahead.compile_ahead(layer, states, 8, torch.float16, masked)
    frequencies = tuple(cache.layers[0].frequencies)
    # kernels are the same for every capacity
    config = TurboQuantConfig(max_cache_len=capacity and 1)
    kind = config, frequencies, TurboQuantLayer, (2, 64, 32), (dtype, dtype, torch.float16), 4, True
    assert started == [(*kind, False, gpu), (*kind, True, gpu)]


# A small query is kept, a larger one is counted at once.
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_deferring_changes_nothing(kept, padded, monkeypatch):
    tokens, (query, keys, values) = 200, skewed_states(201)
    if not kept:
        monkeypatch.setattr("hf_turboquant.layer.MAX_QUERY_BYTES", query[:, :, :tokens].nbytes - 1)
    layers = []
    for defers in (False, True):
        monkeypatch.setattr(TurboQuantLayer, "_defers", lambda layer, defers=defers: defers)
        layers.append(new_layer(residual_length=16))
        asked, mask = query[:, :, :tokens].clone(), torch.ones(1, 1, 1, tokens, dtype=torch.bool)
        mask[..., :7] = not padded
        held = layers[-1].update(keys[:, :, :tokens], values[:, :, :tokens])
        sdpa(asked, *held, attn_mask=mask, enable_gqa=True)
        if defers:
            assert (layers[-1].observed[1] is not None) == kept
        # both belong to the caller
        asked.fill_(torch.nan)
        mask.fill_(True)
        layers[-1].update(keys[:, :, tokens:], values[:, :, tokens:])
    now, later = layers
    assert now.condition == later.condition == "attention" and now.tokens.quantized == later.tokens.quantized > 0
    for quantizers in zip(now.tokens.quantizers.values(), later.tokens.quantizers.values(), strict=True):
        for name in ("mean", "scale"):
            assert_equal_or_none(*(getattr(quantizer, name) for quantizer in quantizers))
    for role, buffer in now.tokens.codes.items():
        for name, tensor in buffer.tensors.items():
            assert torch.equal(tensor[:, :, 0], later.tokens.codes[role][name][:, :, 0])


@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize("wrong", ["heads", "head_dim", "dtype", "mask"])
def test_a_query_that_attention_refuses_counts_for_nothing(wrong, defers, attention, monkeypatch):
    monkeypatch.setattr(TurboQuantLayer, "_defers", lambda layer: defers)
    query, keys, values = skewed_states(200)
    mask = torch.ones(1, 1, 200, 200, dtype=torch.bool)
    bad = {"heads": (query[:, :3], mask), "head_dim": (query[..., :60], mask), "dtype": (query.int(), mask)}

    def attend(query, handles, mask):
        if attention == "sdpa":
            return sdpa(query, *handles, attn_mask=mask, enable_gqa=True)
        return turboquant_attention_forward(torch.nn.Module(), query, *handles, mask, output_attentions=True)

    layer, expected = (new_layer(residual_length=16) for _ in range(2))
    handles = layer.update(keys, values)
    with pytest.raises((RuntimeError, ValueError)):
        asked, seen = bad.get(wrong, (query, mask[..., :150]))
        attend(asked, handles, seen)
    for each, given in ((layer, handles), (expected, expected.update(keys, values))):
        attend(query, given, mask)
        each.update(keys[:, :, :1], values[:, :, :1])
    assert layer.condition == expected.condition == "attention"
    means = (each.tokens.quantizers["keys"].mean for each in (layer, expected))
    assert_equal_or_none(*means)


def assert_equal_or_none(one, other):
    assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_all_layers_of_a_cache_follow_one_verdict(deferring, tmp_path):
    query, keys, values = skewed_states(300)
    cache = TurboQuantCache(residual_length=8)
    for layer in range(2):
        list(feed_cache(cache, layer, query[:, :, :100], keys[:, :, :100], values[:, :, :100]))
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
    for each in (cache, loaded):
        for layer in each.layers:
            assert layer.verdict is layer.conditioning.verdict is each.verdict
    # what was found of one text says nothing about the next, whichever layer looks first
    alike = values[:, :, :1].expand(-1, -1, 300, -1)
    for number, (states, expected) in enumerate(((alike, None), (values, "attention"))):
        cache.reset()
        for layer in range(2):
            list(feed_cache(cache, layer, query, keys, states))
        assert [cache.layers[layer].condition for layer in ((0, 1), (1, 0))[number]] == [expected] * 2


def feed_cache(cache, layer, query, keys, values):
    """A first prompt of one layer, and its attention."""
    yield sdpa(query, *cache.update(keys, values, layer), enable_gqa=True)


def test_a_sequence_is_smaller_no_sooner_than_keys_are_conditioned():
    layer = new_layer(residual_length=16)
    layer.update(*(torch.randn(8, 2, 60, 64) for _ in range(2)))
    assert layer_memory(layer).smaller_from == 4 + LEARNED_TOKENS + 1
