"""The examples start, on the model that comes with them, and tell the truth about what they did."""

import importlib
import io
import re
import sys

import pytest
import torch


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
