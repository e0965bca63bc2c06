"""Two processes (CPU, and two GPUs where there are): tensor parallel by transformers, data parallel by accelerate."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hf_turboquant import QuantizedStates, TurboQuantCache
from hf_turboquant._supported import cache_name

PROCESSES, ROWS, PROMPT, STEPS = 2, 4, 150, 10
MODELS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
DEVICES = ["cpu"] + ["cuda"] * (torch.cuda.device_count() >= PROCESSES)


def generate(model, input_ids):
    cache = TurboQuantCache(
        model.config, residual_length=8, backend="triton" if model.device.type == "cuda" else "torch"
    )
    input_ids = input_ids.to(model.device)
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, cache_name(model): cache}
    tokens = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    keys = [layer.keys.dequantize().cpu() for layer in cache.layers if isinstance(layer.keys, QuantizedStates)]
    return {"tokens": tokens.cpu(), "keys": keys, "codes_bytes": cache.memory().codes_bytes}


def prompts():
    return torch.randint(3, 98, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))


def work(folder: Path, device: str):
    """One of the processes."""
    from accelerate import PartialState

    torch.set_num_threads(1)
    results = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto")
        results[name] = generate(model, prompts())
    # every process has the whole model, and some rows of the batch
    state = PartialState(cpu=device == "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").to(state.device)
    with state.split_between_processes(prompts()) as rows:
        results["data parallel"] = generate(model, rows)
    torch.save(results, folder / f"{state.process_index}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=DEVICES)
def results(request, tmp_path_factory):
    """What one process finds, and what each of two."""
    folder, alone = tmp_path_factory.mktemp("models"), {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config(
                hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=32, vocab_size=98, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
        model.save_pretrained(folder / name)
        model.to(request.param)
        alone[name] = generate(model, prompts())
        # rows of a batch share their conditioning, so each half is compared with itself
        alone[f"{name} by halves"] = [generate(model, rows) for rows in prompts().chunk(PROCESSES)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if request.param == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        [*launch, __file__, str(folder), request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return alone, [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel(results, name):
    """The tokens of one process; every rank holds the codes of its own heads and of no others."""
    alone, ranks = results
    for rank, result in enumerate(each[name] for each in ranks):
        assert torch.equal(result["tokens"], alone[name]["tokens"])
        assert result["codes_bytes"] * PROCESSES == alone[name]["codes_bytes"] > 0
        assert len(result["keys"]) == len(alone[name]["keys"]) == 2
        for keys, all_keys in zip(result["keys"], alone[name]["keys"], strict=True):
            # sums in another order may turn a code over
            differences = [(keys[:, 0] - all_keys[:, head]).norm() / keys.norm() for head in range(2)]
            assert keys.shape[1] == 1 and differences[rank] < 0.02 and differences[1 - rank] > 0.5


def test_data_parallel(results):
    """Every rank finds the tokens and holds the codes of its rows."""
    alone, ranks = results
    for expected, result in zip(alone["llama by halves"], ranks, strict=True):
        result = result["data parallel"]
        assert torch.equal(result["tokens"], expected["tokens"]) and result["tokens"].shape[0] == ROWS // PROCESSES
        assert result["codes_bytes"] == expected["codes_bytes"] > 0
        assert all(map(torch.equal, result["keys"], expected["keys"]))


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
