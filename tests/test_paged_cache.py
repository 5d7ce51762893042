"""A decoder over pages gives what a full forward pass gives, for several sequences in one step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig, RopeScaling, Runtime, abstract, forward, hidden_states, logits
from model.caches import init_paged_cache, paged_step
from sharding import MeshConfig, make_layout, make_mesh

CONFIG = ModelConfig(vocab_size=37, d_model=16, num_layers=3, num_heads=4, kv_heads=2, d_ff=24)
LENGTHS = (11, 6, 9)
ALONE = Runtime()
TABLE = np.asarray([[7, 2, 9], [4, 1, 0], [5, 3, 8]], np.int32)
STEPS = [(5, 0, 1), (4, 3, 0), (1, 1, 7), (1, 2, 1)]
"""Tokens that each sequence brings in a step: alone, mixed, and some that are not there."""
CONFIGS = {
    "windows in one layer": dataclasses.replace(
        CONFIG, layer_overrides=((1, "sliding_window", 4),), qk_norm="head"
    ),
    "alibi": dataclasses.replace(CONFIG, positions="alibi", sliding_window=3),
    "soft cap, scaled rope": dataclasses.replace(
        CONFIG, attention_soft_cap=2.0, rope_scaling=RopeScaling("llama3", 8.0, 8)
    ),
    "learned, fewer positions than a step has tokens": dataclasses.replace(
        CONFIG, positions="learned", max_length=11, kv_heads=4
    ),
}


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


@functools.partial(jax.jit, static_argnames=("config", "size", "runtime"))
def flat_step(params, cache, tokens, table, kv_lens, cu_q_lens, config, size=4, runtime=ALONE):
    plan = paged_step(table, kv_lens, cu_q_lens, page_size=size, tokens=len(tokens))
    cache = dataclasses.replace(cache, plan=plan)
    hidden, aux = hidden_states(
        params, tokens[:, None], config, runtime, cache=cache, segment_ids=plan.valid
    )
    return logits(params, hidden, config, runtime)[:, 0], aux["cache"]


def by_steps(config, prompts, runtime=ALONE, bucket=12):
    """Logits of each sequence `[length, vocab]`, computed a few tokens a step from pages of 4."""
    cache = init_paged_cache(config, 10, 4, planned_length=11, layout=runtime.layout)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 5 else x, cache)
    held, parts = np.zeros(3, np.int32), [[], [], []]
    for counts in STEPS:
        pieces = [prompts[s][held[s] : held[s] + n] for s, n in enumerate(counts)]
        flat = np.concatenate(pieces)
        held = held + np.asarray(counts, np.int32)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        padded = np.pad(flat, (0, bucket - len(flat))).astype(np.int32)
        out, cache = flat_step(
            params_of(config), cache, padded, TABLE, held, ends, config, runtime=runtime
        )
        assert np.isfinite(out).all()
        for s in range(3):
            parts[s].append(out[ends[s] : ends[s + 1]])
    return [np.concatenate(part) for part in parts]


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_steps_equal_the_full_forward_pass(name):
    config = CONFIGS[name]
    prompts = np.random.default_rng(0).integers(0, 37, (3, 11))
    full, _ = jax.jit(forward, static_argnames="config")(params_of(config), prompts, config)
    for row, length, made in zip(full, LENGTHS, by_steps(config, prompts), strict=True):
        np.testing.assert_allclose(made, row[:length], atol=3e-5)


@pytest.mark.slow
def test_devices_of_a_mesh_hold_and_attend_with_their_own_heads():
    layout = make_layout(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]))
    prompts = np.random.default_rng(0).integers(0, 37, (3, 11))
    alone = by_steps(CONFIG, prompts)
    together = by_steps(CONFIG, prompts, Runtime(layout=layout))
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_step_holds_one_cache():
    """Pages are written in place: a second copy of them would halve what an engine can serve."""
    cache = init_paged_cache(CONFIG, 4096, 4, planned_length=64)
    arrays = (np.zeros(4, np.int32), TABLE, np.ones(3, np.int32), np.arange(4, dtype=np.int32))
    donating = jax.jit(flat_step.__wrapped__, static_argnames=("config", "size"), donate_argnums=1)
    compiled: Any = donating.lower(params_of(CONFIG), cache, *arrays, config=CONFIG).compile()
    pages = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().temp_size_in_bytes < pages / 10


def test_a_step_without_a_plan_and_tokens_of_another_shape_are_refused():
    cache = init_paged_cache(CONFIG, 4, 4, planned_length=8)
    tokens = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="no plan"):
        hidden_states(params_of(CONFIG), tokens, CONFIG, cache=cache)
    arrays = (jnp.asarray(TABLE), jnp.ones(3, jnp.int32), jnp.arange(4))
    plan = paged_step(*arrays, page_size=4, tokens=3)
    with pytest.raises(ValueError, match=r"tokens \[2, 1\].*plan has \[3, 1\]"):
        hidden_states(
            params_of(CONFIG), tokens, CONFIG, cache=dataclasses.replace(cache, plan=plan)
        )
    with pytest.raises(ValueError, match="0 pages"):
        init_paged_cache(CONFIG, 0, 4, planned_length=8)
