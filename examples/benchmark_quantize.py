"""
Time the kernel that quantizes and appends, and the one that dequantizes. `tests/ops` check them.

    python examples/benchmark_quantize.py
    python examples/benchmark_quantize.py --tokens 1 --batches 1 8 --caches turboquant:nbits=4
"""

import argparse
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from report import DEVICE, add_caches, conditions, line, parse_for_gpu, table

from hf_turboquant import TurboQuantConfig
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.benchmark import calls_ms, copy_bandwidth, graph_us
from hf_turboquant.evaluation.caches import label
from hf_turboquant.evaluation.load import parse_count
from hf_turboquant.ops import encode as kernels
from hf_turboquant.ops.decode import dequantize
from hf_turboquant.quantizer import Quantizer

# Tokens in front of new ones.
LENGTH = 1061


class Layer:
    """States of shape `[batch, heads, tokens, head_dim]`, quantizers and buffers of one layer, by role."""

    def __init__(self, options: dict, shape: tuple[int, ...], roles: tuple[str, ...], conditioned: bool):
        batch, heads, tokens, dim = shape
        self.quantizers, self.buffers = [], []
        self.states = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in roles]
        for role in roles:
            quantizer = Quantizer.create(TurboQuantConfig(**options), role, 0, dim, DEVICE)
            if conditioned:
                mean = torch.randn(heads, 1, dim, device=DEVICE)
                quantizer = replace(quantizer, mean=mean, scale=0.5 + torch.rand_like(mean))
            self.quantizers.append(quantizer)
            self.buffers.append(quantizer.new_buffer(batch, heads))
            self.buffers[-1].reserve(LENGTH + tokens)
        # Codes and scales of the new tokens are written.
        written = sum(buffer.nbytes / buffer.capacity for buffer in self.buffers) * tokens
        self.nbytes = sum(x.nbytes for x in self.states) + written

    def quantize(self) -> None:
        for buffer in self.buffers:
            buffer.length = LENGTH
        kernels.quantize(*zip(self.states, self.quantizers, self.buffers, strict=True))

    def dequantize(self) -> None:
        for buffer, quantizer, state in zip(self.buffers, self.quantizers, self.states, strict=True):
            dequantize(buffer, quantizer, state)


def rows(args):
    """Name, layers to rotate through and function of every row of the table."""
    both = "keys", "values"
    for options, dim, batch, tokens in product(args.caches, args.head_dims, args.batches, args.tokens):
        shape, name = (batch, args.kv_heads, tokens, dim), f"{batch} × {tokens:,}, D={dim}, {label(options)}"
        for roles, conditioned in ((both[:1], False), (both[1:], False), (both, False), (both, True)):
            layers = [Layer(options, shape, roles, conditioned) for _ in range(4 if tokens > 1024 else 32)]
            yield f"{name}: {' and '.join(roles)}{', conditioned' * conditioned}", layers, Layer.quantize
        yield f"{name}: dequantize what the row above quantized", layers, Layer.dequantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_caches(parser, "turboquant:nbits=4/3/2")
    parser.add_argument("--tokens", type=parse_count, nargs="+", default=[8192, 1], help="new tokens of a sequence")
    parser.add_argument("--batches", type=parse_count, nargs="+", default=[1], help="numbers of sequences")
    parser.add_argument("--head-dims", type=parse_count, nargs="+", default=[128], help="numbers of a key")
    parser.add_argument("--kv-heads", type=parse_count, default=8, help="heads of keys and values")
    args = parse_for_gpu(parser, ours=True)
    texts = f"bf16 states, {args.kv_heads} KV heads", f"copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s"
    print(conditions(DEVICE, *texts, "medians of CUDA graphs over rotating buffers; host: of one call in eager mode"))
    print("\n" + table(["batch × tokens", "µs", "GB/s", "host µs"]))
    for name, layers, function in rows(args):
        calls = [partial(function, layer) for layer in layers]
        us = graph_us(calls)
        ((_, host_ms),) = calls_ms(calls[:1], 300, skipped=100)
        print(line(name, f"{us:.1f}", f"{layers[0].nbytes / us / 1e3:.0f}", f"{1e3 * host_ms:.0f}"), flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
