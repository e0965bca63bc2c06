"""Every way of generating, with `DynamicCache` and with ours: the same tokens at 8 bits, and a run at the default."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=99, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# a window so short that most of what attention reads is codes; with two seeds of three, as with other noise of this
# size, some way meets a tie that `check` cannot see: of beams, of a sampled token, in a padded row
PRECISE = {"nbits": 8, "residual_length": 16, "seed": 6}
PROMPT, NEW_TOKENS = 160, 12
# in nats per token: 8 bits moved the scores of SmolLM2's beams by up to 0.0016
EIGHT_BITS_SCORE = 0.0016
TABLE = "| way of generating | model | same tokens at 8 bits |"


@dataclass
class Run:
    """One way, with one cache: what was generated and from what."""

    model: LlamaForCausalLM
    tokenizer: object
    new_cache: object
    prompt: torch.Tensor
    draft: LlamaForCausalLM | None = None
    caches: list = field(default_factory=list)

    def cache(self):
        self.caches.append(self.new_cache())
        return self.caches[-1]

    def generate(self, ids=None, mask=None, seed=0, model=None, **options):
        ids = self.prompt if ids is None else ids
        name = cache_name(self.model)
        options.setdefault(name, None) or options.update({name: self.cache()})
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False} | options
        torch.manual_seed(seed)
        mask = torch.ones_like(ids) if mask is None else mask
        return (model or self.model).generate(ids, attention_mask=mask, **options)

    def two_rows(self):
        return torch.cat([self.prompt, self.prompt.flip(1)])


def left_padded(run):
    ids = run.two_rows()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    return run.generate(ids.masked_fill(mask == 0, 0), mask)


def chat(run):
    """Three turns, one cache: each prompt is the whole conversation."""
    cache, conversation = run.cache(), run.prompt[:, :100]
    for turn in range(3):
        conversation = torch.cat([conversation, run.prompt[:, 100 + 12 * turn : 112 + 12 * turn]], dim=1)
        conversation = run.generate(conversation, **{cache_name(run.model): cache}, max_new_tokens=6, min_new_tokens=6)
    assert cache.get_seq_length() == conversation.shape[1] - 1
    return conversation


def from_a_prefix(run):
    """Two questions about one document, which is prefilled once."""
    prefix, answers = run.cache(), []
    with torch.no_grad():
        run.model(run.prompt[:, :140], **{cache_name(run.model): prefix})
    for question in (run.prompt[:, 140:], run.prompt[:, 20:50]):
        twin = copy.deepcopy(prefix)
        whole = torch.cat([run.prompt[:, :140], question], dim=1)
        answers.append(run.generate(whole, **{cache_name(run.model): twin})[0])
        assert twin.get_seq_length() == answers[-1].shape[0] - 1
    # the answers did not touch it
    assert prefix.get_seq_length() == 140
    return torch.cat(answers)


def twice_with_reset(run):
    cache = run.cache()
    first = run.generate(**{cache_name(run.model): cache})
    # in transformers 5.17 DynamicCache.reset keeps the length: a new one is what reset should give
    cache.reset() if isinstance(cache, TurboQuantCache) else cache.__init__(config=run.model.config)
    # another batch size
    second = run.generate(run.two_rows(), **{cache_name(run.model): cache})
    assert torch.equal(first[0], second[0]) or run.tokenizer is not None
    return torch.cat([first, second])


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def streaming(run):
    streamer = Collector()
    out = run.generate(streamer=streamer)
    assert streamer.ended and streamer.tokens == out[0].tolist()
    return out


def text_streaming(run):
    """The streamers of transformers give the text that the tokens make."""
    iterator = TextIteratorStreamer(run.tokenizer, skip_prompt=True)
    out = run.generate(streamer=iterator)
    expected = run.tokenizer.decode(out[0, run.prompt.shape[1] :])
    assert "".join(iterator) == expected
    pieces = []
    printer = TextStreamer(run.tokenizer, skip_prompt=True)
    printer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    assert torch.equal(out, run.generate(streamer=printer)) and "".join(pieces) == expected
    return out


def text_pipeline(run):
    generator = pipeline("text-generation", model=run.model, tokenizer=run.tokenizer)
    text = run.tokenizer.decode(run.prompt[0])
    (out,) = generator(
        text, **{cache_name(run.model): run.cache()}, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False
    )
    assert out["generated_text"]
    return run.tokenizer(out["generated_text"], return_tensors="pt")["input_ids"]


def chat_pipeline(run):
    """A conversation through the pipeline, with one cache for both turns."""
    generator = pipeline("text-generation", model=run.model, tokenizer=run.tokenizer)
    cache, messages = run.cache(), []
    for question in (run.tokenizer.decode(run.prompt[0, :120]), "And in one word?"):
        messages.append({"role": "user", "content": question})
        options = {cache_name(run.model): cache, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        messages = generator(messages, **options)[0]["generated_text"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    return run.tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]


def beams(run):
    return run.generate(num_beams=3, num_return_sequences=2, max_new_tokens=8, min_new_tokens=8)


def batched_beams(run):
    return run.generate(run.two_rows(), num_beams=4, num_return_sequences=3)


def stepwise(run):
    """`model.forward` in a loop, as training scripts and servers do."""
    cache, ids = run.cache(), run.prompt
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = run.model(ids[:, cache.get_seq_length() :], **{cache_name(run.model): cache}).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


WAYS = {
    "greedy": lambda run: run.generate(),
    "greedy, batch of 2": lambda run: run.generate(run.two_rows()),
    "forward in a loop": stepwise,
    "sampling": lambda run: run.generate(do_sample=True, top_k=20),
    "sampling, several sequences": lambda run: run.generate(do_sample=True, top_p=0.9, num_return_sequences=3),
    "beam search": lambda run: run.generate(num_beams=3),
    "beam search, several sequences": batched_beams,
    "beam sampling": lambda run: run.generate(do_sample=True, num_beams=3, num_return_sequences=2, top_k=20),
    "repetition penalty": lambda run: run.generate(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "draft model": lambda run: run.generate(assistant_model=run.draft),
    "draft model, sampling": lambda run: run.generate(assistant_model=run.draft, do_sample=True, top_k=20),
    "early exit": lambda run: run.generate(assistant_early_exit=1),
    "prompt lookup": lambda run: run.generate(prompt_lookup_num_tokens=5),
    "left padding": left_padded,
    "chunked prefill": lambda run: run.generate(prefill_chunk_size=48),
    "chunked prefill, left padding": lambda run: run.generate(
        run.two_rows(),
        (torch.arange(PROMPT, device=run.prompt.device) >= 9).long().expand(2, -1),
        prefill_chunk_size=10,
    ),
    "streaming": streaming,
    "chat": chat,
    "saved prefix": from_a_prefix,
    "reset and again": twice_with_reset,
}
REAL_WAYS = {
    name: WAYS[name]
    for name in (
        "greedy",
        "sampling",
        "draft model",
        "prompt lookup",
        "left padding",
        "chunked prefill",
        "saved prefix",
    )
} | {
    "beam search": beams,
    "beam search, batch of 2": batched_beams,
    "text streaming": text_streaming,
    "pipeline": text_pipeline,
    "chat pipeline": chat_pipeline,
}
# in a cache that several of them share, the last tokens are still exact or cropped: this many codes at least
LEAST_CODES = 80


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    # weights so large that logits differ and a few bits matter
    config = copy.deepcopy(CONFIG)
    config.initializer_range = 0.1
    model = LlamaForCausalLM(config).eval()
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    prompt = torch.randint(3, 99, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return model, draft, None, prompt


@pytest.fixture(scope="module")
def real(smollm2):
    model, tokenizer = smollm2
    text = (
        "The rain had stopped before dawn, and the harbour lay grey and still. Marta counted the boats as she walked: "
        "eleven, where the day before there had been twelve. The missing one was her brother's, a narrow green "
        "boat with a torn sail, which he never took beyond the lighthouse. She asked the old man who mended nets "
        "whether he had seen it leave. He had not, he said, but the dogs had barked around four, and there had been a "
        "lamp on the quay. The lamp was still there when she came to it, cold, and beside it a coil of rope, a tin "
        "of tobacco and a letter with her name on it. She did not open it at once. She counted the boats again: "
        "eleven. Then she sat down on the wet stones, with her back against the wall, and opened the letter. It said"
    )
    prompt = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    # its own first 20 layers: a draft that is sometimes right
    draft = copy.copy(model)
    draft = type(model)(copy.deepcopy(model.config)).to(model.device, model.dtype).eval()
    draft.load_state_dict(model.state_dict())
    draft.model.layers = draft.model.layers[:20]
    draft.config.num_hidden_layers = 20
    return model, draft, tokenizer, prompt


def generate_both(way, setup, options):
    model, draft, tokenizer, prompt = setup
    results = []
    for new_cache in (
        lambda: DynamicCache(config=model.config),
        lambda: TurboQuantCache(model.config, **options),
    ):
        run = Run(model, tokenizer, new_cache, prompt, draft)
        results.append((way(run), run.caches))
    return results


def check(results, model, beams_of=None):
    (expected, _), (ours, caches) = results
    assert caches
    for cache in caches:
        # codes hold most of the tokens of every layer
        assert all(layer.tokens.quantized >= LEAST_CODES for layer in cache.layers)
        assert all(layer.get_seq_length() == cache.get_seq_length() for layer in cache.layers)
    assert expected.shape == ours.shape
    if torch.equal(expected, ours):
        return "yes"
    for row, our_row in zip(expected, ours, strict=True):
        if torch.equal(row, our_row):
            continue
        if beams_of is not None:
            # either is a best beam where the full model gives them the same score, but for what 8 bits change
            scores = [score(model, tokens, beams_of) for tokens in (row, our_row)]
            assert abs(scores[0] - scores[1]) < EIGHT_BITS_SCORE, f"other beams, of scores {scores}"
            continue
        # a first difference is allowed where the full cache itself all but ties
        first = int((row != our_row).nonzero()[0])
        with torch.inference_mode():
            logits = model(row[None, :first]).logits[0, -1].float()
        gap = logits[row[first]] - logits[our_row[first]]
        assert gap.abs() < 0.02 * logits.std(), f"tokens differ from {first} on; logits are {gap:.3f} apart"
    return "up to a tie"


def score(model, tokens, prompt_length):
    """What beam search ranks a sequence by: the mean log-probability of its new tokens."""
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0, prompt_length - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, tokens[prompt_length:, None]).mean().item()


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_at_8_bits(tiny, way, record_property):
    same = check(generate_both(WAYS[way], tiny, PRECISE), tiny[0])
    record_property(TABLE, f"| {way} | tiny Llama | {same} |")


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_the_default_runs(tiny, way):
    model, draft, tokenizer, prompt = tiny
    run = Run(model, tokenizer, lambda: TurboQuantCache(model.config), prompt, draft)
    out = way(run)
    assert out.shape[-1] >= NEW_TOKENS and int(out.max()) < model.config.vocab_size
    assert all(layer.condition == "attention" for cache in run.caches for layer in cache.layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU no kernel is compiled")
@pytest.mark.parametrize("capacity", (None, PROMPT + 100))
@pytest.mark.parametrize("way", WAYS)
def test_kernels_give_the_tokens_of_the_reference(tiny, way, capacity):
    """On a GPU; with static capacity steps are compiled, where transformers compiles them."""
    model, draft = (copy.deepcopy(part).cuda() for part in tiny[:2])
    options = {"nbits": 4, "residual_length": 16}
    results = []
    for changes in ({"backend": "torch"}, {"backend": "triton", "max_cache_len": capacity}):
        new_cache = lambda changes=changes: TurboQuantCache(model.config, **options, **changes)  # noqa: E731
        run = Run(model, None, new_cache, tiny[3].cuda(), draft)
        results.append(WAYS[way](run))
        for layer in (layer for cache in run.caches for layer in cache.layers):
            layer.measure()
            assert layer.tokens.quantized >= LEAST_CODES
    assert torch.equal(*results)


@pytest.mark.parametrize("way", REAL_WAYS)
def test_same_tokens_of_a_real_model(real, way, record_property):
    beams_of = real[3].shape[1] if way.startswith("beam search") else None
    same = check(generate_both(REAL_WAYS[way], real, PRECISE), real[0], beams_of)
    record_property(TABLE, f"| {way} | SmolLM2-135M-Instruct | {same} |")
