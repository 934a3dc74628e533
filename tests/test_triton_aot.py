"""The Triton kernels as machine code of four architectures, without a GPU: tests/triton_gates/compiled.py.

In a process of its own: the stand-in for a driver would be in the way of a real one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def test_compiled():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_gates/compiled.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-6000:] + found.stderr[-2000:]
