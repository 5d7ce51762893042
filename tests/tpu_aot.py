"""What tests marked `tpu_aot` share: the mark with its visible skip, and a compile that fits."""

import pytest

from kernels_pallas.tpu_topology import GENERATIONS, Compiled, compile_for, why_not

REASON = why_not()
NAMES = tuple(GENERATIONS)

every_generation = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here"),
    pytest.mark.parametrize("generation", NAMES),
]
"""Marks of a test that takes a generation's name: `pytestmark = every_generation`, or one by one by
`on_every_generation`.
"""


def on_every_generation(test):
    """Run `test(generation, ...)` for each TPU generation, or skip it with the reason."""
    for mark in every_generation:
        test = mark(test)
    return test


def compile_and_fit(function, shapes, generation, *, kernels=None, **options) -> Compiled:
    """`compile_for`, and the program must hold `kernels` kernels, each within the vector memory."""
    compiled = compile_for(function, shapes, generation, **options)
    budget = GENERATIONS[generation].vmem_bytes
    assert all(used <= budget for used in compiled.vmem_bytes), (compiled.vmem_bytes, budget)
    if kernels is not None:
        assert len(compiled.vmem_bytes) == kernels, compiled.vmem_bytes
    return compiled
