"""
Show the memory of a compressed cache, counted from the tensors that it holds.

    python examples/memory_table.py
    python examples/memory_table.py --contexts 4096 131072 --kv-heads 2 --head-dim 256
"""

import argparse

import torch
from report import head, line

from hf_turboquant import TurboQuantCache
from hf_turboquant.cli import Formatter, parse_count, run


def ratio(shape: tuple[int, ...], **options) -> float:
    """Bytes of a full bf16 cache over all bytes held, after a prefill and some steps of one layer."""
    cache = TurboQuantCache(condition="center", **options)
    states = torch.randn(shape, dtype=torch.bfloat16)
    for tokens in states.split([shape[2] - 16, *[1] * 16], dim=2):
        cache.update(tokens, tokens, 0)
    return cache.memory().compression_ratio


def main():
    about = "How many times smaller a cache gets, everything counted."
    parser = argparse.ArgumentParser(description=about, formatter_class=Formatter)
    contexts = [2048, 8192, 32768, 131072]
    parser.add_argument("--contexts", type=parse_count, nargs="+", default=contexts, help="tokens, such as 128k")
    parser.add_argument("--kv-heads", type=int, default=8, help="heads of keys and values")
    parser.add_argument("--head-dim", type=int, default=128, help="numbers of a key")
    args = parser.parse_args()
    print(f"bf16, {args.kv_heads} KV heads of {args.head_dim}, batch 1: full cache / compressed cache, in bytes\n")
    print(head("context", "keys", "4 bits", "3 bits", "2 bits"))
    for context in args.contexts:
        for estimator in ("qjl", "rescaled"):
            shape = 1, args.kv_heads, context, args.head_dim
            ratios = (f"{ratio(shape, nbits=nbits, key_estimator=estimator):.2f}" for nbits in (4, 3, 2))
            print(line(f"{context:,}", estimator, *ratios), flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
