"""A step's scratch space is not taken from the system again in every step."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
from train import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp

step = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(jnp.outer(x, x)) @ x))
x = jnp.ones(4000)
for _ in range(10):
    float(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    float(step(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_steps_take_no_pages_once_memory_is_kept():
    def faults(mode: str) -> int:
        root = Path(__file__).parents[1]
        command = [sys.executable, "-c", PROGRAM, mode]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 4000
    assert faults("plain") > 12000
