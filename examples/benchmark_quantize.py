"""
Time the kernel that quantises and appends, and the one that dequantises. `tests/ops` check them.

    python examples/benchmark_quantize.py
    python examples/benchmark_quantize.py --only decode
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from report import conditions, head, line, parse_for_gpu

from hf_turboquant import TurboQuantConfig
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.benchmark import call_ms, copy_bandwidth, graph_us, median_ms
from hf_turboquant.ops import reference
from hf_turboquant.quantizer import Quantizer

# `ops.quantize` is the function; the module of the same name holds the kernel.
kernels = import_module("hf_turboquant.ops.quantize")
dequantize = import_module("hf_turboquant.ops.dequantize").dequantize


@dataclass(frozen=True)
class Case:
    """Keys or values of one configuration; `conditioned` gives every head its own mean and scale."""

    role: str = "keys"
    nbits: int = 4
    estimator: str = "qjl"
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    conditioned: bool = False
    heads: int = 8
    sketch: str = "orthogonal"
    rotation: str = "haar"

    def quantizer(self, device) -> Quantizer:
        role = self.role.removesuffix("s")
        options = {f"{role}_bits": self.nbits, f"{role}_estimator": self.estimator}
        config = TurboQuantConfig(sketch=self.sketch, rotation=self.rotation, **options)
        quantizer = Quantizer.create(config, self.role, 0, self.head_dim, device)
        if self.conditioned:
            generator = torch.Generator().manual_seed(1)
            factors = 0.5 + torch.rand(self.heads, 1, self.head_dim, generator=generator).to(device)
            mean = torch.randn(self.heads, 1, self.head_dim, generator=generator).to(device)
            quantizer = replace(quantizer, mean=mean, scale=factors)
        return quantizer


@dataclass
class Layer:
    """States, quantizers and buffers of one layer; its methods append `tokens` at `length`, or read them back."""

    batch: int
    tokens: int
    keys: Case | None
    values: Case | None
    length: int = 0

    def __post_init__(self):
        roles = [case for case in (self.keys, self.values) if case is not None]
        self.quantizers = [case.quantizer("cuda") for case in roles]
        shape = (self.batch, roles[0].heads, self.tokens)
        self.states = [torch.randn(*shape, c.head_dim, device="cuda", dtype=c.dtype) for c in roles]
        self.buffers = [quantizer.new_buffer(*shape[:2]) for quantizer in self.quantizers]
        for buffer in self.buffers:
            buffer.reserve(self.length + self.tokens)
        # Codes and scales of the new tokens are written.
        written = sum(buffer.nbytes / buffer.capacity for buffer in self.buffers) * self.tokens
        self.nbytes = sum(x.nbytes for x in self.states) + written

    def _rewind(self) -> None:
        for buffer in self.buffers:
            buffer.length = self.length

    def single(self) -> None:
        self._rewind()
        for args in zip(self.states, self.quantizers, self.buffers, strict=True):
            kernels.quantize(*args)

    def pair(self) -> None:
        self._rewind()
        kernels.quantize_pair(self.states, self.quantizers, self.buffers)

    def dequantize(self) -> None:
        """Dequantises everything that `single` appended, in the dtype of the states."""
        for state, quantizer, buffer in zip(self.states, self.quantizers, self.buffers, strict=True):
            dequantize(buffer, quantizer, state)

    def torch(self) -> None:
        self._rewind()
        for args in zip(self.states, self.quantizers, self.buffers, strict=True):
            reference.quantize(*args)


def rows():
    """Name, layers to rotate through and function of every row of the table."""

    def pair(nbits=4, estimator="qjl", head_dim=128, **options) -> tuple[Case, Case]:
        values = Case("values", nbits, "rescaled", head_dim, options.get("dtype", torch.bfloat16))
        return Case("keys", nbits, estimator, head_dim, **options), values

    def prefill(count: int, keys: Case | None, values: Case | None) -> list[Layer]:
        return [Layer(1, 8192, keys, values) for _ in range(count)]

    def decode(tokens: int, batch: int, *cases: Case, count: int = 32) -> list[Layer]:
        return [Layer(batch, tokens, *cases, length=1061) for _ in range(count)]

    for head_dim in (128, 64, 256):
        for form in ((4, "qjl"), (3, "rescaled"), (2, "rescaled")):
            name = "keys + values, D={}, {} bits ({} keys".format(head_dim, *form)
            for conditioned in (False, True):
                layers = prefill(4, *pair(*form, head_dim, conditioned=conditioned))
                yield f"prefill 8,192: {name}{', conditioned' * conditioned})", layers, "single"
            yield f"dequantise them: {name}, conditioned)", layers, "dequantize"
    for estimator in ("qjl", "rescaled"):
        yield f"prefill 8,192: keys alone, 4 bits ({estimator})", prefill(8, pair(4, estimator)[0], None), "single"
    yield "prefill 8,192: values alone, 4 bits", prefill(8, None, pair()[1]), "single"
    yield "prefill 8,192: as the first row but fp32", prefill(4, *pair(dtype=torch.float32)), "single"
    yield "prefill 8,192: as the first row, torch reference", prefill(1, *pair()), "torch"
    yield "8,192 keys of one head, 3 bits (rescaled)", prefill(32, pair(3, "rescaled", heads=1)[0], None), "single"
    for batch in (1, 8):
        for form in ((4, "qjl"), (3, "rescaled")):
            layers = decode(1, batch, *pair(*form))
            name = "decode, 1 token × {}, {} bits ({} keys)".format(batch, *form)
            yield f"{name}, one launch", layers, "pair"
            yield f"{name}, two launches", layers, "single"
    yield "decode, 4 tokens × 1, 4 bits (qjl keys)", decode(4, 1, *pair()), "pair"
    yield "decode, 1 token × 1, 4 bits, torch reference", decode(1, 1, *pair(), count=1), "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    about = "time only rows of the table whose name contains TEXT"
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help=about)
    args = parse_for_gpu(parser)
    texts = "bf16 states, 8 KV heads, head_dim 128 unless said", f"copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s"
    print(conditions("cuda", *texts, "medians of CUDA graphs over rotating buffers; host: of one call in eager mode"))
    print("\n" + head("what", "µs", "GB/s", "host µs"))
    for name, layers, function in rows():
        if any(text in name for text in args.only):
            calls = [getattr(layer, function) for layer in layers]
            # The reference is timed from start to end.
            us = graph_us(calls) if function != "torch" else 1e3 * median_ms(calls[0])
            # The first calls compile.
            host_ms = statistics.median([call_ms(calls[0])[1] for _ in range(300)][100:])
            print(line(name, f"{us:.1f}", f"{layers[0].nbytes / us / 1e3:.0f}", f"{1e3 * host_ms:.0f}"), flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
