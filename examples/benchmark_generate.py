"""
Measure a whole decode step through each cache: host time, GPU time, memory, and the largest batch.

    python examples/benchmark_generate.py
    python examples/benchmark_generate.py --contexts 8k --batches 1 --caches dynamic turboquant:nbits=4
    python examples/benchmark_generate.py --static
    python examples/benchmark_generate.py --loop --contexts 8k 32k 128k --batches 1

With `--static` the caches have a static capacity, and `generate` compiles the step itself (CUDA graphs). With `--loop`
whole requests are timed by the wall clock, from the prompt on, as a streamer sees their tokens: turboquant through
`custom_generate=hf_turboquant.generate`, dynamic through `generate`, static through `generate`, compiled.

The model has random weights in the shape of Llama-3.1-8B, because speed does not depend on the weights. Caches are
filled with random states layer by layer, as a prefill leaves them; the prefill itself is timed separately.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from report import Times, conditions, head, line, parse_for_gpu
from rich.progress import track
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_turboquant
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.benchmark import CUDNN, EFFICIENT, FLASH, call_ms, copy_bandwidth
from hf_turboquant.evaluation.caches import held_bytes, label, new_cache, parse
from hf_turboquant.evaluation.load import parse_count
from hf_turboquant.generation import release
from hf_turboquant.layer import TurboQuantLayer

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 262144,
}
OURS = "turboquant:nbits=4/3/2"
CACHES = {
    "eager": ["dynamic", "quanto:nbits=4", "hqq:nbits=4", OURS, "turboquant:nbits=4,key_estimator=rescaled"],
    "static": ["static", OURS],
    "loop": ["dynamic", "static", OURS],
}
COLUMNS = {
    "eager": ("step (ms)", "host (ms)", "GPU busy (ms)", "peak memory (GB)", "cache (GB)"),
    "static": (
        "step (ms)", "GPU busy (ms)", "between kernels (ms)", "kernels", "first steps (s)", "graphs",
        "peak memory (GB)", "cache (GB)",
    ),
    "loop": (
        "first request: first token (s)", "then to full speed (s)", "first token (s)", "step (ms)",
        "ideal, fp16 KV (ms)", "ideal, codes (ms)", "of fp16 ideal", "peak memory (GB)",
    ),
}  # fmt: skip
# A longer gap between kernels means that the GPU waits for the host.
HOST_GAP_US = 20
# Tokens filled at a time, of all sequences together.
FILLED_TOKENS = 2**18


def gigabytes(cache) -> str:
    held = cache.memory().total_bytes if hasattr(cache, "memory") else held_bytes(cache)
    return f"{held / 1e9:.2f}"


def fill(cache, config, batch: int, context: int) -> None:
    """Fills every layer with random keys and values of `context` tokens, as a prefill leaves them."""
    # A large batch is filled in pieces, because its states would take memory that the cache needs.
    piece = max(1, FILLED_TOKENS // batch)
    for layer_idx in range(config.num_hidden_layers):
        for start in range(0, context, piece):
            shape = (batch, config.num_key_value_heads, min(piece, context - start), config.head_dim)
            keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            cache.update(keys, values, layer_idx)
            layer = cache.layers[layer_idx]
            if isinstance(layer, TurboQuantLayer):
                # Show the layer a query, as attention would.
                layer.settle(keys[:, :, -64:].repeat_interleave(4, dim=1))


class Entry:
    """A filled cache of [`decode`]: wall and host times of its steps (ms), bytes held and peak memory (bytes)."""

    def __init__(self, model, options: dict, batch: int, context: int):
        self.times_ms: list[tuple[float, float]] = []
        before, self.peak = torch.cuda.memory_allocated(), 0
        self.cache = new_cache(model.config, options)
        fill(self.cache, model.config, batch, context)
        self.held = torch.cuda.memory_allocated() - before

    def step(self, model, token: torch.Tensor) -> None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.times_ms.append(call_ms(partial(model, token, **{cache_name(model): self.cache}, logits_to_keep=1)))
        self.peak = max(self.peak, self.held + torch.cuda.max_memory_allocated() - before)
        self.held += torch.cuda.memory_allocated() - before


@torch.inference_mode()
def decode(model, caches: list[dict], batch: int, context: int, steps: int, query_length: int) -> list[tuple]:
    """
    Times steps of `query_length` tokens after `context`. Caches take turns, because the host's speed varies over time.

    Returns:
        For every cache: median time of a step (ms), the host's part of it, GPU time, peak memory without the other
        caches (GB), and size of the cache (GB).
    """
    weights = torch.cuda.memory_allocated()
    token = torch.randint(0, model.config.vocab_size, (batch, query_length), device="cuda")
    entries, rows = [Entry(model, options, batch, context) for options in caches], []
    for _ in range(steps):
        for entry in entries:
            entry.step(model, token)
    for entry in entries:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                model(token, **{cache_name(model): entry.cache}, logits_to_keep=1)
            torch.cuda.synchronize()
        busy_ms = sum(event.self_device_time_total for event in profiler.key_averages()) / 3e3
        medians = [statistics.median(column) for column in zip(*entry.times_ms[2:], strict=True)]
        numbers = *medians, busy_ms, (weights + entry.peak) / 1e9
        rows.append((*(f"{number:.1f}" for number in numbers), gigabytes(entry.cache)))
    return rows


def attempt(work: Callable, model, groups: list[list[dict]], *args):
    """Label and cells of every cache of every group, as `work` returns them, or the error."""
    for caches in groups:
        try:
            rows = work(model, caches, *args)
        except (ImportError, ValueError, torch.OutOfMemoryError) as error:
            rows = [(str(error).splitlines()[0][:60],)] * len(caches)
        gc.collect()
        torch.cuda.empty_cache()
        yield from zip(map(label, caches), rows, strict=True)


def generate(model, ids: torch.Tensor, tokens: int, times: Times, **options) -> torch.Tensor:
    """Generates exactly `tokens` tokens for every sequence; `times` sees them come."""
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **length, **options)


class Profiled(Times):
    """Starts a profiler after the first step, which is not compiled and does other work."""

    def __init__(self):
        super().__init__()
        self.profiler = profile(activities=[ProfilerActivity.CUDA])

    def put(self, value):
        # The first entry is the prompt.
        if len(self.times_s) == 1:
            torch.cuda.synchronize()
            self.profiler.start()
        super().put(value)


def gpu_times(events) -> tuple[float, float, int]:
    """From a profile: ms in which the GPU worked, ms of short gaps between kernels, number of kernels."""
    # Events that torch.compile adds are ranges around kernels that are counted already.
    own = (e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith("#"))
    ranges = sorted((event.time_range.start, event.time_range.end) for event in own)
    busy_us = sum(stop - start for start, stop in ranges)
    gaps_us = [max(0, start - stop) for (_, stop), (start, _) in pairwise(ranges)]
    return busy_us / 1e3, sum(gap for gap in gaps_us if gap < HOST_GAP_US) / 1e3, len(ranges)


@torch.inference_mode()
def decode_static(model, caches: list[dict], batch: int, context: int, tokens: int) -> list[tuple[str, ...]]:
    """Times a compiled step of `generate` after `context` tokens: wall time, GPU time, compilation, memory."""
    (options,) = caches
    torch.compiler.reset()
    counters.clear()
    cache = new_cache(model.config, {**options, "max_cache_len": context + tokens + 16})
    fill(cache, model.config, batch, context)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device="cuda")
    start, times, profiled = time.perf_counter(), Times(), Profiled()
    ids = generate(model, ids, tokens, times, **{cache_name(model): cache})
    late_s = times.steps_s[len(times.steps_s) // 4 :]
    # Compilation, and the steps that run before CUDA graphs are captured.
    first_s = time.perf_counter() - start - sum(late_s)
    peak = torch.cuda.max_memory_allocated()
    generate(model, ids, 8, profiled, **{cache_name(model): cache})
    torch.cuda.synchronize()
    profiled.profiler.stop()
    steps = len(profiled.steps_s)
    busy_ms, between_ms, kernels = (total / steps for total in gpu_times(profiled.profiler.events()))
    cells = f"{statistics.median(late_s) * 1e3:.1f}", f"{busy_ms:.1f}", f"{between_ms:.1f}", f"{kernels:.0f}"
    graphs = str(counters["stats"]["unique_graphs"])
    return [(*cells, f"{first_s:.0f}", graphs, f"{peak / 1e9:.1f}", gigabytes(cache))]


def request(model, ids: torch.Tensor, tokens: int, chunk: int | None, options: dict) -> list[float]:
    """Generates `tokens` tokens per sequence; returns seconds to the first, then from each to the next."""
    times, options = Times(), dict(options)
    kind = options.pop("cache")
    how = {"dynamic": {cache_name(model): DynamicCache(config=model.config)}, "static": {"cache_implementation": kind}}
    how = how.get(kind) or {"custom_generate": hf_turboquant.generate, **options}
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(model, ids, tokens, times, prefill_chunk_size=chunk, **how)
    return [times.times_s[1] - start, *times.steps_s]


def loop(model, caches: list[dict], batch: int, context: int, tokens: int, chunk: int | None, bandwidth: float):
    """Times two requests, the second of which reuses what the first left: see `COLUMNS`."""
    (options,), config = caches, model.config
    ids = torch.randint(3, config.vocab_size, (batch, context), device="cuda")
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    static = options["cache"] == "static"
    # cuDNN makes a plan for every length; only a static length avoids that cost in each step.
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT] if static else [FLASH, EFFICIENT]):
        first = request(model, ids, tokens, chunk, options)
        peak = torch.cuda.max_memory_allocated()
        again = request(model, ids, tokens, chunk, options)
    # Release the cache, so that the next one does not share its memory.
    release(model)
    # Mean over all tokens and not a median, because the host may do work only between some of them.
    step_s = sum(again[4:]) / len(again[4:])
    # A static cache compiles at the second and third step, and again if guards fail.
    ready_s = sum(first[1:]) - (tokens - 1) * step_s if static else sum(first[1:4]) - 3 * step_s
    # Embeddings are looked up; all other weights are read once per step.
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    numbers = (
        2 * batch * (context + tokens / 2) * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )
    full_s, codes = (weights + 2 * numbers) / bandwidth, ""
    if "nbits" in options:
        # Codes, and the two-byte norms of each vector: two for keys, one for values.
        codes = f"{(weights + numbers * (options['nbits'] / 8 + 3 / config.head_dim)) / bandwidth * 1e3:.2f}"
    cells = f"{first[0]:.2f}", f"{ready_s:.2f}", f"{again[0]:.3f}", f"{step_s * 1e3:.2f}", f"{full_s * 1e3:.2f}", codes
    return [(*cells, f"{step_s / full_s:.2f}", f"{peak / 1e9:.1f}")]


@torch.inference_mode()
def prefill(model, caches: list[dict], context: int) -> list[tuple[str]]:
    """Median time of a prefill of one sequence; caches take turns, and first prefills, which compile, don't count."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device="cuda")
    times_ms = [[] for _ in caches]
    for _ in range(9):
        for times, options in zip(times_ms, caches, strict=True):
            cache = new_cache(model.config, options)
            times.append(call_ms(partial(model, ids, **{cache_name(model): cache}, logits_to_keep=1))[0])
            del cache
    return [(f"{statistics.median(times[1:]):.1f} ms",) for times in times_ms]


def fits(model, options: dict, batch: int, context: int) -> bool:
    try:
        decode(model, [options], batch, context, 3, 1)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def largest_batch(model, options: dict, context: int, batch: int) -> int:
    """The largest batch, searched in steps of an eighth, that decodes without running out of memory."""
    while fits(model, options, batch, context):
        batch += max(1, batch // 8)
    while batch > 1 and not fits(model, options, batch, context):
        batch -= max(1, batch // 16)
    return batch


def arguments() -> argparse.Namespace:
    """The parsed arguments; `mode` is a key of `CACHES`, `caches` a list of options."""
    parser = argparse.ArgumentParser(description="Steps of an 8B-shaped model.", formatter_class=Formatter)
    add = parser.add_argument
    add("--contexts", type=parse_count, nargs="*", default=[8192, 32768, 131072], help="tokens, such as 128k")
    add("--batches", type=parse_count, nargs="*", default=[1, 8], help="numbers of sequences")
    add("--caches", nargs="+", metavar="SPEC", help="such as dynamic turboquant:nbits=4/3 (default: all)")
    add("--steps", type=parse_count, default=12, help="steps of a cache")
    add("--query-length", type=parse_count, default=1, help="tokens of a step, as in a later turn of a chat")
    add("--in-turns", action="store_true", help="keep all caches in memory and let them step and prefill in turns")
    add("--max-tokens", type=parse_count, default=2**18, help="skip larger batch × context")
    add("--prefill", type=parse_count, nargs="*", default=[8192], help="contexts whose prefill is timed")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--static", type=parse_count, nargs="?", const=64, help="time this many compiled steps (bare: 64)"
    )
    mode.add_argument(
        "--loop", type=parse_count, nargs="?", const=200, help="time requests of so many tokens (bare: 200)"
    )
    add("--chunk", type=parse_count, help="with --loop, tokens of a piece of the prefill")
    add("--largest-batch", type=parse_count, help="find the largest batch at this context")
    args = parse_for_gpu(parser)
    args.mode = "loop" if args.loop else "static" if args.static else "eager"
    args.caches = [options for spec in args.caches or CACHES[args.mode] for options in parse(spec)]
    if args.mode != "eager" and (args.in_turns or args.query_length > 1):
        parser.error("--in-turns and --query-length are for steps that are not compiled")
    if args.loop and args.loop < 8:
        parser.error(f"--loop must be of at least 8 tokens, got {args.loop}")
    return args


def main():
    args = arguments()
    config = LlamaConfig(**LLAMA_8B, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    how = {
        "eager": f"{args.steps - 2} steps of {args.query_length} tokens, eager{', caches in turns' * args.in_turns}",
        "static": f"{args.static} tokens, compiled by generate",
        "loop": f"{args.loop} tokens a request, greedy",
    }[args.mode]
    print(conditions("cuda", "Llama-3.1-8B shape, random bf16 weights, sdpa (flash or cuDNN)", how), end="\n\n")
    groups = [args.caches] if args.in_turns else [[options] for options in args.caches]
    work, sizes = {"eager": (decode, (args.steps, args.query_length)), "static": (decode_static, (args.static,))}.get(
        args.mode, (loop, (args.loop, args.chunk))
    )
    if args.loop:
        bandwidth = copy_bandwidth("cuda")
        torch.cuda.empty_cache()
        sizes += (bandwidth,)
        print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s, of which the ideals are made\n")
    columns = COLUMNS[args.mode]
    print(head("batch × context", "cache", *columns), flush=True)
    # Without the math backend, which would be an unfair baseline. cuDNN is the fastest at prefills, but makes a plan
    # for every length, which takes 40 ms in each step.
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT] if args.static else [FLASH, EFFICIENT]):
        shapes = [(b, c) for b in args.batches for c in args.contexts if b * c <= args.max_tokens]
        for batch, context in track(shapes, description="decode steps", transient=True):
            for name, cells in attempt(work, model, groups, batch, context, *sizes):
                print(line(f"{batch} × {context:,}", name, *cells, *[""] * (len(columns) - len(cells))), flush=True)
    if args.mode != "eager":
        return
    with sdpa_kernel([CUDNN, FLASH]):
        for context in args.prefill:
            for name, (cell,) in attempt(prefill, model, groups, context):
                print(f"prefill of {context:,} tokens, {name}: {cell}", flush=True)
    if args.largest_batch:
        with sdpa_kernel([FLASH]):
            for options in args.caches:
                batch = largest_batch(model, options, args.largest_batch, 16 if options["cache"] == "dynamic" else 64)
                print(f"largest batch at {args.largest_batch:,} tokens, {label(options)}: {batch}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
