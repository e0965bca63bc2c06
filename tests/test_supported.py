"""The versions of transformers that are let in."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_turboquant._supported import LOWEST, TOO_NEW, check_transformers


@pytest.mark.parametrize("version", ("5.17.0", "5.24.0", "5.40.0.dev0"))
def test_supported(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ("4.57.1", "5.16.2", "6.0.0", "6.0.0.dev0"))
def test_unsupported(version):
    with pytest.raises(ImportError, match=rf"needs transformers>=5\.17,<6, got {version}. Run `pip install"):
        check_transformers(version)


def test_the_import_fails_before_anything_else_does():
    """With a transformers of another version, of which nothing but the number is there."""
    script = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.version = lambda name: '4.57.1'\n"
        "sys.modules['transformers'] = None\n"
        "import hf_turboquant"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert run.returncode == 1
    assert "ImportError: hf_turboquant needs transformers>=5.17,<6, got 4.57.1." in run.stderr


def test_the_range_is_that_of_the_package():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    required = config["options"]["install_requires"].split()
    assert "transformers>={}.{},<{}".format(*LOWEST, TOO_NEW[0]) in required
    # the lowest torch and triton are those of the measurements on a GPU
    speed = (Path(__file__).parent.parent / "docs" / "speed.md").read_text(encoding="utf-8")
    versions = re.search(r"torch (\d+\.\d+)\.\d+, triton (\d+\.\d+)\.", speed).groups()
    assert {f"torch>={versions[0]}", f"triton>={versions[1]};"} <= set(required)
