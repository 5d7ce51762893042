"""What tests marked `gpu_aot` share: the mark with its visible skip, and a compile that must keep
its values in registers.
"""

import pytest

from kernels_pallas.gpu_topology import Compiled, compile_for, why_not

REASON = why_not()


def on_a_described_gpu(test):
    """Run a test where JAX's CUDA plugin can compile, or skip it with the reason."""
    test = pytest.mark.skipif(REASON is not None, reason=REASON or "the plugin compiles here")(test)
    return pytest.mark.gpu_aot(test)


def compile_and_fit(function, shapes, *, kernels, name="h100", spilled=0, **options) -> Compiled:
    """`compile_for`, and the program must hold `kernels` Mosaic kernels that spill no more than
    `spilled` bytes a thread.
    """
    compiled = compile_for(function, shapes, name, **options)
    assert len(compiled.registers) == kernels, compiled.registers
    assert all(size <= spilled for size in compiled.spilled_bytes), compiled.spilled_bytes
    return compiled
