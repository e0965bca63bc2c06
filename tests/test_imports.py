"""Who imports whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_turboquant

ROOT = Path(hf_turboquant.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
OF_MODELS = {
    "cache.py",
    "hybrid.py",
    "batch.py",
    "lengths.py",
    "attention.py",
    "saving.py",
    "conditioning.py",
    "estimate.py",
    "cli.py",
}
OF_MODELS |= {"generation.py", "decoding.py", "captured.py", "sliding.py"}


def imports(path):
    """Modules a file imports, anywhere in it; relative ones start with the package's name."""
    package = ["hf_turboquant", *path.parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_layers_of_the_package(path):
    roots = {name.split(".")[0] for name in imports(path)}
    names = set(imports(path))
    if path.parts[0] != "ops":
        assert "triton" not in roots, "triton belongs below ops/"
    of_models = path.parts[0] == "evaluation" or path.as_posix() in OF_MODELS
    if not of_models:
        assert "transformers" not in roots, "transformers belongs in cache, layers, attention and what runs models"
    if path.parts[0] != "evaluation":
        assert not roots & {"rich", "matplotlib", "datasets"}, "extras belong in evaluation/"
        lazy = path == Path("cli.py")
        assert lazy or not any("evaluation" in name for name in names), "nothing but the command needs evaluation"
    if path.name == "config.py":
        assert "torch" not in roots
    if path.name == "cache.py":
        assert "hf_turboquant.attention" not in names, "cache and attention meet in handle"
    if path == Path("attention.py"):
        assert not names & {"hf_turboquant.cache", "hf_turboquant.layer"}, "cache and attention meet in handle"


def test_the_scan_sees_imports():
    assert {"hf_turboquant.config", "hf_turboquant.ops", "transformers"} <= {
        name.split(".")[0] if name.startswith("transformers") else name for name in imports(Path("cache.py"))
    }


def test_the_package_alone_brings_no_extras():
    # extras are imported in evaluation/ alone, as the test above says; transformers may bring some of them itself
    code = "import sys, hf_turboquant; print([m for m in sys.modules if m.startswith('hf_turboquant.evaluation')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == "[]"


def test_all_is_sorted_and_complete():
    assert list(hf_turboquant.__all__) == sorted(hf_turboquant.__all__)
    assert all(hasattr(hf_turboquant, name) for name in hf_turboquant.__all__)
