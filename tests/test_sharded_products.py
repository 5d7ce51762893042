"""Products with weight formats on a mesh: in parts where these make up the whole, by kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_aot import REASON, compile_and_fit
from weight_formats import adapted, matrix

from kernels_pallas.tpu_topology import described_mesh
from model import ModelConfig, Runtime, forward, init
from sharding import MeshConfig, make_layout, make_mesh, split_linear
from sharding.mesh import AXES
from weights import (
    ActQuant,
    Int8,
    Outlier,
    Permuted,
    flatten,
    from_flat,
    grouped,
    int8,
    linear,
    low_rank_bank,
    normal_float,
    stack,
)

COLUMNS, ROWS = ("d_model", "d_ff"), ("d_ff", "d_model")
GROUPED = functools.partial(grouped.quantize, bits=8, group=32)


def found_in_calls(w):
    coded = int8.quantize(w, act=ActQuant())
    return Int8(coded.q, coded.scale, coded.act, Outlier(threshold=2.0, capacity=4))


def bank(w):
    """Each row of the batch takes another adapter, or none."""
    base = GROUPED(w)
    held = low_rank_bank.join(base, [adapted(base), adapted(base, 5)])
    return low_rank_bank.choose(held, jnp.asarray([[1], [0], [2], [1]]))


FORMATS = {
    "grouped": (GROUPED, True, True),
    "one group": (lambda w: grouped.quantize(w, 8, -1), True, False),
    "nf4": (lambda w: normal_float.quantize(w, 32, double=True), True, True),
    "int8": (int8.quantize, True, True),
    "coded inputs": (lambda w: int8.quantize(w, act=ActQuant()), True, False),
    "outliers": (
        lambda w: int8.quantize(w, act=ActQuant(), outliers=jnp.asarray([3, 9])),
        True,
        False,
    ),
    "one range": (lambda w: int8.quantize(w, act=ActQuant(mode="tensor")), False, False),
    "outliers of a call": (found_in_calls, False, False),
    "permuted": (lambda w: Permuted(GROUPED(w), jnp.arange(256)[::-1]), True, False),
    "qlora": (lambda w: adapted(normal_float.quantize(w, 32)), True, True),
    "bank": (bank, True, True),
}


@pytest.mark.parametrize("axes", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("name", FORMATS)
def test_parts_make_up_the_product_and_its_gradient(name, axes):
    make, by_row, by_input = FORMATS[name]
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    params = {"kernel": make(matrix(256, 64)), "bias": jnp.arange(64.0)}
    x = jax.random.normal(jax.random.key(0), (4, 3, 256))
    cotangent = jax.random.normal(jax.random.key(1), (4, 3, 64))

    def run(multiply, x):
        y, pull = jax.vjp(multiply, x)
        return y, pull(cotangent)[0]

    def split(x):
        return split_linear(params, x, axes, layout)

    expected = jax.jit(functools.partial(run, lambda x: linear(params, x)))(x)
    found = jax.jit(functools.partial(run, split))(x)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    in_parts = "shard_map" in str(jax.make_jaxpr(split)(x))
    assert in_parts == (by_row if axes == COLUMNS else by_input)
    odd = str(jax.make_jaxpr(split)(x[:1]))  # one row of a batch does not divide
    assert "shard_map" not in odd


def test_adapters_train_as_on_one_device():
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    weight = adapted(GROUPED(matrix(256, 64)))
    x = jax.random.normal(jax.random.key(0), (4, 3, 256))

    def loss(multiply, a, b):
        kernel = type(weight)(weight.base, a, b, weight.scale)
        return jnp.sum(jnp.square(multiply({"kernel": kernel}, x)))

    for axes in (COLUMNS, ROWS):
        multiply = functools.partial(split_linear, axes=axes, layout=layout)
        gradients = (
            jax.jit(jax.grad(functools.partial(loss, each), argnums=(0, 1)))(weight.a, weight.b)
            for each in (multiply, linear)
        )
        for ours, expected in zip(*gradients, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.tpu_aot
@pytest.mark.skipif(REASON is not None, reason=REASON or "libtpu compiles here")
def test_a_model_on_a_mesh_of_tpus_multiplies_by_kernels():
    config = ModelConfig(
        vocab_size=256, d_model=512, num_layers=1, num_heads=4, d_ff=1024, tied_embeddings=True
    )

    def model(key):
        flat = flatten(init(config, key, jnp.bfloat16))
        for path, leaf in flat.items():
            if path.endswith("/kernel"):
                flat[path] = stack([grouped.quantize(leaf[0], 4, 128)])
        return from_flat(flat)

    params = jax.eval_shape(model, jax.random.key(0))
    mesh = described_mesh("v5e", {axis: {"data": 2, "tensor": 2}.get(axis, 1) for axis in AXES})
    runtime = Runtime("bfloat16", layout=make_layout(mesh))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    run = lambda params, tokens: forward(params, tokens, config, runtime)[0]  # noqa: E731
    compiled = compile_and_fit(run, (params, tokens), "v5e", mesh=mesh)
    assert len(compiled.vmem_bytes) >= 7  # query, key, value, output, gate, up and down
