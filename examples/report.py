"""What the examples that measure share: the option `--caches`, tables for a document, and the conditions above them."""

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hf_turboquant.evaluation.caches import parse
from hf_turboquant.evaluation.load import machine

DEVICE = "cuda"


def add_caches(parser: argparse.ArgumentParser, *default: str) -> None:
    """Adds `--caches`; without a default the example has its own."""
    about = f"KIND:OPTION=VALUE/VALUE, such as dynamic turboquant:nbits=4/3{'' if default else ' (default: all)'}"
    parser.add_argument("--caches", nargs="+", default=default or None, metavar="SPEC", help=about)


def parse_for_gpu(parser: argparse.ArgumentParser, ours: bool = False) -> argparse.Namespace:
    """
    The arguments of a benchmark, which is refused without a GPU. `caches` are options of caches, or with `ours` of
    [`TurboQuantConfig`] alone.
    """
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: on a CPU these times say nothing. `hf-turboquant benchmark` runs on both")
    args.caches = parse(*args.caches or ())
    if ours and {options.pop("cache") for options in args.caches} != {"turboquant"}:
        parser.error("--caches must be of turboquant, whose kernels are timed here")
    return args


def line(*cells) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(columns: Sequence[str], rows: Iterable[Iterable] = ()) -> str:
    """A markdown table, of which the `rows` may follow later."""
    return "\n".join([line(*columns), "|---" * len(columns) + "|", *(line(*cells) for cells in rows)])


def conditions(device: torch.device | str, *texts: str) -> str:
    """What was measured, in the words of `texts`, on which machine and with which versions."""
    where = machine(device)
    return "; ".join([*texts, where.pop("device"), ", ".join(f"{name} {version}" for name, version in where.items())])


def show(model, source: str | None, texts: Iterable[str], *tables: str) -> None:
    """Prints what a model, loaded from `source`, gave: the conditions, the tables and the command."""
    name = Path(source or "SmolLM2-135M-Instruct").name
    about = conditions(model.device, f"**{name}** in {str(model.dtype).removeprefix('torch.')}", *texts)
    command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    print(f"{about}.", *tables, f"`{command}`", sep="\n\n", end="\n\n")
