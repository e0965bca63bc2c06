"""Which path runs, through real models: plain sdpa, "turboquant" and eager."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_turboquant import TurboQuantCache, ops, states

pytestmark = pytest.mark.usefixtures("early_learning")

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=99,
    eos_token_id=2,
)


@pytest.fixture
def paths(monkeypatch):
    """What ran: attention on codes, or dequantised layers."""
    ran = []
    attention, dequantize = ops.attention, states.LayerStates.dequantize
    monkeypatch.setattr(ops, "attention", lambda *a, **k: ran.append("codes") or attention(*a, **k))
    monkeypatch.setattr(
        states.LayerStates, "dequantize", lambda self, role: ran.append("dequantized") or dequantize(self, role)
    )
    return ran


def run(implementation, padded, paths, pieces=(40, 1, 4, 1), **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    model.set_attn_implementation(implementation)
    ids, mask = torch.randint(3, 99, (2, sum(pieces))), torch.ones(2, sum(pieces), dtype=torch.long)
    mask[0, : 7 if padded else 0] = 0
    # without conditioning: eager attention shows no query, so it would not be the same for all
    cache = TurboQuantCache(CONFIG, nbits=3, residual_length=8, condition="none")
    start, after_prefill = 0, []
    for piece in pieces:
        stop = start + piece
        with torch.no_grad():
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **options)
        start = stop
        after_prefill.append(list(paths))
        paths.clear()
    return out, after_prefill


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("implementation", ("sdpa", "turboquant", "eager"))
def test_path(implementation, padded, paths):
    out, ran = run(implementation, padded, paths)
    # the first prefill is exact; then every layer of every step
    expected = ["codes"] * 2 if implementation != "eager" else ["dequantized"] * 4
    assert ran == [[], expected, expected, expected]
    reference, _ = run("sdpa", padded, paths)
    assert (out.logits - reference.logits).norm() < 1e-5 * reference.logits.norm()


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
        past_key_values=TurboQuantCache(CONFIG, residual_length=8),
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
    config = Gemma2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=99,
        sliding_window=16,
        # so low that it matters for a random model
        attn_logit_softcapping=0.05,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
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
                outputs[implementation] = model(piece, past_key_values=cache).logits
    assert (outputs["turboquant"] - outputs["eager"]).norm() < 1e-5 * outputs["eager"].norm()
    assert ("codes" in paths) == with_cache


def test_full_precision_cache_under_our_attention(paths):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    ids, logits = torch.randint(3, 99, (2, 20)), []
    for implementation in ("sdpa", "turboquant"):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=CONFIG)
        with torch.no_grad():
            model(ids[:, :15], past_key_values=cache)
            logits.append(model(ids[:, 15:], past_key_values=cache).logits)
    assert torch.equal(*logits) and paths == []


def test_backends(monkeypatch):
    states = torch.randn(2, 1, 2, 10, 32)
    cache = TurboQuantCache(CONFIG, backend="triton", nbits=8, residual_length=0, condition="none")
    with pytest.raises(ValueError, match="`backend='triton'` cannot run `quantize` here: .*Use `backend='auto'`"):
        cache.update(*states, 0)
    assert cache.get_seq_length() == 0
    monkeypatch.setattr(ops, "quantize_kernels", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        TurboQuantCache(CONFIG, backend="triton", residual_length=0, condition="none").update(*states, 0)
    cache = TurboQuantCache(CONFIG, backend="torch", residual_length=0, condition="none")
    cache.update(*states, 0)
    assert cache.layers[0].codes["keys"].length == 6


def test_import_without_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, hf_turboquant\n"
        "from hf_turboquant import ops\n"
        "assert ops.attention_kernels is None\n"
        "cache = hf_turboquant.TurboQuantCache(residual_length=0, condition='none')\n"
        "cache.update(*torch.randn(2, 1, 2, 10, 32), 0)\n"
        "print(cache.layers[0].codes['keys'].length)\n"
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
