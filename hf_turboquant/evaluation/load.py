"""Turns what a user types into a model, a text and settings."""

import platform
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .. import __version__
from .caches import label, new_cache, parse

# As in the project's measurements: a block of 32 tokens sees itself exactly and all earlier tokens in codes.
_ALL_CODES = "condition=none,residual_length=32,sink_length=0"
PRESETS = {
    "default": ["turboquant:nbits=4/3/2,key_estimator=qjl/rescaled"],
    # Every estimator of the papers: only keys, only values (the other in 8 bits), then both with exact tokens.
    "estimators": [
        f"turboquant:key_bits=4/3/2,value_bits=8,key_estimator=mse/rescaled,{_ALL_CODES}",
        f"turboquant:key_bits=4/3/2,value_bits=8,key_estimator=qjl,sketch=orthogonal/gaussian,{_ALL_CODES}",
        f"turboquant:key_bits=8,key_estimator=rescaled,value_bits=4/3/2,value_estimator=mse/rescaled,{_ALL_CODES}",
        "turboquant:nbits=4/3/2,key_estimator=mse/rescaled,condition=none/center",
        "turboquant:nbits=4/3/2,key_estimator=qjl,condition=none",
    ],
}


def baselines(config) -> list[dict]:
    """transformers' own quantised caches that are installed and support this model."""
    found = []
    for spec in ("quanto:nbits=4/2", "hqq:nbits=4/2", "fp8"):
        for options in parse(spec):
            try:
                new_cache(config, options)
            except ValueError:
                continue
            found.append(options)
    return found


def settings(options: dict) -> dict:
    """
    The arguments of [`run.Settings`], with lists as tuples and caches parsed.

    Raises:
        `ValueError`: a part, a cache or a depth is not valid.
    """
    from .run import PARTS

    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    named = options.get("caches") or ["default"]
    caches = [found for name in named for spec in PRESETS.get(name, [name]) for found in parse(spec)]
    for part in options.get("parts", ()):
        if part not in PARTS:
            raise ValueError(f"--parts must be of {', '.join(PARTS)}, got {part!r}.")
    if any(not 0 <= depth <= 1 for depth in options.get("needle_depths", ())):
        raise ValueError(f"--needle-depths must be from 0 (first) to 1 (last), got {options['needle_depths']}.")
    names = [label(found) for found in caches]
    if len(set(names)) < len(names):
        raise ValueError(f"--caches must differ from each other, got {', '.join(names)}.")
    return {**options, "caches": caches}


def read_text(source: str) -> str:
    """
    Reads a text file, `hub:DATASET:CONFIG:SPLIT:COLUMN` (the last three are optional), or `reference`: the reference of
    the Python language, which is part of every Python.

    Raises:
        `ValueError`: the text cannot be read.
    """
    if source == "reference":
        return "\n".join(topics.values())
    if source.startswith("hub:"):
        name, config, split, column = (source.split(":") + ["", "", "", ""])[1:5]
        # Not one of our dependencies, because only users who name a dataset need it.
        from datasets import load_dataset

        try:
            rows = load_dataset(name, config or None, split=split or "test")
            return "\n".join(rows[column or "text"])
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--text hub:... must name a dataset with that split and column: {reason}") from None
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"--text must be a text file or hub:DATASET, got {source}: {reason}.") from None


def place(dtype: str | None = None, device: str | None = None) -> tuple[str, torch.dtype]:
    """
    Device and dtype; the defaults suit this machine.

    Raises:
        `ValueError`: there is no such dtype, or no such device.
    """
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
    what = "a name on the Hub, a local folder or a config.json that transformers knows"
    return _found(what, name, lambda: AutoConfig.from_pretrained(name))


def load_model(name: str, dtype: str | None = None, device: str | None = None):
    """
    Loads a causal language model in evaluation mode, and its tokenizer.

    Raises:
        `ValueError`: there is no model of that name, or no such dtype.
    """
    device, found = place(dtype, device)
    if Path(name).is_file():
        raise ValueError(f"MODEL must be a Hub name or a folder with weights, got the file {name!r}.")

    def load():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=found, device_map=device)
        return model.eval(), AutoTokenizer.from_pretrained(name)

    return _found("a causal language model on the Hub or in a local folder", name, load)


def _found(what: str, name: str, load: Callable):
    try:
        return load()
    except (ModuleNotFoundError, torch.OutOfMemoryError):
        raise
    # Config, weights and tokenizer can fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        advice = "Look at the files" if Path(name).exists() else "Check the name, the path and the network"
        raise ValueError(f"MODEL must be {what}, got {name!r}: {reason}. {advice}.") from None
