"""What the examples that measure print: tables for a document, and the conditions above them."""

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
    """What was measured, as the texts say, where and with which versions."""
    where = machine(device)
    return "; ".join([*texts, where.pop("device"), ", ".join(f"{name} {version}" for name, version in where.items())])


def named(model, source: str | None) -> str:
    """The model that was loaded from `source`, as conditions have it."""
    return f"**{Path(source or 'SmolLM2-135M-Instruct').name}** in {str(model.dtype).removeprefix('torch.')}"


def command() -> str:
    """The command that is running, for below the table that it prints."""
    return f"`{shlex.join(['python', f'examples/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`"
