"""The command `hf-turboquant`: estimate memory from a config, evaluate quality on a model, time its caches."""

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections import Counter

from .config import KEY_ESTIMATORS, TurboQuantConfig

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; what a user can mend is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="hf-turboquant", description="TurboQuant KV caches: see, measure, decide.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_estimate(commands)
    _add_evaluate(commands)
    _add_benchmark(commands)
    args = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # names that transformers is about to change: not for the user of a command to mend
            warnings.simplefilter("ignore", FutureWarning)
            args.run(args)
    except BrokenPipeError:
        # whoever read our output has enough; without this, python complains again while it shuts down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        wanted = "'hf-turboquant[eval]'" if error.name in ("rich", "matplotlib") else error.name
        advice = f"Install it with `pip install {wanted}`."
        print(f"hf-turboquant: this command needs the package {error.name!r}. {advice}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"hf-turboquant: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch has a type of its own for GPUs, and words for CPUs
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        print(
            "hf-turboquant: out of memory. Take shorter contexts, a smaller batch or another --device.", file=sys.stderr
        )
        return 2
    return 0


def load_config(model: str):
    """
    The config of a Hub name, a local folder or a `config.json`.

    Raises:
        `ValueError`: there is none, or transformers does not know its kind of model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except ModuleNotFoundError:
        raise
    # a config can be wrong in any way
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"MODEL must be a name on the Hub, a local folder or a config.json that transformers knows, got {model!r}: "
            f"{reason.rstrip('.')}. Check the name, the path and the network."
        ) from None


def parse_bytes(text: str) -> int:
    """`"24G"` -> 24 · 10⁹."""
    number = text.upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        count = float(number.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        count = 0
    if not 0 < count < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 24G or 800M, got {text!r}")
    return int(count)


def _positive(text: str) -> int:
    if not text.replace("_", "").isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer below 2³¹, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _add_estimate(commands) -> None:
    parser = commands.add_parser("estimate", help="memory of the cache, from the config alone")
    parser.add_argument("model", metavar="MODEL", help="a Hub name, a local folder or a config.json")
    parser.add_argument("--contexts", type=_positive, nargs="+", default=[8192, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences, each of that many tokens")
    parser.add_argument("--nbits", type=float, nargs="+", default=[4, 3, 2])
    parser.add_argument("--key-estimator", choices=KEY_ESTIMATORS, default=TurboQuantConfig.key_estimator)
    parser.add_argument("--budget", type=parse_bytes, metavar="BYTES", help="for the cache alone, such as 24G")
    parser.add_argument("--json", action="store_true", help="print everything as json")
    parser.set_defaults(run=_estimate)


def _estimate(args) -> None:
    from transformers import logging

    from .estimate import MAX_CONTEXT, Estimate

    # that some kernels are missing does not matter to shapes
    logging.set_verbosity_error()
    estimate = Estimate.from_config(load_config(args.model))
    widths = [int(nbits) if float(nbits).is_integer() else nbits for nbits in args.nbits]
    options = [{"nbits": nbits, "key_estimator": args.key_estimator} for nbits in widths]
    names = ["bf16", "fp8", *(f"{nbits} bits" for nbits in widths)]
    states = args.batch * estimate.state_bytes
    rows = {}
    for context in args.contexts:
        full = [estimate.full_bytes(context, args.batch, fp8=fp8) for fp8 in (False, True)]
        ours = [estimate.memory(context, args.batch, **option).total_bytes - states for option in options]
        rows[context] = dict(zip(names, full + ours, strict=True))
    longest = {}
    if args.budget:
        counts = [estimate.longest_context(args.budget, args.batch, **option) for option in ({}, *options)]
        longest = dict(zip([names[0], *names[2:]], counts, strict=True))
    compressed = estimate.compressed()
    if args.json:
        about = {"model": args.model, "layers": len(estimate.layers), "compressed": compressed, "batch": args.batch}
        about |= {"state_bytes": states, "kv_bytes": rows, "budget_bytes": args.budget, "longest_context": longest}
        print(json.dumps(about, indent=1))
        return
    print(f"{args.model}: {len(estimate.layers)} layers")
    kinds = Counter((index in compressed, cost) for index, cost in enumerate(estimate.layers))
    for (is_compressed, cost), count in kinds.items():
        print(f"  {count:3} × {_describe(cost)}{': compressed' if is_compressed else ''}")
    print(f"\nKeys and values at batch {args.batch}, every byte counted ({args.key_estimator} keys, bf16 model)")
    print("".join(["    context", *(f"{name:>11}" for name in names)]))
    for context, row in rows.items():
        print("".join([f"{context:11,}", *(f"{_readable(count):>11}" for count in row.values())]))
    if any("linear" in cost.kind or "recurrent" in cost.kind for cost in estimate.layers):
        print(f"Beside them, whatever the context: {_readable(states)} of states that are not compressed")
    if longest:
        texts = [f"{name} {count:,}" if count < MAX_CONTEXT else f"{name} any" for name, count in longest.items()]
        print(f"Longest context in {_readable(args.budget)}, in tokens: {', '.join(texts)}")
    for warning in _warnings(estimate, compressed, rows, states):
        print(f"Note: {warning}")


def _add_evaluate(commands) -> None:
    parser = commands.add_parser("evaluate", help="quality of compressed caches, measured on a model and a text")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hub name or a local folder")
    add("--text", required=True, help="a text file, or hub:DATASET:CONFIG:SPLIT:COLUMN of a dataset on the Hub")
    add("--out", default="evaluation", help="folder of results.json and plots; an interrupted run goes on from there")
    add("--parts", nargs="+", help="quality, needle, fidelity, claims (default: all)")
    add(
        "--caches",
        nargs="+",
        metavar="SPEC",
        help="such as turboquant:nbits=4/3 quanto:nbits=4 (default: all)",
    )
    add("--window", type=_positive, help="quality: tokens of a window")
    add("--windows", type=_positive, help="quality: number of windows")
    add("--block", type=_positive, help="quality: tokens fed at a time")
    add("--prefill", type=_positive, help="quality: tokens of the first block")
    add("--score-from", type=_natural, help="quality: count blocks from this position on")
    add("--needle-lengths", type=_positive, nargs="+", help="tokens of the haystacks")
    add("--needle-depths", type=float, nargs="+", help="where the needles are, 0 to 1")
    add("--fidelity-lengths", type=_positive, nargs="+", help="tokens of context")
    add("--dtype", help="of the model, such as float32 (default: float32 on CPU, bfloat16 elsewhere)")
    add("--device", help="cuda where there is one, else cpu, by default")
    parser.set_defaults(run=_evaluate)


def _evaluate(args) -> None:
    # before anything else: whether this can run at all is known at once
    from .evaluation import load, run

    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: given[name] for name in run.Settings.__dataclass_fields__ if name in given}
    settings = run.Settings(**load.settings(options))
    text = load.read_text(args.text)
    model, tokenizer = load.load_model(args.model, args.dtype, args.device)
    if not args.caches:
        settings = dataclasses.replace(settings, caches=settings.caches + load.baselines(model.config))
    run.evaluate(model, tokenizer, text, settings, args.out)


def _add_benchmark(commands) -> None:
    parser = commands.add_parser("benchmark", help="speed of a layer's cache in the shape of a model, on this machine")
    parser.add_argument("model", metavar="MODEL", help="a Hub name, a local folder or a config.json")
    parser.add_argument("--contexts", type=_positive, nargs="+", default=[8192, 32768], metavar="TOKENS")
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--nbits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--key-estimator", choices=KEY_ESTIMATORS, default=TurboQuantConfig.key_estimator)
    parser.add_argument("--generate", type=_positive, metavar="TOKENS", help="also time generate, with the weights")
    parser.add_argument("--dtype", help="such as bfloat16 (default: float32 on CPU, bfloat16 elsewhere)")
    parser.add_argument("--device", help="cuda where there is one, else cpu, by default")
    parser.add_argument("--json", action="store_true", help="print everything as json")
    parser.set_defaults(run=_benchmark)


def _benchmark(args) -> None:
    from transformers import logging

    from .evaluation import benchmark, load

    logging.set_verbosity_error()
    caches = [{"nbits": nbits, "key_estimator": args.key_estimator} for nbits in args.nbits]
    for options in caches:
        TurboQuantConfig(**options)
    device, dtype = load.place(args.dtype, args.device)
    found = benchmark.benchmark(load_config(args.model), args.contexts, args.batch, caches, device, dtype)
    if args.generate:
        model, _ = load.load_model(args.model, args.dtype, args.device)
        found["tokens_per_s"] = {n: benchmark.generation(model, n, args.generate, caches) for n in args.contexts}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    benchmark.show(found)


def _describe(cost) -> str:
    shapes = {f"{heads} KV heads of {dim}" if heads > 1 else f"1 KV head of {dim}" for heads, dim in cost.shapes}
    if len(shapes) > 1:
        (heads, keys), (_, values) = cost.shapes
        shapes = {f"{heads} KV head{'s' * (heads > 1)} with keys of {keys} and values of {values}"}
    window = f" of {cost.window} tokens" if cost.window else ""
    return ", ".join([cost.kind + window, *shapes])


def _warnings(estimate, compressed: list[int], rows: dict, states: int):
    holders = [cost for cost in estimate.layers if cost.token_bytes]
    growing = [cost for cost in holders if cost.window is None]
    if len(growing) < len(estimate.layers):
        yield f"{len(growing)} of {len(estimate.layers)} layers hold a KV cache that grows with the context."
    if any(len({dim for _, dim in estimate.layers[index].shapes}) > 1 for index in compressed):
        yield "keys and values of different widths are latents (MLA): every step dequantises them."
    context, row = max(rows.items())
    total, ours = row["bf16"] + states, min(row.values()) + states
    if total < 2 * ours:
        yield (
            f"compression can't help much: at {context:,} tokens the whole cache, states included, goes from "
            f"{_readable(total)} to {_readable(ours)} at best."
        )


def _readable(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
