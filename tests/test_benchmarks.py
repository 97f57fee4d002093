"""The benchmarks are run by hand; here only that they start."""

import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = sorted((Path(__file__).parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help(script: Path):
    """Their folder comes first on the path: a script called `kernels` hid the package that transformers looks for."""
    if script.stem == "sweep":
        pytest.importorskip("triton")
    run = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout
