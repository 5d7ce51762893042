"""Tensors that hold several of our arrays: rows are shared out without loss, on a mesh as well."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import ModelConfig, abstract
from model.checkpoint import Checkpoint
from model.families import export_checkpoint, import_checkpoint
from model.families.tensors import by_kv_head, contiguous
from sharding import MeshConfig, make_layout, make_mesh
from weights import flatten

GPT = {
    "norm": "layernorm",
    "feed_forward": "plain",
    "feed_forward_bias": True,
    "qkv_bias": True,
    "output_bias": True,
}
CONFIG = ModelConfig(
    vocab_size=48, d_model=32, num_layers=2, num_heads=4, d_ff=64, max_length=32, **GPT
)
FORMS = {
    "gpt2": {"positions": "learned", "tied_embeddings": True},
    "gpt_neox": {"residual": "parallel_two_norms"},
    "falcon": {"residual": "parallel_two_norms", "kv_heads": 2},
    "btlm": {"positions": "alibi", "feed_forward": "gated"},
}


@pytest.mark.parametrize("name", FORMS)
def test_packed_tensors_come_back_from_files_onto_a_mesh(name, tmp_path):
    """Each device gets its share of rows that are scattered over a packed tensor."""
    config = dataclasses.replace(CONFIG, **FORMS[name])
    rng = np.random.default_rng(0)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract(config))
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    ours = Checkpoint(config, params, {}, {}, tmp_path)
    export_checkpoint(ours, tmp_path, family=name)
    layout = make_layout(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    found = import_checkpoint(tmp_path, layout=layout)
    wanted, got = flatten(params), flatten(found.params)
    assert wanted.keys() == got.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), err_msg=path)
    again = tmp_path / "again"
    export_checkpoint(found, again)
    same = (again / "model.safetensors").read_bytes()
    assert same == (tmp_path / "model.safetensors").read_bytes()


@given(kv_heads=st.integers(1, 5), group=st.integers(1, 4), head_dim=st.integers(1, 6))
def test_parts_of_a_packed_tensor_share_its_rows(kv_heads, group, head_dim):
    """Every row is some part's, once; a head's rows stand together, key head by key head."""
    heads = kv_heads * group
    config = ModelConfig(
        d_model=8, num_heads=heads, kv_heads=kv_heads, head_dim=2 * head_dim
    ).resolve()
    width = 2 * head_dim
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    for packing in (by_kv_head, contiguous):
        parts = packing(config, sizes)
        assert [len(part) for part in parts] == sizes
        assert sorted(np.concatenate(parts)) == list(range(sum(sizes)))
    query, key, value = by_kv_head(config, sizes)
    block = (group + 2) * width
    for head in range(heads):
        start = (head // group) * block + (head % group) * width
        assert query[head * width] == start
    np.testing.assert_array_equal(key[::width], np.arange(kv_heads) * block + group * width)
    np.testing.assert_array_equal(value, key + width)
