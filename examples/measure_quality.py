"""
Measure what a compressed KV cache does to a model: perplexity, KL divergence and top-1 agreement of its predictions.

    python examples/measure_quality.py --text book.txt --windows 4
    python examples/measure_quality.py --text book.txt --bits 4 --key-estimators rescaled --model Qwen/Qwen3-0.6B

Windows of the text are fed in small blocks, each block attending to the cache, so that every prediction but those of
the first block comes through it. The full cache and all compressed ones go block by block side by side: each is run
once, and only one block of logits is alive.
"""

import argparse
import math
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from load_model import load
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import DynamicCache

import hf_turboquant
from hf_turboquant import TurboQuantCache

COLUMNS = "keys", "condition", "bits", "perplexity", "KL (nats)", "top-1", "compression"


@dataclass
class Quality:
    """Sums over the scored tokens; the properties are their means."""

    tokens: int = 0
    nll_sum: float = 0.0
    kl_sum: float = 0.0
    agreement_sum: float = 0.0
    bits_sum: float = 0.0
    compression_ratio: float = 1.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the text's own next token."""
        return math.exp(self.nll_sum / self.tokens)

    @property
    def kl(self) -> float:
        """Mean KL(full || compressed) of the next-token distributions, in nats."""
        return self.kl_sum / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens after which both caches find the same next token most likely."""
        return self.agreement_sum / self.tokens

    @property
    def bits(self) -> float:
        """Mean of what `weigh` said of the cache."""
        return self.bits_sum / self.tokens

    def add(self, full: torch.Tensor, log_probs: torch.Tensor, targets: torch.Tensor, bits: float = 0.0) -> None:
        """Count a block: log-probabilities `[batch, tokens, vocab]` of both caches, next tokens `[batch, tokens]`."""
        self.tokens += targets.numel()
        self.bits_sum += bits * targets.numel()
        self.nll_sum -= log_probs.gather(-1, targets[..., None]).sum().item()
        self.kl_sum += (full.exp() * (full - log_probs)).sum().item()
        self.agreement_sum += (full.argmax(-1) == log_probs.argmax(-1)).sum().item()


def split_windows(tokenizer, text: str, length: int, count: int) -> torch.Tensor:
    """The first `count` windows of the text, as token ids of shape `[count, length]`."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise ValueError(
            f"The text must hold {count} windows of {length} tokens, got {len(ids)} tokens. "
            "Take a longer text, fewer windows or shorter ones."
        )
    return ids[: count * length].view(count, length)


@torch.inference_mode()
def measure(
    model,
    windows: torch.Tensor,
    configurations: list[dict | Callable],
    block: int = 32,
    batch: int = 4,
    prefill: int | None = None,
    score_from: int = 0,
    advance: Callable[[int], object] = lambda tokens: None,
    weigh: Callable[[object], float] = lambda cache: 0.0,
) -> list[Quality]:
    """
    Compare compressed caches with the full one on the same text.

    Args:
        model: a causal language model.
        windows (`torch.Tensor`): token ids of shape `[windows, length]`.
        configurations (`list[dict | Callable]`): options of `TurboQuantCache`, one dict for each cache; or functions
            that make any other cache from the model's config.
        block (`int`): tokens fed at a time.
        batch (`int`): windows fed at a time; they share a cache, its conditioning and its constants.
        prefill (`int`, *optional*): tokens of the first block, if it is another.
        score_from (`int`): position of the first block whose predictions count.
        advance (`Callable`): called with the number of tokens done, after every block of every cache.
        weigh (`Callable`): called with every cache after every scored block; [`Quality.bits`] is the mean.

    Returns:
        A [`Quality`] for the full cache, then one for each configuration.
    """
    qualities = [Quality() for _ in range(1 + len(configurations))]
    for ids in windows.to(model.device).split(batch):
        caches = [DynamicCache(config=model.config)]
        caches += [
            options(model.config) if callable(options) else TurboQuantCache(model.config, **options)
            for options in configurations
        ]
        starts = [0, *range(block if prefill is None else prefill, ids.shape[1], block)]
        for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            inputs = ids[:, start:stop]
            # the window's last token has no next one
            targets = ids[:, start + 1 : stop + 1]
            full = None
            for cache, quality in zip(caches, qualities, strict=True):
                logits = model(inputs, past_key_values=cache).logits[:, : targets.shape[1]]
                log_probs = logits.float().log_softmax(-1)
                full = log_probs if full is None else full
                if start >= score_from:
                    quality.add(full, log_probs, targets, weigh(cache))
                advance(inputs.numel())
        for cache, quality in zip(caches, qualities, strict=True):
            if isinstance(cache, TurboQuantCache):
                quality.compression_ratio = cache.memory().compression_ratio
    return qualities


def rows(configurations: list[dict], qualities: list[Quality]) -> list[tuple[str, ...]]:
    """The cells below `COLUMNS`."""
    labels = [("full cache", "", "")]
    labels += [(options["key_estimator"], options["condition"], str(options["nbits"])) for options in configurations]
    return [
        (*label, f"{q.perplexity:.2f}", f"{q.kl:.4f}", f"{q.agreement:.3f}", f"{q.compression_ratio:.2f}")
        for label, q in zip(labels, qualities, strict=True)
    ]


def markdown(table_rows: list[tuple[str, ...]], conditions: str) -> str:
    """The table for a document: conditions above, the command that made it below."""
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *table_rows)]
    command = shlex.join(["python", "examples/measure_quality.py", *sys.argv[1:]])
    return "\n".join([conditions, "", *lines, "", f"`{command}`"])


def main():
    parser = argparse.ArgumentParser(description="Perplexity, KL and top-1 agreement of compressed against full cache.")
    parser.add_argument("--model", help="a Hub name or a local folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--dtype", help="of the model, such as float32 (default: float32 on CPU, bfloat16 elsewhere)")
    parser.add_argument("--text", type=Path, required=True, help="any text file; its first windows are used")
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=4, help="number of windows")
    parser.add_argument("--block", type=int, default=32, help="tokens fed at a time")
    parser.add_argument("--prefill", type=int, help="tokens of the first block (default: as the others)")
    parser.add_argument("--score-from", type=int, default=0, help="count blocks from this position on")
    parser.add_argument("--batch", type=int, default=4, help="windows fed at a time")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="of keys and of values")
    estimators = ["qjl", "rescaled", "mse"]
    parser.add_argument("--key-estimators", nargs="+", choices=estimators, default=estimators)
    conditions = ["attention", "center", "none"]
    parser.add_argument("--conditions", nargs="+", choices=conditions, default=["attention"])
    args = parser.parse_args()

    configurations = [
        {"key_estimator": estimator, "condition": condition, "nbits": nbits}
        for condition in args.conditions
        for estimator in args.key_estimators
        for nbits in args.bits
    ]
    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load(args.model, args.dtype and getattr(torch, args.dtype))
    windows = split_windows(tokenizer, args.text.read_text(encoding="utf-8"), args.window, args.windows)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        description = f"{len(configurations)} caches and the full one"
        task = progress.add_task(description, total=windows.numel() * (1 + len(configurations)))
        qualities = measure(
            model,
            windows,
            configurations,
            args.block,
            args.batch,
            args.prefill,
            args.score_from,
            lambda tokens: progress.advance(task, tokens),
        )

    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine() + " CPU"
    conditions = (
        f"{Path(args.model or 'SmolLM2-135M-Instruct').name} in {str(model.dtype).removeprefix('torch.')} on {where}; "
        f"{args.text.name}, {args.windows} × {args.window:,} tokens from its start in blocks of {args.block}"
        + (f" after a prefill of {args.prefill}" if args.prefill else "")
        + (f", scored from position {args.score_from:,}" if args.score_from else "")
        + "; "
        "compression against a full cache in that dtype; "
        f"hf_turboquant {hf_turboquant.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}."
    )
    table_rows = rows(configurations, qualities)
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, caption=conditions)
    for cells in table_rows:
        table.add_row(*cells)
    console.print(table)
    print(markdown(table_rows, conditions))


if __name__ == "__main__":
    main()
