import dataclasses
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, so it has to be set before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# tests run in one process per core: threads of their own would only wait for each other
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def pytest_addoption(parser):
    parser.addoption("--tables", action="store_true", help="print the tables of docs/models.md")


def pytest_terminal_summary(terminalreporter, config):
    """Rows that tests recorded as properties, under the heading that is the property's name."""
    reports = terminalreporter.stats.get("passed", []) if config.getoption("--tables") else []
    tables = {}
    for heading, row in (item for report in reports for item in report.user_properties):
        tables.setdefault(heading, []).append(row)
    for heading, rows in tables.items():
        terminalreporter.write_line("\n".join(["", heading, "|---" * (heading.count("|") - 1) + "|", *rows]))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer: a real model, fetched once."""
    from load_model import load

    return load(None)


def forget_quantizers():
    """The next caches make quantizers anew."""
    from hf_turboquant import arena, quantizer

    arena._layout.cache_clear()
    quantizer._create.cache_clear()


@pytest.fixture
def same_search(monkeypatch):
    """
    Tokens that come alone are searched for as long as those that come together, in four rounds: then how tokens arrive
    does not matter.
    """
    from hf_turboquant.search import ANNEALINGS

    for bits, annealing in ANNEALINGS.items():
        monkeypatch.setitem(ANNEALINGS, bits, dataclasses.replace(annealing, rounds=annealing.single_rounds))
    forget_quantizers()
    yield
    forget_quantizers()


@pytest.fixture(scope="module")
def early_learning():
    """Keys wait for 16 tokens in place of 128 before they are conditioned: most texts of tests are short."""
    from hf_turboquant import conditioning, config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "LEARNED_TOKENS", 16)
        patch.setattr(conditioning, "MIN_TOKENS", 8)
        forget_quantizers()
        yield
    forget_quantizers()
