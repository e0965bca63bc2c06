"""The estimator against facts, against arithmetic, and against the bytes that real caches hold."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from test_models import ROWS, EncoderDecoderRow
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_turboquant import TurboQuantCache, cli
from hf_turboquant.estimate import MAX_CONTEXT, Estimate

CONFIGS = json.loads((Path(__file__).parent / "model_configs.json").read_text())
# layers that hold anything, those that are compressed, and what these keep of a token: heads × (key + value)
KNOWN = {
    "SmolLM2-135M": (30, 30, 3 * (64 + 64)),
    "Llama-3.2-1B": (16, 16, 8 * (64 + 64)),
    "Llama-3.1-8B": (32, 32, 8 * (128 + 128)),
    "Llama-3.3-70B": (80, 80, 8 * (128 + 128)),
    "Mistral-7B-v0.3": (32, 32, 8 * (128 + 128)),
    "Qwen2.5-3B": (36, 36, 2 * (128 + 128)),
    "Qwen3-8B": (36, 36, 8 * (128 + 128)),
    "Qwen3-30B-A3B": (48, 48, 4 * (128 + 128)),
    "Qwen3-Next-80B-A3B": (48, 12, 2 * (256 + 256)),
    "Qwen3.5-35B-A3B": (40, 10, 2 * (256 + 256)),
    "gemma-2-9b": (42, 21, 8 * (256 + 256)),
    "gemma-3-27b": (62, 10, 16 * (128 + 128)),
    # 15 of its 35 layers read what others keep
    "gemma-3n-E4B": (20, 4, 2 * (256 + 256)),
    "gpt-oss-20b": (24, 12, 8 * (64 + 64)),
    "DeepSeek-V3": (61, 61, 512 + 64),
    "Jamba-v0.1": (32, 4, 8 * (128 + 128)),
    "Mamba2-2.7B": (64, 0, 0),
}
DECODERS = [row for row in ROWS if not isinstance(row, EncoderDecoderRow)]


@functools.cache
def estimate(name):
    return Estimate.from_config(AutoConfig.for_model(**CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_well_known_models(name):
    layers, compressed, coordinates = KNOWN[name]
    found = estimate(name)
    held = sum(bool(cost.token_bytes or cost.state_bytes) for cost in found.layers)
    assert (held, len(found.compressed())) == (layers, compressed)
    growth = found.full_bytes(100_001) - found.full_bytes(100_000)
    assert growth == compressed * coordinates * 2


def test_a_hybrid_at_200k_tokens_and_a_small_model_at_8k():
    hybrid = estimate("Qwen3.5-35B-A3B")
    assert hybrid.compressed() == list(range(3, 40, 4))
    assert hybrid.full_bytes(200_000) == 4_096_000_000
    assert hybrid.full_bytes(200_000, fp8=True) == 2_048_000_000
    # 30 recurrent states in float32 and 30 convolutions of 4 steps in bf16
    assert hybrid.state_bytes == 30 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)
    assert estimate("Qwen2.5-3B").full_bytes(8192) == 301_989_888


def test_the_sizes_of_other_kinds():
    windows = {cost.window for cost in estimate("gpt-oss-20b").layers}
    # as the model card gives it, though the current token is one of them and is not kept
    assert windows == {None, 128}
    gemma = estimate("gemma-3-27b")
    assert {str(cost) for cost in gemma.layers} == {
        f"{kind}, 16 KV heads of 128" for kind in ("full attention", "sliding window of 1,024 tokens")
    }
    assert gemma.full_bytes(10**5) - gemma.full_bytes(1023) == 10 * 16 * 256 * 2 * (10**5 - 1023)
    # an fp8 cache takes sliding windows too
    assert 2 * gemma.full_bytes(10**5, fp8=True) == gemma.full_bytes(10**5)
    mamba = estimate("Mamba2-2.7B")
    assert mamba.full_bytes(10**6) == 0 and mamba.longest_context(10**9, nbits=4) == MAX_CONTEXT
    assert mamba.longest_context(10**6) == 0


@pytest.mark.parametrize("row", DECODERS, ids=lambda row: row.name)
def test_bytes_of_real_caches(row):
    model = row.model()
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    options = {"nbits": 3, "residual_length": 8, "sink_length": 2, "condition": "center"}
    cache = TurboQuantCache(model.config, **options)
    with torch.no_grad():
        row.forward(model, tokens, torch.ones_like(tokens), **{row.cache_name: cache, "use_cache": True})
    found = Estimate.from_config(model.config, torch.float32)
    held, expected = cache.memory(), found.memory(40, 2, **options)
    assert expected.total_bytes == pytest.approx(held.total_bytes, rel=0.01)
    assert expected.full_bytes == pytest.approx(held.full_bytes, rel=0.01)
    assert expected.codes_bytes == held.codes_bytes and expected.exact_bytes == held.exact_bytes
    assert (held.codes_bytes > 0) == (row.compressed > 0)


def test_bytes_of_the_default_cache_and_of_skipped_layers():
    row = DECODERS[0]
    model = row.model()
    tokens = torch.randint(3, 90, (1, 700), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"nbits": 2, "skip_layers": (0, -1), "key_estimator": "rescaled"}):
        cache = TurboQuantCache(model.config, **options)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        assert cache.layers[1].condition == "attention"
        found = Estimate.from_config(model.config, torch.float32)
        assert found.memory(700, 1, **options) == cache.memory()


def test_bytes_of_half_bits():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=99,
    )  # fmt: skip
    cache = TurboQuantCache(config, nbits=2.5)
    with torch.no_grad():
        LlamaForCausalLM(config)(torch.randint(3, 90, (1, 300)), past_key_values=cache)
    assert Estimate.from_config(config, torch.float32).memory(300, 1, nbits=2.5) == cache.memory()


def test_the_longest_context_is_the_longest():
    found, budget = estimate("Qwen3-8B"), 24 * 10**9
    longest = found.longest_context(budget, batch=2, nbits=4)
    assert found.memory(longest, 2, nbits=4).total_bytes <= budget
    assert found.memory(longest + 1, 2, nbits=4).total_bytes > budget
    full = found.longest_context(budget)
    assert full == budget // (36 * 8 * 256 * 2)
    # fits a little more than the steady ratio says less the spare capacity
    assert 3.5 < found.longest_context(budget, nbits=4) / full < 4


def test_encoder_decoders_are_refused():
    (row, *_) = [row for row in ROWS if row.name == "whisper"]
    with pytest.raises(ValueError, match="decoder-only"):
        Estimate.from_config(row.config())


def test_a_model_in_place_of_its_config():
    with pytest.raises(ValueError, match="got LlamaForCausalLM. Use `model.config`"):
        Estimate.from_config(DECODERS[0].model())


@pytest.fixture
def config_file(tmp_path):
    def write(name):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(CONFIGS[name]))
        return str(path)

    return write


def test_the_command(config_file, capsys):
    arguments = ["estimate", config_file("Qwen3.5-35B-A3B"), "--contexts", "200000", "--budget", "24GB"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "10 × full attention, 2 KV heads of 256: compressed" in text and "4.1 GB" in text
    assert "10 of 40 layers hold a KV cache" in text and "64.9 MB of states" in text
    assert "this cache can't help" not in text
    # bf16, fp8, then 4, 3 and 2 bits, each with how many times smaller it is
    (row,) = re.findall(r"^ +200,000 .*$", text, re.MULTILINE)
    assert re.findall(r"([\d.]+)×", row) == ["2.0", "3.8", "5.0", "7.3"] and row.count("B") == 5
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes"]["200000"]["bf16"] == 4_096_000_000 and len(found["compressed"]) == 10
    assert found["longest_context"]["4 bits"] > 3 * found["longest_context"]["bf16"]
    # without `--contexts` and `--budget`
    capsys.readouterr()
    assert cli.main(["estimate", config_file("Qwen3-8B"), "--nbits", "2.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["kv_bytes"]) == ["8192", "32768", "131072"] and not found["longest_context"]
    assert list(found["kv_bytes"]["8192"]) == ["bf16", "fp8", "2.5 bits"]
    # at 1,000 tokens the states of linear attention are most of the cache
    assert cli.main(["estimate", config_file("Qwen3.5-35B-A3B"), "--contexts", "1000"]) == 0
    assert "this cache can't help much" in capsys.readouterr().out
    assert cli.main(["estimate", config_file("Qwen3-8B"), "--contexts", "8k", "128K", "1M", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["kv_bytes"]) == ["8192", "131072", "1048576"]
    assert cli.main(["estimate", config_file("Mamba2-2.7B"), "--budget", "1G"]) == 0
    assert "4 bits any" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such/model"], "Check the name, the path and the network"),
        (["README.md"], "Check the name, the path and the network"),
        (["{config}", "--nbits", "9"], "`nbits` must be"),
        (["{config}", "--nbits", "nan"], "`nbits` must be"),
        (["{config}", "--nbits", "inf"], "`nbits` must be"),
    ],
)
def test_bad_input_is_one_line(config_file, capsys, monkeypatch, arguments, message):
    # the hub is asked no questions from tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [argument.format(config=config_file("Qwen3-8B")) for argument in arguments]
    assert cli.main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "flag", [["--contexts", "0"], ["--contexts", "128q"], ["--batch", "-1"], ["--budget", "much"], ["--budget", "nanG"]]
)
def test_bad_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", "model", *flag])
    assert stop.value.code == 2 and "must be" in capsys.readouterr().err
