"""The decoding loop behind `custom_generate`: the tokens of `generate`, by steps that were captured once."""

import copy
import gc
import importlib.metadata
import logging
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import warning_once

import hf_turboquant
from hf_turboquant import TurboQuantCache, captured, decoding, generation
from hf_turboquant._supported import cache_name
from hf_turboquant.captured import Graph, Steps
from hf_turboquant.layer import TurboQuantLayer

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
MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=16,
    mamba_d_ssm=128,
)  # fmt: skip
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "turboquant": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="turboquant")),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **SLIDING)),
    "qwen3-next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **LINEAR)),
    "falcon-h1": lambda: FalconH1ForCausalLM(FalconH1Config(**SHAPE, **MAMBA2)),
}
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# more of them where there is a GPU
FAMILIES = KINDS | {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, **SLIDING, tie_word_embeddings=False, attn_implementation="turboquant")
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, **EXPERTS)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SHAPE, **EXPERTS, layer_types=SLIDING["layer_types"], sliding_window=64, attn_implementation="turboquant"
        )
    ),
}
OPTIONS = {"nbits": 3, "residual_length": 16}
NEW = 24


def make(kind):
    torch.manual_seed(0)
    model = FAMILIES[kind]().eval()
    # otherwise all tokens are alike to a tiny model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def same_search(same_search):
    """A cache of static capacity takes the last tokens of a prompt in chunks one by one, one that grows together."""


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
    # as on a GPU: a prompt is quantized after its token
    monkeypatch.setattr(TurboQuantLayer, "_defers", lambda layer: True)
    # the kernels' steps can be captured; here the reference does their work
    monkeypatch.setattr(TurboQuantCache, "is_compileable", True)
    generation._kept.clear()
    return fake


def ours(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    if cache_name(model) not in options:
        options = {**OPTIONS, **options}
    return model.generate(ids, custom_generate=hf_turboquant.generate, **options)


def theirs(model, ids, seed=0, cache=None, **options):
    torch.manual_seed(seed)
    cache = TurboQuantCache(model.config, **OPTIONS) if cache is None else cache
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, **{cache_name(model): cache}, **options)


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


@pytest.fixture(scope="module")
def tokenizer():
    # the last one is what stop strings are compared with
    words = {**{f"w{i}": i for i in range(99)}, "abcdef": 99}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0")


class Collector(BaseStreamer):
    """Collects tokens; `fails` at that many, with `error`."""

    def __init__(self, fails=None, error=None):
        self.tokens, self.ended, self.fails, self.error = [], False, fails, error

    def put(self, value):
        self.tokens.append(value.flatten().tolist())
        if len(self.tokens) == self.fails:
            raise self.error

    def end(self):
        self.ended = True


class At(StoppingCriteria):
    """Ends every sequence at a length, and notes what it was shown."""

    def __init__(self, length, notes=None):
        self.length, self.notes = length, [] if notes is None else notes

    def __call__(self, input_ids, scores, **kwargs):
        self.notes.append(("looked at", input_ids.shape[1]))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("way", [{}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("length", [150, 50])
def test_all_that_generate_returns(model, graphs, way, length):
    """Also across the length at which a sliding window is full."""
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **way}
    expected, got = theirs(model, prompt(tokens=length), **options), ours(model, prompt(tokens=length), **options)
    assert type(got) is type(expected) and torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        pairs = list(zip(getattr(got, name), getattr(expected, name), strict=True))
        assert len(pairs) == NEW and all(torch.allclose(ours, full, atol=1e-5) for ours, full in pairs)
    cache = got[cache_name(model)]
    assert isinstance(cache, TurboQuantCache) and cache.get_seq_length() == length + NEW - 1
    # whose cache is out is not used again
    assert model not in generation._kept
    kinds = 1 + (length == 50 and any(cache.is_sliding))
    assert graphs.made == kinds == len(decoding._steps[cache].graphs)


def test_the_next_step_is_under_way_while_the_host_looks(llama, monkeypatch):
    notes = []
    step = Steps.__call__
    monkeypatch.setattr(Steps, "__call__", lambda s, ids: notes.append(("step", ids.shape[1])) or step(s, ids))
    cache = TurboQuantCache(llama.config, **OPTIONS)
    out = ours(llama, prompt(), **{cache_name(llama): cache}, stopping_criteria=[At(153, notes)])
    assert out.shape[1] == 153
    # the first token comes before the first step; one too many at an end that nobody knew of, which is taken back
    later = [(what, length) for length in (152, 153) for what in ("step", "looked at")]
    assert notes == [("looked at", 151), ("step", 151), *later]
    assert cache.get_seq_length() == 152
    notes.clear()
    cache.reset()
    ours(llama, prompt(), **{cache_name(llama): cache}, max_new_tokens=3, stopping_criteria=[At(200, notes)])
    assert notes[-2:] == [("looked at", 152), ("looked at", 153)] and cache.get_seq_length() == 152


@pytest.mark.parametrize("capacity", [None, 400])
def test_the_first_token_does_not_wait_for_quantizing(llama, graphs, capacity):
    cache, notes = TurboQuantCache(llama.config, **OPTIONS, max_cache_len=capacity), []

    class Watcher(Collector):
        def put(self, value):
            notes.append([layer.observed is not None for layer in cache.layers])

    given = {cache_name(llama): cache, "streamer": Watcher()}
    ours(llama, prompt(), **given, max_new_tokens=3)
    # the prompt, then a token after another
    assert notes == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    # nothing is left to others who may not be able to do it
    cache.reset()
    ours(llama, prompt(), **given, max_new_tokens=1)
    assert [layer.observed for layer in cache.layers] == [None] * 2 and cache.layers[0].tokens.codes[
        "keys"
    ].length == 130


def test_a_cache_that_cannot_be_cropped_gets_no_step_too_many():
    model = make("qwen3-next")
    notes = []
    cache = TurboQuantCache(model.config, **OPTIONS)
    ours(model, prompt(), **{cache_name(model): cache}, stopping_criteria=[At(153, notes)])
    assert cache.get_seq_length(1) == 152 and len(notes) == 3


@pytest.mark.parametrize("capacity", [None, 400])
def test_a_chat_over_a_given_cache(model, graphs, capacity):
    conversations = []
    for run in (theirs, ours):
        room = capacity if run is ours else None
        cache, ids = TurboQuantCache(model.config, **OPTIONS, max_cache_len=room), prompt()
        for turn in range(3):
            way = {"cache": cache} if run is theirs else {cache_name(model): cache}
            ids = run(model, ids, **way, stopping_criteria=[At(ids.shape[1] + 9)])
            ids = torch.cat([ids, torch.full((2, 15 + turn), 7)], dim=1)
        conversations.append(ids)
    assert torch.equal(*conversations)
    # one graph for three turns, but one that grows has no graph
    assert graphs.made == (0 if capacity is None else 1)


def test_memory_and_graph_serve_the_next_request_like_it(llama, graphs):
    def request(**options):
        out = ours(llama, prompt(**options))
        _, cache = generation._kept[llama]
        return out, cache, cache.layers[0].tokens.arena.data_ptr()

    _, cache, address = request()
    assert cache.options.max_cache_len == 256 and graphs.made == 1
    # a longer one that finds room, and a shorter one
    for tokens in (200, 90, 150):
        out, again, same = request(tokens=tokens)
        assert again is cache and same == address and graphs.made == 1
        assert torch.equal(out, theirs(llama, prompt(tokens=tokens)))
    # no room, another batch, other options
    assert request(tokens=300)[1] is not cache and graphs.made == 2
    assert request(batch=1, tokens=300)[1].layers[0].tokens.arena is not None and graphs.made == 3
    ours(llama, prompt(batch=1, tokens=300), nbits=4)
    assert graphs.made == 4
    ours(llama, prompt(batch=1, tokens=30), nbits=4, max_cache_len=300)
    assert graphs.made == 4


def test_other_weights_are_captured_anew(graphs):
    model = make("llama")
    ours(model, prompt())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    assert torch.equal(ours(model, prompt()), theirs(model, prompt())) and graphs.made == 2
    generation.release(model)
    assert model not in generation._kept


def test_nothing_outlives_the_model():
    model = make("llama")
    cache = TurboQuantCache(model.config, **OPTIONS, max_cache_len=200)
    ours(model, prompt())
    ours(model, prompt(), **{cache_name(model): cache})
    assert cache in decoding._steps
    gone = weakref.ref(model), weakref.ref(cache)
    del model, cache
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_steps_that_no_graph_can_hold_go_on_uncaptured(model, graphs, caplog):
    graphs.error = RuntimeError("operation not permitted when stream is capturing\nand more")
    expected = theirs(model, prompt(), do_sample=True)
    for _ in range(2):
        assert torch.equal(ours(model, prompt(), do_sample=True), expected)
    assert graphs.made == graphs.replays == 0
    # said once, though there were two requests
    assert caplog.text.count("go on uncaptured: operation not permitted when stream is capturing\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("full"), KeyboardInterrupt(), torch.OutOfMemoryError("of memory")], ids=repr
)
@pytest.mark.parametrize("capacity", [None, 256])
def test_a_request_that_fails_leaves_model_and_cache_usable(llama, graphs, error, capacity):
    cache = TurboQuantCache(llama.config, **OPTIONS, max_cache_len=capacity)
    first = ours(llama, prompt(), **{cache_name(llama): cache})
    turn = torch.cat([first, torch.full((2, 20), 7)], dim=1)
    expected = theirs(llama, turn, cache=copy.deepcopy(cache))
    with pytest.raises(type(error)):
        ours(llama, turn, **{cache_name(llama): cache}, streamer=Collector(fails=6, error=error))
    # in the middle of the model, which then has the tokens of a step in some layers
    hook = llama.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        ours(llama, turn, **{cache_name(llama): cache})
    with pytest.raises(type(error)):
        ours(llama, prompt())
    hook.remove()
    assert [layer.get_seq_length() for layer in cache.layers] == [first.shape[1] - 1] * 2
    assert llama not in generation._kept
    assert torch.equal(ours(llama, turn, **{cache_name(llama): cache}), expected)
    assert torch.equal(ours(llama, prompt()), first)


def test_streamers_and_stop_strings(llama, tokenizer):
    streamer = Collector()
    out = ours(llama, prompt(batch=1), streamer=streamer)
    assert streamer.ended and sum(streamer.tokens, []) == out[0].tolist() and len(streamer.tokens) == NEW + 1
    word = tokenizer.decode(theirs(llama, prompt())[0, 155])
    expected = theirs(llama, prompt(), stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(ours(llama, prompt(), stop_strings=[word], tokenizer=tokenizer), expected)
    assert expected[0, 156:].eq(0).all()
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    ours(llama, prompt(batch=1), streamer=iterator)
    assert "".join(iterator) == tokenizer.decode(out[0, 150:])
    with pytest.raises(ValueError, match="`stop_strings` need the `tokenizer`"):
        ours(llama, prompt(), stop_strings=[word])


class Counts(LogitsProcessor):
    """Low tokens after an even number of tokens, high ones after an odd one."""

    def __call__(self, input_ids, scores):
        low = torch.arange(scores.shape[1]) < 50
        return scores.masked_fill(low if input_ids.shape[1] % 2 else ~low, -torch.inf)


def test_processors_and_criteria_of_ones_own(llama, graphs):
    options = {"logits_processor": [Counts()], "stopping_criteria": [At(165)]}
    expected = theirs(llama, prompt(), **options)
    assert torch.equal(ours(llama, prompt(), **options), expected) and expected.shape[1] == 165
    assert not torch.equal(expected, theirs(llama, prompt(), stopping_criteria=[At(165)]))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"output_hidden_states": True}, {"assistant": True}],
    ids=str,
)
def test_the_rest_is_left_to_the_loop_of_transformers(llama, options, caplog):
    warning_once.cache_clear()
    options = dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = make("llama")
    options["return_dict_in_generate"] = True
    expected, got = theirs(llama, prompt(batch=1), **options), ours(llama, prompt(batch=1), **options)
    assert torch.equal(got.sequences, expected.sequences)
    cache = got[cache_name(llama)]
    assert type(cache) is TurboQuantCache and cache.options.nbits == 3
    ours(llama, prompt(batch=1), **options)
    assert caplog.text.count("to the loop of transformers, over the same cache") == 1


def test_other_caches_go_through_the_same_loop(llama, graphs):
    for cache, made in ((DynamicCache(config=llama.config), 0), (StaticCache(llama.config, max_cache_len=200), 1)):
        expected = llama.generate(prompt(), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(ours(llama, prompt(), **{cache_name(llama): cache}), expected)
        assert cache.get_seq_length() == 150 + NEW - 1 and graphs.made == made


def test_what_is_refused(llama):
    cache = TurboQuantCache(llama.config)
    for options, words in (
        ({cache_name(llama): cache, "nbits": 4}, "must not come with another cache, got {'nbits': 4}"),
        ({"cache_implementation": "static", "nbits": 4}, "must not come with another cache"),
        ({"nbits": 9}, "nbits"),
        ({"nbit": 4}, "nbit"),
        ({"num_beams": 2, "streamer": Collector()}, "streamer"),
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0}, "custom_generate='transformers-community"),
    ):
        with pytest.raises(ValueError, match=words):
            ours(llama, prompt(batch=1), **options)
    small = TurboQuantCache(llama.config, max_cache_len=155)
    with pytest.raises(ValueError, match="max_cache_len=155"):
        ours(llama, prompt(), **{cache_name(llama): small})
    assert small.get_seq_length() == 0


def test_the_folder_for_the_hub(llama):
    # transformers looks for what its requirements.txt names
    if not any(importlib.metadata.distributions(name="hf-turboquant")):
        pytest.skip("hf-turboquant is not installed")
    folder = Path(__file__).parent.parent / "examples" / "custom_generate"
    streamer = Collector()
    options = {"trust_remote_code": True, "max_new_tokens": NEW, "do_sample": False, **OPTIONS}
    out = llama.generate(prompt(batch=1), custom_generate=str(folder), streamer=streamer, **options)
    assert torch.equal(out, theirs(llama, prompt(batch=1))) and sum(streamer.tokens, []) == out[0].tolist()
    assert "custom_generate" in (folder / "README.md").read_text().split("---")[1]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cuda_graph_gives_the_tokens_of_generate(kind, dtype):
    model = make(kind).to("cuda", dtype)
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
    assert all(isinstance(graph, Graph) for graph in decoding._steps[cache].graphs.values())
    assert decoding._steps[cache].graphs and not decoding._steps[cache].failed


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
    for round in range(200):
        ours(model, prompt(batch=1 + round % 3, tokens=50 + 97 * (round % 5)).cuda())
        if round % 100 == 99:
            generation.release(model)
            gc.collect()
            torch.cuda.empty_cache()
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1]


@cuda
def test_a_long_answer_takes_no_more_memory_than_its_cache():
    model, used = make("llama").cuda(), []

    class Watch(BaseStreamer):
        def put(self, value):
            used.append(torch.cuda.memory_allocated())

        def end(self):
            pass

    out = ours(model, prompt(batch=1).cuda(), max_new_tokens=10_000, eos_token_id=None, streamer=Watch())
    # the ids so far, int64, are joined anew at each step
    assert out.shape[1] == 10_150 and used[-1] - used[1_000] < 2**20


@cuda
def test_a_turn_over_a_given_cache_replays_the_graph_of_the_last_one():
    model = make("llama").cuda()
    conversations = []
    for run in (ours, theirs):
        cache, ids = TurboQuantCache(model.config, **OPTIONS, max_cache_len=400), prompt().cuda()
        for _ in range(3):
            if run is ours:
                ids = ours(model, ids, **{cache_name(model): cache})
                graphs = dict(decoding._steps[cache].graphs)
            else:
                ids = theirs(model, ids, cache=cache, disable_compile=True)
            ids = torch.cat([ids, torch.full((2, 15), 7, device="cuda")], dim=1)
        conversations.append(ids)
    assert torch.equal(*conversations)
    assert len(graphs) == 1


def test_a_request_of_one_token_keeps_no_prompt(llama, graphs):
    ours(llama, prompt(), max_new_tokens=1)
    assert [layer.pending for layer in generation._kept[llama][1].layers] == [None] * 2
