"""The quantized product compiled for every TPU generation, alone and inside shard_map."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from tpu_aot import NAMES, REASON, compile_and_fit, on_every_generation

from kernels_pallas.bit_planes import bit_planes_matmul
from kernels_pallas.int8_matmul import int8_matmul, quantize_rows
from kernels_pallas.quantized_matmul import SHAPES, cost, packed_rows, quantized_matmul
from kernels_pallas.tpu_topology import described_mesh

needs_libtpu = pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")


def arrays(rows, columns, bits, group, *, zeros=False, table=False, form="packed"):
    groups = rows // (group or rows)
    kind = jax.ShapeDtypeStruct
    made = {"scales": kind((groups, columns), jnp.float32)}
    if form == "packed":
        made["codes"] = kind((packed_rows(rows, bits), columns), jnp.uint32)
    else:
        made["codes"] = kind((rows, columns), jnp.int8)
    if zeros:
        made["zeros"] = kind((groups, columns), jnp.float32)
    if table:
        made["table"] = kind((2**bits,), jnp.float32)
    return made


def x_of(m, rows):
    return jax.ShapeDtypeStruct((m, rows), jnp.bfloat16)


@on_every_generation
@pytest.mark.parametrize("name", ["llama3_8b_query_int4", "llama3_8b_up_int3", "llama3_8b_up_nf4"])
def test_decoding_reads_the_packed_codes_once_and_keeps_no_matrix(name, generation):
    shape = SHAPES[name]
    made = arrays(
        shape.rows, shape.columns, shape.bits, shape.group, zeros=shape.zeros, table=shape.table
    )
    product = functools.partial(quantized_matmul, bits=shape.bits, group=shape.group)
    compiled = compile_and_fit(
        lambda x, made: product(x, **made), (x_of(shape.m, shape.rows), made), generation, kernels=1
    )
    assert compiled.temp_bytes < 2**20
    _, moved = cost(
        shape.m, shape.rows, shape.columns, bits=shape.bits, group=shape.group, zeros=shape.zeros
    )
    assert compiled.argument_bytes + compiled.output_bytes == pytest.approx(moved, rel=0.05)


@on_every_generation
def test_a_training_step_of_adapters_compiles_over_frozen_codes(generation):
    made = arrays(1024, 1280, 4, 64, table=True)

    def loss(x, made):
        return jnp.sum(quantized_matmul(x, bits=4, group=64, **made).astype(jnp.float32) ** 2)

    compiled = compile_and_fit(jax.grad(loss), (x_of(64, 1024), made), generation, kernels=2)
    assert compiled.temp_bytes < 1024 * 1280 * 4


@pytest.mark.tpu_aot
@needs_libtpu
def test_the_gradient_of_many_rows_fits_the_smallest_vector_memory():
    """Its block of the result is in float32."""
    made = arrays(4096, 1024, 4, 64, table=True)
    dy = x_of(2048, 1024)
    product = functools.partial(quantized_matmul, bits=4, group=64, transposed=True)
    compile_and_fit(lambda dy, made: product(dy, **made), (dy, made), "v4", kernels=1)


@on_every_generation
def test_scales_and_zeros_in_float16_are_taken(generation):
    made = arrays(512, 256, 4, 128, zeros=True)
    for name in ("scales", "zeros"):
        made[name] = jax.ShapeDtypeStruct(made[name].shape, jnp.float16)
    product = functools.partial(quantized_matmul, bits=4, group=128)

    def step(x, made):
        y, pull = jax.vjp(lambda x: product(x, **made), x)
        return y, pull(y)[0]

    compile_and_fit(step, (x_of(8, 512), made), generation, kernels=2)


@on_every_generation
def test_grouped_int8_has_a_kernel_and_per_column_int8_is_left_to_xla(generation):
    for group, kernels in ((128, 0 if generation == "v4" else 1), (None, 0)):
        made = arrays(1024, 512, 8, group, form="int8")
        compile_and_fit(
            lambda x, made, group=group: quantized_matmul(x, group=group, **made),
            (x_of(8, 1024), made),
            generation,
            kernels=kernels,
        )


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
    ("split", "generation"), [*(("rows", name) for name in NAMES), ("columns", "v5e")]
)
def test_matrices_may_be_split_over_a_mesh(split, generation):
    mesh = described_mesh(generation, {"tensor": 2})
    made = arrays(2048, 512, 4, 128, zeros=True)
    whole = P("tensor", None) if split == "rows" else P(None, "tensor")
    x_spec, y_spec = (P(None, "tensor"), P()) if split == "rows" else (P(), P(None, "tensor"))

    def product(x, made):
        y = quantized_matmul(x, bits=4, group=128, **made)
        return jax.lax.psum(y, "tensor") if split == "rows" else y

    specs = (x_spec, dict.fromkeys(made, whole))
    mapped = jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=y_spec)

    def step(x, made):
        y, pull = jax.vjp(lambda x: mapped(x, made), x)
        return y, pull(y)[0]

    compiled = compile_and_fit(
        step, (x_of(8, 2048), made), generation, kernels=2, mesh=mesh, specs=(x_spec, whole)
    )
    assert compiled.temp_bytes < 2**20


@on_every_generation
def test_integer_kernels_compile_inside_shard_map(generation):
    """Columns over two devices: the row quantizer, its product, and that with bit planes."""
    mesh, columns = described_mesh(generation, {"tensor": 2}), P(None, "tensor")
    kind = jax.ShapeDtypeStruct
    shapes = (
        x_of(32, 2048),
        kind((2048, 512), jnp.int8),
        kind((512,), jnp.float32),
        kind((2, 64, 512), jnp.uint32),
    )
    specs = (P(), columns, P("tensor"), P(None, None, "tensor"))

    def run(x, codes, scales, planes):
        rows, x_scales, _ = quantize_rows(x)
        y = int8_matmul(rows, codes, scales, x_scales, implementation="tpu")
        return y, bit_planes_matmul(rows, planes, coding="signed")

    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(columns, columns))
    compile_and_fit(split, shapes, generation, kernels=3, mesh=mesh, specs=specs)


@pytest.mark.tpu_aot
@needs_libtpu
def test_a_product_that_the_compiler_splits_itself_runs_plainly():
    mesh = described_mesh("v5e", {"tensor": 2})
    made, columns = arrays(256, 512, 4, 64), P(None, "tensor")

    def compiled():
        return compile_and_fit(
            lambda x, made: quantized_matmul(x, bits=4, group=64, **made),
            (x_of(8, 256), made),
            "v5e",
            kernels=0,
            mesh=mesh,
            specs=(P(), columns),
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled()
    assert all("shard_map" in str(warning.message) for warning in caught)


@on_every_generation
def test_what_no_kernel_takes_runs_plainly_with_one_warning(generation):
    made = arrays(256, 128, 4, 64)

    def lower():
        halves = jax.ShapeDtypeStruct((4, 256), jnp.float16)
        mesh = described_mesh(generation)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.make_jaxpr(lambda x, m: quantized_matmul(x, bits=4, group=64, **m))(
                halves, made
            )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "pallas_call" not in str(lower())
        lower()
    assert len(caught) <= 1  # the first generation of this process says it for all
    assert all("float16" in str(warning.message) for warning in caught)
