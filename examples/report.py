"""Output of the examples that measure: tables for a document, and the conditions above them."""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from hf_turboquant.evaluation.load import machine


def line(*cells) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*columns: str) -> str:
    """The first two rows of a markdown table."""
    return "\n".join([line(*columns), "|---" * len(columns) + "|"])


def table(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A markdown table."""
    return "\n".join([head(*columns), *(line(*cells) for cells in rows)])


def conditions(device: torch.device | str, *texts: str) -> str:
    """What was measured, in the words of `texts`, on which machine and with which versions."""
    where = machine(device)
    return "; ".join([*texts, where.pop("device"), ", ".join(f"{name} {version}" for name, version in where.items())])


def named(model, source: str | None) -> str:
    """The name of the model that was loaded from `source`, for the conditions."""
    return f"**{Path(source or 'SmolLM2-135M-Instruct').name}** in {str(model.dtype).removeprefix('torch.')}"


def command() -> str:
    """The running command, to print below its table."""
    return f"`{shlex.join(['python', f'examples/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`"
