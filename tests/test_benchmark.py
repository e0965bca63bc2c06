"""`hf-turboquant benchmark`: every time is there, of what it says it is."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_turboquant import cli
from hf_turboquant._supported import cache_name
from hf_turboquant.evaluation import benchmark
from hf_turboquant.layer import TurboQuantLayer

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Few repetitions of small copies."""
    median, copy = benchmark.median_ms, benchmark.copy_bandwidth
    monkeypatch.setattr(benchmark, "median_ms", lambda function: median(function, 0.01))
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: copy(device, 2**20))


@pytest.fixture
def config(tmp_path):
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_time_and_condition_is_there(quick, config, monkeypatch):
    shown = []
    monkeypatch.setattr(benchmark, "show", shown.append)
    command = ["benchmark", str(config), "--contexts", "200", "400", "--nbits", "3", "--batch", "2"]
    assert cli.main([*command, "--dtype", "float32", "--device", "cpu"]) == 0
    (found,) = shown
    conditions = found["conditions"]
    assert (conditions["batch"], conditions["heads"], conditions["kv_heads"], conditions["key_dim"]) == (2, 4, 2, 32)
    assert conditions["dtype"] == "torch.float32" and conditions["copy_bytes_per_s"] > 0
    assert [(row["context"], row["options"] is None) for row in found["rows"]] == [
        (200, True),
        (200, False),
        (400, True),
        (400, False),
    ]
    for row in found["rows"]:
        assert 0 < row["attention_ms"] and 0 < row["step_ms"] and 0 < row["prefill_ms"]
    full, ours = found["rows"][2:]
    # the full cache holds its 400 tokens, and none of those of the steps
    assert full["bytes"] == 2 * 2 * 2 * 400 * 32 * 4 > 2 * ours["bytes"]


def test_attention_reads_codes(quick, monkeypatch):
    layers = []
    update = TurboQuantLayer.update
    monkeypatch.setattr(TurboQuantLayer, "update", lambda self, *states: layers.append(self) or update(self, *states))
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "key_dim": 32, "value_dim": 32}
    benchmark.layer_times(shape, 300, {"nbits": 4}, torch.device("cpu"), torch.float32)
    assert layers[-1].tokens.quantized >= 300 - 132 and layers[-1].condition == "attention"


def test_calls_take_turns_and_the_first_do_not_count(monkeypatch):
    order, times_ms = [], iter([(9, 9), (8, 8), (1, 0.5), (2, 1), (5, 3), (4, 1), (3, 1), (6, 5)])
    monkeypatch.setattr(benchmark, "call_ms", lambda function: function() or next(times_ms))
    found = benchmark.calls_ms([lambda: order.append("a"), lambda: order.append("b")], 4, skipped=1)
    assert order == ["a", "b"] * 4 and found == [(3, 1), (4, 1)]


def test_time_is_that_of_all_threads_and_not_of_compiling(monkeypatch):
    calls, seen = [], []

    def timer(statement, globals, num_threads):
        # what is compiled at the first call has been by now
        seen.append((num_threads, len(calls)))
        return SimpleNamespace(blocked_autorange=lambda min_run_time: SimpleNamespace(median=2e-3))

    monkeypatch.setattr(benchmark, "Timer", timer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert benchmark.median_ms(lambda: calls.append(0)) == 2
    assert seen == [(7, 1)]


def test_generation_is_timed_without_its_prompt(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    seconds, forward = [0.0], model.forward

    # a token that the model reads takes a second, and the first step, which compiles, five more
    @functools.wraps(forward)
    def slow(input_ids, **options):
        seconds[0] += input_ids.shape[1] + (5 if seconds[0] == 20 else 0)
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", slow)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: seconds[0])
    cache, times = DynamicCache(config=model.config), benchmark.Times()
    benchmark.generate(model, torch.randint(0, 97, (1, 20)), 5, times, **{cache_name(model): cache})
    # the prompt gives the first token
    assert times.steps_s == [6, 1, 1, 1]
    # each token that is generated but the last was written to the cache once
    assert cache.get_seq_length() == 20 + 1 + 3 and seconds[0] == 20 + 5 + 1 + 3


def test_table(quick, config, capsys):
    command = ["benchmark", str(config), "--contexts", "150", "--nbits", "4", "2", "--device", "cpu"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "that saves memory, not time" in text.replace("\n", " ")
    assert text.count("qjl") == 2 and re.search(r"^ +150 +full +[\d.]+ +1\.00 .* 1\.00 ", text, re.MULTILINE)


@pytest.mark.parametrize(
    "model, extra, message",
    [
        ({"model_type": "mistral", "sliding_window": 16}, [], "must have layers with full attention"),
        ({"model_type": "llama"}, ["--nbits", "9"], "`nbits` must be"),
        ({"model_type": "llama"}, ["--dtype", "int8"], "--dtype must be a floating-point type"),
        ({"model_type": "llama"}, ["--device", "gpu"], "--device must be one that this machine"),
        ({"model_type": "llama"}, ["--contexts", "2000000000", "--batch", "200000"], "out of memory"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, model, extra, message):
    AutoConfig.for_model(**model, **SIZES).save_pretrained(tmp_path)
    assert cli.main(["benchmark", str(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_what_is_timed_on_a_gpu_runs_there():
    count = torch.zeros(1, device="cuda")
    assert benchmark.graph_us([lambda: count.add_(1)], inner=2, repeats=3) > 0
    # once before the capture, then three replays to warm up and three that count
    assert count.item() == 1 + 2 * (3 + 3)
    wall_ms, host_ms = benchmark.call_ms(lambda: torch.cuda._sleep(10_000_000))
    assert wall_ms > 2 * host_ms > 0
    assert 1e10 < benchmark.copy_bandwidth("cuda") < 1e14
