"""Untrusted Python programs, run where they can harm nothing, within limits.

`Pool.run` runs a program; `check` decides whether a function passes its tests so that the function
cannot cheat. Linux only, standard library only; imports nothing of Sheaf's other rooms, and no JAX.
`python -m sandbox check` prints what this machine can isolate.
"""

from sandbox.function_tests import TEST_LIMITS, FunctionTest, Verdict, check, check_all, counts
from sandbox.pool import Pool, run
from sandbox.program import (
    Execution,
    Isolation,
    Limits,
    Program,
    SandboxError,
    SandboxUnavailable,
)

__all__ = [
    "TEST_LIMITS",
    "Execution",
    "FunctionTest",
    "Isolation",
    "Limits",
    "Pool",
    "Program",
    "SandboxError",
    "SandboxUnavailable",
    "Verdict",
    "check",
    "check_all",
    "counts",
    "run",
]
