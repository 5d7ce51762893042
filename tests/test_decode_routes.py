"""Decoding steps reach the decode kernel where there is one, whatever the padding, window or mesh,
and give what a full forward pass gives; on a CPU they cost what attention costs.

A program traced for a TPU and compiled for a CPU makes the TPU's choices and runs the definitions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tpu_aot import REASON

from kernels_pallas.tpu_topology import compile_for, described_mesh
from model import ModelConfig, Runtime, abstract, forward, hidden_states, init_cache
from model.caches.attend import AXES, decode
from sharding import Layout, MeshConfig, constrain, make_mesh

CONFIG = ModelConfig(vocab_size=37, d_model=16, num_layers=2, num_heads=4, kv_heads=2, d_ff=24)
MIXED = dataclasses.replace(CONFIG, layer_overrides=((1, "sliding_window", 4),))
SCORED = dataclasses.replace(
    CONFIG, positions="alibi", sliding_window=4, attention_soft_cap=2.0, kv_heads=1
)
STEPS = (4, 1, 1) * 4
ROWS, LENGTH = 3, sum(STEPS)
TOKENS = np.random.default_rng(0).integers(0, 37, (ROWS, LENGTH)).astype(np.int32)
pytestmark = pytest.mark.filterwarnings(
    "ignore:decode_attention.*traced for tpu and is compiled for cpu"
)

apply = jax.jit(forward, static_argnames=("config", "runtime"))


def traced_for_a_tpu():
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


def decoded(config, cache, real=None):
    """Logits of a cache's steps, `[rows, length, vocab]`; `real` marks what is no padding."""
    start, parts = 0, []
    for step in STEPS:
        piece = slice(start, start + step)
        segment_ids = None if real is None else real[:, piece].astype(np.int32)
        logits, aux = apply(
            params_of(config), TOKENS[:, piece], config, cache=cache, segment_ids=segment_ids
        )
        cache, start = aux["cache"], start + step
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.7]))
def test_steps_with_padding_anywhere_equal_the_full_forward_pass(seed, share):
    real = np.random.default_rng(seed).random((ROWS, LENGTH)) >= share
    with traced_for_a_tpu():
        found = decoded(MIXED, init_cache(MIXED, ROWS, LENGTH, chunk=4), real)
    rows = np.zeros_like(TOKENS)
    for row in range(ROWS):
        rows[row, : real[row].sum()] = TOKENS[row, real[row]]
    full = apply(params_of(MIXED), rows, MIXED)[0]
    for row in range(ROWS):
        expected = full[row, : real[row].sum()]
        np.testing.assert_allclose(found[row, real[row]], expected, atol=5e-5)


def test_several_queries_and_a_ring_that_wraps_around():
    with traced_for_a_tpu():
        cache = init_cache(SCORED, ROWS, LENGTH, chunk=4, kind="rolling")
        assert cache.segments["000-002"].keys.shape[3] == 16 < LENGTH
        found = decoded(SCORED, cache)
    np.testing.assert_allclose(found, apply(params_of(SCORED), TOKENS, SCORED)[0], atol=5e-5)


@pytest.mark.parametrize(
    ("queries", "padded", "compute", "stored", "attention", "kernels"),
    [
        (1, False, "float32", "float32", None, 1),
        (1, True, "float32", "float32", None, 1),
        (4, False, "bfloat16", "bfloat16", None, 1),
        (4, False, "bfloat16", "float32", "tpu", 1),
        (4, True, "float32", "float32", None, 0),
        (1, True, "float32", "bfloat16", None, 0),
        (1, False, "float32", "float32", "plain", 0),
        (32, False, "float32", "float32", "plain", 0),
    ],
)
def test_few_queries_in_order_take_the_decode_kernel(
    queries, padded, compute, stored, attention, kernels
):
    runtime = Runtime(compute_dtype=compute, attention=attention)
    tokens = jnp.zeros((2, queries), jnp.int32)

    def step(params, cache):
        ids = jnp.ones_like(tokens) if padded else None
        return forward(params, tokens, CONFIG, runtime, cache=cache, segment_ids=ids)[0]

    with traced_for_a_tpu():
        cache = init_cache(CONFIG, 2, 64, dtype=stored)
        made = str(jax.make_jaxpr(step)(params_of(CONFIG), cache))
    assert made.count("kernel_or_plain[") == kernels


def test_a_step_on_a_cpu_is_the_plain_one():
    tokens, cache = jnp.zeros((2, 1), jnp.int32), init_cache(MIXED, 2, 64)
    programs = [
        apply.lower(params_of(MIXED), tokens, MIXED, Runtime(attention=name), cache=cache).as_text()
        for name in (None, "plain")
    ]
    assert programs[0] == programs[1]


def test_the_gradient_of_a_step_is_that_of_the_plain_one():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 2, 4, 8)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, 3, 2, 2, 16, 8)), jnp.float32)

    def loss(q, keys, values):
        return jnp.sum(decode(q, keys, values, jnp.asarray([2, 9]), layer=1) ** 2)

    with traced_for_a_tpu():
        assert "kernel_or_plain[" in str(jax.make_jaxpr(loss)(q, keys, values))
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, keys, values)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, keys, values)
    for mine, plain in zip(found, expected, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(mine, plain, atol=1e-5)


@pytest.mark.parametrize(("rows", "kv_heads"), [(4, 2), (4, 1), (3, 2)])
def test_decoding_on_a_mesh_equals_decoding_on_one_device(rows, kv_heads):
    """Rows over data, heads over tensor; what does not divide is whole on each device."""
    layout = Layout(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4]))
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(rows, 2, 4, 8)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, 3, rows, kv_heads, 16, 8)), jnp.float32)
    lengths = jnp.asarray([2, 16, 7, 11][:rows], jnp.int32)
    options = {"alibi_slopes": jnp.asarray([0.1, 0.2, 0.3, 0.4]), "window": 5, "return_lse": True}

    def run(layout):
        call = functools.partial(decode, layer=1, layout=layout, **options)
        return jax.jit(call)(q, keys, values, lengths)

    for split, whole in zip(run(layout), run(None), strict=True):
        np.testing.assert_allclose(split, whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")
@pytest.mark.parametrize("sizes", [None, {"data": 2, "tensor": 2}], ids=["device", "mesh"])
def test_a_step_on_a_tpu_holds_the_kernel_and_one_cache(sizes):
    """One kernel a segment; the cache is neither copied nor gathered."""
    mesh = described_mesh("v5e", sizes)
    layout = None if sizes is None else Layout(mesh)
    config = dataclasses.replace(MIXED, d_model=128, head_dim=128)
    runtime = Runtime(compute_dtype="bfloat16", layout=layout)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        cache = jax.eval_shape(lambda: init_cache(config, 4, 4096, chunk=1, dtype="bfloat16"))

    def step(params, tokens, cache):
        split = jax.tree.map(lambda x: constrain(x, AXES, layout), cache.segments)
        cache = dataclasses.replace(cache, segments=split)
        hidden, aux = hidden_states(params, tokens, config, runtime, cache=cache)
        return hidden, aux["cache"]

    tokens = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    compiled = compile_for(step, (abstract(config), tokens, cache), "v5e", mesh=mesh)
    assert len(compiled.vmem_bytes) == 2
    assert "all-gather" not in compiled.text
    assert compiled.temp_bytes < cache.segments["000-001"].keys.size * 2 / 4
