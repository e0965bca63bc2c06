"""The command `hf-turboquant`: estimates memory from a config, evaluates quality on a model, times its caches."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields, replace

from transformers import logging

from . import __version__
from .config import CHOICES, TurboQuantConfig
from .estimate import MAX_CONTEXT, Estimate
from .evaluation import load
from .evaluation.caches import parse_value
from .memory import readable


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


def run(command: Callable[[], object], program: str | None = None, stopped: str | None = None) -> int:
    """
    Runs a command and returns its exit code. Errors that the user can fix, and Ctrl-C, give one line on stderr, with
    the name of the program, by default the running file's, and how to go on when it was `stopped`.
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
        message, code = f"stopped. {stopped or 'Nothing was kept.'}", 130
    except ModuleNotFoundError as error:
        # `evaluate` needs both.
        wanted = "rich matplotlib" if error.name in ("rich", "matplotlib") else error.name.replace("_", "-")
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
    kept = "Give the same command to go on: what --out holds is not measured again." if "out" in args else None
    return run(lambda: args.run(args), "hf-turboquant", kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-turboquant", description="TurboQuant KV caches: see, measure, decide.")
    parser.add_argument("--version", action="version", version=f"hf-turboquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, about: str, model: str = "a Hub name, a local folder or a config.json"):
        name = run.__name__.removeprefix("_")
        found = commands.add_parser(name, help=about, description=about, formatter_class=Formatter)
        found.set_defaults(run=run)
        found.add_argument("model", metavar="MODEL", help=model)
        return found.add_argument

    estimate = command(_estimate, "memory of the cache, from the config alone")
    estimate("--budget", type=load.parse_bytes, metavar="BYTES", help="memory for the cache alone, such as 24G")
    benchmark = command(_benchmark, "speed of a layer's cache in the shape of a model, on this machine")
    evaluate = command(_evaluate, "quality of compressed caches on a model and a text", "a Hub name or a folder")
    evaluate("--out", default="evaluation", help="folder of results.json and plots; a stopped run goes on")
    for option in fields(load.Settings)[1:]:
        evaluate(f"--{option.name.replace('_', '-')}", default=option.default, **option.metadata)
    # Arguments that several commands share.
    for add, contexts in ((estimate, [8192, 32768, 131072]), (benchmark, [8192, 32768])):
        add("--contexts", type=load.parse_count, nargs="+", default=contexts, metavar="TOKENS", help="such as 128k")
        add("--batch", type=load.parse_count, default=1, help="number of sequences, each that long")
        add("--nbits", type=parse_value, nargs="+", default=[4, 3, 2], help="bits of keys and values")
        estimators, default = CHOICES["key_estimator"], TurboQuantConfig.key_estimator
        add("--key-estimator", choices=estimators, default=default, help="kind of keys")
    for add in (benchmark, evaluate):
        add("--dtype", help="such as bfloat16 (default: float32 on CPU, bfloat16 elsewhere)")
        add("--device", help="such as cuda:1 (default: cuda if there is one, else cpu)")
    return parser


def _caches(args) -> dict[str, dict]:
    """Options of the caches asked for, by name; a `ValueError` if there are none such."""
    found = {f"{nbits} bits": {"nbits": nbits, "key_estimator": args.key_estimator} for nbits in args.nbits}
    for options in found.values():
        TurboQuantConfig(**options)
    return found


def _estimate(args) -> None:
    # Missing kernels do not affect shapes.
    logging.set_verbosity_error()
    caches, estimate = _caches(args), Estimate.from_config(load.load_config(args.model))
    states = args.batch * estimate.state_bytes
    growing = sum(bool(cost.token_bytes) and cost.window is None for cost in estimate.layers)
    print(f"{args.model}: {growing} of {len(estimate.layers)} layers hold a KV cache that grows with the context")
    for kind, count in Counter(f"{cost}{': compressed' * cost.compressed}" for cost in estimate.layers).items():
        print(f"  {count:3} × {kind}")
    about = f"every byte counted ({args.key_estimator} keys); ×: how many times smaller than bf16"
    print(f"\nKeys and values at batch {args.batch}, {about}")
    print("    context       bf16" + "".join(f"{name:>11}      ×" for name in ("fp8", *caches)))
    for context in sorted(args.contexts):
        full, fp8 = (estimate.full_bytes(context, args.batch, fp8=fp8) for fp8 in (False, True))
        ours = [estimate.memory(context, args.batch, **options).total_bytes - states for options in caches.values()]
        cells = (f"{readable(count):>11}{full / count if count else 1:6.1f}×" for count in (fp8, *ours))
        print(f"{context:11,}{readable(full):>11}{''.join(cells)}")
    if any("linear" in cost.kind or "recurrent" in cost.kind for cost in estimate.layers):
        print(f"Beside them, whatever the context: {readable(states)} of states that are not compressed")
    if args.budget:
        counts = {n: estimate.longest_context(args.budget, args.batch, **o) for n, o in {"bf16": {}, **caches}.items()}
        texts = (f"{name} {count:,}" if count < MAX_CONTEXT else f"{name} any" for name, count in counts.items())
        print(f"Longest context in {readable(args.budget)}, in tokens: {', '.join(texts)}")
    # At the longest context, the last one above; the cache's own widths, because fp8 takes sliding windows too.
    if full + states < 2 * (min(ours) + states):
        print(f"Note: this cache can't help much: at {context:,} tokens, states included, it goes from", end=" ")
        print(f"{readable(full + states)} to {readable(min(ours) + states)} at best.")


def _evaluate(args) -> None:
    # Imported first, to fail at once if a dependency is missing.
    from .evaluation import run

    # All that can be refused without the weights is refused before they are loaded.
    settings = load.Settings(**{option.name: getattr(args, option.name) for option in fields(load.Settings)})
    text, config = load.read_text(settings.text), load.load_config(args.model)
    load.place(args.dtype, args.device)
    if args.caches == load.CACHES:
        settings = replace(settings, caches=settings.caches + load.baselines(config))
    settings.check(config, text)
    run.Results(args.out, asdict(settings))
    run.evaluate(*load.load_model(args.model, args.dtype, args.device), text, settings, args.out)


def _benchmark(args) -> None:
    from .evaluation import benchmark

    logging.set_verbosity_error()
    caches, place = list(_caches(args).values()), load.place(args.dtype, args.device)
    benchmark.show(benchmark.benchmark(load.load_config(args.model), args.contexts, args.batch, caches, *place))
