"""
Measure what a compressed KV cache does to a model: perplexity, KL divergence and top-1 agreement of its predictions,
as a table for a document. `hf-turboquant evaluate` measures more.

    python examples/measure_quality.py --text book.txt --windows 4
    python examples/measure_quality.py --text book.txt --bits 4 --key-estimators rescaled --model Qwen/Qwen3-0.6B
"""

from itertools import product
from pathlib import Path

import torch
from load_model import load, parser
from report import command, conditions, named, table
from tqdm import tqdm

from hf_turboquant.config import CONDITIONS, KEY_ESTIMATORS
from hf_turboquant.evaluation.load import read_text
from hf_turboquant.evaluation.quality import Quality, measure, split_windows

COLUMNS = "keys", "condition", "bits", "perplexity", "KL (nats)", "top-1", "compression"


def rows(configurations: list[dict], qualities: list[Quality]) -> list[tuple]:
    """The cells below `COLUMNS`."""
    labels = [("full cache", "", "")]
    labels += [(options["key_estimator"], options["condition"], options["nbits"]) for options in configurations]
    return [
        (*label, f"{q.perplexity:.2f}", f"{q.kl:.4f}", f"{q.agreement:.3f}", f"{q.compression_ratio:.2f}")
        for label, q in zip(labels, qualities, strict=True)
    ]


def main():
    arguments = parser("Perplexity, KL and top-1 agreement of compressed against full cache.")
    add = arguments.add_argument
    add("--dtype", help="of the model, such as float32 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--text", required=True, help="any text file, or `reference`; its first windows are used")
    add("--window", type=int, default=2048, help="tokens in a window")
    add("--windows", type=int, default=4, help="number of windows")
    add("--block", type=int, default=32, help="tokens fed at a time")
    add("--prefill", type=int, help="tokens of the first block (default: those of --block)")
    add("--score-from", type=int, default=0, help="count blocks from this position on")
    add("--batch", type=int, default=4, help="windows fed at a time")
    add("--bits", type=int, nargs="+", default=[4, 3, 2], help="bits of keys and of values")
    add("--key-estimators", nargs="+", choices=KEY_ESTIMATORS, default=KEY_ESTIMATORS)
    add("--conditions", nargs="+", choices=CONDITIONS, default=["attention"])
    add("--seed", type=int, default=0, help="seed of rotations and sketches")
    args = arguments.parse_args()

    names = "condition", "key_estimator", "nbits"
    choices = product(args.conditions, args.key_estimators, args.bits)
    configurations = [{**dict(zip(names, choice, strict=True)), "seed": args.seed} for choice in choices]
    model, tokenizer = load(args.model, args.dtype and getattr(torch, args.dtype))
    windows = split_windows(tokenizer, read_text(args.text), args.window, args.windows)
    tokens = windows.numel() * (1 + len(configurations))
    with tqdm(total=tokens, desc=f"{len(configurations)} caches and the full one", unit=" tokens", leave=False) as bar:
        sizes = args.block, args.batch, args.prefill, args.score_from
        qualities = measure(model, windows, configurations, *sizes, bar.update)
    texts = [
        f"{Path(args.text).name}, {args.windows} × {args.window:,} tokens from its start in blocks of {args.block}"
    ]
    texts += [f"the first one of {args.prefill}"] if args.prefill else []
    texts += [f"scored from position {args.score_from:,}"] if args.score_from else []
    texts += [f"rotations of seed {args.seed}", "compression against a full cache in that dtype"]
    print(conditions(model.device, named(model, args.model), *texts), end=".\n\n")
    print(table(COLUMNS, rows(configurations, qualities)), command(), sep="\n\n")


if __name__ == "__main__":
    main()
