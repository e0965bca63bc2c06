"""Which path runs, through real models: plain sdpa, "turboquant" and eager."""

import copy
import logging
import re
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, masking_utils
from transformers.integrations import flash_attention
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_turboquant import QuantizedStates, TurboQuantCache, TurboQuantConfig, handle, ops
from hf_turboquant._supported import cache_name
from hf_turboquant.attention import turboquant_attention_forward
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.traced import handles_of

pytestmark = pytest.mark.usefixtures("early_learning")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 99,
}
CONFIG = LlamaConfig(**SHAPE, eos_token_id=2)
GEMMA2 = Gemma2Config(
    **SHAPE,
    sliding_window=16,
    # so low that it matters for a random model
    attn_logit_softcapping=0.05,
)


@pytest.fixture
def paths(monkeypatch):
    """What ran: attention on codes, or dequantized layers."""
    ran = []
    attention, dequantize = ops.attention, ops.dequantize_all
    monkeypatch.setattr(ops, "attention", lambda *a, **k: ran.append("codes") or attention(*a, **k))
    monkeypatch.setattr(ops, "dequantize_all", lambda *a: ran.append("dequantized") or dequantize(*a))
    return ran


@pytest.fixture
def implementations(monkeypatch):
    """Lets the implementations run that need a C++ compiler or a GPU."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **{**options, "backend": "eager"}))
    # compiled once in a process
    monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)
    # compiling the mask takes longer than all the rest
    create = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, **k: create(*a, **{**k, "_compile": False}))

    def flash(query, key, value, mask, is_causal, softmax_scale, **_):
        # the kernels read memory, and handles have none
        assert not any(isinstance(x, QuantizedStates) for x in (query, key, value))
        causal = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
        mask = causal if mask is None else causal & mask[:, None, None, : key.shape[1]].bool()
        states = [x.transpose(1, 2) for x in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*states, mask, scale=softmax_scale, enable_gqa=True)
        # rows of padding see nothing
        return out.transpose(1, 2).nan_to_num()

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)


def run(implementation, padded, paths, pieces=(40, 1, 4, 1), cache=None, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    # not by `set_attn_implementation`, which asks for the kernels
    model.config._attn_implementation = implementation
    ids, mask = torch.randint(3, 99, (2, sum(pieces))), torch.ones(2, sum(pieces), dtype=torch.long)
    mask[0, : 7 if padded else 0] = 0
    if cache is None:
        # without conditioning: eager attention shows no query, so it would not be the same for all
        cache = TurboQuantCache(CONFIG, nbits=3, residual_length=8, condition="none")
    start, after_prefill = 0, []
    for piece in pieces:
        stop = start + piece
        with torch.no_grad():
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **{cache_name(model): cache}, **options)
        start = stop
        after_prefill.append(list(paths))
        paths.clear()
    return out, after_prefill


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("implementation", sorted({"eager", *ALL_ATTENTION_FUNCTIONS}))
def test_path(implementation, padded, paths, implementations):
    try:
        exact, _ = run(implementation, padded, paths, cache=DynamicCache(config=CONFIG))
    except (TypeError, ValueError) as error:
        # continuous batching has a cache of its own, and fails with every other
        with pytest.raises(type(error), match=re.escape(str(error)[:50])):
            run(implementation, padded, paths)
        return
    out, ran = run(implementation, padded, paths)
    # the first prefill is exact; then every layer of every step
    expected = ["codes"] * 2 if implementation in ("sdpa", "turboquant") else ["dequantized"] * 4
    assert ran == [[], expected, expected, expected]
    assert (out.logits - exact.logits).norm() < 0.1 * exact.logits.norm()
    # what continuous batching takes has no causal mask
    reference, _ = run("sdpa", padded, paths)
    assert "paged" in implementation or (out.logits - reference.logits).norm() < 1e-5 * reference.logits.norm()


@pytest.mark.parametrize("capacity", (None, 60))
@pytest.mark.parametrize("inside", [(True, True, True), (True, False, False), (False, True, True), (True, False, True)])
@pytest.mark.parametrize("implementation", ("sdpa", "turboquant", "eager"))
def test_autocast(implementation, inside, capacity):
    """Of a model in fp32, rotary embeddings leave keys in fp32 and values in bf16; autocast may begin or end."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    model.set_attn_implementation(implementation)
    ids, logits = torch.randint(3, 99, (2, 50)), []
    for cache in (
        DynamicCache(config=CONFIG),
        TurboQuantCache(CONFIG, residual_length=8, nbits=8, max_cache_len=capacity),
    ):
        for piece, enabled in zip(ids.split([40, 9, 1], dim=1), inside, strict=True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled):
                out = model(piece, **{cache_name(model): cache}).logits
        logits.append(out.float())
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()
    assert cache.layers[0].tokens.quantized > 0


def gradients(model, cache, ids, prompt, names, train_prompt=False):
    """Of a loss over the tokens after a cached prompt."""
    model.zero_grad()
    with torch.set_grad_enabled(train_prompt):
        model(ids[:, :prompt], **{cache_name(model): cache})
    model(ids[:, prompt:], **{cache_name(model): cache}).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if any(part in name for part in names)}


@pytest.mark.parametrize(
    "options", ({}, {"condition": "none"}, {"residual_length": 0}, {"max_cache_len": 90, "condition": "none"}), ids=str
)
@pytest.mark.parametrize("implementation", ("sdpa", "turboquant", "eager"))
@pytest.mark.parametrize("model_type", ("llama", "gemma2", "only queries"))
def test_gradients_flow_to_the_tokens_of_the_call(model_type, implementation, options):
    torch.manual_seed(0)
    # softcap has a path of its own; sdpa has none
    kind, config = (Gemma2ForCausalLM, GEMMA2) if model_type == "gemma2" else (LlamaForCausalLM, CONFIG)
    if model_type == "gemma2" and implementation == "sdpa":
        pytest.skip("sdpa has no softcap")
    model, names = kind(copy.deepcopy(config)).train(), ("q_proj", "k_proj", "v_proj", "embed")
    if model_type == "only queries":
        names = ("layers.0.self_attn.q_proj",)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names[0] in name)
    model.set_attn_implementation(implementation)
    # all exact, and with codes; as few as the window and more
    for prompt, tokens in ((10, 4), (60, 1), (60, 4), (60, 20)):
        ids = torch.randint(3, 99, (2, prompt + tokens))
        cache = TurboQuantCache(config, **{"nbits": 8, "residual_length": 16, **options})
        expected = gradients(model, DynamicCache(config=config), ids, prompt, names)
        for name, found in gradients(model, cache, ids, prompt, names).items():
            assert (found - expected[name]).norm() < 0.05 * expected[name].norm(), (name, prompt, tokens)


@pytest.mark.parametrize("prompt", (10, 60))
def test_gradients_that_are_cut_off_are_said_once(prompt, caplog):
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(copy.deepcopy(CONFIG)).train(), torch.randint(3, 99, (1, prompt + 4))
    found = []
    for train_prompt in (False, True, True):
        handle.log_cut_off.cache_clear()
        caplog.clear()
        cache = TurboQuantCache(CONFIG, residual_length=16)
        found.append(gradients(model, cache, ids, prompt, ("k_proj",), train_prompt))
        said = [record.getMessage() for record in caplog.records if "Gradients" in record.getMessage()]
        assert len(said) == train_prompt
    assert "use a `DynamicCache` to train with them" in said[0]
    # what the prompt was computed for does not matter
    assert all(torch.equal(found[0][name], x) for name, x in found[1].items())


def test_eager_attention_says_once_that_it_dequantizes(paths, caplog):
    handle._log_dequantize.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_turboquant.handle"):
        run("eager", False, paths)
    assert len(caplog.records) == 1 and "attn_implementation='sdpa'" in caplog.text


@pytest.mark.parametrize("implementation", ("sdpa", "turboquant"))
def test_generate_reaches_the_codes(implementation, paths):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 99, (1, 30))
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        **{cache_name(model): TurboQuantCache(CONFIG, residual_length=8)},
    )
    assert paths == ["codes"] * 2 * 4


def test_probabilities_come_from_the_scores(paths):
    out, _ = run("turboquant", True, paths, output_attentions=True)
    reference, _ = run("eager", True, paths, output_attentions=True)
    for probabilities, expected in zip(out.attentions, reference.attentions, strict=True):
        assert probabilities.shape == (2, 4, 1, 46)
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_cache", (True, False))
def test_softcap(with_cache, paths):
    torch.manual_seed(0)
    model, config = Gemma2ForCausalLM(copy.deepcopy(GEMMA2)).eval(), GEMMA2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ids, outputs = torch.randint(3, 99, (2, 300)), {}
    for implementation in ("eager", "turboquant"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            if not with_cache:
                outputs[implementation] = model(ids, use_cache=False).logits
                continue
            cache = TurboQuantCache(config, residual_length=8, condition="none")
            for piece in (ids[:, :290], ids[:, 290:291], ids[:, 291:295]):
                outputs[implementation] = model(piece, **{cache_name(model): cache}).logits
    assert (outputs["turboquant"] - outputs["eager"]).norm() < 1e-5 * outputs["eager"].norm()
    assert ("codes" in paths) == with_cache


@pytest.mark.parametrize("tokens", (6, 200), ids=("exact", "codes"))
@pytest.mark.parametrize("options", ({}, {"softcap": 0.5}, {"output_attentions": True}), ids=str)
def test_dropout_is_applied_on_every_path(options, tokens, paths):
    """All probabilities are dropped, also where no gradient flows."""
    layer, module = TurboQuantLayer(TurboQuantConfig(condition="none", residual_length=8), 0), torch.nn.Module()
    module.num_key_value_groups = 2
    layer.update(*torch.randn(2, 1, 2, tokens, 32))
    query, held = torch.randn(1, 4, 1, 32), layer.update(*torch.randn(2, 1, 2, 1, 32))
    with torch.no_grad():
        kept, dropped = (
            turboquant_attention_forward(module, query, *held, None, dropout=p, **options)[0] for p in (0.0, 1.0)
        )
    assert kept.abs().min() > 0 and dropped.abs().max() == 0
    assert ("dequantized" in paths) == (tokens == 200)


@pytest.mark.parametrize("options", ({"dropout": 0.1}, {"is_causal": True}), ids=str)
def test_a_compiled_step_refuses_what_it_does_not_know(options):
    keys, values = handles_of(torch.empty(0), "an arena", 300, *torch.randn(2, 1, 2, 4, 32))
    with pytest.raises(ValueError, match="must attend without dropout and `is_causal`"):
        turboquant_attention_forward(torch.nn.Module(), torch.randn(1, 4, 4, 32), keys, values, None, **options)


def test_full_precision_cache_under_our_attention(paths):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    ids, logits = torch.randint(3, 99, (2, 20)), []
    for implementation in ("sdpa", "turboquant"):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=CONFIG)
        with torch.no_grad():
            model(ids[:, :15], **{cache_name(model): cache})
            logits.append(model(ids[:, 15:], **{cache_name(model): cache}).logits)
    assert torch.equal(*logits) and paths == []


def test_backends(monkeypatch):
    states = torch.randn(2, 1, 2, 10, 32)
    cache = TurboQuantCache(CONFIG, backend="triton", residual_length=0, condition="none")
    with pytest.raises(ValueError, match="`backend='triton'` cannot run `quantize` here: .*Use `backend='auto'`"):
        cache.update(*states.double(), 0)
    assert cache.get_seq_length() == 0
    monkeypatch.setattr(ops, "quantize_kernels", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        TurboQuantCache(CONFIG, backend="triton", residual_length=0, condition="none").update(*states, 0)
    cache = TurboQuantCache(CONFIG, backend="torch", residual_length=0, condition="none")
    cache.update(*states, 0)
    assert cache.layers[0].tokens.quantized == 6


def test_import_without_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, hf_turboquant\n"
        "from hf_turboquant import ops\n"
        "assert ops.attention_kernels is None\n"
        "cache = hf_turboquant.TurboQuantCache(residual_length=0, condition='none')\n"
        "cache.update(*torch.randn(2, 1, 2, 10, 32), 0)\n"
        "print(cache.layers[0].tokens.codes['keys'].length)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "6", result.stderr


def test_auto_says_once_what_it_took(caplog):
    ops._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="hf_turboquant.ops"):
        for _ in range(2):
            cache = TurboQuantCache(CONFIG, residual_length=0, condition="none")
            cache.update(*torch.randn(2, 1, 2, 10, 32), 0)
    assert [record.getMessage() for record in caplog.records] == [
        "quantize runs on the torch reference: the tensors are on cpu."
    ]
