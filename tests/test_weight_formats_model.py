"""A decoder whose kernels are weight formats: it runs, generates, trains what is real, is split
over a mesh and comes back from its folder.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from weight_formats import make

import weights
from model import ModelConfig, Runtime, forward, generate, init, rules
from model.checkpoint import load, save
from sharding import MeshConfig, make_layout, make_mesh, partition
from weights import flatten, from_flat, grouped, int8

CONFIG = ModelConfig(
    vocab_size=128,
    d_model=64,
    num_layers=2,
    num_heads=4,
    kv_heads=2,
    d_ff=128,
    max_length=64,
    tied_embeddings=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 128, (4, 12)), jnp.int32)
KERNELS = ("int4", "int8_outliers", "qlora", "slim", "llm_int8", "spqr", "permuted")
"""Formats that the kernels take in turn, so that one model holds them all."""


def formatted(makers):
    """The params with a format for every kind of kernel, in turn, and a coded table."""
    flat = flatten(init(CONFIG, jax.random.key(0)))
    kernels = sorted({path.split("/", 2)[2] for path in flat if path.endswith("/kernel")})
    chosen = dict(zip(kernels, itertools.cycle(makers)))
    for path, leaf in flat.items():
        if path.endswith("/kernel"):
            maker = chosen[path.split("/", 2)[2]]
            flat[path] = weights.stack([maker(4 * one) for one in leaf])
    flat["embed/table"] = grouped.quantize(flat["embed/table"], 8, 32)
    return from_flat(flat)


@pytest.fixture(scope="module")
def params():
    return formatted([functools.partial(make, name) for name in KERNELS])


@pytest.fixture(scope="module")
def expected(params):
    return jax.jit(forward, static_argnums=2)(params, TOKENS, CONFIG)[0]


def test_the_formats_stand_for_the_model_that_dequantizing_gives(params, expected):
    flat = flatten(params)
    dense = from_flat({path: weights.dequantize(leaf) for path, leaf in flat.items()})
    found = jax.jit(forward, static_argnums=2)(dense, TOKENS, CONFIG)[0]
    off = np.abs(found - expected).max() / np.abs(found).max()
    assert off < 0.05  # one kind of kernel codes its input in 8 bits
    prepared = weights.map_with_path(lambda _, leaf: weights.prepare(leaf, "cpu"), params)
    ready = jax.jit(forward, static_argnums=2)(prepared, TOKENS, CONFIG)[0]
    np.testing.assert_allclose(ready, expected, rtol=1e-3, atol=1e-3)


def test_generation_reads_the_same_model_token_by_token(params):
    row = [int(token) for token in TOKENS[0, :5]]
    made = generate(params, [row], CONFIG, max_new_tokens=3).lists()[0]
    for _ in range(3):
        padded = jnp.asarray([row + [0] * (12 - len(row))], jnp.int32)
        logits = jax.jit(forward, static_argnums=2)(params, padded, CONFIG)[0]
        row.append(int(jnp.argmax(logits[0, len(row) - 1])))
    assert row[5:] == made


def test_a_saved_model_comes_back_onto_a_mesh_and_computes_the_same(params, expected, tmp_path):
    save(tmp_path / "quantized", CONFIG, params)
    whole = load(tmp_path / "quantized").params
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    layout = make_layout(make_mesh(MeshConfig(data=4, tensor=2)))
    split = load(tmp_path / "quantized", layout).params
    jax.tree.map(np.testing.assert_array_equal, split, params)
    kernel = flatten(split)["layers/000-002/attention/key/kernel"]
    assert {shard.data.shape[-1] for shard in kernel.codes.addressable_shards} == {16}
    np.testing.assert_allclose(on_mesh(split, layout), expected, rtol=2e-3, atol=2e-3)


def on_mesh(params, layout):
    run = jax.jit(forward, static_argnums=(2, 3))
    return run(params, TOKENS, CONFIG, Runtime(layout=layout))[0]


def test_groups_split_over_fsdp_and_tensor_compute_the_same():
    params = formatted([jax.jit(lambda w: grouped.quantize(w, 8, 32)), jax.jit(int8.quantize)])
    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    split = jax.device_put(params, partition(params, rules(CONFIG), layout))
    kernel = flatten(split)["layers/000-002/attention/key/kernel"]
    assert {shard.data.shape for shard in kernel.codes.addressable_shards} == {(2, 8, 16)}
    assert {shard.data.shape for shard in kernel.scale.addressable_shards} == {(2, 1, 16)}
    expected = jax.jit(forward, static_argnums=2)(params, TOKENS, CONFIG)[0]
    np.testing.assert_allclose(on_mesh(split, layout), expected, rtol=1e-4, atol=1e-4)


def test_specs_follow_the_matrix_and_splits_that_cut_a_group_are_named():
    weight = grouped.quantize(jnp.ones((64, 32)), 4, 16)
    specs = weights.specs(weight, P("fsdp", "tensor"))
    assert (specs.codes, specs.scale) == (P("fsdp", "tensor"), P("fsdp", "tensor"))
    assert specs.zero.q == P()
    one = weights.specs(grouped.quantize(jnp.ones((64, 32)), 4, -1), P("fsdp", "tensor"))
    assert one.scale == P(None, "tensor")
    wide = weights.specs(int8.quantize(jnp.ones((64, 32))), P("fsdp", "tensor"))
    assert wide.scale == P("tensor")
    flat = flatten(init(CONFIG, jax.random.key(0)))
    path = "layers/000-002/attention/query/kernel"
    flat[path] = weights.stack([grouped.quantize(one, 4, 32) for one in flat[path]])
    layout = make_layout(make_mesh(MeshConfig(data=1, fsdp=8)))
    message = rf"{path}: Grouped \[64, 64\] \(bits 4, group 32\) cannot be split into 8 .* fit: 1$"
    with pytest.raises(ValueError, match=message):
        partition(from_flat(flat), rules(CONFIG), layout)


def test_only_what_is_chosen_trains_and_codes_are_left_alone(params):
    leaves, tree = jax.tree.flatten(params)
    paths = [weights.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen = {i: leaf for i, leaf in enumerate(leaves) if paths[i].endswith(("/a", "/b"))}
    assert len(chosen) == 2

    def loss(chosen):
        full = jax.tree.unflatten(tree, [chosen.get(i, leaf) for i, leaf in enumerate(leaves)])
        return jnp.mean(jnp.square(forward(full, TOKENS, CONFIG)[0]))

    gradients = jax.jit(jax.grad(loss))(chosen)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0
    assert dataclasses.is_dataclass(flatten(params)["embed/table"])
