"""The GPU kernel of the quantized product without a GPU: in Pallas' simulator against float64, its
words in the places where a tensor core's operand has them, and lowered for CUDA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_quantized_matmul import as_operand, bound, drawn, f64, normal

from kernels_pallas.gpu_topology import GPUS
from kernels_pallas.quantized_matmul import SHAPES, gpu, pack
from kernels_pallas.quantized_matmul.gpu_decode import pair, table_pairs

CASES = {
    # name: rows of input, rows, bits, group, splits, what there is
    "int4_split": (3, 512, 4, 128, 2, {"zeros": True}),
    "int3_two_blocks": (70, 256, 3, 64, 1, {"zeros": True, "offsets": True}),
    "int2_wide_groups": (2, 1024, 2, 512, 2, {"zeros": True}),
    "table_small_groups": (4, 256, 4, 32, 1, {"table": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_what_float64_does_in_the_simulator(name):
    m, rows, bits, group, splits, options = CASES[name]
    arguments, matrix = drawn(rows, 128, bits, group, **options)
    w, x = as_operand(arguments, rows), normal((m, rows), jnp.bfloat16)
    assert gpu.unsupported(x, w) is None
    y = f64(jax.jit(functools.partial(gpu.matmul, splits=splits, simulate=True))(x, w))
    assert np.max(np.abs(y - f64(x) @ matrix)) <= bound(f64(x), matrix)


class Thread:
    """One thread of a warpgroup, in Python's whole numbers."""

    def __init__(self, words, table, thread):
        self.words, self.table = words, table
        warp, lane = divmod(thread, 32)
        self.row, self.quarter = 16 * warp + lane // 4, lane % 4

    def both(self, value, mask):
        return value & mask

    def either(self, a, b):
        return a | b

    def one_of(self, value, bits):
        return value | bits

    def shifted(self, value, left):
        return (value << left) % 2**32 if left > 0 else value >> -left

    def floated(self, value):
        return int(np.float32(value).view(np.uint32))

    def word(self, row, upper):
        return int(self.words[row + self.quarter, self.row + 8 * upper])

    def entry(self, code):
        return int(self.table[code])


@pytest.mark.parametrize(
    ("bits", "table"), [(1, 0), (2, 0), (3, 0), (4, 0), (7, 0), (8, 0), (4, 1)]
)
def test_each_thread_holds_what_a_tensor_core_takes_of_it(bits, table):
    """NVIDIA's layout of the operand of a 64 x 16 product: thread l of warp w holds rows
    `16 w + l / 4 (+ 8)` and columns `2 (l % 4) (+ 8)` and the next.
    """
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (256, 64))
    entries = jnp.asarray(rng.normal(size=2**bits), jnp.bfloat16)
    words, pairs = np.asarray(pack(jnp.asarray(codes), bits)), np.asarray(table_pairs(entries))
    values = f64(entries)[codes] if table else codes if bits == 8 else 1 + codes / 2**bits
    for thread in (0, 1, 6, 37, 127):
        machine = Thread(words, pairs, thread)
        for slab, half, upper in np.ndindex(16, 2, 2):
            found = pair(machine, bits, slab, half, upper, bool(table))
            column, row = machine.row + 8 * upper, 16 * slab + 8 * half + 2 * machine.quarter
            numbers = np.asarray([found & 0xFFFF, found >> 16], np.uint32) << 16
            np.testing.assert_array_equal(numbers.view(np.float32), values[row : row + 2, column])


@pytest.mark.parametrize("name", ["llama3_8b_query_int4", "llama3_8b_up_int3", "llama3_8b_up_nf4"])
def test_the_kernel_lowers_for_cuda_without_a_gpu(name):
    shape = SHAPES[name]
    options = {"zeros": shape.zeros, "table": shape.table}
    arguments, _ = drawn(shape.rows, 256, shape.bits, shape.group, **options)
    w = as_operand(arguments, shape.rows)
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(functools.partial(gpu.matmul, dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((shape.m, shape.rows), jnp.bfloat16)
    exported = export.export(run, platforms=["cuda"], disabled_checks=unchecked)(x, w)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 1


def test_parts_and_slots_fill_a_gpu():
    arguments, _ = drawn(256, 128, 4, 128)
    w, h100 = as_operand(arguments, 256), GPUS["h100"]
    for blocks, steps in ((32, 16), (8, 16), (112, 16), (1, 1), (500, 16)):
        splits = gpu.splits_for(blocks, steps, h100.processors)
        assert 1 <= splits <= max(steps // 4, 1)
    assert gpu.splits_for(32, 16, h100.processors) == 4
    assert gpu.slots_for(w, 16, 128, h100.shared_bytes) == gpu.MOST_SLOTS
    assert 2 <= gpu.slots_for(w, 64, 128, h100.shared_bytes) < gpu.MOST_SLOTS


def test_what_the_kernel_does_not_take_is_said():
    arguments, _ = drawn(512, 128, 4, 128)
    w = as_operand(arguments, 512)
    x = normal((4, 512), jnp.bfloat16)
    assert gpu.unsupported(x, w) is None
    assert "float32" in str(gpu.unsupported(x.astype(jnp.float32), w))
    arguments, _ = drawn(512, 100, 4, 128)
    assert "eights" in str(gpu.unsupported(x, as_operand(arguments, 512)))
    arguments, _ = drawn(960, 128, 4, 96)
    assert "groups of 96" in str(
        gpu.unsupported(normal((4, 960), jnp.bfloat16), as_operand(arguments, 960))
    )
