"""The estimator against facts, against arithmetic, and against the bytes that real caches hold."""

import functools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_models import ROWS, EncoderDecoderRow
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_turboquant import TurboQuantCache, cli
from hf_turboquant._supported import cache_name
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


# too few to condition keys by, and enough
@pytest.mark.parametrize("length", (40, 150))
@pytest.mark.parametrize("row", DECODERS, ids=lambda row: row.name)
def test_bytes_of_real_caches(row, length):
    model = row.model()
    tokens = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(0))
    options = {"nbits": 3, "residual_length": 8, "sink_length": 2, "condition": "center"}
    cache = TurboQuantCache(model.config, **options)
    with torch.no_grad():
        row.forward(model, tokens, torch.ones_like(tokens), **{cache_name(model): cache, "use_cache": True})
    found = Estimate.from_config(model.config, torch.float32)
    held, expected = cache.memory(), found.memory(length, 2, **options)
    assert expected.total_bytes == pytest.approx(held.total_bytes, rel=0.01)
    assert expected.full_bytes == pytest.approx(held.full_bytes, rel=0.01)
    assert expected.codes_bytes == held.codes_bytes and expected.exact_bytes == held.exact_bytes
    assert (held.codes_bytes > 0) == (row.compressed > 0 and length > 130)


def test_bytes_of_the_default_cache_and_of_skipped_layers():
    row = DECODERS[0]
    model = row.model()
    tokens = torch.randint(3, 90, (1, 700), generator=torch.Generator().manual_seed(0))
    skipped = {"nbits": 2, "skip_layers": (0, -1), "key_estimator": "rescaled"}
    for options in ({}, skipped, {"max_cache_len": 800}):
        cache = TurboQuantCache(model.config, **options)
        with torch.no_grad():
            model(tokens, **{cache_name(model): cache})
        assert cache.layers[1].condition == "attention"
        found = Estimate.from_config(model.config, torch.float32)
        assert found.memory(700, 1, **options) == cache.memory()


@pytest.mark.parametrize("capacity", [20, 250])
def test_a_fixed_capacity_is_allocated_in_other_layers_too(capacity):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "head_dim"), 64)
    config = Gemma3TextConfig(
        **sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    options = {"max_cache_len": capacity, "skip_layers": (1,)}
    cache = TurboQuantCache(config, **options)
    with torch.no_grad():
        model = Gemma3ForCausalLM(config)
        model(torch.randint(3, 60, (2, 15)), **{cache_name(model): cache})
    expected, held = Estimate.from_config(config, torch.float32).memory(15, 2, **options), cache.memory()
    # 1,024 bytes a token, of two sequences; transformers' layers count their tokens in a few bytes more
    allocated = pytest.approx(2 * 1024 * (capacity + min(32, capacity)), abs=64)
    assert held.other_bytes == allocated and expected.other_bytes == allocated
    assert expected.exact_bytes == held.exact_bytes and expected.slack_bytes == held.slack_bytes


def test_bytes_of_half_bits():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=99,
    )  # fmt: skip
    cache = TurboQuantCache(config, nbits=2.5)
    with torch.no_grad():
        model = LlamaForCausalLM(config)
        model(torch.randint(3, 90, (1, 300)), **{cache_name(model): cache})
    assert Estimate.from_config(config, torch.float32).memory(300, 1, nbits=2.5) == cache.memory()


def test_the_longest_context_is_the_longest():
    found, budget = estimate("Qwen3-8B"), 24 * 10**9
    longest = found.longest_context(budget, batch=2, nbits=4)
    assert found.memory(longest, 2, nbits=4).total_bytes <= budget
    assert found.memory(longest + 1, 2, nbits=4).total_bytes > budget
    full = found.longest_context(budget)
    assert full == budget // (36 * 8 * 256 * 2)
    capacity = {"nbits": 4, "max_cache_len": 1000}
    assert [found.longest_context(bytes_, **capacity) for bytes_ in (10**6, 10**9)] == [0, 1000]
    with pytest.raises(ValueError, match="max_cache_len=1000"):
        found.memory(1001, **capacity)
    # fits a little more than the steady ratio says less the spare capacity
    assert 3.5 < found.longest_context(budget, nbits=4) / full < 4


# `python tests/test_estimate.py` does this for all types that transformers has
KINDS_OF_MODELS = {
    "bert": "its attention sees later tokens, as that of an encoder does\\. If it generates text, count from",
    "roberta": "its attention sees later tokens",
    "electra": "its attention sees later tokens",
    "albert": "`model` must take a cache, got AlbertModel, which does not. Take a decoder\\. If",
    "distilbert": "must take a cache",
    "modernbert": "must take a cache",
    "clip": "must take a cache, got CLIPTextModel",
    "bit": "must take a cache, got BitModel",
    "rwkv": "must take a cache",
    "openai-gpt": "must take a cache",
    # a head_dim for each layer
    "embedding_gemma2": "must take a cache",
    "whisper": "its decoder caches the states of an encoder too",
    "t5": "its decoder caches the states of an encoder too",
    "bart": "its decoder caches the states of an encoder too",
    "colpali": "its attention sees later tokens",
    "clap_text_model": "transformers has no model of its own for ClapTextConfig",
    "deepseek_v4": "its cache has layers of its own kind, DeepseekV4",
    "unlimited_ocr": "its cache has layers of its own kind, UnlimitedOcr",
    "xlstm": "no attribute 'rnn_state'",
    # by default, all of it is recurrent
    "bamba": "only contain LinearAttention layers",
    "bert decoder": "2 × full attention, 12 KV heads of 64: compressed",
    # sees all of a prompt, and generates
    "paligemma": "18 × full attention, 1 KV head of 256: compressed",
    "gpt_neox": "2 × full attention, 64 KV heads of 96: compressed",
    "modernbert-decoder": "2 × full attention, 12 KV heads of 64: compressed",
    # the sizes are those of a test
    "bloom": "2 × full attention, 8 KV heads of 8, cannot be packed",
    # its text has a class only within the whole, and some layers see nothing but images
    "mllama": "32 × full attention, 8 KV heads of 128: compressed; 8 × full attention, empty for text alone",
    # layers run several times, over a cache each
    "dory": "42 × sliding window of 1,024 tokens, 4 KV heads of 256; "
    "14 × full attention, 4 KV heads of 256: compressed",
}
MODEL_OPTIONS = {
    "gpt_neox": {"num_hidden_layers": 2},
    "modernbert-decoder": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "bert decoder": {"num_hidden_layers": 2, "is_decoder": True},
}


def answer(name, **options) -> str:
    """What an estimate says of a type of model: its layers, or why it is refused."""
    try:
        found = Estimate.from_config(AutoConfig.for_model(name, **options))
    except ValueError as error:
        return str(error)
    held, full = found.memory(10_000, nbits=4), found.full_bytes(10_000) + found.state_bytes
    assert held.full_bytes == full and (held.codes_bytes > 0) == bool(found.compressed())
    kinds = Counter(f"{cost}{': compressed' * cost.compressed}" for cost in found.layers)
    return "; ".join(f"{count} × {kind}" for kind, count in kinds.items())


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_kinds_of_models(name):
    kind = name.split(" ")[0]
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    found = answer(kind, **MODEL_OPTIONS.get(name, {}))
    if KINDS_OF_MODELS[name][0].isdigit():
        assert found == KINDS_OF_MODELS[name]
    else:
        assert re.search(KINDS_OF_MODELS[name], found)


def test_the_whole_reason(monkeypatch):
    error = RuntimeError("first line,\n\n second line.")
    monkeypatch.setattr("hf_turboquant.estimate._run", Mock(side_effect=error))
    with pytest.raises(ValueError, match="'llama': first line, second line\\. If it generates text, count from"):
        Estimate.from_config(AutoConfig.for_model("llama"))


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


def contexts(text: str) -> list[str]:
    return re.findall(r"^ +([\d,]+) .*×$", text, re.MULTILINE)


def test_the_command(config_file, capsys):
    assert cli.main(["estimate", config_file("Qwen3.5-35B-A3B"), "--contexts", "200000", "--budget", "24GB"]) == 0
    text = capsys.readouterr().out
    assert "10 × full attention, 2 KV heads of 256: compressed" in text and "4.1 GB" in text
    assert "10 of 40 layers hold a KV cache" in text and "64.9 MB of states" in text
    assert "this cache can't help" not in text
    # bf16, fp8, then 4, 3 and 2 bits, each with how many times smaller it is
    (row,) = re.findall(r"^ +200,000 .*$", text, re.MULTILINE)
    assert re.findall(r"([\d.]+)×", row) == ["2.0", "3.8", "5.0", "7.3"] and row.count("B") == 5
    longest = {name: int(count.replace(",", "")) for name, count in re.findall(r"(bf16|4 bits) ([\d,]+\d)", text)}
    assert longest["4 bits"] > 3 * longest["bf16"] > 10**6
    # without `--contexts` and `--budget`
    assert cli.main(["estimate", config_file("Qwen3-8B"), "--nbits", "2.5"]) == 0
    text = capsys.readouterr().out
    assert contexts(text) == ["8,192", "32,768", "131,072"] and "Longest" not in text and "states" not in text
    assert re.search(r"^ +context +bf16 +fp8 +× +2\.5 bits +×$", text, re.MULTILINE)
    # at 1,000 tokens the states of linear attention are most of the cache
    assert cli.main(["estimate", config_file("Qwen3.5-35B-A3B"), "--contexts", "1000"]) == 0
    assert "this cache can't help much" in capsys.readouterr().out
    # a short context too: the note is about the longest
    assert cli.main(["estimate", config_file("Qwen3-8B"), "--contexts", "128K", "1M", "100"]) == 0
    text = capsys.readouterr().out
    assert contexts(text) == ["100", "131,072", "1,048,576"] and "can't help" not in text
    # sliding windows count their tokens in a few bytes, which are no states
    assert cli.main(["estimate", config_file("gemma-3-27b"), "--nbits", "4"]) == 0
    text = capsys.readouterr().out
    assert "10 of 62 layers hold a KV cache" in text and "Beside them" not in text
    assert cli.main(["estimate", config_file("Mamba2-2.7B"), "--budget", "1G"]) == 0
    assert "4 bits any" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such/model"], "Check the name, the path and the network"),
        (["{broken}"], "is not a valid JSON file. Look at the files."),
        (["{config}", "--nbits", "9"], "`nbits` must be"),
        (["{config}", "--nbits", "nan"], "`nbits` must be"),
        (["{config}", "--nbits", "inf"], "`nbits` must be"),
    ],
)
def test_bad_input_is_one_line(config_file, tmp_path, capsys, monkeypatch, arguments, message):
    # the hub is asked no questions from tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "llama",')
    files = {"config": config_file("Qwen3-8B"), "broken": broken}
    arguments = [argument.format(**files) for argument in arguments]
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


if __name__ == "__main__":
    # all types, some hundreds, in the config that each has by default: a name, then what an estimate says
    for name in sys.argv[1:] or sorted(CONFIG_MAPPING_NAMES):
        print(f"{name}: {answer(name)}", flush=True)
