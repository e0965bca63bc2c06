"""
Compare the quality of compressed caches at equal bytes: this one, and the integers of quanto and HQQ in transformers'
`QuantizedCache`.

    python -m pip install -e ".[compare]"
    python examples/compare_quality.py --text book.txt --windows 12 --batch 12
    python examples/compare_quality.py --text book.txt reference --model first-model second-model --length 2048

The first half of each window is the prefill; the second half is fed in blocks of 64 and scored. Bits are counted per
coordinate of a cached token, as the mean over scored blocks: codes, scales, zero points and exact tokens, in the recent
window and elsewhere. Floats count 16 bits, as in a model in half precision. Memory that does not grow with the tokens
does not count.

Exact tokens matter most in a short context: ours keep a full window, the integers empty theirs whenever it is full. A
block of 64 is longer than the short windows: as with the integers, it sees itself exactly and the rest in codes.
"""

from pathlib import Path

from load_model import load, parser
from report import add_caches, show, table

from hf_turboquant.cli import run
from hf_turboquant.evaluation.caches import label, parse, usable
from hf_turboquant.evaluation.load import read_text
from hf_turboquant.evaluation.quality import Quality, measure, split_windows

CACHES = (
    "turboquant:nbits=4/3.5/3/2.5/2,key_estimator=rescaled,residual_length=128/32/1",
    "turboquant:nbits=4/3.5/3/2.5/2,key_estimator=qjl,residual_length=128/1",
    "turboquant:key_bits=8,value_bits=4,residual_length=128/1",
    "turboquant:nbits=4/3/2,key_estimator=rescaled,condition=none",
    # Algorithms 1 and 2 as printed.
    "turboquant:nbits=4/3/2,value_estimator=mse,sketch=gaussian,rotation=haar,condition=none,residual_length=0,sink_length=0",
    # Groups of 64 along the channels of a token, or for keys along the tokens of a channel, as in KIVI.
    "quanto:nbits=4/2,residual_length=128/32,q_group_size=64,axis_key=0/-1",
    "hqq:nbits=4/2,residual_length=128/32,q_group_size=64",
)


def rows(qualities: dict[str, Quality]) -> str:
    """A markdown table, fewest bits last."""
    found = sorted(qualities.items(), key=lambda item: -item[1].bits)
    cells = [(n, f"{q.bits:.2f}", f"{q.kl:.4f}", f"{q.perplexity:.2f}", f"{q.agreement:.3f}") for n, q in found]
    return table(("cache", "bits in all", "KL (nats)", "perplexity", "top-1"), cells)


def at_equal_bits(first: dict[str, Quality], second: dict[str, Quality]) -> str:
    """A markdown table: for each of the first, the best of the second that takes no more bits."""
    cells = []
    for name, q in sorted(first.items(), key=lambda item: -item[1].bits):
        fitting = {other: their for other, their in second.items() if their.bits <= q.bits}
        best = min(fitting, key=lambda other: fitting[other].kl, default=None)
        other = (f"{best} ({fitting[best].bits:.2f})", f"{fitting[best].kl:.4f}") if best else ("none", "")
        cells.append((name, f"{q.bits:.2f}", f"{q.kl:.4f}", *other))
    return table(("cache", "bits in all", "KL", "the best of the others, no more bits", "KL"), cells)


def main():
    arguments = parser("KL, perplexity and top-1 against all bits that a cache holds.", nargs="+")
    about = "text files, of which the first windows are used, or `reference`: the reference of the Python language"
    arguments.add_argument("--text", nargs="+", required=True, help=about)
    add_caches(arguments)
    arguments.add_argument("--length", type=int, default=1024, help="tokens in a window")
    arguments.add_argument("--windows", type=int, default=12, help="number of windows")
    arguments.add_argument("--batch", type=int, default=12, help="windows fed at a time")
    args = arguments.parse_args()
    # Keys by channel come in groups of 64 tokens, from the prefill on.
    if args.length % 128:
        arguments.error(f"--length must be a multiple of 128, two halves in blocks of 64, got {args.length}.")
    half = args.length // 2
    blocks = {"block": 64, "batch": args.batch, "prefill": half, "score_from": half}
    for source in args.model or [None]:
        model, tokenizer = load(source, "float32")
        caches = {label(options): options for options in usable(model.config, parse(*(args.caches or CACHES)))}
        for text in args.text:
            windows = split_windows(tokenizer, read_text(text), args.length, args.windows)
            full, *qualities = measure(model, windows, list(caches.values()), **blocks)
            found = dict(zip(caches, qualities, strict=True))
            ours = {name: q for name, q in found.items() if caches[name]["cache"] == "turboquant"}
            theirs = {name: q for name, q in found.items() if name not in ours}
            sizes = f"{args.windows} windows of {args.length:,} tokens, {args.batch} in a batch"
            tables = rows({"full cache": full, **found}), at_equal_bits(theirs, ours), at_equal_bits(ours, theirs)
            show(model, source, (f"**{Path(text).name}**", sizes), *tables)


if __name__ == "__main__":
    raise SystemExit(run(main))
