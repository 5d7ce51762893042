"""The GPU kernels of attention without a GPU: in Pallas' simulator against the plain function, and
lowered for CUDA; and cuDNN's function where it means the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas.attention import attention, cudnn, flash, reference
from kernels_pallas.attention.gpu import Hopper, obstacle
from kernels_pallas.target import Target

EVERYTHING = {"window": 90, "sinks": 4, "soft_cap": 30.0}
H100 = Target("gpu", "NVIDIA H100 80GB HBM3", None)


def gradients(attend, q, k, v, slopes, where, cotangents, options):
    def function(q, k, v, slopes):
        return attend(q, k, v, alibi_slopes=slopes, return_lse=True, **where, **options)

    results, pull = jax.vjp(function, q, k, v, slopes)
    return results, pull(cotangents)


def arguments(length, heads, kv_heads, dim, alibi):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float16)  # noqa: E731
    q, cotangent = normal(1, length, heads, dim), normal(1, length, heads, dim)
    k, v = normal(1, length, kv_heads, dim), normal(1, length, kv_heads, dim)
    positions = np.arange(length, dtype=np.int32)[None]
    segments = np.repeat([1, 2, 0], [length - 50, 40, 10])[None].astype(np.int32)
    where = {"query_positions": positions, "key_positions": positions}
    where |= {"query_segment_ids": segments, "key_segment_ids": segments}
    slopes = jnp.asarray(rng.uniform(0.01, 0.1, heads), jnp.float32) if alibi else None
    return q, k, v, slopes, where, (cotangent, normal(1, length, heads).astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "dim", "alibi", "options"),
    [(128, 64, False, {}), (140, 40, True, EVERYTHING)],
    ids=["causal", "everything"],
)
def test_the_hopper_kernels_compute_the_plain_function_in_the_simulator(
    length, dim, alibi, options
):
    arrays = arguments(length, 2 if alibi else 1, 1, dim, alibi)
    kernel = functools.partial(flash.attention, Hopper(simulate=True))
    run = functools.partial(gradients, options=options)
    found = jax.jit(functools.partial(run, kernel))(*arrays)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, arrays)
    expected = jax.jit(functools.partial(run, reference.attention))(*exact)
    for mine, truth in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        finite = jnp.isfinite(truth)
        np.testing.assert_array_equal(jnp.isfinite(mine), finite)
        scale = float(jnp.max(jnp.abs(jnp.where(finite, truth, 0))))
        np.testing.assert_allclose(
            jnp.where(finite, mine, 0), jnp.where(finite, truth, 0), atol=2e-3 * max(scale, 1)
        )


@pytest.mark.parametrize(
    ("dim", "kernels", "options"), [(64, 3, EVERYTHING), (128, 3, {}), (256, 1, EVERYTHING)]
)
def test_the_hopper_kernels_lower_for_cuda_without_a_gpu(dim, kernels, options):
    alibi = bool(options)
    arrays = jax.eval_shape(lambda: arguments(500, 4, 2, dim, alibi))
    run = functools.partial(
        gradients, functools.partial(flash.attention, Hopper()), options=options
    )
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)(*arrays)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == kernels


def test_what_the_hopper_kernels_do_not_take_is_said():
    q = jax.ShapeDtypeStruct((1, 64, 4, 128), jnp.bfloat16)
    assert obstacle(H100, q, q, q) is None
    assert "A100" in str(obstacle(Target("gpu", "NVIDIA A100-SXM4-40GB", None), q, q, q))
    wide = jax.ShapeDtypeStruct((1, 64, 4, 320), jnp.bfloat16)
    assert "exceed 256" in str(obstacle(H100, wide, wide, wide))
    exact = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    assert "float32" in str(obstacle(H100, exact, exact, exact))


@pytest.mark.parametrize("order", ["in order", "padded", "packed", "shuffled"])
def test_the_library_serves_only_where_it_means_the_same(order):
    q, k, v, _, where, _ = arguments(128, 4, 2, 16, False)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    if order != "padded":
        ids = np.repeat([1, 2 if order == "packed" else 1], 64)[None].astype(np.int32)
        where |= {"query_segment_ids": ids, "key_segment_ids": ids}
    if order == "shuffled":
        moved = np.random.default_rng(1).permutation(128)[None].astype(np.int32)
        where |= {"query_positions": moved, "key_positions": moved}
    options = where | {"window": 20, "scale": 0.3}
    taken = bool(cudnn._in_order(options, True))
    assert taken == (order == "in order")
    out = jax.jit(functools.partial(cudnn.attention, library="xla", **options))(q, k, v)
    np.testing.assert_allclose(
        out.astype(jnp.float32),
        reference.attention(q, k, v, **options).astype(jnp.float32),
        atol=4e-2,
    )


def test_what_the_library_lacks_is_an_error_by_name():
    q, k, v, _, where, _ = arguments(64, 4, 2, 16, False)
    with pytest.raises(ValueError, match="'cudnn': it has no soft_cap"):
        attention(q, k, v, **where, soft_cap=2.0, implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn': 32 queries and 64 keys"):
        cudnn.attention(q[:, :32], k, v, **where)
