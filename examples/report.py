"""What the examples that measure share: tables for a document, the conditions above them, times of a request."""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from hf_turboquant.evaluation.load import machine


class Times(BaseStreamer):
    """A streamer that records when each token comes."""

    def __init__(self):
        self.times_s: list[float] = []

    def put(self, value):
        self.times_s.append(time.perf_counter())

    def end(self):
        pass

    @property
    def steps_s(self) -> list[float]:
        """Times from one new token to the next; the first entry is the prompt."""
        return [after - before for before, after in pairwise(self.times_s[1:])]


def parse_for_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark, which is refused without a GPU."""
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: on a CPU these times say nothing. `hf-turboquant benchmark` runs on both")
    return args


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
