"""What importing the package needs, and what it does."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_needs_no_extras():
    blocked = ("datasets", "optimum", "gguf", "matplotlib", "pandas", "sklearn", "peft", "lm_eval")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: cannot be imported
import optimum_sparse.cli, optimum_sparse.evaluation
print(sorted(optimum_sparse.__all__))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "SparsityConfig" in done.stdout


def test_a_missing_datasets_package_says_what_to_install():
    code = """
import sys
sys.modules["datasets"] = None
from optimum_sparse.calibration import load_documents
next(load_documents("c4", "train"))
"""
    assert "pip install 'optimum-sparse[datasets]'" in run(code).stderr
