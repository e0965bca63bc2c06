"""The decoding loop behind `custom_generate`: the tokens of `generate`, by steps that were captured once."""

import gc
import logging
import weakref

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import hf_turboquant
from hf_turboquant import TurboQuantCache, captured, generation
from hf_turboquant.captured import Graph

SHAPE = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=99, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=64, query_pre_attn_scalar=32)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "turboquant": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="turboquant")),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **SLIDING)),
    "qwen3-next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **LINEAR)),
}
OPTIONS = {"nbits": 3, "residual_length": 16}
NEW = 24


def make(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    # otherwise all tokens are alike to a tiny model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def prompt(batch=2, tokens=150, seed=0):
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens=150):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :7] = 0
    return mask


class FakeGraph(Graph):
    """
    A CUDA graph for a CPU: it runs again what was captured, and makes sure that this reads and writes where it did.
    """

    made = 0
    replays = 0
    error = None

    def __init__(self, run, cache):
        if self.error is not None:
            raise self.error
        type(self).made += 1
        self.steps = weakref.ref(run.__self__)
        self.addresses = self._addresses(cache)

    def _addresses(self, cache):
        static = [x for x in torch.utils._pytree.tree_leaves(self.steps().static) if isinstance(x, torch.Tensor)]
        return [x.data_ptr() for x in static] + [
            x.data_ptr() for layer in cache.layers for x in captured._tensors(layer)
        ]

    def replay(self, cache):
        assert self._addresses(cache) == self.addresses
        type(self).replays += 1
        return self.steps()._run()

    @staticmethod
    def warm(run):
        return run()

    @staticmethod
    def runs_on(model):
        return True


@pytest.fixture
def graphs(monkeypatch):
    """Steps are captured, by a graph that needs no GPU: `made` and `replays` tell how often."""
    fake = type("Fake", (FakeGraph,), {"made": 0, "replays": 0})
    monkeypatch.setattr(captured, "Graph", fake)
    monkeypatch.setattr(generation, "Graph", fake)
    # the kernels' steps can be captured; here the reference does their work
    monkeypatch.setattr(TurboQuantCache, "is_compileable", True)
    generation._kept.clear()
    return fake


def ours(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    if "past_key_values" not in options:
        options = {**OPTIONS, **options}
    return model.generate(ids, custom_generate=hf_turboquant.generate, **options)


def theirs(model, ids, seed=0, cache=None, **options):
    torch.manual_seed(seed)
    cache = TurboQuantCache(model.config, **OPTIONS) if cache is None else cache
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, past_key_values=cache, **options)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "top-p": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "left padding": {"attention_mask": left_padded()},
    "bad words": {"bad_words_ids": [[7], [11, 12]], "no_repeat_ngram_size": 2, "min_new_tokens": 10},
    "ends of rows": {"eos_token_id": [5, 40, 41, 42, 43, 44, 45]},
    "chunked prefill": {"prefill_chunk_size": 48, "attention_mask": left_padded()},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_of_generate(model, way):
    expected = theirs(model, prompt(), **WAYS[way])
    assert torch.equal(ours(model, prompt(), **WAYS[way]), expected)
    assert expected.shape[1] > 152


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_of_generate_by_captured_steps(model, graphs, way):
    expected = theirs(model, prompt(), **WAYS[way])
    for _ in range(2):
        assert torch.equal(ours(model, prompt(), **WAYS[way]), expected)
    # the first request warms and captures, the second replays alone
    assert graphs.made == 1 and graphs.replays >= 2 * (expected.shape[1] - 150) - 4


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_gives_the_tokens_of_generate(kind):
    model = make(kind).cuda()
    for way, options in WAYS.items():
        if "attention_mask" in options:
            options = {**options, "attention_mask": options["attention_mask"].cuda()}
        # shorter than the sliding window, and longer
        for tokens in (150,) if "attention_mask" in options else (50, 150):
            ids = prompt(tokens=tokens).cuda()
            cache = TurboQuantCache(model.config, **OPTIONS, max_cache_len=256)
            expected = theirs(model, ids, cache=cache, disable_compile=True, **options)
            for _ in range(2):
                assert torch.equal(ours(model, ids, **options), expected), (way, tokens)
    (_, cache) = generation._kept[model]
    assert all(isinstance(graph, Graph) for graph in generation._steps[cache].graphs.values())
    assert generation._steps[cache].graphs and not generation._steps[cache].failed


@cuda
def test_a_model_that_no_graph_can_hold_goes_on_uncaptured(caplog):
    model = make("llama").cuda()
    ids = prompt().cuda()
    expected = ours(model, ids, do_sample=True)
    generation.release(model)
    hook = model.model.layers[1].register_forward_hook(lambda module, args, out: out * out.isfinite().all().item())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(ours(model, ids, do_sample=True), expected)
    assert caplog.text.count("go on uncaptured") == 1
    hook.remove()
    generation.release(model)
    assert torch.equal(ours(model, ids, do_sample=True), expected)


@cuda
def test_requests_of_changing_lengths_leave_no_memory():
    model = make("llama").cuda()
    used = []
    for round in range(30):
        ours(model, prompt(batch=1 + round % 3, tokens=50 + 97 * (round % 5)).cuda())
        if round % 15 == 14:
            generation.release(model)
            gc.collect()
            torch.cuda.empty_cache()
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1]


@cuda
def test_a_turn_over_a_given_cache_replays_the_graph_of_the_last_one():
    model = make("llama").cuda()
    conversations = []
    for run in (ours, theirs):
        cache, ids = TurboQuantCache(model.config, **OPTIONS, max_cache_len=400), prompt().cuda()
        for _ in range(3):
            if run is ours:
                ids = ours(model, ids, past_key_values=cache)
                graphs = dict(generation._steps[cache].graphs)
            else:
                ids = theirs(model, ids, cache=cache, disable_compile=True)
            ids = torch.cat([ids, torch.full((2, 15), 7, device="cuda")], dim=1)
        conversations.append(ids)
    assert torch.equal(*conversations)
    assert len(graphs) == 1
