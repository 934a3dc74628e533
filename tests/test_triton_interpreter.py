"""The Triton kernels' values, bounds and races, on a CPU: tests/triton_gates/*.py under Triton's interpreter.

TRITON_INTERPRET must stand before Triton is imported, and kernels made under it cannot be compiled: so each file runs
in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", ["values.py", "faults.py"])
def test_under_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/triton_gates/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-6000:] + found.stderr[-2000:]
