"""Speed: the timing functions of all benchmarks, and times of one layer's cache in the shape of a model."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from ..config import TurboQuantConfig
from ..estimate import Estimate
from ..layer import TurboQuantLayer
from .caches import label
from .load import machine

FLASH, CUDNN, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


class Times(BaseStreamer):
    """A streamer that records when each token comes."""

    def __init__(self):
        self.times_s: list[float] = []

    def put(self, value):
        self.times_s.append(time.perf_counter())

    def end(self):
        pass

    @property
    def steps_s(self) -> list[float]:
        """Times from one new token to the next; the first entry of `times_s` is the prompt."""
        return [after - before for before, after in pairwise(self.times_s[1:])]


def median_ms(function: Callable[[], object], seconds: float = 0.3) -> float:
    """Median time of a call, host time included, until the current device has finished."""
    # Compile kernels first; otherwise `Timer` takes that for the duration of a call and waits after every call.
    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def call_ms(function: Callable[[], object]) -> tuple[float, float]:
    """
    Times of one call on an idle device: until a GPU has finished, and until the host has launched everything. What it
    returns is freed later, which is not timed.
    """
    _wait()
    start = time.perf_counter()
    _ = function()
    launched = time.perf_counter()
    _wait()
    return (time.perf_counter() - start) * 1e3, (launched - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def calls_ms(functions: Iterable[Callable[[], object]], repeats: int, skipped: int) -> list[tuple[float, float]]:
    """
    Medians of both times of [`call_ms`] for each function. Calls take turns, because a host's speed varies over time;
    the first `skipped` of `repeats`, which compile and warm up, don't count.
    """
    turns = list(zip(*([call_ms(function) for function in functions] for _ in range(repeats)), strict=True))
    return [tuple(map(statistics.median, zip(*times[skipped:], strict=True))) for times in turns]


def graph_us(functions: Sequence[Callable[[], object]], inner: int = 1, repeats: int = 15) -> float:
    """
    Median GPU time of one of `functions`, from replays of a CUDA graph that holds all of them `inner` times. They
    should work on different tensors, so that nothing is found in L2.
    """
    # What they read must be there before another stream reads it.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for function in functions:
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for function in [*functions] * inner:
                function()
        times_ms = []
        for _ in range(repeats + 3):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times_ms.append(start.elapsed_time(stop))
    # The first replays warm up.
    return statistics.median(times_ms[3:]) * 1e3 / (len(functions) * inner)


def copy_bandwidth(device: torch.device | str, nbytes: int | None = None) -> float:
    """Bytes per second, read and written, of a copy of `nbytes` on `device`; a GPU must be the current device."""
    on_gpu = torch.device(device).type == "cuda"
    source = torch.randn((nbytes or 2 ** (29 if on_gpu else 27)) // 4, device=device)
    # A torch kernel, because `copy_` between tensors of one dtype leaves the copy to the driver, which is slower.
    copy = partial(torch.mul, source, 2.0, out=torch.empty_like(source))
    return 2 * source.nbytes / (graph_us([copy], inner=4) * 1e-6 if on_gpu else median_ms(copy) * 1e-3)


def fastest(measure: Callable[[], float]) -> float:
    """The shortest time that `measure` finds among torch's attention kernels that support what it calls."""
    times = []
    for backend in (None, FLASH, CUDNN, EFFICIENT):
        try:
            with sdpa_kernel(backend) if backend else nullcontext(), warnings.catch_warnings():
                # torch warns for each kernel why it does not support the call.
                warnings.simplefilter("ignore", UserWarning)
                times.append(measure())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # A kernel may be missing or not support the shape; with `None`, torch picks one that does.
            if backend is None:
                raise
    return min(times)


def new_layer(options: dict | None, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor):
    """A layer of one of our caches, or without `options` a `DynamicLayer`, as a prefill leaves it."""
    layer = DynamicLayer() if options is None else TurboQuantLayer(TurboQuantConfig(**options), 0)
    layer.update(keys, values)
    if options is not None:
        # Show the layer a query, as attention would.
        layer.settle(query)
    return layer


def attended_bytes(layer) -> int:
    """What attention reads of a layer."""
    if isinstance(layer, TurboQuantLayer):
        return sum(buffer.used_nbytes for buffer in layer.tokens.codes.values()) + layer.tokens.exact.nbytes
    return layer.keys.nbytes + layer.values.nbytes


def generate(model, ids: torch.Tensor, tokens: int, times: Times, **options) -> torch.Tensor:
    """Generates exactly `tokens` tokens for every sequence, greedily; `times` sees them come."""
    options |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **options)


@torch.inference_mode()
def layer_times(shape: dict, context: int, options: dict | None, device: torch.device, dtype: torch.dtype) -> dict:
    """
    Times of one layer that holds `context` random tokens: attention of one query, a whole step (append and attention),
    and the cache's share of a prefill.

    Args:
        shape (`dict`): `batch`, `heads` (of queries), `kv_heads`, `key_dim`, `value_dim`.
        options (`dict`, *optional*): see [`TurboQuantConfig`]; without them a `DynamicLayer` is timed.

    Returns:
        `attention_ms`, `step_ms`, `prefill_ms` and the `bytes` that attention reads.
    """

    def random(heads: str, tokens: int, dim: str) -> torch.Tensor:
        return torch.randn(shape["batch"], shape[heads], tokens, shape[dim], device=device, dtype=dtype)

    states = [random("kv_heads", context, dim) for dim in ("key_dim", "value_dim")]
    token = [state[:, :, :1].clone() for state in states]
    query, seen = (random("heads", tokens, "key_dim") for tokens in (1, min(context, 64)))
    attend = partial(scaled_dot_product_attention, query, enable_gqa=True)
    prefill = partial(new_layer, options, seen, *states)

    layer = prefill()
    measure = partial(median_ms, partial(attend, layer.keys, layer.values))
    attention_ms, nbytes = fastest(measure) if options is None else measure(), attended_bytes(layer)
    # By default torch may pick cuDNN, which makes a plan for every new length: most of a step's time on an H100.
    with sdpa_kernel([FLASH, EFFICIENT, SDPBackend.MATH]) if device.type == "cuda" else nullcontext():
        # Few steps, so that the context stays about the same.
        ((step_ms, _),) = calls_ms([lambda: attend(*layer.update(*token))], 13, skipped=3)
    times = {"attention_ms": attention_ms, "step_ms": step_ms, "prefill_ms": median_ms(prefill)}
    return {**times, "bytes": nbytes}


def benchmark(config, contexts: list[int], batch: int, caches: list[dict], device: str, dtype: torch.dtype) -> dict:
    """
    All times of one layer, full and compressed, with the conditions of the measurement. Its shape is the most frequent
    one among the layers of the model that a [`TurboQuantCache`] compresses.

    Args:
        config (`PreTrainedConfig`): the model's; no weights are needed.
        caches (`list[dict]`): one set of options of [`TurboQuantConfig`] for each cache.

    Raises:
        `ValueError`: the model has no such layer.
    """
    estimate = Estimate.from_config(config)
    shapes = Counter(estimate.layers[index].shapes for index in estimate.compressed())
    if not shapes:
        raise ValueError("MODEL must have layers with full attention, got none: there is nothing to compress.")
    ((kv_heads, key_dim), (_, value_dim)), _ = shapes.most_common(1)[0]
    heads = config.get_text_config(decoder=True).num_attention_heads
    shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim}
    device = torch.device(device)
    # torch waits only for the current device.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        rows = [
            {"context": context, "options": options, **layer_times(shape, context, options, device, dtype)}
            for context in contexts
            for options in (None, *caches)
        ]
        copy = copy_bandwidth(device)
    conditions = {**machine(device), "device_type": device.type, "dtype": str(dtype)}
    conditions |= {"threads": torch.get_num_threads(), **shape, "copy_bytes_per_s": copy}
    return {"conditions": conditions, "rows": rows}


def show(found: dict) -> None:
    """Prints the times as a table, with ratios to the full cache at the same context."""
    console, conditions = Console(), dict(found["conditions"])
    copy = conditions.pop("copy_bytes_per_s")
    console.print(", ".join(f"{name} {value}" for name, value in conditions.items()) + f", copy {copy / 1e9:.0f} GB/s")
    console.print(
        "One layer, one query: median ms, host time included. step: append and attention; prefill: what all tokens at "
        "once cost the cache. full: the fastest of torch's attention kernels.\n"
        "One cache is read again and again: what fits the processor's own can be faster than a copy."
    )
    if conditions["device_type"] != "cuda":
        console.print("Without a GPU the torch reference attends to codes: that saves memory, not time.")
    columns = "context", "cache", "attention", "×", "GB/s", "of copy", "step", "×", "prefill"
    table, full = Table(*columns, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False), None
    for row in found["rows"]:
        full = row if row["options"] is None else full
        name, rate = "full" if row is full else label(row["options"]), row["bytes"] / row["attention_ms"] * 1e3
        attention, step = (f"{full[key] / row[key]:.2f}" for key in ("attention_ms", "step_ms"))
        cells = f"{row['context']:,}", name, f"{row['attention_ms']:.3f}", attention, f"{rate / 1e9:.1f}"
        table.add_row(*cells, f"{rate / copy:.0%}", f"{row['step_ms']:.3f}", step, f"{row['prefill_ms']:.1f}")
    console.print(table)
