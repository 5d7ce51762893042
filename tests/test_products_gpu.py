"""The GPU kernels of integer products without a GPU: in Pallas' simulator against 64-bit integers,
their bytes in the places where a tensor core's operand has them, lowered for CUDA, and compiled to
machine code for a GPU that is not there.
"""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_aot import compile_and_fit, on_a_described_gpu
from jax import export
from jax.sharding import PartitionSpec as P

from kernels_pallas.bit_planes import bit_planes_matmul, pack_planes
from kernels_pallas.bit_planes import gpu as planes_gpu
from kernels_pallas.bit_planes.tpu import by_bytes
from kernels_pallas.flat_gemm import flat_gemm, routes
from kernels_pallas.gpu_topology import GPUS, described_mesh
from kernels_pallas.int8_matmul import gpu, gpu_product, int8_matmul
from kernels_pallas.int8_matmul.gpu_operand import place, selector
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.target import Target


def codes(shape, seed=0, low=-128):
    return jnp.asarray(np.random.default_rng(seed).integers(low, 128, shape), jnp.int8)


def positive(size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 1.5, size), jnp.float32)


def whole(x):
    return np.asarray(x, np.int64)


INT8 = {
    # name: rows of input, of a block of them, rows, columns, splits, type, with bias and addend
    "bands": (20, 8, 200, 48, 1, "float32", True),
    "split": (70, 128, 300, 80, 2, "bfloat16", False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_the_8_bit_kernel_is_exact_in_the_simulator(name, monkeypatch):
    m, block, rows, columns, splits, dtype, terms = INT8[name]
    monkeypatch.setattr(gpu_product, "block_rows", lambda m: block)
    monkeypatch.setattr(gpu_product, "BAND", 2)
    x, w = codes((m, rows)).at[0].set(-128), codes((rows, columns), seed=1).at[:, 0].set(-128)
    of_x, of_w = positive(m), positive(columns, seed=1)
    sums = whole(x) @ whole(w)
    expected = sums * np.asarray(of_x, np.float64)[:, None] * np.asarray(of_w, np.float64)
    added = ()
    if terms:
        added = positive(columns, seed=2), positive((m, columns), seed=3).astype(dtype)
        expected = expected + np.asarray(added[0]) + np.asarray(added[1], np.float64)
    run = functools.partial(gpu.int8_matmul, dtype=jnp.dtype(dtype), splits=splits, simulate=True)
    y = np.asarray(jax.jit(run)(x, w, of_x, of_w, *added), np.float64)
    rounding = 2.0**-22 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(y, expected, atol=rounding * np.max(np.abs(expected)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "coding", "rows", "splits"), [(3, "signed", 300, 2), (8, "bipolar", 200, 1)]
)
def test_the_bit_planes_kernel_is_exact_in_the_simulator(bits, coding, rows, splits):
    stored = np.random.default_rng(bits).integers(0, 2**bits, (rows, 60))
    values = {
        "signed": stored - 2**bits * (stored >> (bits - 1)),
        "bipolar": 2 * stored - (2**bits - 1),
    }
    x, planes = codes((5, rows)), pack_planes(jnp.asarray(stored), bits)
    run = functools.partial(planes_gpu.matmul, coding=coding, splits=splits, simulate=True)
    np.testing.assert_array_equal(jax.jit(run)(x, planes), whole(x) @ values[coding])


def held(thread, upper, k16):
    """Column and rows, of 16 `k16`, of a register of an 8-bit operand of 64 columns as NVIDIA has
    it, but that a thread's two columns are neighbours (`gpu_operand.paired`).
    """
    warp, lane = divmod(thread, 32)
    return 16 * warp + 2 * (lane // 4) + upper, 16 * k16 + 4 * (lane % 4) + np.arange(4)


def test_the_transposing_load_brings_each_thread_the_bytes_of_its_columns():
    """By what NVIDIA says of `ldmatrix.trans` and `prmt`, of all threads of both warpgroups."""
    matrix = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    k, column = np.meshgrid(np.arange(128), np.arange(128), indexing="ij")
    shared = np.zeros(128 * 128, np.uint8)
    shared[128 * k + (column ^ (16 * (k % 8)))] = matrix  # the swizzle of 128 bytes
    for warp, depth in np.ndindex(8, 4):
        rows = [place(32 * warp + lane) + 4096 * depth for lane in range(32)]
        banks = np.asarray(rows).reshape(4, 8) % 128
        assert all(len(set(tile)) == 8 for tile in banks)  # a tile is read at once
        tiles = [
            [shared[row : row + 16].view(np.uint16) for row in rows[8 * i :][:8]] for i in range(4)
        ]
        for lane, half, upper in np.ndindex(32, 2, 2):
            pair = [
                np.asarray([tile[2 * (lane % 4) + one][lane // 4] for one in range(2)]).view(
                    np.uint8
                )
                for tile in tiles[2 * half : 2 * half + 2]
            ]
            chosen = selector(32 * warp + lane, upper)
            found = [np.concatenate(pair)[(chosen >> (4 * i)) & 7] for i in range(4)]
            n, rows_of = held(32 * warp + lane, upper, 2 * depth + half)
            np.testing.assert_array_equal(found, matrix[rows_of, n])


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_planes_become_the_codes_that_a_tensor_core_takes_of_each_thread(bits):
    stored = np.random.default_rng(bits).integers(0, 2**bits, (256, 128))
    planes = np.asarray(pack_planes(jnp.asarray(stored), bits))
    order = np.asarray(by_bytes(jnp.arange(256)[None]))[0]
    for thread in (0, 1, 6, 37, 127, 200):
        for half, upper, shift in np.ndindex(2, 2, 8):
            at = planes_gpu.place(thread, half) // 4 + upper
            words = [plane.reshape(-1)[at] for plane in planes]
            found = np.asarray([planes_gpu.four_codes(words, shift)]).view(np.uint8)
            column, rows = held(thread, upper, 2 * shift + half)
            np.testing.assert_array_equal(found, stored[order[rows], column])


def lowered(run, *shapes):
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)(*shapes)
    return exported.mlir_module().count("@mosaic_gpu_v2")


def shaped(*pairs):
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs)


INT8_SHAPES = {
    "decode": shaped(((16, 4096), "int8"), ((4096, 512), "int8"), ((16,), "float32")),
    "prefill": shaped(((300, 1000), "int8"), ((1000, 144), "int8"), ((300,), "float32")),
}


@pytest.mark.parametrize("name", INT8_SHAPES)
def test_the_8_bit_kernel_lowers_for_cuda_without_a_gpu(name):
    x, w, of_x = INT8_SHAPES[name]
    (scales,) = shaped(((w.shape[1],), "float32"))
    (addend,) = shaped(((x.shape[0], w.shape[1]), "bfloat16"))
    run = functools.partial(gpu.int8_matmul, dtype=jnp.dtype("bfloat16"))
    assert lowered(run, x, w, of_x, scales, scales, addend) == 1


@pytest.mark.parametrize("bits", [2, 8])
def test_the_bit_planes_kernel_lowers_for_cuda_without_a_gpu(bits):
    shapes = shaped(((20, 1000), "int8"), ((bits, 32, 260), "uint32"))
    assert lowered(functools.partial(planes_gpu.matmul, coding="signed"), *shapes) == 1


@on_a_described_gpu
@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (4096, "float32")])
def test_the_8_bit_product_of_activations_is_one_kernel_that_fits(m, dtype):
    shapes = shaped(((m, 4096), dtype), ((4096, 4096), "int8"), ((4096,), "float32"))
    addend = shaped(((m, 4096), dtype))

    def layer(x, w, scales, addend):
        return int8_matmul(x, w, scales, bias=scales, addend=addend)

    compiled = compile_and_fit(layer, (*shapes, *addend), kernels=1)
    assert compiled.temp_bytes < 2 * m * 4096 + 2**20  # codes and sums, no matrix
    assert compiled.registers[0] <= 168


@on_a_described_gpu
@pytest.mark.parametrize(("m", "dtype", "bits"), [(1, "int8", 2), (512, "uint8", 8)])
def test_the_product_with_planes_is_one_kernel_that_keeps_no_codes(m, dtype, bits):
    shapes = shaped(((m, 4096), dtype), ((bits, 128, 11008), "uint32"))
    run = functools.partial(bit_planes_matmul, coding="signed")
    compiled = compile_and_fit(run, shapes, kernels=1)
    assert compiled.temp_bytes < 4096 * 11008 // 2 + 12 * m * 11008


@on_a_described_gpu
@pytest.mark.parametrize(
    ("m", "transposed", "kernels"), [(8, False, 1), (200, False, 0), (8, True, 0)]
)
def test_packed_codes_meet_their_kernel_where_it_serves_and_else_xla(m, transposed, kernels):
    columns, rows = 512, 1024
    x = ((m, columns if transposed else rows), "bfloat16")
    shapes = shaped(x, ((rows // 8, columns), "uint32"), ((rows // 128, columns), "float32"))
    options = {"bits": 4, "group": 128, "transposed": transposed}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_and_fit(functools.partial(quantized_matmul, **options), shapes, kernels=kernels)


@on_a_described_gpu
def test_few_dense_rows_are_left_to_xla_which_copies_no_matrix():
    assert routes.default_route(8, "bfloat16", "gpu") == "library"
    shapes = shaped(((8, 1024), "bfloat16"), ((1024, 4096), "bfloat16"))
    compiled = compile_and_fit(flat_gemm, shapes, kernels=0)
    assert len(re.findall(r"%gemm_fusion\S* = |cublas", compiled.text)) >= 1
    assert compiled.temp_bytes < 1024 * 4096


@on_a_described_gpu
def test_a_matrix_split_over_gpus_is_multiplied_by_the_kernel_of_each():
    mesh = described_mesh("h200", {"model": 2})
    shapes = shaped(((8, 512), "bfloat16"), ((512, 512), "int8"), ((512,), "float32"))
    specs = (P(), P(None, "model"), P("model"))
    run = jax.shard_map(int8_matmul, mesh=mesh, in_specs=specs, out_specs=P(None, "model"))
    compile_and_fit(run, shapes, kernels=1, name="h200", specs=specs, mesh=mesh)


def test_parts_and_slots_fill_a_gpu():
    h100 = GPUS["h100"]
    assert gpu_product.splits_for(112, 32, h100.processors) == 1
    assert gpu_product.splits_for(32, 32, h100.processors) == 4
    assert gpu_product.splits_for(1, 2, h100.processors) == 1
    sizes = {"rows": 256, "slots": 4, "steps": 32, "splits": 1, "dtype": "bfloat16"}
    flags = dict.fromkeys(("scaled", "bias", "addend", "simulate"), False)
    call = gpu_product.Call(gpu.Bytes(), m=9000, columns=1000, **sizes, **flags)
    assert call.grid == (1, 3, 8, 12)  # 36 blocks of rows in three bands
    assert call.ends == (36 * 256 - 9000, 24)
    for m in (1, 7, 33, 100, 190, 5000):
        rows = gpu_product.block_rows(m)
        assert rows in (8, 64, 128, 192, 256) if rows > 48 else rows % 8 == 0
        for form in (gpu.Bytes(), planes_gpu.Planes(8, True)):
            slots = gpu_product.slots_for(form, rows, 4, h100)
            assert 2 <= slots <= gpu_product.MOST_SLOTS


def test_what_the_kernels_do_not_take_is_said():
    x, w = codes((4, 64)), codes((64, 32))
    kind = jnp.dtype("bfloat16")
    assert gpu.unsupported(x, w, kind) is None
    assert "sixteens; there are 30" in str(gpu.unsupported(x, w[:, :30], kind))
    assert "result is int32" in str(gpu.unsupported(x, w, jnp.dtype("int32")))
    assert "empty" in str(gpu.unsupported(x[:0], w, kind))
    planes = jnp.zeros((2, 8, 30), jnp.uint32)
    assert "fours; there are 30" in str(planes_gpu.unsupported(x, planes))
    from kernels_pallas.bit_planes import api as planes_api
    from kernels_pallas.int8_matmul import api

    a100 = Target("gpu", "NVIDIA A100-SXM4-40GB", None)
    for operation in (api.PRODUCT, planes_api.OPERATION):
        assert "A100" in str(operation.obstacles["gpu"](a100, {}, {}))
