"""Turns what a user types into settings, a text and a model."""

import argparse
import math
import platform
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .. import __version__
from .caches import label, new_cache, parse

PARTS = ("quality", "needle", "fidelity", "claims")


def parse_bytes(text: str, base: int = 1000, least: int = 1, most: int = 10**18) -> int:
    """`"24G"` -> 24 · 10⁹."""
    digits, units = text.upper().removesuffix("B"), ["", "K", "M", "G", "T"]
    unit = digits[-1:] if digits[-1:] in units else ""
    try:
        count = float(digits.removesuffix(unit)) * base ** units.index(unit)
    except ValueError:
        count = math.nan
    if not least <= count < most or (not unit and count % 1):
        raise argparse.ArgumentTypeError(f"must be a number from {least} on, such as 8192, 128k or 24G, got {text!r}")
    return int(count)


# `"128k"` -> 131,072, as model cards count.
parse_count = partial(parse_bytes, base=1024, most=2**31)


def _option(default, about: str, **how):
    """A field that is an argument of the command too, where `how` says how it is read."""
    return field(default=default, metadata={"help": about, **how})


CACHES = ("turboquant:nbits=4/3/2,key_estimator=qjl/rescaled",)
_TEXT = "a text file, hub:DATASET:CONFIG:SPLIT:COLUMN of a dataset on the Hub, or `reference`: Python's own reference"
_SPECS = "KIND:OPTION=VALUE/VALUE, such as turboquant:nbits=4/3 fp8; the default adds what transformers has"

_HALF = "quality: count blocks from here on (default: half a window)"
_TOKENS = {"type": parse_count, "metavar": "TOKENS"}


@dataclass(frozen=True)
class Settings:
    """
    What to measure, and on what. All of it is saved with the results.

    `caches` may be given as specs, see [`caches.parse`], and become options. Windows take what the whole model reads;
    `prefill` and `score_from` are half of one unless given.

    Raises:
        `ValueError`: a part, a cache or a depth is not valid, or the blocks leave no token to score.
    """

    model: str
    text: str = _option("reference", _TEXT)
    caches: Sequence = _option(CACHES, _SPECS, metavar="SPEC", nargs="+")
    parts: Sequence[str] = _option(PARTS, "what to measure", metavar="PART", nargs="+")
    window: int = _option(1024, "quality: tokens in a window", **_TOKENS)
    windows: int = _option(1, "quality: number of windows", type=parse_count)
    batch: int = _option(1, "quality: windows that share a cache", type=parse_count)
    block: int = _option(64, "quality: tokens fed at a time", **_TOKENS)
    prefill: int | None = _option(None, "quality: tokens of the first block (default: half a window)", **_TOKENS)
    score_from: int | None = _option(None, _HALF, type=partial(parse_count, least=0), metavar="TOKENS")
    needle_lengths: Sequence[int] = _option((256, 512, 1024), "tokens of the haystacks", nargs="+", **_TOKENS)
    needle_depths: Sequence[float] = _option(
        (0.0, 0.5, 1.0), "where the needles are, 0 to 1", type=float, metavar="DEPTH", nargs="+"
    )
    fidelity_lengths: Sequence[int] = _option((512, 1024), "tokens of context", nargs="+", **_TOKENS)

    def __post_init__(self):
        if all(isinstance(spec, str) for spec in self.caches):
            object.__setattr__(self, "caches", parse(*self.caches))
        for name in ("prefill", "score_from"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.window // 2)
        for part in set(self.parts) - set(PARTS):
            raise ValueError(f"--parts must be of {', '.join(PARTS)}, got {part!r}.")
        if any(not 0 <= depth <= 1 for depth in self.needle_depths):
            raise ValueError(f"--needle-depths must be from 0 (first) to 1 (last), got {self.needle_depths}.")
        names = [label(options) for options in self.caches]
        if len(set(names)) < len(names):
            raise ValueError(f"--caches must differ from each other, got {', '.join(names)}.")
        if "quality" in self.parts and not max(self.prefill, self.score_from) < self.window - 1:
            raise ValueError(
                f"--prefill and --score-from must leave tokens of the window to score, got {self.prefill} and "
                f"{self.score_from} of {self.window}. Take a longer --window, or leave them out."
            )

    def check(self, config, text: str) -> None:
        """A `ValueError` if the text is empty, a context longer than the model can read, or a cache does not fit it."""
        if not text.strip():
            raise ValueError(f"The text must hold words, got an empty one from {self.text}. Give another --text.")
        needles = max(self.needle_lengths) + 32
        lengths = {"quality": self.window, "needle": needles, "fidelity": max(self.fidelity_lengths)}
        longest = max(lengths.get(part, 0) for part in self.parts)
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and longest > limit:
            raise ValueError(
                f"Contexts must be within the {limit:,} tokens that {self.model} can read, got {longest:,} (needles "
                "need 32 for the question). Take a shorter --window, --needle-lengths or --fidelity-lengths."
            )
        for options in self.caches:
            new_cache(config, options)


def baselines(config) -> list[dict]:
    """transformers' own quantized caches that are installed and support this model."""
    found = []
    for options in parse("quanto:nbits=4/2", "hqq:nbits=4/2", "fp8"):
        with suppress(ValueError):
            new_cache(config, options)
            found.append(options)
    return found


def read_text(source: str) -> str:
    """
    Reads a text file, `hub:DATASET:CONFIG:SPLIT:COLUMN` (the last three are optional), or `reference`: the reference of
    the Python language, which is part of every Python. A `ValueError` if the text cannot be read.
    """
    if source == "reference":
        return "\n".join(topics.values())
    try:
        if not source.startswith("hub:"):
            return Path(source).read_text(encoding="utf-8")
        # Not one of our dependencies, because only users who name a dataset need it.
        from datasets import load_dataset

        name, config, split, column = (source.split(":") + ["", "", "", ""])[1:5]
        rows = load_dataset(name, config or None, split=split or "test")
        return "\n".join(row.removesuffix("\n") for row in rows[column or "text"])
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        must = "a text file in UTF-8, hub:DATASET:CONFIG:SPLIT:COLUMN or reference"
        raise ValueError(f"The text must be {must}, got {source}: {reason}.") from None


def place(dtype: str | None = None, device: str | None = None) -> tuple[str, torch.dtype]:
    """Device and dtype, by default those that suit this machine; a `ValueError` if there is no such one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"), None)
    try:
        # Tensors on "meta" hold no numbers.
        usable = torch.empty(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ValueError(f"--device must be one that this machine and this torch have, such as cpu, got {device!r}.")
    # One-byte floats cannot be computed with.
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"--dtype must be a floating-point type of torch such as bfloat16, got {dtype!r}.")
    return device, found


def machine(device: torch.device | str) -> dict[str, str]:
    """The machine and the versions of a measurement."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"hf_turboquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions}


def load_config(name: str):
    """The config of a Hub name, a local folder or a `config.json`; a `ValueError` if transformers finds none."""
    with _finding("a name on the Hub, a local folder or a config.json that transformers knows", name):
        return AutoConfig.from_pretrained(name)


def load_model(name: str, dtype: str | None = None, device: str | None = None):
    """A causal language model in evaluation mode, and its tokenizer; a `ValueError` if there is no such model."""
    device, found = place(dtype, device)
    if Path(name).is_file():
        raise ValueError(f"MODEL must be a Hub name or a folder with weights, got the file {name!r}.")
    with _finding("a causal language model on the Hub or in a local folder", name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=found, device_map=device)
        return model.eval(), AutoTokenizer.from_pretrained(name)


@contextmanager
def _finding(what: str, name: str):
    try:
        yield
    except (ModuleNotFoundError, torch.OutOfMemoryError):
        raise
    # Config, weights and tokenizer can fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        advice = "Look at the files" if Path(name).exists() else "Check the name, the path and the network"
        raise ValueError(f"MODEL must be {what}, got {name!r}: {reason}. {advice}.") from None
