"""A step's scratch space does not come in pages of 4 KiB where `train.py` was started plainly."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import resource, sys
from train import ask_for_huge_pages

if "ask" in sys.argv:
    ask_for_huge_pages()
import jax, jax.numpy as jnp

step = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(jnp.outer(x, x)) @ x))
x = jnp.ones(4000)
for _ in range(3):
    float(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    float(step(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10, *sys.argv[1:])
"""


def output(*arguments: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not THP.exists() or "[madvise]" not in THP.read_text(),
    reason="needs glibc and huge pages on request",
)
def test_steps_take_few_pages_once_huge_ones_are_asked_for():
    faults, *arguments = output("ask", "and keep", "arguments")
    assert " ".join(arguments) == "ask and keep arguments"
    assert int(faults) < 4000
    assert int(output("plain")[0]) > 12000
