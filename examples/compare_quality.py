"""
Compare what compressed caches cost a model at equal bytes: this one, and the integers of quanto and HQQ as
transformers' `QuantizedCache` has them.

    pip install optimum-quanto hqq
    python examples/compare_quality.py --text book.txt --windows 12 --batch 12

Bits are counted per coordinate of a cached token, mean over the scored blocks: codes, scales, zero points and exact
tokens, in the recent window and elsewhere; floats count 16 bits, as in a model in half precision. What does not grow
with the tokens does not count.
"""

import argparse
from pathlib import Path

import torch
from load_model import load
from transformers import QuantizedCache

from hf_turboquant import TurboQuantCache
from hf_turboquant.config import PRESETS
from hf_turboquant.evaluation.quality import Quality, measure, split_windows

NBITS = (4, 3.5, 3, 2.5, 2)


def turboquant(**options):
    return lambda config: TurboQuantCache(config, **options)


def preset(name: str):
    return lambda config: TurboQuantCache.from_preset(config, name)


def integers(backend: str, nbits: int, **options):
    """Groups of 64 values with a scale and a zero point, and a recent window of 128 tokens."""
    return lambda config: QuantizedCache(backend, config, nbits=nbits, residual_length=128, **options)


def candidates() -> dict[str, object]:
    """Name and maker of every cache."""
    found = {f"{estimator} {nbits}": turboquant(nbits=nbits, key_estimator=estimator)
             for estimator in ("rescaled", "qjl") for nbits in NBITS}  # fmt: skip
    found |= {
        f"rescaled {nbits}, not conditioned": turboquant(nbits=nbits, key_estimator="rescaled", condition="none")
        for nbits in NBITS
    }
    # what is exact weighs most in a short context: a window as long as the integers have on average
    found |= {
        f"{estimator} {nbits}, window 32": turboquant(nbits=nbits, key_estimator=estimator, residual_length=32)
        for estimator in ("rescaled", "qjl")
        for nbits in NBITS
    }
    found |= {name: preset(name) for name in PRESETS}
    for nbits in (4, 2):
        # groups along the channels of a token, and keys along the tokens of a channel, as KIVI has them
        found[f"quanto int{nbits}"] = integers("quanto", nbits)
        found[f"quanto int{nbits}, keys by channel"] = integers("quanto", nbits, axis_key=-1)
        found[f"HQQ int{nbits}"] = integers("hqq", nbits, axis_key=1, axis_value=1)
    return found


def bits_per_coordinate(cache) -> float:
    """Bits held for every coordinate of the tokens that `cache` holds."""
    if isinstance(cache, TurboQuantCache):
        memory = cache.memory()
        itemsize = next(layer.dtype for layer in cache.layers if layer.is_initialized).itemsize
        halves = (memory.exact_bytes + memory.other_bytes) / itemsize
        return 8 * (memory.codes_bytes + memory.scales_bytes + 2 * halves) / (memory.full_bytes / itemsize)
    held = coordinates = 0
    for layer in cache.layers:
        states = [layer.keys, layer.values]
        quantized = [getattr(layer, name) for name in ("_quantized_keys", "_quantized_values") if hasattr(layer, name)]
        held += _bits(states) + _bits(quantized)
        coordinates += sum(state.numel() for state in states) + _coordinates(quantized)
    return held / coordinates


def _bits(tree) -> int:
    if isinstance(tree, dict):
        return sum(map(_bits, tree.values()))
    if isinstance(tree, (list, tuple)):
        return sum(map(_bits, tree))
    if not isinstance(tree, torch.Tensor):
        return 0
    if hasattr(tree, "_scale"):
        return _bits([tree._data._data, tree._scale, tree._shift])
    return tree.numel() * (16 if tree.is_floating_point() else 8 * tree.itemsize)


def _coordinates(quantized) -> int:
    # HQQ's tensors come with a description, quanto's have the shape they stand for
    shapes = [each[1]["shape"] if isinstance(each, tuple) else each.shape for each in quantized]
    return sum(torch.Size(shape).numel() for shape in shapes)


def rows(names: list[str], qualities: list[Quality]) -> list[str]:
    """A markdown table, fewest bits last."""
    lines = ["| cache | bits in all | KL (nats) | perplexity | top-1 |", "|---|---|---|---|---|"]
    for name, q in sorted(zip(names, qualities, strict=True), key=lambda pair: -pair[1].bits):
        lines.append(f"| {name} | {q.bits:.2f} | {q.kl:.4f} | {q.perplexity:.2f} | {q.agreement:.3f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description="KL, perplexity and top-1 against all bits that a cache holds.")
    parser.add_argument("--model", help="a Hub name or a local folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--text", type=Path, required=True, help="any text file; its first windows are used")
    parser.add_argument("--windows", type=int, default=12, help="number of windows of 1,024 tokens")
    parser.add_argument("--batch", type=int, default=12, help="windows fed at a time")
    args = parser.parse_args()
    model, tokenizer = load(args.model, torch.float32)
    windows = split_windows(tokenizer, args.text.read_text(encoding="utf-8"), 1024, args.windows)
    caches = candidates()
    options = {"block": 64, "batch": args.batch, "prefill": 512, "score_from": 512, "weigh": bits_per_coordinate}
    qualities = measure(model, windows, list(caches.values()), **options)
    print("\n".join(rows(["full cache", *caches], qualities)))


if __name__ == "__main__":
    main()
