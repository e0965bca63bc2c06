"""
Measure a whole decode step through each cache: host time, GPU time, memory, and the largest batch.

    python examples/benchmark_generate.py
    python examples/benchmark_generate.py --contexts 8192 --batches 1 --caches dynamic turboquant-4
    python examples/benchmark_generate.py --static
    python examples/benchmark_generate.py --loop --contexts 8192 32768 131072 --batches 1

With `--static` the caches have a static capacity, and `generate` compiles the step itself (CUDA graphs). With `--loop`
whole requests are timed by the wall clock, from the prompt on, as a streamer sees their tokens: "turboquant" through
`custom_generate=hf_turboquant.generate`, "dynamic" through `generate`, "static" through `generate`, compiled.

The model has random weights in the shape of Llama-3.1-8B, because speed does not depend on the weights. Caches are
filled with random states layer by layer, as a prefill leaves them; the prefill itself is timed separately.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from report import conditions, head, line, parse_for_gpu
from rich.progress import track
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

import hf_turboquant
from hf_turboquant import TurboQuantCache
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.benchmark import CUDNN, EFFICIENT, FLASH, call_ms, copy_bandwidth
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
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "quanto-4": lambda config: QuantizedCache("quanto", config, nbits=4),
    "hqq-4": lambda config: QuantizedCache("hqq", config, nbits=4, axis_key=1, axis_value=1),
    "turboquant-4": lambda config: TurboQuantCache(config, nbits=4),
    "turboquant-4-rescaled": lambda config: TurboQuantCache(config, nbits=4, key_estimator="rescaled"),
    **{f"turboquant-{nbits}": lambda config, nbits=nbits: TurboQuantCache(config, nbits=nbits) for nbits in (3, 2)},
    "dynamic-offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "turboquant-4-offloaded": lambda config: TurboQuantCache(config, nbits=4, offloading=True),
}
STATIC_CACHES = {
    "static": lambda config, length: StaticCache(config=config, max_cache_len=length),
    **{f"turboquant-{n}": lambda c, most, n=n: TurboQuantCache(c, nbits=n, max_cache_len=most) for n in (4, 3, 2)},
}
STATIC_COLUMNS = (
    "batch × context", "cache", "step (ms)", "GPU busy (ms)", "between kernels (ms)", "kernels", "first steps (s)",
    "graphs", "peak memory (GB)", "cache (GB)",
)  # fmt: skip
# Arguments of `generate`.
LOOP_CACHES = {
    "dynamic": lambda config: {"past_key_values": DynamicCache(config=config)},
    "static": lambda config: {"cache_implementation": "static"},
    **{f"turboquant-{n}": lambda _, n=n: {"custom_generate": hf_turboquant.generate, "nbits": n} for n in (4, 3, 2)},
}
LOOP_COLUMNS = (
    "batch × context", "cache", "first request: first token (s)", "then to full speed (s)", "first token (s)",
    "step (ms)", "ideal, fp16 KV (ms)", "ideal, codes (ms)", "of fp16 ideal", "peak memory (GB)",
)  # fmt: skip
# A longer gap between kernels means that the GPU waits for the host.
HOST_GAP_US = 20
# Tokens filled at a time, of all sequences together.
FILLED_TOKENS = 2**18
COLUMNS = ("batch × context", "cache", "step (ms)", "host (ms)", "GPU busy (ms)", "peak memory (GB)", "cache (GB)")


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


def cache_bytes(cache) -> int:
    if isinstance(cache, TurboQuantCache):
        return cache.memory().total_bytes
    return sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t))


@dataclass
class Entry:
    """A cache of [`decode`]: wall and host times of its steps (ms), bytes held and peak memory (bytes)."""

    make: Callable
    cache: object = None
    times_ms: list[tuple[float, float]] = field(default_factory=list)
    held: int = 0
    peak: int = 0

    def measure(self, work: Callable[[], None]) -> None:
        """Does `work` and counts its memory towards this cache."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        self.peak = max(self.peak, self.held + torch.cuda.max_memory_allocated() - before)
        self.held += torch.cuda.memory_allocated() - before

    def fill(self, config, batch: int, context: int) -> None:
        self.cache = self.make(config)
        fill(self.cache, config, batch, context)

    def step(self, model, token: torch.Tensor) -> None:
        self.times_ms.append(call_ms(lambda: model(token, past_key_values=self.cache, logits_to_keep=1)))


@torch.inference_mode()
def decode(model, makers: dict, batch: int, context: int, steps: int, query_length: int):
    """
    Times steps of `query_length` tokens after `context`. Caches take turns, because the host's speed varies over time.

    Returns:
        By name of the cache: median time of a step (ms), the host's part of it, GPU time, peak memory without the
        other caches (GB), and size of the cache (GB).
    """
    entries = {name: Entry(make) for name, make in makers.items()}
    weights = torch.cuda.memory_allocated()
    token = torch.randint(0, model.config.vocab_size, (batch, query_length), device="cuda")
    for entry in entries.values():
        entry.measure(lambda entry=entry: entry.fill(model.config, batch, context))
        # Only steps count.
        entry.peak = 0
    for _ in range(steps):
        for entry in entries.values():
            entry.measure(lambda entry=entry: entry.step(model, token))
    cells = {}
    for name, entry in entries.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                model(token, past_key_values=entry.cache, logits_to_keep=1)
            torch.cuda.synchronize()
        busy_ms = sum(event.self_device_time_total for event in profiler.key_averages()) / 3e3
        medians = [statistics.median(column) for column in zip(*entry.times_ms[2:], strict=True)]
        memory = (weights + entry.peak) / 1e9, cache_bytes(entry.cache) / 1e9
        cells[name] = tuple(f"{number:.1f}" for number in (*medians, busy_ms, memory[0])) + (f"{memory[1]:.2f}",)
    return cells


def attempt(work: Callable, model, groups: list[dict], *args):
    """Name and cells of every cache of every group, as `work` returns them, or the error."""
    for makers in groups:
        try:
            rows = work(model, makers, *args)
        except (ImportError, ValueError, torch.OutOfMemoryError) as error:
            rows = dict.fromkeys(makers, (str(error).splitlines()[0][:60],))
        gc.collect()
        torch.cuda.empty_cache()
        yield from rows.items()


class Clock(StoppingCriteria):
    """
    Records the time of every step; `generate` waits for the GPU before the next one. Starts a profiler after the first
    step, which is not compiled and does other work.
    """

    def __init__(self, profiler: profile | None = None):
        self.times_s: list[float] = []
        self.profiler = profiler

    def __call__(self, input_ids, scores, **kwargs):
        if self.profiler is not None and not self.times_s:
            torch.cuda.synchronize()
            self.profiler.start()
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model, cache, ids: torch.Tensor, tokens: int, profiler=None) -> tuple[torch.Tensor, list[float]]:
    """Generates from a filled cache; returns ids and the times of all steps but the first, which is not compiled."""
    clock = Clock(profiler)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    ids = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, stopping_criteria=[clock], **options
    )
    return ids, [stop - start for start, stop in zip(clock.times_s, clock.times_s[1:], strict=False)]


def gpu_times(events) -> tuple[float, float, int]:
    """From a profile: ms in which the GPU worked, ms of short gaps between kernels, number of kernels."""
    # Events that torch.compile adds are ranges around kernels that are counted already.
    own = (e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith("#"))
    ranges = sorted((event.time_range.start, event.time_range.end) for event in own)
    busy_us = sum(stop - start for start, stop in ranges)
    gaps_us = [max(0, start - stop) for (_, stop), (start, _) in pairwise(ranges)]
    return busy_us / 1e3, sum(gap for gap in gaps_us if gap < HOST_GAP_US) / 1e3, len(ranges)


@torch.inference_mode()
def decode_static(model, makers: dict, batch: int, context: int, tokens: int) -> dict[str, tuple[str, ...]]:
    """Times a compiled step of `generate` after `context` tokens: wall time, GPU time, compilation, memory."""
    (name, make_cache), *_ = makers.items()
    torch.compiler.reset()
    counters.clear()
    cache = make_cache(model.config, context + tokens + 16)
    fill(cache, model.config, batch, context)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device="cuda")
    start = time.perf_counter()
    ids, times_s = generate(model, cache, ids, tokens)
    # Compilation, and the steps that run before CUDA graphs are captured.
    first_s = time.perf_counter() - start - sum(times_s[len(times_s) // 4 :])
    peak = torch.cuda.max_memory_allocated()
    profiler = profile(activities=[ProfilerActivity.CUDA])
    _, profiled_s = generate(model, cache, ids, 8, profiler)
    torch.cuda.synchronize()
    profiler.stop()
    busy_ms, between_ms, kernels = (total / len(profiled_s) for total in gpu_times(profiler.events()))
    cells = (
        f"{statistics.median(times_s[len(times_s) // 4 :]) * 1e3:.1f}",
        f"{busy_ms:.1f}",
        f"{between_ms:.1f}",
        f"{kernels:.0f}",
        f"{first_s:.0f}",
        str(counters["stats"]["unique_graphs"]),
        f"{peak / 1e9:.1f}",
        f"{cache_bytes(cache) / 1e9:.2f}",
    )
    return {name: cells}


class Times(BaseStreamer):
    """Appends every token to one list and its arrival time (s) to another."""

    def __init__(self):
        self.tokens: list[int] = []
        self.times_s: list[float] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()
        self.times_s.append(time.perf_counter())

    def end(self):
        pass


def request(model, ids: torch.Tensor, tokens: int, chunk: int | None, options: dict) -> list[float]:
    """Generates `tokens` tokens per sequence; returns seconds to the first, then from each to the next."""
    streamer = Times()
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=0, prefill_chunk_size=chunk, **options,
    )  # fmt: skip
    # The first entry is the prompt.
    return [streamer.times_s[1] - start, *(stop - start for start, stop in pairwise(streamer.times_s[1:]))]


def loop(model, makers: dict, batch: int, context: int, tokens: int, chunk: int | None, bandwidth: float):
    """Times two requests, the second of which reuses what the first left: see `LOOP_COLUMNS`."""
    (name, options), *_ = makers.items()
    config = model.config
    ids = torch.randint(3, config.vocab_size, (batch, context), device="cuda")
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    # cuDNN makes a plan for every length; only a static length avoids that cost in each step.
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT] if name == "static" else [FLASH, EFFICIENT]):
        first = request(model, ids, tokens, chunk, options(config))
        peak = torch.cuda.max_memory_allocated()
        again = request(model, ids, tokens, chunk, options(config))
    # Release the cache, so that the next one does not share its memory.
    release(model)
    # Mean over all tokens and not a median, because the host may do work only between some of them.
    step_s = sum(again[4:]) / len(again[4:])
    ready_s = sum(first[1:4]) - 3 * step_s
    if name == "static":
        # Compilation happens at the second and third step, and again if guards fail.
        ready_s = sum(first[1:]) - (tokens - 1) * step_s
    # Embeddings are looked up; all other weights are read once per step.
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    numbers = (
        batch * (context + tokens / 2) * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    )
    full_s = (weights + 2 * numbers) / bandwidth
    bits = name.rpartition("-")[2]
    # Codes, and the two-byte norms of each vector: two for keys, one for values.
    codes_s = (weights + numbers * (int(bits) / 8 + 3 / config.head_dim)) / bandwidth if bits.isdigit() else None
    cells = (
        f"{first[0]:.2f}",
        f"{ready_s:.2f}",
        f"{again[0]:.3f}",
        f"{step_s * 1e3:.2f}",
        f"{full_s * 1e3:.2f}",
        "" if codes_s is None else f"{codes_s * 1e3:.2f}",
        f"{step_s / full_s:.2f}",
        f"{peak / 1e9:.1f}",
    )
    return {name: cells}


@torch.inference_mode()
def prefill(model, makers: dict, context: int) -> dict[str, tuple[str]]:
    """Median time of a prefill of one sequence; caches take turns, and first prefills, which compile, don't count."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device="cuda")
    times_ms = {name: [] for name in makers}
    for _ in range(9):
        for name, make_cache in makers.items():
            cache = make_cache(model.config)
            times_ms[name].append(call_ms(partial(model, ids, past_key_values=cache, logits_to_keep=1))[0])
            del cache
    return {name: (f"{statistics.median(times[1:]):.1f} ms",) for name, times in times_ms.items()}


def fits(model, make_cache, batch: int, context: int) -> bool:
    try:
        decode(model, {"": make_cache}, batch, context, 3, 1)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def largest_batch(model, make_cache, context: int, start: int) -> int:
    """The largest batch, searched in steps of an eighth, that decodes without running out of memory."""
    batch = start
    while fits(model, make_cache, batch, context):
        batch += max(1, batch // 8)
    while batch > 1 and not fits(model, make_cache, batch, context):
        batch -= max(1, batch // 16)
    return batch


def arguments() -> tuple[argparse.Namespace, dict]:
    """The parsed arguments, and functions that make the caches, by name."""
    parser = argparse.ArgumentParser(description="Steps of an 8B-shaped model.", formatter_class=Formatter)
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192, 32768, 131072], help="tokens")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="sequences")
    parser.add_argument("--caches", nargs="+", choices={**CACHES, **STATIC_CACHES, **LOOP_CACHES}, help="which")
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--query-length", type=int, default=1, help="tokens of a step, as in a later turn of a chat")
    parser.add_argument(
        "--in-turns", action="store_true", help="keep all caches in memory and let them step and prefill in turns"
    )
    parser.add_argument("--max-tokens", type=int, default=2**18, help="skip larger batch × context")
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192], help="contexts whose prefill is timed")
    parser.add_argument("--static", type=int, nargs="?", const=64, default=0, help="time this many compiled steps")
    parser.add_argument("--loop", type=int, nargs="?", const=200, default=0, help="time requests of this many tokens")
    parser.add_argument("--chunk", type=int, help="with --loop, tokens of a piece of the prefill")
    parser.add_argument("--largest-batch", type=int, default=0, help="find the largest batch at this context")
    args = parse_for_gpu(parser)
    caches = LOOP_CACHES if args.loop else STATIC_CACHES if args.static else CACHES
    # Offloading saves memory, not time: it runs only if requested.
    names = args.caches or [name for name in caches if "offloaded" not in name]
    if not set(names) <= set(caches):
        parser.error(f"--caches must be of {list(caches)}, got {names}")
    if (args.static or args.loop) and (args.in_turns or args.query_length > 1):
        parser.error("--in-turns and --query-length are for steps that are not compiled")
    if args.static and args.loop:
        parser.error("--static and --loop are two tables: run them one by one")
    if args.loop and args.loop < 8:
        parser.error(f"--loop must be of at least 8 tokens, got {args.loop}")
    return args, {name: caches[name] for name in names}


def main():
    args, makers = arguments()
    config = LlamaConfig(**LLAMA_8B, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    turns = ", caches in turns" * args.in_turns
    how = f"median of {args.steps - 2} steps of {args.query_length} tokens, eager{turns}"
    how = f"{args.static} tokens, compiled by generate" if args.static else how
    how = f"{args.loop} tokens a request, greedy" if args.loop else how
    print(conditions("cuda", "Llama-3.1-8B shape, random bf16 weights, sdpa (flash or cuDNN)", how), end="\n\n")
    columns = LOOP_COLUMNS if args.loop else STATIC_COLUMNS if args.static else COLUMNS
    groups = [makers] if args.in_turns else [{name: make} for name, make in makers.items()]
    work, sizes = (decode_static, (args.static,)) if args.static else (decode, (args.steps, args.query_length))
    if args.loop:
        bandwidth = copy_bandwidth("cuda")
        torch.cuda.empty_cache()
        work, sizes = loop, (args.loop, args.chunk, bandwidth)
        print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s, of which the ideals are made\n")
    print(head(*columns), flush=True)
    # Without the math backend, which would be an unfair baseline. cuDNN is the fastest at prefills, but makes a plan
    # for every length, which takes 40 ms in each step.
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT] if args.static else [FLASH, EFFICIENT]):
        shapes = [(b, c) for b in args.batches for c in args.contexts if b * c <= args.max_tokens]
        for batch, context in track(shapes, description="decode steps", transient=True):
            for name, cells in attempt(work, model, groups, batch, context, *sizes):
                cells += ("",) * (len(columns) - 2 - len(cells))
                print(line(f"{batch} × {context:,}", name, *cells), flush=True)
        if args.static or args.loop:
            return
    with sdpa_kernel([CUDNN, FLASH]):
        for context in args.prefill:
            for name, (cell,) in attempt(prefill, model, groups, context):
                print(f"prefill of {context:,} tokens, {name}: {cell}", flush=True)
    if args.largest_batch:
        with sdpa_kernel([FLASH]):
            for name in makers:
                batch = largest_batch(model, CACHES[name], args.largest_batch, 16 if name == "dynamic" else 64)
                print(f"largest batch at {args.largest_batch:,} tokens, {name}: {batch}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
