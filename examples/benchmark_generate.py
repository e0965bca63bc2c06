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

import torch
from report import DEVICE, add_caches, conditions, line, parse_for_gpu, table
from rich.progress import track
from torch.autograd import DeviceType
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import hf_turboquant
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import Formatter, run
from hf_turboquant.estimate import Estimate
from hf_turboquant.evaluation.benchmark import CUDNN, EFFICIENT, FLASH, Times, calls_ms, copy_bandwidth, generate
from hf_turboquant.evaluation.caches import held_bytes, label, new_cache, parse
from hf_turboquant.evaluation.load import parse_count
from hf_turboquant.generation import release
from hf_turboquant.layer import TurboQuantLayer

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 262144,
}  # fmt: skip
OURS = "turboquant:nbits=4/3/2"
CACHES = {
    "eager": ("dynamic", "quanto:nbits=4", "hqq:nbits=4", OURS, "turboquant:nbits=4,key_estimator=rescaled"),
    "static": ("static", OURS),
    "loop": ("dynamic", "static", OURS),
}
COLUMNS = {
    "eager": ("step (ms)", "host (ms)", "GPU busy (ms)", "peak memory (GB)", "cache (GB)"),
    "static": ("step (ms)", "GPU busy (ms)", "first steps (s)", "peak memory (GB)", "cache (GB)"),
    "loop": ("first request: first token (s)", "then to full speed (s)", "first token (s)", "step (ms)",
             "ideal, fp16 KV (ms)", "ideal, codes (ms)", "of fp16 ideal", "peak memory (GB)"),
}  # fmt: skip


def fill(cache, config, batch: int, context: int) -> None:
    """Fills every layer with random keys and values of `context` tokens, as a prefill leaves them."""
    # A large batch is filled in pieces, because its states would take memory that the cache needs.
    piece = max(1, 2**18 // batch)
    for layer_idx in range(config.num_hidden_layers):
        for start in range(0, context, piece):
            shape = (batch, config.num_key_value_heads, min(piece, context - start), config.head_dim)
            keys, values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            cache.update(keys, values, layer_idx)
            layer = cache.layers[layer_idx]
            if isinstance(layer, TurboQuantLayer):
                # Show the layer a query, as attention would.
                layer.settle(keys[:, :, -64:].repeat_interleave(4, dim=1))


def on_gpu(function: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and the time (ms) that the GPU worked for it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = function()
        torch.cuda.synchronize()
    # Events that torch.compile adds are ranges around kernels that are counted already.
    own = (e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.name.startswith("#"))
    return result, sum(event.time_range.elapsed_us() for event in own) / 1e3


def cells(*numbers: float, cache) -> tuple[str, ...]:
    """Numbers and the size of the cache (GB) as cells of a table."""
    return *(f"{number:.1f}" for number in numbers), f"{held_bytes(cache) / 1e9:.2f}"


@torch.inference_mode()
def decode(model, caches: list[dict], batch: int, context: int, args) -> list[tuple]:
    """Times steps of `args.query_length` tokens after `context`; the peak of memory is that without other caches."""
    token = torch.randint(0, model.config.vocab_size, (batch, args.query_length), device=DEVICE)
    held = [new_cache(model.config, options) for options in caches]
    for cache in held:
        fill(cache, model.config, batch, context)
    steps = [partial(model, token, **{cache_name(model): cache}, logits_to_keep=1) for cache in held]
    rows, times_ms = [], calls_ms(steps, args.steps, skipped=2)
    for cache, step, medians in zip(held, steps, times_ms, strict=True):
        torch.cuda.reset_peak_memory_stats()
        _, busy_ms = on_gpu(lambda step=step: [step() for _ in range(3)])
        peak = torch.cuda.max_memory_allocated() - sum(held_bytes(other) for other in held if other is not cache)
        rows.append(cells(*medians, busy_ms / 3, peak / 1e9, cache=cache))
    return rows


@torch.inference_mode()
def decode_static(model, caches: list[dict], batch: int, context: int, args) -> list[tuple]:
    """Times compiled steps of `generate` after `context` tokens."""
    torch.compiler.reset()
    cache = new_cache(model.config, {**caches[0], "max_cache_len": context + args.static + 16})
    fill(cache, model.config, batch, context)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device=DEVICE)
    write = partial(generate, model, **{cache_name(model): cache})
    start, times = time.perf_counter(), Times()
    ids = write(ids, args.static, times)
    late_s = times.steps_s[len(times.steps_s) // 4 :]
    # Compilation, and the steps that run before CUDA graphs are captured.
    first_s, peak = time.perf_counter() - start - sum(late_s), torch.cuda.max_memory_allocated()
    # The first step is not compiled and does other work: the difference is eight compiled steps.
    ids, short_ms = on_gpu(partial(write, ids, 4, Times()))
    ids, long_ms = on_gpu(partial(write, ids, 12, Times()))
    return [cells(statistics.median(late_s) * 1e3, (long_ms - short_ms) / 8, first_s, peak / 1e9, cache=cache)]


def request(model, ids: torch.Tensor, args, cache: str, **options) -> list[float]:
    """Generates `args.loop` tokens per sequence; returns seconds to the first, then from each to the next."""
    if cache == "turboquant":
        options["custom_generate"] = hf_turboquant.generate
    else:
        # transformers makes its own caches from their names.
        options["cache_implementation"] = cache
    times = Times()
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(model, ids, args.loop, times, **options)
    return [times.times_s[1] - start, *times.steps_s]


def loop(model, caches: list[dict], batch: int, context: int, args) -> list[tuple]:
    """Times two requests, the second of which reuses what the first left."""
    (options,) = caches
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=DEVICE)
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    static = options["cache"] == "static"
    # cuDNN makes a plan for every length; only a static length avoids that cost in each step.
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT] if static else [FLASH, EFFICIENT]):
        first = request(model, ids, args, **options)
        peak = torch.cuda.max_memory_allocated()
        again = request(model, ids, args, **options)
    # Release the cache, so that the next one does not share its memory.
    release(model)
    # Mean over all tokens and not a median, because the host may do work only between some of them.
    step_s = statistics.mean(again[4:])
    # A static cache compiles at the second and third step, and again if guards fail.
    ready_s = sum(first[1:]) - (args.loop - 1) * step_s if static else sum(first[1:4]) - 3 * step_s
    # Embeddings are looked up; all other weights are read once per step.
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    estimate, length = Estimate.from_config(model.config), context + args.loop // 2
    full_s, codes = (weights + estimate.full_bytes(length, batch)) / args.bandwidth, ""
    if options["cache"] == "turboquant":
        ours = {name: value for name, value in options.items() if name != "cache"}
        codes = f"{(weights + estimate.memory(length, batch, **ours).total_bytes) / args.bandwidth * 1e3:.2f}"
    times = f"{first[0]:.2f}", f"{ready_s:.2f}", f"{again[0]:.3f}", f"{step_s * 1e3:.2f}", f"{full_s * 1e3:.2f}", codes
    return [(*times, f"{step_s / full_s:.2f}", f"{peak / 1e9:.1f}")]


def batching_ms(model, batch: int, context: int) -> float:
    """Time of a step of transformers' continuous batching: the difference of 72 and 8 tokens."""
    options = {"inputs": torch.randint(3, model.config.vocab_size, (batch, context)).tolist(), "progress_bar": False}
    lengths = (GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0) for n in (8, 72))
    requests = [partial(model.generate_batch, generation_config=length, **options) for length in lengths]
    (few_ms, _), (many_ms, _) = calls_ms(requests, 2, skipped=1)
    return (many_ms - few_ms) / 64


@torch.inference_mode()
def prefill(model, caches: list[dict], context: int) -> list[tuple[str]]:
    """Median time of a prefill of one sequence; first prefills, which compile, don't count."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=DEVICE)

    def read(options: dict):
        # With the cache, which nobody frees before the first token.
        return model(ids, **{cache_name(model): new_cache(model.config, options)}, logits_to_keep=1)

    # Short prompts vary more, because they take as long as the host.
    times_ms = calls_ms([partial(read, options) for options in caches], max(9, 2**15 // context), skipped=1)
    return [(f"{wall_ms:.1f} ms",) for wall_ms, _ in times_ms]


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


def largest_batch(model, options: dict, context: int, args) -> int:
    """The largest batch, searched in steps of an eighth, that decodes without running out of memory."""

    def fits(batch: int) -> bool:
        ((_, row),) = attempt(decode, model, [[options]], batch, context, args)
        return len(row) > 1

    args.steps, args.query_length = 3, 1
    batch = 16 if options["cache"] == "dynamic" else 64
    while fits(batch):
        batch += max(1, batch // 8)
    while batch > 1 and not fits(batch):
        batch -= max(1, batch // 16)
    return batch


def arguments() -> argparse.Namespace:
    """The parsed arguments; `mode` is a key of `CACHES`, `caches` a list of options."""
    parser = argparse.ArgumentParser(description="Steps of an 8B-shaped model.", formatter_class=Formatter)
    add = partial(parser.add_argument, type=parse_count)
    add("--contexts", nargs="*", default=[8192, 32768, 131072], help="tokens, such as 128k")
    add("--batches", nargs="*", default=[1, 8], help="numbers of sequences")
    add_caches(parser)
    add("--steps", default=12, help="steps of a cache")
    add("--query-length", default=1, help="tokens of a step, as in a later turn of a chat")
    parser.add_argument("--in-turns", action="store_true", help="keep all caches in memory and let them take turns")
    add("--max-tokens", default=2**18, help="skip larger batch × context")
    add("--prefill", nargs="*", default=[8192], help="contexts whose prefill is timed")
    mode = partial(parser.add_mutually_exclusive_group().add_argument, type=parse_count, nargs="?")
    mode("--static", const=64, help="time this many compiled steps (bare: 64)")
    mode("--loop", const=200, help="time requests of so many tokens (bare: 200)")
    parser.add_argument("--batching", action="store_true", help="also time steps of transformers' generate_batch")
    add("--largest-batch", help="find the largest batch at this context")
    args = parse_for_gpu(parser)
    args.mode = "loop" if args.loop else "static" if args.static else "eager"
    args.caches = args.caches or parse(*CACHES[args.mode])
    if args.mode != "eager" and (args.in_turns or args.query_length > 1):
        parser.error("--in-turns and --query-length are for steps that are not compiled")
    if args.loop and args.loop < 8:
        parser.error(f"--loop must be of at least 8 tokens, got {args.loop}")
    return args


def main():
    args = arguments()
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16).eval()
    how = {
        "eager": f"{args.steps - 2} steps of {args.query_length} tokens, eager{', caches in turns' * args.in_turns}",
        "static": f"{args.static} tokens, compiled by generate",
        "loop": f"{args.loop} tokens a request, greedy",
    }[args.mode]
    print(conditions(DEVICE, "Llama-3.1-8B shape, random bf16 weights, sdpa (flash or cuDNN)", how), end="\n\n")
    groups = [args.caches] if args.in_turns else [[options] for options in args.caches]
    if args.loop:
        args.bandwidth = copy_bandwidth(DEVICE)
        torch.cuda.empty_cache()
        print(f"copy bandwidth {args.bandwidth / 1e9:.0f} GB/s, of which the ideals are made\n")
    work, columns = {"eager": decode, "static": decode_static, "loop": loop}[args.mode], COLUMNS[args.mode]
    print(table(["batch × context", "cache", *columns]), flush=True)
    # Without the math backend, which would be an unfair baseline. cuDNN is the fastest at prefills, but makes a plan
    # for every length, which takes 40 ms in each step.
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT] if args.static else [FLASH, EFFICIENT]):
        shapes = [(b, c) for b in args.batches for c in args.contexts if b * c <= args.max_tokens]
        for batch, context in track(shapes, description="decode steps", transient=True):
            for name, row in attempt(work, model, groups, batch, context, args):
                print(line(f"{batch} × {context:,}", name, *row, *[""] * (len(columns) - len(row))), flush=True)
    for batch, context in shapes if args.batching else ():
        print(f"generate_batch, {batch} × {context:,}: {batching_ms(model, batch, context):.1f} ms a step", flush=True)
    if args.mode != "eager":
        return
    with sdpa_kernel([CUDNN, FLASH]):
        for context in args.prefill:
            for name, (cell,) in attempt(prefill, model, groups, context):
                print(f"prefill of {context:,} tokens, {name}: {cell}", flush=True)
    with sdpa_kernel([FLASH]):
        for options in args.caches if args.largest_batch else ():
            batch = largest_batch(model, options, args.largest_batch, args)
            print(f"largest batch at {args.largest_batch:,} tokens, {label(options)}: {batch}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
