"""The TPU kernels of attention compiled for every generation, without a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from tpu_aot import REASON, compile_and_fit, on_every_generation

from kernels_pallas.attention import attention
from kernels_pallas.tpu_topology import described_mesh
from sharding import check_heads, context_attention, make_layout
from sharding.mesh import AXES

needs_libtpu = pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")


def shapes(batch, length, heads, kv_heads, dim, dtype=jnp.bfloat16):
    """q, k, v, positions, segment ids and a cotangent."""
    q, k, tokens = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((batch, length, heads, dim), dtype),
            ((batch, length, kv_heads, dim), dtype),
            ((batch, length), jnp.int32),
        )
    )
    return q, k, k, tokens, tokens, q


def gradients(attend, q, k, v, positions, segments, cotangent, **options):
    where = {"query_positions": positions, "key_positions": positions}
    where |= {"query_segment_ids": segments, "key_segment_ids": segments}
    return jax.vjp(lambda q, k, v: attend(q, k, v, **where, **options), q, k, v)[1](cotangent)


@on_every_generation
def test_packed_training_compiles_inside_shard_map(generation):
    mesh = described_mesh(generation, {"data": 2, "tensor": 2})
    heads, rows = P("data", None, "tensor"), P("data")
    specs = (heads, heads, heads, rows, rows, heads)
    run = functools.partial(gradients, attention)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    compiled = compile_and_fit(
        split, shapes(4, 4096, 16, 4, 128), generation, kernels=2, mesh=mesh, specs=specs
    )
    assert "all-gather" not in compiled.text
    assert compiled.temp_bytes < 4 * compiled.argument_bytes  # no array of queries times keys


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("generation", ["v4", "7x"])
def test_everything_at_once_compiles(generation):
    """For the smallest vector memory, and the newest matrix unit."""
    slopes = jax.ShapeDtypeStruct((6,), jnp.float32)

    def run(slopes, *arrays):
        def attend(q, k, v, **options):
            out, lse = attention(q, k, v, return_lse=True, alibi_slopes=slopes, **options)
            return out + jnp.exp(lse)[..., None].astype(out.dtype)

        return gradients(attend, *arrays, window=1000, sinks=4, soft_cap=30.0)

    compile_and_fit(run, (slopes, *shapes(2, 1500, 6, 2, 96)), generation, kernels=2)


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [(8, 1, 64, jnp.bfloat16), (4, 4, 256, jnp.float32)],
    ids=["64", "256-float32"],
)
def test_head_dims_compile_for_the_smallest_vector_memory(heads, kv_heads, dim, dtype):
    run = functools.partial(gradients, attention)
    compile_and_fit(run, shapes(1, 4096, heads, kv_heads, dim, dtype), "v4", kernels=2)


@pytest.mark.tpu_aot
@needs_libtpu
def test_a_program_that_the_compiler_partitions_gets_no_kernel_and_one_warning():
    spec = P("data", None, "tensor")
    specs = (spec, spec, spec, P("data"), P("data"), spec)
    with pytest.warns(UserWarning, match="the compiler partitions this program"):
        compiled = compile_and_fit(
            functools.partial(gradients, attention),
            shapes(2, 1024, 8, 4, 64),
            "v5e",
            kernels=0,
            axes={"data": 2, "tensor": 2},
            specs=specs,
        )
    assert "all-gather" not in compiled.text


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
    ("axes", "kv_heads"),
    [({"fsdp": 2, "tensor": 2}, 1), ({"context": 4}, 2)],
    ids=["heads", "ring"],
)
def test_a_model_on_a_mesh_of_tpus_runs_kernels_on_its_own_part(axes, kv_heads):
    mesh = described_mesh("v5e", {axis: axes.get(axis, 1) for axis in AXES})
    layout = check_heads(make_layout(mesh), 8, kv_heads)
    attend = functools.partial(context_attention, attention, layout=layout)
    run = functools.partial(gradients, attend)
    compiled = compile_and_fit(run, shapes(2, 2048, 8, kv_heads, 128), "v5e", mesh=mesh)
    assert compiled.vmem_bytes
