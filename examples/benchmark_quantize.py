"""
Check the kernel that quantises and appends against float64 mathematics in every configuration, then time it and the
kernel that dequantises.

    python examples/benchmark_quantize.py            # all checks, then the tables (one GPU)
    python examples/benchmark_quantize.py --no-check
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context

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
    """
    One configuration: `pieces` are the lengths of successive appends; `conditioned` gives every head its own mean and
    scale, `per_head` also its own transform.
    """

    role: str = "keys"
    nbits: int = 4
    estimator: str = "qjl"
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    conditioned: bool = False
    per_head: bool = False
    sketch: str = "orthogonal"
    rotation: str = "haar"
    pieces: tuple[int, ...] = (1, 126, 1, 1, 3, 200, 1)
    batch: int = 2
    heads: int = 3

    def quantizer(self, device) -> Quantizer:
        role = self.role.removesuffix("s")
        options = {f"{role}_bits": self.nbits, f"{role}_estimator": self.estimator}
        config = TurboQuantConfig(sketch=self.sketch, rotation=self.rotation, **options)
        quantizer = Quantizer.create(config, self.role, 0, self.head_dim, device)
        if self.conditioned or self.per_head:
            generator = torch.Generator().manual_seed(1)
            factors = 0.5 + torch.rand(self.heads, 1, self.head_dim, generator=generator).to(device)
            mean = torch.randn(self.heads, 1, self.head_dim, generator=generator).to(device)
            quantizer = replace(quantizer, mean=mean, scale=factors)
        if self.per_head:
            rotations = quantizer.transform.roll(1, -1).repeat(self.heads, 1, 1).contiguous()
            for head in range(self.heads):
                rotations[head] = rotations[head].roll(head, 0)
            quantizer = replace(quantizer, transform=rotations, dual=rotations)
        return quantizer


@dataclass
class Disagreement:
    """
    How far stored codes deviate from the mathematics.

    Args:
        codes (`float`): fraction of codes that differ from the reference's.
        coordinate (`float`):
            Largest excess of |αy - c[code]| over that of the nearest centroid, times √head_dim, where α is the factor
            before rounding that best fits the codes of a vector.
        direction (`float`): largest (best cosine - cosine) / (1 - best cosine), where the best is over all α.
        sign (`float`): largest |⟨sketch row, residual⟩| of a wrong sign, over |row| |residual| / √head_dim.
        scale (`float`): largest relative error of a scale or residual norm, given the codes.
        error (`float`): squared error of the dequantised vectors, over that of the reference's, minus one.
    """

    codes: float
    coordinate: float
    direction: float
    sign: float
    scale: float
    error: float


def disagreement(states: torch.Tensor, quantizer: Quantizer, buffer) -> Disagreement:
    """Compares all tokens of `buffer` with `states`, of shape `[batch, heads, buffer.length, head_dim]`."""
    codes, stored = reference.codes_of(buffer, quantizer, 0, buffer.length)
    expected, expected_scales = reference.encode(states, quantizer)
    x = states.double()
    if quantizer.mean is not None:
        x = x - quantizer.mean.double()
    if quantizer.scale is not None:
        x = x * quantizer.scale.double()
    z = x @ quantizer.transform.double().mT
    norms = torch.linalg.vector_norm(z, dim=-1)
    y = z / norms.unsqueeze(-1)
    chosen = quantizer.centroids.double()[(codes & (2**quantizer.code_bits - 1)).int()]
    coordinate = direction = sign = 0.0
    scales = {"scales": norms}
    if quantizer.annealing is not None:
        # No single code or sign is right by itself: compare only the error.
        scales = _joint_scales(y, norms, chosen, (codes >> quantizer.code_bits).double() * 2 - 1, quantizer)
    else:
        coordinate, direction = _distances(y, chosen, quantizer)
        if quantizer.estimator == "rescaled":
            scales["scales"] = norms / (y * chosen).sum(-1)
        if quantizer.sketch is not None:
            lengths = torch.linalg.vector_norm(y - chosen, dim=-1)
            scales["residual_norms"] = norms * lengths
            rows = quantizer.sketch.double()
            product = (y - chosen) @ rows.mT / lengths.unsqueeze(-1) / torch.linalg.vector_norm(rows, dim=-1)
            wrong = (codes >> quantizer.code_bits).bool() != (product >= 0)
            sign = (product.abs() * wrong).max().item() * quantizer.head_dim**0.5
    scale = max(((stored[name] - exact).abs() / exact).max().item() for name, exact in scales.items())
    wrong = (codes != expected).double().mean().item()
    errors = [
        (reference.decode(*read, quantizer) - z).square().sum()
        for read in ((codes, stored), (expected, expected_scales))
    ]
    return Disagreement(wrong, coordinate, direction, sign, scale, (errors[0] / errors[1] - 1).item())


def _distances(y: torch.Tensor, chosen: torch.Tensor, quantizer: Quantizer) -> tuple[float, float]:
    """`coordinate` and `direction` of a [`Disagreement`]."""
    values, excesses, cosines = quantizer.centroids.double(), [], []
    for stretch in quantizer.stretches or (1.0,):
        distances = torch.stack([(y * stretch - value).abs() for value in values])
        excesses.append(((y * stretch - chosen).abs() - distances.amin(0)).amax(-1))
        cosines.append(torch.cosine_similarity(y, values[distances.argmin(0)], dim=-1))
    coordinate = torch.stack(excesses).amin(0).max() * quantizer.head_dim**0.5
    best = torch.stack(cosines).amax(0)
    direction = ((best - torch.cosine_similarity(y, chosen, dim=-1)) / (1 - best)).max()
    return coordinate.item(), direction.item()


def _joint_scales(y, norms, chosen, signs, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """The least-squares scales of given codes and signs, with ⟨ẑ, z⟩ = |z|²."""
    parts = torch.stack([chosen, signs @ quantizer.sketch.double()], dim=-1)
    fitted = torch.linalg.lstsq(parts, y.unsqueeze(-1)).solution
    length = (y.unsqueeze(-1) * (parts @ fitted)).sum(-2)
    return dict(
        zip(("scales", "residual_norms"), (norms.unsqueeze(-1) * (fitted.squeeze(-1) / length)).unbind(-1), strict=True)
    )


def check(case: Case, device: str = "cuda") -> Disagreement:
    """Appends `case.pieces` to a buffer of random bytes with the kernel, and compares all tokens at the end."""
    quantizer = case.quantizer(device)
    torch.manual_seed(0)
    states = torch.randn(case.batch, case.heads, sum(case.pieces), case.head_dim).to(device, case.dtype)
    buffer = quantizer.new_buffer(case.batch, case.heads)
    buffer.reserve(states.shape[2])
    for tensor in buffer.tensors.values():
        tensor.view(torch.uint8).random_()
    for piece in states.split(case.pieces, dim=2):
        kernels.quantize(piece, quantizer, buffer)
    return disagreement(states, quantizer, buffer)


ROLES = (("keys", "qjl"), ("keys", "rescaled"), ("keys", "mse"), ("values", "rescaled"), ("values", "mse"))


def matrix() -> list[Case]:
    """Every role, estimator and width at every head_dim; the other options with three of each."""
    every = [Case(role, nbits, e, d) for d in (64, 128) for role, e in ROLES for nbits in (2, 3, 4)]
    every += [Case(*row, d) for d in (80, 96, 192, 256) for row in (("keys", 4, "qjl"), ("keys", 3, "qjl"))]
    every += [Case("values", nbits, "rescaled", d) for d in (80, 96, 192, 256) for nbits in (2, 3, 4)]
    some = (("keys", 4, "qjl"), ("keys", 3, "rescaled"), ("values", 3, "rescaled"))
    for options in ({"dtype": torch.float16}, {"dtype": torch.float32}, {"per_head": True}):
        every += [Case(*row, d, **options) for d in (64, 128, 256) for row in some]
    return every + [Case(sketch="gaussian"), Case(rotation="hadamard"), Case(pieces=(5, 1000, 24), heads=1)]


def check_or_explain(case: Case) -> Disagreement | str:
    """Runs [`check`] and returns failures as text, because one must not hide the others."""
    try:
        return check(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip()[-400:]


def check_all() -> bool:
    cases = matrix()
    # Kernels compile in parallel; Triton keeps them on disk for the timing below.
    with ProcessPoolExecutor(min(14, os.cpu_count()), get_context("spawn")) as pool:
        results = list(pool.map(check_or_explain, cases))
    passed = True
    for case, result in zip(cases, results, strict=True):
        # 2^-8 is half a unit in the last place of bf16.
        limits = {"coordinate": 1e-4, "direction": 0.1, "sign": 1e-4, "scale": 2**-8 + 1e-5, "error": 0.01}
        if isinstance(result, str) or any(getattr(result, name) > limit for name, limit in limits.items()):
            print("FAILED", case, result)
            passed = False
    done = [result for result in results if not isinstance(result, str)]
    print(f"{len(done)} of {len(cases)} configurations ran; the worst of each, over all of them:")
    for name in ("codes", "coordinate", "direction", "sign", "scale", "error"):
        print(f"  {name} {max((getattr(result, name) for result in done), default=0):.1e}")
    return passed


@dataclass
class Layer:
    """States, quantizers and buffers of one layer; its methods append `tokens` at `length`, or read them back."""

    batch: int
    tokens: int
    keys: Case
    values: Case
    length: int = 0
    heads: int = 8

    def __post_init__(self):
        self.roles = [case for case in (self.keys, self.values) if case is not None]
        self.quantizers = [replace(case, heads=self.heads).quantizer("cuda") for case in self.roles]
        shape = (self.batch, self.heads, self.tokens)
        self.states = [torch.randn(*shape, c.head_dim, device="cuda", dtype=c.dtype) for c in self.roles]
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

    def prefill(count: int, keys: Case | None, values: Case | None, **options) -> list[Layer]:
        return [Layer(1, 8192, keys, values, **options) for _ in range(count)]

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
    yield "8,192 keys of one head, 3 bits (rescaled)", prefill(32, pair(3, "rescaled")[0], None, heads=1), "single"
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
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="TEXT", help="time only rows of the table whose name contains TEXT"
    )
    args = parse_for_gpu(parser)
    started = time.perf_counter()
    passed = args.no_check or check_all()
    print(f"checks: {time.perf_counter() - started:.0f} s\n", flush=True)
    texts = "bf16 states, 8 KV heads, head_dim 128 unless said", f"copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s"
    print(conditions("cuda", *texts, "medians of CUDA graphs over rotating buffers; host: of one call in eager mode"))
    print("\n" + head("what", "µs", "GB/s", "host µs"))
    for name, layers, function in rows():
        if not any(text in name for text in args.only):
            continue
        try:
            calls = [getattr(layer, function) for layer in layers]
            # The reference is timed from start to end.
            us = graph_us(calls) if function != "torch" else 1e3 * median_ms(calls[0])
            # The first calls compile.
            host_ms = statistics.median([call_ms(calls[0])[1] for _ in range(300)][100:])
            print(line(name, f"{us:.1f}", f"{layers[0].nbytes / us / 1e3:.0f}", f"{1e3 * host_ms:.0f}"), flush=True)
        except Exception as error:
            passed = False
            print(line(name, f"FAILED {type(error).__name__} {str(error)[:200]}", "", ""), flush=True)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(run(main))
