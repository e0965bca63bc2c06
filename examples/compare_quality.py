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
"""

import sys
from pathlib import Path

from load_model import load, parser
from report import conditions, named, table

from hf_turboquant.cli import run
from hf_turboquant.config import PRESETS, TurboQuantConfig
from hf_turboquant.evaluation.caches import new_cache
from hf_turboquant.evaluation.load import read_text
from hf_turboquant.evaluation.quality import Quality, measure, split_windows

BITS = {
    **{f"{nbits}": {"nbits": nbits} for nbits in (4, 3.5, 3, 2.5, 2)},
    "8 for keys, 4 for values": {"key_bits": 8, "value_bits": 4},
}
# Exact tokens matter most in a short context: ours keep a full window, the integers empty theirs whenever it is full.
# A block of 64 is longer than the short windows: as with the integers, it sees itself exactly and the rest in codes.
WINDOWS = {"rescaled": (128, 32, 1), "qjl": (128, 1)}


def all_of(options: dict) -> dict:
    """`options` with defaults for everything that `candidates` varies."""
    return {"key_estimator": TurboQuantConfig.key_estimator, **options}


def candidates() -> dict[str, dict]:
    """Names and options of our caches."""
    found = {}
    for estimator, windows in WINDOWS.items():
        for window in windows:
            for bits, option in BITS.items():
                options = {**option, "key_estimator": estimator}
                # The presets are among these rows.
                preset = "".join(f"{name}: " for name in PRESETS if all_of(PRESETS[name]) == options and window == 128)
                name = f"{preset}{estimator} {bits}" + (f", window {window}" if window != 128 else "")
                found[name] = {**options, "residual_length": window}
    for nbits in (4, 3, 2):
        options = {"nbits": nbits, "key_estimator": "rescaled", "condition": "none"}
        found[f"rescaled {nbits}, not conditioned"] = {**options, "residual_length": 128}
        found[f"paper {nbits}"] = {**PRESETS["paper"], "nbits": nbits}
    return found


def integers(config) -> dict[str, dict]:
    """Names and options of transformers' installed integer caches: groups of 64 values, a scale and a zero point."""
    found = {}
    for window in (128, 32):
        for nbits in (4, 2):
            options = {"nbits": nbits, "residual_length": window, "q_group_size": 64}
            end = f", window {window}" if window != 128 else ""
            # Groups along the channels of a token, or for keys along the tokens of a channel, as in KIVI.
            found[f"quanto int{nbits}{end}"] = {"cache": "quanto", **options}
            found[f"quanto int{nbits}, keys by channel{end}"] = {"cache": "quanto", **options, "axis_key": -1}
            found[f"HQQ int{nbits}{end}"] = {"cache": "hqq", **options, "axis_key": 1, "axis_value": 1}
    usable = {}
    for name, options in found.items():
        try:
            new_cache(config, options)
            usable[name] = options
        except ValueError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return usable


def rows(qualities: dict[str, Quality]) -> str:
    """A markdown table, fewest bits last."""
    found = sorted(qualities.items(), key=lambda item: -item[1].bits)
    cells = [(n, f"{q.bits:.2f}", f"{q.kl:.4f}", f"{q.perplexity:.2f}", f"{q.agreement:.3f}") for n, q in found]
    return table(("cache", "bits in all", "KL (nats)", "perplexity", "top-1"), cells)


def at_equal_bits(groups: dict[str, dict[str, Quality]], theirs: dict[str, Quality]) -> str:
    """A markdown table: for each of `theirs`, the best of every group of ours that takes no more bits."""
    cells = []
    for name, their in sorted(theirs.items(), key=lambda item: -item[1].bits):
        cells.append([name, f"{their.bits:.2f}", f"{their.kl:.4f}"])
        for group in groups.values():
            fitting = {other: q for other, q in group.items() if q.bits <= their.bits}
            best = min(fitting, key=lambda other: fitting[other].kl, default=None)
            cells[-1] += [f"{best} ({fitting[best].bits:.2f})", f"{fitting[best].kl:.4f}"] if best else ["none", ""]
    return table(["integers", "bits in all", "KL", *(cell for group in groups for cell in (group, "KL"))], cells)


def beaten(ours: dict[str, Quality], theirs: dict[str, Quality]) -> list[str]:
    """Those of `ours` that one of `theirs` beats with no more bits, each with the best one that does."""
    lines = []
    for name, q in ours.items():
        better = {other: their for other, their in theirs.items() if their.bits <= q.bits and their.kl < q.kl}
        if better:
            other = min(better, key=lambda each: better[each].kl)
            lines.append(
                f"- {name} ({q.bits:.2f}, {q.kl:.4f}): {other} ({better[other].bits:.2f}, {better[other].kl:.4f})"
            )
    return lines


def main():
    arguments = parser("KL, perplexity and top-1 against all bits that a cache holds.", nargs="+")
    about = "text files, of which the first windows are used, or `reference`: the reference of the Python language"
    arguments.add_argument("--text", nargs="+", required=True, help=about)
    arguments.add_argument("--length", type=int, default=1024, help="tokens in a window")
    arguments.add_argument("--windows", type=int, default=12, help="number of windows")
    arguments.add_argument("--batch", type=int, default=12, help="windows fed at a time")
    args = arguments.parse_args()
    # Keys by channel come in groups of 64 tokens, from the prefill on.
    if args.length % 128:
        arguments.error(f"--length must be a multiple of 128, two halves in blocks of 64, got {args.length}.")
    half = args.length // 2
    options = {"block": 64, "batch": args.batch, "prefill": half, "score_from": half}
    for source in args.model or [None]:
        model, tokenizer = load(source, "float32")
        ours, theirs = candidates(), integers(model.config)
        for text in args.text:
            windows = split_windows(tokenizer, read_text(text), args.length, args.windows)
            qualities = measure(model, windows, [*ours.values(), *theirs.values()], **options)
            found = dict(zip(["full cache", *ours, *theirs], qualities, strict=True))
            our, their = ({name: found[name] for name in names} for names in (ours, theirs))
            sizes = f"{args.windows} windows of {args.length:,} tokens, {args.batch} in a batch"
            print(conditions(model.device, f"{named(model, source)}, **{Path(text).name}**", sizes), end="\n\n")
            usual = {name: found[name] for name, options in ours.items() if options["residual_length"] == 128}
            groups = {"ours, no more bits": our, "with a window of 128": usual}
            print(rows(found), at_equal_bits(groups, their), sep="\n\n", end="\n\n")
            print("\n".join(["Ours that integers better with no more bits:", *(beaten(our, their) or ["- none"])]))


if __name__ == "__main__":
    raise SystemExit(run(main))
