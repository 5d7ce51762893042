"""The loss a piece of the tokens at a time: values, gradients, memory and traffic of the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig, Runtime, init, rules
from planning.hlo import collectives
from sharding import MeshConfig, make_layout, make_mesh, partition
from training.chunked_loss import Head, head_cross_entropy
from training.config import TrainConfig
from training.decoders import decoder
from training.language_model import LOGITS_CHUNK, logits_chunk
from training.objectives import language_model


def multiply(kernel, hidden, layout):
    return hidden @ kernel


@pytest.mark.parametrize("chunk", [1, 5, 12, 1000])
def test_pieces_give_the_loss_and_gradient_of_the_whole(chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 12, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(8, 50)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 12)), jnp.int32)

    def total(hidden, kernel, chunk):
        entropy = head_cross_entropy(Head(kernel, multiply), hidden, targets, 0.1, chunk)
        return jnp.sum(entropy.loss + 1e-2 * entropy.log_z**2), entropy

    both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    whole, ours = both(hidden, kernel, None), both(hidden, kernel, chunk)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_pieces_bound_the_memory_of_the_logits():
    hidden = jax.ShapeDtypeStruct((4, 64, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def loss(hidden, kernel, targets, chunk=None):
        return head_cross_entropy(Head(kernel, multiply), hidden, targets, 0.0, chunk).loss.sum()

    def temporary_bytes(chunk):
        compiled = jax.jit(partial(jax.grad(loss, argnums=(0, 1)), chunk=chunk))
        memory = compiled.lower(hidden, kernel, targets).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary_bytes(16) < temporary_bytes(None) / 3


MODEL = ModelConfig(
    vocab_size=96, d_model=16, num_layers=1, num_heads=2, d_ff=32, tied_embeddings=True,
    max_length=32, d_embed=8, logit_scale=0.5,
)  # fmt: skip


def gradient(model, chunk, layout, batch):
    """`value_and_grad` of a model's loss on a mesh, compiled, and the parameters in place."""
    apply = decoder(model, Runtime(layout=layout), head=not chunk)
    objective = language_model(z_loss=0.1, label_smoothing=0.1, chunk=chunk)
    params = init(model, jax.random.key(0))
    spread = None if layout is None else partition(params, rules(model), layout)
    if layout is not None:
        batch = jax.device_put(batch, layout.sharding(("batch", "length")))
        params = jax.device_put(params, spread)

    def loss(params):
        return objective.loss(apply, params, batch, None)[0]

    compiled = jax.jit(jax.value_and_grad(loss), out_shardings=(None, spread))
    return compiled.lower(params).compile(), params


@pytest.mark.parametrize("tied", [True, False])
def test_pieces_on_a_mesh_train_as_the_whole_and_exchange_the_gradient_once(tied):
    model = MODEL if tied else ModelConfig(**{**vars(MODEL), "tied_embeddings": False})
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 96, (8, 32)).astype(np.int32) for name in ("tokens", "targets")
    } | {"loss_mask": (rng.random((8, 32)) < 0.7).astype(np.float32)}
    layout = make_layout(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2)))
    compiled, params = gradient(model, 8, layout, batch)
    alone, whole = gradient(model, None, None, batch)
    for a, b in zip(jax.tree.leaves(compiled(params)), jax.tree.leaves(alone(whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    table = 96 * 8 * 4 / 2  # bytes of the half of the vocabulary that a device sees
    exchanged = [
        each for each in collectives(compiled.as_text(), layout.mesh.shape) if each.size >= table
    ]
    assert exchanged
    assert max(each.count for each in exchanged) < 8  # 8 pieces of 8 tokens


def test_the_loss_is_cut_where_layers_are_recomputed_too():
    assert logits_chunk(-1, "none", None) == logits_chunk(0, "full", None) == 0
    assert logits_chunk(-1, "full", None) == LOGITS_CHUNK
    assert logits_chunk(512, "none", None) == 512
    staged = make_layout(make_mesh(MeshConfig(data=1, stage=8)))
    assert logits_chunk(-1, "full", staged) == 0
    with pytest.raises(ValueError, match=r"train.logits_chunk=-2 must be at least 0, or -1"):
        TrainConfig(logits_chunk=-2)
