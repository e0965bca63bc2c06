"""The command `hf-turboquant`: estimates memory from a config, evaluates quality on a model, times its caches."""

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections import Counter

from .config import KEY_ESTIMATORS, TurboQuantConfig
from .memory import readable

UNITS = ["", "K", "M", "G", "T"]


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; errors that the user can fix give one line on stderr and exit code 2."""
    args = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # transformers warns of names that it will change, which the user of a command cannot fix.
            warnings.simplefilter("ignore", FutureWarning)
            args.run(args)
        return 0
    except BrokenPipeError:
        # The reader of our output has closed the pipe; without this, Python complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        wanted = "'hf-turboquant[eval]'" if error.name in ("rich", "matplotlib") else error.name
        message = f"this command needs the package {error.name!r}. Install it with `pip install {wanted}`."
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except RuntimeError as error:
        # torch has its own error type on GPUs, but only a message on CPUs.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        message = "out of memory. Take shorter contexts, a smaller batch or another --device."
    print(f"hf-turboquant: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-turboquant", description="TurboQuant KV caches: see, measure, decide.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Arguments that several commands share.
    shape, place = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    shape.add_argument("model", metavar="MODEL", help="a Hub name, a local folder or a config.json")
    shape.add_argument("--batch", type=_positive, default=1, help="number of sequences, each that long")
    shape.add_argument("--nbits", type=number, nargs="+", default=[4, 3, 2])
    shape.add_argument("--key-estimator", choices=KEY_ESTIMATORS, default=TurboQuantConfig.key_estimator)
    shape.add_argument("--json", action="store_true", help="print everything as json")
    place.add_argument("--dtype", help="such as bfloat16 (default: float32 on CPU, bfloat16 elsewhere)")
    place.add_argument("--device", help="default: cuda if there is one, else cpu")

    about = "memory of the cache, from the config alone"
    estimate = commands.add_parser("estimate", help=about, parents=[shape])
    estimate.add_argument("--budget", type=parse_bytes, metavar="BYTES", help="memory for the cache alone, such as 24G")
    contexts = {"type": parse_tokens, "nargs": "+", "metavar": "TOKENS", "help": "tokens, such as 8192 or 128k"}
    estimate.add_argument("--contexts", **contexts, default=[8192, 32768, 131072])
    estimate.set_defaults(run=_estimate)

    about = "speed of a layer's cache in the shape of a model, on this machine"
    benchmark = commands.add_parser("benchmark", help=about, parents=[shape, place])
    benchmark.add_argument("--generate", type=_positive, metavar="TOKENS", help="also time generate, with the weights")
    benchmark.add_argument("--contexts", **contexts, default=[8192, 32768])
    benchmark.set_defaults(run=_benchmark)

    about = "quality of compressed caches, measured on a model and a text"
    evaluate = commands.add_parser("evaluate", help=about, parents=[place])
    evaluate.set_defaults(run=_evaluate)
    add = evaluate.add_argument
    add("model", metavar="MODEL", help="a Hub name or a local folder")
    text = "a text file, hub:DATASET:CONFIG:SPLIT:COLUMN of a dataset on the Hub, or Python's own reference (default)"
    add("--text", default="reference", help=text)
    add("--out", default="evaluation", help="folder of results.json and plots; an interrupted run resumes from it")
    add("--parts", nargs="+", help="quality, needle, fidelity, claims (default: all)")
    add("--caches", nargs="+", metavar="SPEC", help="such as turboquant:nbits=4/3 quanto:nbits=4 (default: all)")
    add("--window", type=_positive, help="quality: tokens in a window")
    add("--windows", type=_positive, help="quality: number of windows")
    add("--block", type=_positive, help="quality: tokens fed at a time")
    add("--prefill", type=_positive, help="quality: tokens in the first block")
    add("--score-from", type=_natural, help="quality: count blocks from this position on")
    add("--needle-lengths", type=_positive, nargs="+", help="tokens of the haystacks")
    add("--needle-depths", type=float, nargs="+", help="where the needles are, 0 to 1")
    add("--fidelity-lengths", type=_positive, nargs="+", help="tokens of context")
    return parser


def _estimate(args) -> None:
    from transformers import logging

    from .estimate import MAX_CONTEXT, Estimate
    from .evaluation.load import load_config

    # Missing kernels do not affect shapes.
    logging.set_verbosity_error()
    estimate = Estimate.from_config(load_config(args.model))
    options = {f"{nbits} bits": {"nbits": nbits, "key_estimator": args.key_estimator} for nbits in args.nbits}
    states = args.batch * estimate.state_bytes
    rows, longest = {}, {}
    for context in args.contexts:
        rows[context] = {"bf16": estimate.full_bytes(context, args.batch)}
        rows[context]["fp8"] = estimate.full_bytes(context, args.batch, fp8=True)
        for name, option in options.items():
            rows[context][name] = estimate.memory(context, args.batch, **option).total_bytes - states
    if args.budget:
        for name, option in {"bf16": {}, **options}.items():
            longest[name] = estimate.longest_context(args.budget, args.batch, **option)
    compressed = estimate.compressed()
    if args.json:
        about = {"model": args.model, "layers": len(estimate.layers), "compressed": compressed, "batch": args.batch}
        about |= {"state_bytes": states, "kv_bytes": rows, "budget_bytes": args.budget, "longest_context": longest}
        print(json.dumps(about, indent=1))
        return
    print(f"{args.model}: {len(estimate.layers)} layers")
    kinds = Counter(f"{cost}{': compressed' * (i in compressed)}" for i, cost in enumerate(estimate.layers))
    for kind, count in kinds.items():
        print(f"  {count:3} × {kind}")
    about = f"every byte counted ({args.key_estimator} keys); ×: how many times smaller than bf16"
    print(f"\nKeys and values at batch {args.batch}, {about}")
    print("".join(["    context       bf16", *(f"{name:>11}      ×" for name in ("fp8", *options))]))
    for context, row in rows.items():
        full, *others = row.values()
        cells = (f"{readable(count):>11}{full / count if count else 1:6.1f}×" for count in others)
        print("".join([f"{context:11,}{readable(full):>11}", *cells]))
    if any("linear" in cost.kind or "recurrent" in cost.kind for cost in estimate.layers):
        print(f"Beside them, whatever the context: {readable(states)} of states that are not compressed")
    if longest:
        texts = [f"{name} {count:,}" if count < MAX_CONTEXT else f"{name} any" for name, count in longest.items()]
        print(f"Longest context in {readable(args.budget)}, in tokens: {', '.join(texts)}")
    for note in _notes(estimate, compressed, *max(rows.items()), states):
        print(f"Note: {note}")


def _notes(estimate, compressed: list[int], context: int, row: dict[str, int], states: int):
    growing = sum(bool(cost.token_bytes) and cost.window is None for cost in estimate.layers)
    if growing < len(estimate.layers):
        yield f"{growing} of {len(estimate.layers)} layers hold a KV cache that grows with the context."
    if any(len({dim for _, dim in estimate.layers[index].shapes}) > 1 for index in compressed):
        yield "keys and values of different widths are latents (MLA): every step dequantises them."
    # The cache's own widths: fp8 takes sliding windows too.
    total, ours = row["bf16"] + states, min(count for name, count in row.items() if name.endswith("bits")) + states
    if total < 2 * ours:
        yield (
            f"this cache can't help much: at {context:,} tokens the whole cache, states included, goes from "
            f"{readable(total)} to {readable(ours)} at best."
        )


def _evaluate(args) -> None:
    # Imported first, to fail at once if a dependency is missing.
    from .evaluation import load, run

    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: given[name] for name in run.Settings.__dataclass_fields__ if name in given}
    settings = run.Settings(**load.settings(options))
    text = load.read_text(args.text)
    model, tokenizer = load.load_model(args.model, args.dtype, args.device)
    if not args.caches:
        settings = dataclasses.replace(settings, caches=settings.caches + load.baselines(model.config))
    run.evaluate(model, tokenizer, text, settings, args.out)


def _benchmark(args) -> None:
    from transformers import logging

    from .evaluation import benchmark, load

    logging.set_verbosity_error()
    caches = [{"nbits": nbits, "key_estimator": args.key_estimator} for nbits in args.nbits]
    for options in caches:
        TurboQuantConfig(**options)
    device, dtype = load.place(args.dtype, args.device)
    found = benchmark.benchmark(load.load_config(args.model), args.contexts, args.batch, caches, device, dtype)
    if args.generate:
        model, _ = load.load_model(args.model, args.dtype, args.device)
        found["tokens_per_s"] = {n: benchmark.generation(model, n, args.generate, caches) for n in args.contexts}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        benchmark.show(found)


def parse_bytes(text: str, base: int = 1000, what: str = "bytes such as 24G or 800M") -> int:
    """`"24G"` -> 24 · 10⁹."""
    digits = text.upper().removesuffix("B")
    unit = digits[-1:] if digits[-1:] in UNITS else ""
    try:
        count = float(digits.removesuffix(unit)) * base ** UNITS.index(unit)
    except ValueError:
        count = 0
    if not 1 <= count < (2**31 if base == 1024 else float("inf")):
        raise argparse.ArgumentTypeError(f"must be a number of {what}, got {text!r}")
    return int(count)


def parse_tokens(text: str) -> int:
    """`"128k"` -> 131,072, as model cards count."""
    return parse_bytes(text, 1024, "tokens such as 8192 or 128k")


def _positive(text: str) -> int:
    if not text.replace("_", "").isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer below 2³¹, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number
