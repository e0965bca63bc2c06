"""
Measure the host time of a decode step on a CPU, without a GPU, by leaving out all kernels.

    python examples/measure_host.py

Eager decoding of short contexts takes as long as the host needs to launch it. Here a tiny model with many layers runs
the same code as on a GPU, except for the launches themselves; its results are meaningless.
"""

import argparse
import os
from functools import partial
from unittest.mock import patch

# Set before anything imports triton: its interpreter accepts tensors on a CPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.benchmark import calls_ms


def launches_left_out():
    """Within this context no kernel runs."""
    return patch("hf_turboquant.ops.launch.Launcher.__call__", lambda *_: None)


def prepare(layers: int) -> dict:
    """A step of a tiny model by the name of its cache, after a prompt long enough that some tokens are in codes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=99, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float16).eval()
    steps = {}
    for cache in (DynamicCache(config=config), TurboQuantCache(config, backend="triton")):
        read = partial(model, **{cache_name(model): cache})
        read(torch.randint(0, 99, (1, 600)))
        steps[type(cache).__name__] = partial(read, torch.zeros(1, 1, dtype=torch.long))
        steps[type(cache).__name__]()
    assert cache.memory().codes_bytes > 0
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    args = parser.parse_args()
    with launches_left_out(), torch.inference_mode():
        steps = prepare(args.layers)
        times_ms = calls_ms(steps.values(), args.steps, skipped=args.steps // 10)
    for name, (wall_ms, _) in zip(steps, times_ms, strict=True):
        print(f"{name}: {wall_ms:.2f} ms a step of {args.layers} layers")


if __name__ == "__main__":
    raise SystemExit(run(main))
