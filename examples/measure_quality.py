"""
Measure what a compressed KV cache does to a model: perplexity, KL divergence and top-1 agreement of its predictions,
as a table for a document. `hf-turboquant evaluate` measures more.

    python examples/measure_quality.py --text book.txt --windows 4
    python examples/measure_quality.py --text book.txt --bits 4 --key-estimators rescaled --model Qwen/Qwen3-0.6B
"""

import argparse
import platform
import shlex
import sys
from pathlib import Path

import torch
import transformers
from load_model import load
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import hf_turboquant
from hf_turboquant.evaluation.quality import Quality, measure, split_windows

COLUMNS = "keys", "condition", "bits", "perplexity", "KL (nats)", "top-1", "compression"


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
    parser.add_argument("--seed", type=int, default=0, help="of rotations and sketches")
    args = parser.parse_args()

    configurations = [
        {"key_estimator": estimator, "condition": condition, "nbits": nbits, "seed": args.seed}
        for condition in args.conditions
        for estimator in args.key_estimators
        for nbits in args.bits
    ]
    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load(args.model, args.dtype and getattr(torch, args.dtype))
    windows = split_windows(tokenizer, args.text.read_text(encoding="utf-8"), args.window, args.windows)

    tokens = windows.numel() * (1 + len(configurations))
    with tqdm(total=tokens, desc=f"{len(configurations)} caches and the full one", unit=" tokens", leave=False) as bar:
        qualities = measure(
            model, windows, configurations, args.block, args.batch, args.prefill, args.score_from, bar.update
        )

    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine() + " CPU"
    conditions = (
        f"{Path(args.model or 'SmolLM2-135M-Instruct').name} in {str(model.dtype).removeprefix('torch.')} on {where}; "
        f"{args.text.name}, {args.windows} × {args.window:,} tokens from its start in blocks of {args.block}"
        + (f" after a prefill of {args.prefill}" if args.prefill else "")
        + (f", scored from position {args.score_from:,}" if args.score_from else "")
        + f"; rotations of seed {args.seed}; "
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
