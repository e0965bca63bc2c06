"""
Compare attention from codes with torch's fastest fp16 attention.

    python examples/benchmark_attention.py                     # correctness, then the table
    python examples/benchmark_attention.py --only 8x32k --caches turboquant:nbits=4 --scores --layer-step

Every configuration is checked against an fp32 reference before it is timed. Times are medians over replays of a CUDA
graph that rotates through several caches, so that nothing is found in L2; the baseline is timed in the same way.
"""

import argparse
import subprocess
from functools import partial

import torch
import triton
from report import DEVICE, add_caches, conditions, line, parse_for_gpu, table
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_turboquant import ops
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.benchmark import (
    FLASH,
    attended_bytes,
    calls_ms,
    copy_bandwidth,
    fastest,
    graph_us,
    new_layer,
)  # fmt: skip
from hf_turboquant.evaluation.caches import label
from hf_turboquant.ops import attend as kernels
from hf_turboquant.ops import reference
from hf_turboquant.states import AttentionOptions

# Name: batch, query heads, KV heads, head_dim, kv_len.
SHAPES = {
    "1x8k": (1, 32, 8, 128, 8192),
    "1x32k": (1, 32, 8, 128, 32768),
    "1x128k": (1, 32, 8, 128, 131072),
    "8x8k": (8, 32, 8, 128, 8192),
    "8x32k": (8, 32, 8, 128, 32768),
    "32x32k": (32, 32, 8, 128, 32768),
    "8x8k MHA": (8, 32, 32, 128, 8192),
    "8x32k D=256 16/2": (8, 16, 2, 256, 32768),
}
COLUMNS = ("shape", "cache", "fp16 µs", "codes + merge µs", "×", "TB/s", "of copy", "whole call µs", "×", "error")
# Least size of all buffers rotated through: several times the L2 of the largest GPU.
ROTATED_BYTES = 300e6


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def filled(shape, options: dict | None):
    """A layer that holds random tokens of a shape of `SHAPES`; without `options` a `DynamicLayer`."""
    batch, heads, kv_heads, dim, kv_len = shape
    keys, values = (random(batch, kv_heads, kv_len, dim) for _ in range(2))
    return new_layer(options, random(batch, heads, 64, dim), keys, values)


def rotated(shape, options: dict | None) -> tuple[list, int]:
    """Layers to rotate through, and how often, for a graph that is long enough."""
    layers = [filled(shape, options)]
    count = int(min(16, max(2, -(-ROTATED_BYTES // attended_bytes(layers[0])))))
    return layers + [filled(shape, options) for _ in range(1, count)], max(1, 8 // count)


def baseline_us(shape, query: torch.Tensor) -> float:
    """Time of the fastest of torch's kernels on exact keys and values."""
    layers, inner = rotated(shape, None)
    attend = partial(scaled_dot_product_attention, query, enable_gqa=True)
    return fastest(lambda: graph_us([partial(attend, layer.keys, layer.values) for layer in layers], inner))


def errors(query: torch.Tensor, layer, mask: torch.Tensor | None) -> tuple[float, float]:
    """Relative errors of the kernels and of torch in the query's dtype, both against the fp32 reference."""
    states, options = layer.keys.states, AttentionOptions(query.shape[-1] ** -0.5, mask)
    truth = reference.attention(query.float(), states, options)
    keys, values = (ops.dequantize_all(states, role).to(query.dtype) for role in ("keys", "values"))
    plain = scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    ours = kernels.attention(query, states, options)
    return tuple(((out.float() - truth).norm() / truth.norm()).item() for out in (ours, plain))


def compare(name: str, options: dict, best_us: float, copy: float, query: torch.Tensor, args) -> None:
    """Checks and times attention from the codes of one cache, and prints its row of the table."""
    layers, inner = rotated(SHAPES[name], options)
    mask = torch.rand((len(query), 1, 1, SHAPES[name][-1]), device=DEVICE) > 0.01 if args.mask else None
    error, plain = errors(query, layers[0], mask)
    if not error <= 2 * plain:
        raise AssertionError(f"{name} {label(options)}: error {error:.1e}, and torch's is {plain:.1e}")
    how = AttentionOptions(query.shape[-1] ** -0.5, mask)
    calls = [partial(kernels.attention, query, layer.keys.states, how) for layer in layers]
    for call in calls:
        call()

    def us(*launches: str) -> float:
        return graph_us([partial(call, launches=launches) for call in calls], inner)

    # Codes and merge are what the baseline does.
    part, whole = us(*kernels.LAUNCHES[1:]), us(*kernels.LAUNCHES)
    rate = attended_bytes(layers[0]) / part * 1e6
    cells = name, label(options), f"{best_us:.1f}", f"{part:.1f}", f"{best_us / part:.2f}", f"{rate / 1e12:.2f}"
    cells += f"{rate / copy:.0%}", f"{whole:.1f}", f"{best_us / whole:.2f}", f"{error:.1e} ({plain:.1e})"
    print(line(*cells), flush=True)
    if args.launches:
        print(", ".join(f"{launch} {us(launch):.1f} µs" for launch in kernels.LAUNCHES), flush=True)


def scores_line(shape, options: dict) -> str:
    batch, heads, kv_heads, dim, kv_len = shape
    layers, query = rotated(shape, options)[0], random(batch, heads, 1, dim)
    ours = graph_us([partial(kernels.scores, query, layer.keys.states, scaling=1.0) for layer in layers])
    found = [f"scores, {label(options)}, {heads // kv_heads} queries for each of {kv_len:,} keys: {ours:.1f} µs"]
    for dtype in (torch.float32, torch.float16):
        keys = [random(batch, kv_heads, kv_len, dim, dtype=dtype) for _ in range(2)]
        rows = query.to(dtype).view(batch, kv_heads, -1, dim)
        plain = graph_us([partial(torch.matmul, rows, k.mT) for k in keys])
        found.append(f"torch {dtype}: {plain:.1f} µs ({plain / ours:.1f}×)")
    return "; ".join(found)


def layer_step_us(shape, options: dict | None) -> tuple[float, float]:
    """
    Times of appending one token and attending, through `update` and torch's attention, at successive lengths: GPU time
    alone, and time from start to end with a host that launches one by one.
    """
    batch, heads, kv_heads, dim, _ = shape
    layer, query, token = filled(shape, options), random(batch, heads, 1, dim), random(batch, kv_heads, 1, dim)

    def step():
        scaled_dot_product_attention(query, *layer.update(token, token), enable_gqa=True)

    # cuDNN makes a plan for every length, which takes 40 ms.
    with sdpa_kernel(FLASH):
        ((wall_ms, _),) = calls_ms([step], 40, skipped=10)
        return graph_us([step], inner=8), wall_ms * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--only", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE", help="what to time")
    add_caches(parser, "turboquant:nbits=4", "turboquant:nbits=4/3/2,key_estimator=rescaled")
    add("--launches", action="store_true", help="also time each launch of a call by itself")
    add("--mask", action="store_true", help="with a boolean mask, as compiled steps have one")
    add("--scores", action="store_true", help="also time the logits alone against matrix products")
    add("--layer-step", action="store_true", help="also time append + attention through `update`")
    args = parse_for_gpu(parser, ours=True)
    copy = copy_bandwidth(DEVICE)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    texts = f"copy {copy / 1e12:.2f} TB/s", f"triton {triton.__version__}, commit {commit or 'unknown'}"
    print(conditions(DEVICE, "fp16, one query, medians under CUDA graphs", *texts))
    print(table(COLUMNS))
    for name in args.only:
        shape = SHAPES[name]
        query = random(shape[0], shape[1], 1, shape[3])
        best_us = baseline_us(shape, query)
        for options in args.caches:
            compare(name, options, best_us, copy, query, args)
            torch.cuda.empty_cache()
        if args.scores:
            print(scores_line(shape, args.caches[0]))
            print(scores_line((1, 64, 1, 128, 8192), {"nbits": 3, "key_estimator": "rescaled"}))
        for options in (None, *args.caches) if args.layer_step else ():
            us, eager_us = layer_step_us(shape, options)
            what = label(options) if options else "DynamicLayer"
            print(f"{name}, layer step, {what}: {us:.0f} µs of the GPU; eager, host included {eager_us:.0f}")


if __name__ == "__main__":
    raise SystemExit(run(main))
