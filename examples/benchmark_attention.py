"""
Compare attention from codes with torch's fastest fp16 attention.

    python examples/benchmark_attention.py                     # correctness, then the table
    python examples/benchmark_attention.py --only 8x32k --scores --layer-step

Every configuration is checked against an fp32 reference before it is timed. Times are medians over replays of a CUDA
graph that rotates through several caches, so that nothing is found in L2; the baseline is timed in the same way.
"""

import argparse
import statistics
import subprocess
from importlib import import_module

import torch
import torch.nn.functional as F
import triton
from report import conditions, head, line, parse_for_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicLayer

import hf_turboquant.ops.attention  # noqa: F401
from hf_turboquant.cli import Formatter, run
from hf_turboquant.config import TurboQuantConfig
from hf_turboquant.evaluation.benchmark import call_ms, copy_bandwidth, graph_us
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.ops import attention_plan as plan
from hf_turboquant.ops import reference
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.states import LayerStates

# The module: the package exports a function of the same name.
kernels = import_module("hf_turboquant.ops.attention")

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
# By name, options of the cache.
FORMATS = {
    "8 bits": {"nbits": 8},
    "8 bits, values 4": {"key_bits": 8, "value_bits": 4},
    "4 bits QJL": {"nbits": 4},
    "4 bits": {"nbits": 4, "key_estimator": "rescaled"},
    "3 bits": {"nbits": 3, "key_estimator": "rescaled"},
    "2 bits": {"nbits": 2, "key_estimator": "rescaled"},
}
COLUMNS = (
    "shape",
    "format",
    "fp16 us",
    "codes + combine us",
    "ratio",
    "TB/s",
    "of copy",
    "whole call us",
    "ratio",
    "error",
)
# Least size of all buffers rotated through: several times the L2 of the largest GPU.
ROTATED_BYTES = 300e6


def random_states(
    batch, kv_heads, kv_len, head_dim, *, value_dim=None, dtype=torch.float16, device="cuda", seed=0, peak=1.0,
    tail=None, **options,
):  # fmt: skip
    """
    A `LayerStates` of random codes (every code is valid). Memory beyond the length is poisoned.

    Args:
        peak (`float`): factor of the keys; large ones make the softmax peaky.
        tail (`int`, *optional*): tokens in the recent window, all of it by default.
    """
    config = TurboQuantConfig(**options)
    generator = torch.Generator(device=device).manual_seed(seed)
    ring = config.residual_length
    tail = ring if tail is None else tail
    length = kv_len - config.sink_length - tail
    quantizers, codes, exact = {}, {}, {}
    for role, dim in (("keys", head_dim), ("values", value_dim or head_dim)):
        quantizer = quantizers[role] = Quantizer.create(config, role, 0, dim, device)
        buffer = codes[role] = quantizer.new_buffer(batch, kv_heads)
        buffer.reserve(max(length, 1))
        buffer.length = length
        norm = dim**0.5 * (peak if role == "keys" else 1.0)
        # That of random codes, in units of their scale.
        norm /= 74 * dim**0.5 if quantizer.nbits == 8 else 1.0
        for name, tensor in buffer.tensors.items():
            if name.startswith("plane"):
                tensor.random_(0, 256, generator=generator)
            else:
                # A residual is about 2^-bits of its vector.
                share = 1.0 if name == "scales" else 2.0**-quantizer.code_bits
                tensor.uniform_(0.5 * norm * share, 1.5 * norm * share, generator=generator)
                tensor.view(batch, kv_heads, -1)[:, :, length:] = torch.nan
        slots = torch.randn((batch, kv_heads, config.sink_length + ring, dim), generator=generator, device=device)
        exact[role] = (slots * (peak if role == "keys" else 1.0)).to(dtype)
    phase = length % ring if ring else 0
    states = LayerStates(quantizers, codes, exact, kv_len, length, config.sink_length, ring, phase)
    valid = torch.zeros(config.sink_length + ring, dtype=torch.bool, device=device)
    for _, slots in states.exact_runs():
        valid[slots] = True
    for tensor in exact.values():
        tensor[:, :, ~valid] = torch.nan
    return states


def torch_attention(query, states, scaling, attention_mask=None, is_causal=False, softcap=None, sinks=None):
    """The same attention in the query's own dtype, on dequantised states."""
    keys, values = (states.dequantize(role).to(query.dtype) for role in ("keys", "values"))
    kv_len, length = states.kv_len, query.shape[2]
    bias = torch.zeros((1, 1, length, kv_len), device=query.device)
    if is_causal:
        positions = torch.arange(kv_len, device=query.device)
        bias = bias.masked_fill(positions > positions[-length:, None], -torch.inf)
    if attention_mask is not None:
        mask = attention_mask[..., :kv_len]
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    if softcap is None and sinks is None:
        bias = bias.to(query.dtype) if is_causal or attention_mask is not None else None
        return F.scaled_dot_product_attention(query, keys, values, bias, scale=scaling, enable_gqa=True)
    groups = query.shape[1] // keys.shape[1]
    logits = query @ keys.repeat_interleave(groups, dim=1).mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits.dtype)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :kv_len]
    return weights @ values.repeat_interleave(groups, dim=1)


def relative_error(x, truth) -> float:
    return float((x.float() - truth).norm() / truth.norm())


def poison_scratch() -> None:
    """Fills scratch memory with NaN (integers with noise), to show that all of it is written before it is read."""
    for scratch in plan.SCRATCH.values():
        for tensor in scratch.tensors.values():
            tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.random_()


def check(query, states, portable=None, **options) -> tuple[float, float]:
    """Relative errors of the kernels and of torch in the query's dtype, both against the fp32 reference."""
    poison_scratch()
    out = kernels.attention(query, states, portable=portable, **options)
    truth = reference.attention(query.float(), states, **options)
    return relative_error(out, truth), relative_error(torch_attention(query, states, **options), truth)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def copies(nbytes: float) -> tuple[int, int]:
    """The number of buffer sets to rotate through, and how often, for a graph that is long enough."""
    count = int(min(16, max(2, -(-ROTATED_BYTES // nbytes))))
    return count, max(1, 8 // count)


def baseline_us(batch, heads, kv_heads, dim, kv_len) -> dict[str, float]:
    count, inner = copies(4 * batch * kv_heads * kv_len * dim)
    sets = [[random(batch, kv_heads, kv_len, dim) for _ in range(2)] for _ in range(count)]
    query, times = random(batch, heads, 1, dim), {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            calls = [lambda s=s: F.scaled_dot_product_attention(query, *s, enable_gqa=True) for s in sets]
            times[name] = graph_us(calls, inner)
    return times


def format_sets(shape, name, **options) -> list:
    batch, _, kv_heads, dim, kv_len = shape
    options = {**FORMATS[name], **options}
    first = random_states(batch, kv_heads, kv_len, dim, **options)
    count, _ = copies(used_bytes(first))
    return [first] + [random_states(batch, kv_heads, kv_len, dim, seed=i, **options) for i in range(1, count)]


def used_bytes(states) -> int:
    return sum(buffer.used_nbytes for buffer in states.codes.values()) + sum(x.nbytes for x in states.exact.values())


def attention_us(sets, query, mask, *launches) -> float:
    """Time of a call, or of only the given `launches` of it."""
    options = {"scaling": query.shape[-1] ** -0.5, "attention_mask": mask}
    for states in sets:
        kernels.attention(query, states, **options)
    options |= {"launches": launches} if launches else {}
    return graph_us([lambda s=s: kernels.attention(query, s, **options) for s in sets], copies(used_bytes(sets[0]))[1])


def scores_table(shape, form: str = "4 bits QJL") -> None:
    batch, heads, kv_heads, dim, kv_len = shape
    sets, query = format_sets(shape, form), random(batch, heads, 1, dim)
    ours = graph_us([lambda s=s: kernels.scores(query, s, scaling=1.0) for s in sets])
    print(f"scores, {form}, {heads // kv_heads} queries for each of {kv_len:,} keys: {ours:.1f} us", end="")
    for dtype in (torch.float32, torch.float16):
        keys = [random(batch, kv_heads, kv_len, dim, dtype=dtype) for _ in range(2)]
        rows = query.to(dtype).view(batch, kv_heads, -1, dim)
        plain = graph_us([lambda k=k, rows=rows: rows @ k.mT for k in keys])
        print(f"; torch {dtype}: {plain:.1f} us ({plain / ours:.1f}x)", end="")
    print()


def layer_step_us(shape, make_layer) -> tuple[float, float]:
    """
    Times of appending one token and attending, through `update` and torch's attention, at successive lengths: GPU time
    alone, and time from start to end with a host that launches one by one.
    """
    batch, heads, kv_heads, dim, kv_len = shape
    layer, states = make_layer(), random(batch, kv_heads, kv_len, dim)
    layer.update(states, states)
    query, token = random(batch, heads, 1, dim), random(batch, kv_heads, 1, dim)

    def step():
        F.scaled_dot_product_attention(query, *layer.update(token, token), enable_gqa=True)

    # cuDNN makes a plan for every length, which takes 40 ms.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        times_ms = [call_ms(step)[0] for _ in range(40)]
        return graph_us([step], inner=8), statistics.median(times_ms[10:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument(
        "--only", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE", help="what to time"
    )
    parser.add_argument(
        "--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT", help="how"
    )
    parser.add_argument("--launches", action="store_true", help="also time each launch of a call by itself")
    parser.add_argument("--mask", action="store_true", help="with a boolean mask, as compiled steps have one")
    parser.add_argument("--scores", action="store_true", help="also time the logits alone against matrix products")
    parser.add_argument("--layer-step", action="store_true", help="also time append + attention through `update`")
    arguments = parse_for_gpu(parser)
    copy = copy_bandwidth("cuda")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    texts = f"copy {copy / 1e12:.2f} TB/s", f"triton {triton.__version__}, commit {commit or 'unknown'}"
    print(conditions("cuda", "fp16, one query, medians under CUDA graphs", *texts))
    print(head(*COLUMNS))
    for name in arguments.only:
        shape = SHAPES[name]
        batch, heads, kv_heads, dim, kv_len = shape
        best, query = min(baseline_us(*shape).values()), random(batch, heads, 1, dim)
        mask = torch.rand((batch, 1, 1, kv_len), device="cuda") > 0.01 if arguments.mask else None
        for form in arguments.formats:
            sets = format_sets(shape, form)
            error, plain = check(query, sets[0], scaling=dim**-0.5, attention_mask=mask)
            if not error <= 2 * plain:
                raise AssertionError(f"{name} {form}: error {error:.1e}, and torch's is {plain:.1e}")
            # Codes + combine is what the baseline does.
            part, whole = attention_us(sets, query, mask, *kernels.LAUNCHES[1:]), attention_us(sets, query, mask)
            rate = used_bytes(sets[0]) / part * 1e6
            cells = name, form, f"{best:.1f}", f"{part:.1f}", f"{best / part:.2f}", f"{rate / 1e12:.2f}"
            cells += f"{rate / copy:.0%}", f"{whole:.1f}", f"{best / whole:.2f}", f"{error:.1e} ({plain:.1e})"
            print(line(*cells), flush=True)
            if arguments.launches:
                times = {launch: attention_us(sets, query, mask, launch) for launch in kernels.LAUNCHES}
                print(", ".join(f"{launch} {time:.1f} us" for launch, time in times.items()), flush=True)
            del sets
        torch.cuda.empty_cache()
        if arguments.scores:
            scores_table(shape)
            scores_table((1, 64, 1, 128, 8192), "3 bits")
        if arguments.layer_step:
            plain, plain_eager = layer_step_us(shape, DynamicLayer)
            for form in arguments.formats:
                config = TurboQuantConfig(**FORMATS[form])
                ours, eager = layer_step_us(shape, lambda config=config: TurboQuantLayer(config, 0))
                print(
                    f"{name}, layer step, {form}: {ours:.0f} us of the GPU, DynamicLayer {plain:.0f} "
                    f"({plain / ours:.2f}x); eager, host included {eager:.0f}, DynamicLayer {plain_eager:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    raise SystemExit(run(main))
