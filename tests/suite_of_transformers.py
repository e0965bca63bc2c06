"""
The tests that transformers has for generation and caches, with `TurboQuantCache` in place of `DynamicCache`: all tokens
in codes of 8 bits, for six types of models. Prints what passes with `DynamicCache` and not with ours.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    pip install parameterized
    python tests/suite_of_transformers.py transformers

The folder must hold `tests/generation`, which neither wheels nor source distributions do, of the version that is
installed. SmolLM2-135M-Instruct comes from PyPI, as for the examples. `--tests PATTERN` runs tests of that name alone.
"""

import argparse
import importlib
import sys
import unittest
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from test_models import ALL_CODES, BATCH, PROMPT, ROWS, EncoderDecoderRow
from transformers import DynamicCache

from hf_turboquant import TurboQuantCache

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from load_model import default_model

# Grouped heads, sliding windows, learned positions, linear attention, attention beside a recurrent part, two caches.
NAMES = "llama_gqa", "gemma3", "gpt2", "qwen3_next", "falcon_h1", "t5"


class Codes(TurboQuantCache):
    """`DynamicCache` as transformers calls it. Nothing is learned from prompts, so that chunks give the same codes."""

    # Of all caches together.
    tokens = 0

    def __init__(self, ddp_cache_data=None, config=None, **options):
        super().__init__(config, **ALL_CODES, condition="none", **options)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        held = getattr(self.layers[layer_idx], "codes", {}).get("keys")
        Codes.tokens += held is not None and held.length > 0 and key_states.shape[2]
        return found


class Tester:
    """What the suite asks for models and inputs; its own are too small to have codes."""

    batch_size, seq_length, is_training = BATCH, PROMPT, False

    def __init__(self, row):
        self.row = row
        if isinstance(row, EncoderDecoderRow):
            self.encoder_seq_length = row.source_length

    def prepare_config_and_inputs_for_common(self):
        torch.manual_seed(0)
        config, inputs = self.row.config(), {name: x[:, :PROMPT] for name, x in self.row.inputs().items()}
        # What the model has no use for, but the suite would take for its shape.
        for name in {"num_key_value_heads", "head_dim"} & (vars(config).keys() - vars(type(config)()).keys()):
            delattr(config, name)
        if isinstance(self.row, EncoderDecoderRow):
            inputs = self.row.source(config) | {f"decoder_{name}": x for name, x in inputs.items()}
        return config, inputs


def suites(mixin, cache_tests) -> dict[str, type]:
    """The classes of tests by name: one for each model, and those of caches alone."""
    found = {}
    for row in (row for name in NAMES for row in ROWS if row.name == name):
        kinds = {"all_generative_model_classes": (type(row.model()),), "has_attentions": True}
        found[row.name] = type(row.name, (mixin, unittest.TestCase), {**kinds, "model_tester": Tester(row)})
    here = vars(cache_tests).values()
    ours = [kind for kind in here if isinstance(kind, type) and kind.__module__ == cache_tests.__name__]
    return found | {kind.__name__: kind for kind in ours if issubclass(kind, unittest.TestCase)}


def run(kind: type, cache: type, pattern: str) -> tuple[set[str], dict[str, str]]:
    """Runs all tests of a class with that cache; returns those that pass, and the last line of why others do not."""
    loader, result = unittest.TestLoader(), unittest.TestResult()
    loader.testNamePatterns = [f"*{pattern}*"]
    tests = loader.loadTestsFromTestCase(kind)
    names = {test._testMethodName for test in tests}
    holders = [vars(m) for name, m in sys.modules.items() if not name.startswith(("hf_turboquant", "__main__"))]
    for holder in [holder for holder in holders if holder.get("DynamicCache") is DynamicCache]:
        holder["DynamicCache"] = cache
    try:
        tests.run(result)
    finally:
        for holder in holders:
            if holder.get("DynamicCache") is cache:
                holder["DynamicCache"] = DynamicCache
    why = {test._testMethodName: text.strip().splitlines()[-1] for test, text in result.failures + result.errors}
    why |= {test._testMethodName: f"skipped: {reason}" for test, reason in result.skipped}
    # What a class as a whole needs is reported without the name of a test.
    return names - set(why) if result.testsRun else set(), why


def from_pypi(load):
    """Loads the model that the tests of caches name from where the examples keep it."""
    return lambda name, *args, **options: load(default_model() if "SmolLM2-135M" in name else name, *args, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the sources of transformers")
    parser.add_argument("--tests", default="test", metavar="PATTERN")
    args = parser.parse_args()
    if not (args.folder / "tests/generation/test_utils.py").exists():
        parser.error(f"FOLDER must hold tests/generation/test_utils.py, got {args.folder}. Clone transformers.")
    sys.path.insert(0, str(args.folder.resolve()))
    mixin = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
    cache_tests = importlib.import_module("tests.utils.test_cache_utils")
    with ExitStack() as stack:
        for kind in (cache_tests.AutoTokenizer, cache_tests.AutoModelForCausalLM):
            stack.enter_context(patch.object(kind, "from_pretrained", from_pypi(kind.from_pretrained)))
        for name, kind in suites(mixin, cache_tests).items():
            (full, _), (ours, why) = (run(kind, cache, args.tests) for cache in (DynamicCache, Codes))
            print(f"{name}: {len(full)} pass with DynamicCache, {len(full & ours)} of them with codes", flush=True)
            for test in sorted(full - ours):
                print(f"    {test}: {why.get(test, 'did not run')[:160]}", flush=True)
    print(f"{Codes.tokens:,} tokens of layers were quantized")


if __name__ == "__main__":
    main()
