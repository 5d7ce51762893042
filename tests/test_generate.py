"""Caches give what a full forward pass gives; generation is the plain loop, whatever else is in the
batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import (
    ModelConfig,
    RopeScaling,
    Runtime,
    Sampling,
    abstract,
    forward,
    generate,
    hidden_states,
    init,
    init_cache,
    sample,
)
from model.caches import Dense, Rolling
from model.generate import _generate
from model.layers_apart import can_be_apart, layers_apart
from model.sampling import restrict
from model.segments import segments_of

CONFIG = ModelConfig(vocab_size=37, d_model=16, num_layers=2, num_heads=4, kv_heads=2, d_ff=24)
WINDOWED = dataclasses.replace(CONFIG, sliding_window=4)
MIXED = dataclasses.replace(CONFIG, num_layers=3, layer_overrides=((1, "sliding_window", 4),))
LLAMA3 = RopeScaling("llama3", 8.0, 8)
PROMPTS = [[1, 2, 3], list(range(20)), [7]]

apply = jax.jit(forward, static_argnames=("config",))


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract(config))


def greedy_by_hand(config, prompt, count):
    """Argmax of a full forward pass, again and again, on one padded width so that it compiles
    once.
    """
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (32 - len(tokens))])
        tokens.append(int(apply(params_of(config), padded, config)[0][0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("config", "kind", "steps"),
    [
        (dataclasses.replace(CONFIG, qk_norm="head", rope_scaling=LLAMA3), "dense", (8, 1, 1)),
        (dataclasses.replace(CONFIG, positions="alibi", sliding_window=4), "rolling", (3, 3, 3, 1)),
        (WINDOWED, "rolling", (1,) * 10),
        (dataclasses.replace(CONFIG, positions="learned", max_length=10), "dense", (5, 5)),
    ],
)
def test_decoding_with_a_cache_equals_the_full_forward_pass(config, kind, steps):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 10)), jnp.int32)
    full, _ = apply(params_of(config), tokens, config)
    cache = init_cache(config, 2, 10, chunk=max(steps), kind=kind)
    start, parts = 0, []
    for step in steps:
        logits, aux = apply(params_of(config), tokens[:, start : start + step], config, cache=cache)
        cache, start = aux["cache"], start + step
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [10, 10])


def test_a_sliding_window_gets_a_rolling_cache_that_stays_small():
    cache = init_cache(MIXED, 1, 100, chunk=2)
    assert [type(cache.segments[segment.name]) for segment in MIXED.segments] == [
        Dense,
        Rolling,
        Dense,
    ]
    assert cache.segments["001-002"].keys.shape == (1, 1, 2, 5, 4)
    with pytest.raises(ValueError, match="at most 2 at once"):
        forward(params_of(MIXED), jnp.zeros((1, 3), jnp.int32), MIXED, cache=cache)
    with pytest.raises(ValueError, match=r"needs model\.sliding_window; layers 000-002 have none"):
        init_cache(CONFIG, 1, 10, kind="rolling")
    with pytest.raises(ValueError, match="'roling'; nearest: rolling"):
        init_cache(CONFIG, 1, 10, kind="roling")


@pytest.mark.parametrize("config", [CONFIG, MIXED])
def test_greedy_generation_of_ragged_prompts_is_the_plain_loop(config):
    out = generate(params_of(config), PROMPTS, config, max_new_tokens=6)
    assert out.lists() == [greedy_by_hand(config, prompt, 6) for prompt in PROMPTS]


def test_a_row_draws_the_same_tokens_alone_and_in_a_batch():
    draw = functools.partial(
        generate,
        params_of(CONFIG),
        config=CONFIG,
        max_new_tokens=6,
        sampling=Sampling(1.0, top_k=20, top_p=0.95),
    )
    together = draw(PROMPTS, rng=jax.random.key(5)).lists()
    assert draw(PROMPTS[:1], rng=jax.random.key(5)).lists() == together[:1]
    assert draw(PROMPTS[:1], rng=jax.random.key(6)).lists() != together[:1]


def test_a_stop_token_ends_its_row_only():
    free = generate(params_of(CONFIG), PROMPTS, CONFIG, max_new_tokens=8).lists()
    stop = free[0][2]
    out = generate(
        params_of(CONFIG), PROMPTS, CONFIG, max_new_tokens=8, stop_tokens=[stop], pad_token=36
    )
    for row, expected, padded in zip(out.lists(), free, np.asarray(out.tokens), strict=True):
        end = expected.index(stop) + 1 if stop in expected else 8
        assert row == expected[:end]
        assert (padded[end:] == 36).all()


def test_top_k_and_top_p_keep_the_tokens_they_promise():
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    kept = lambda top_k, top_p: np.isfinite(np.asarray(restrict(logits, top_k, top_p))).tolist()  # noqa: E731
    assert kept(2, None)[0] == [False, True, False, True]
    assert kept(None, 0.7)[0] == [False, True, False, True]
    assert kept(None, 0.8)[0] == [False, True, True, True]
    assert kept(None, 0.5)[1] == [True, False, False, False]
    assert kept(None, 1.0)[0] == [True] * 4
    assert kept(9, None)[0] == [True] * 4


def test_sampled_frequencies_follow_the_tempered_distribution():
    logits = jnp.asarray([1.0, 0.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = sample(jnp.broadcast_to(logits, (4000, 3)), keys, Sampling(temperature=0.5))
    shares = np.bincount(np.asarray(drawn), minlength=3) / 4000
    np.testing.assert_allclose(shares, jax.nn.softmax(logits / 0.5), atol=0.03)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 37]], {}, r"prompt 0 holds token 37; the vocabulary is 0\.\.36"),
        ([], {}, "nothing to generate: 0 prompts"),
        ([[1]], {"sampling": Sampling(1.0)}, "needs a key"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(params_of(CONFIG), prompts, CONFIG, max_new_tokens=2, **options)


def test_generation_past_learned_positions_is_refused():
    config = dataclasses.replace(CONFIG, positions="learned", max_length=8)
    with pytest.raises(ValueError, match="more than the 8 learned positions"):
        generate(params_of(config), [[1, 2, 3]], config, max_new_tokens=6)


def test_wrong_sampling_is_refused():
    for changes, message in (
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**changes)


def test_a_decoding_step_never_holds_a_second_cache():
    config = dataclasses.replace(CONFIG, num_layers=4)
    cache = jax.eval_shape(lambda: init_cache(config, 2, 4096))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))

    def step(params, cache):
        hidden, aux = hidden_states(params, jnp.ones((2, 1), jnp.int32), config, cache=cache)
        return hidden, aux["cache"]

    compiled = jax.jit(step, donate_argnums=1).lower(params_of(config), cache).compile()
    memory = compiled.memory_analysis()
    layer = size / 4
    assert memory.temp_size_in_bytes < 1.5 * layer
    assert memory.alias_size_in_bytes >= size


def test_a_cpu_takes_the_cosines_of_a_step_once():
    """Not anew in each rotation, where layers stand apart and are no loop."""
    config = dataclasses.replace(CONFIG, num_layers=3)
    params = layers_apart(params_of(config))
    cache = init_cache(config, 2, 32, segments=segments_of(params, config))
    lowered = jax.jit(hidden_states, static_argnums=2).lower(
        params, jnp.ones((2, 1), jnp.int32), config, cache=cache
    )
    assert lowered.compile().as_text().count(" cosine(") == 1


def test_bfloat16_generation_runs_in_the_compute_type():
    runtime = Runtime(compute_dtype="bfloat16")
    out = generate(params_of(CONFIG), PROMPTS, CONFIG, max_new_tokens=3, runtime=runtime)
    assert out.tokens.shape == (3, 3)


def test_lengths_of_one_bucket_share_a_compiled_program():
    config = ModelConfig(vocab_size=40, d_model=16, num_layers=2, num_heads=2)
    params = init(config, jax.random.key(0))
    longest = generate(params, [[1, 2, 3]], config, max_new_tokens=16)
    before = _generate._cache_size()
    for new in (1, 2, 9, 15):
        made = generate(params, [[1, 2, 3]], config, max_new_tokens=new)
        assert made.tokens.shape == (1, new)
        np.testing.assert_array_equal(made.tokens, longest.tokens[:, :new])
        assert made.lengths.tolist() == [new]
    assert _generate._cache_size() == before


def test_layers_taken_apart_are_the_same_model_in_the_same_memory():
    config = ModelConfig(
        vocab_size=40,
        d_model=16,
        num_layers=3,
        num_heads=2,
        layer_overrides=((1, "sliding_window", 4),),
    )
    params = init(config, jax.random.key(0))
    assert can_be_apart(params)
    apart = layers_apart(params)
    assert list(apart["layers"]) == ["000-001", "001-002", "002-003"]
    tokens = jnp.arange(10)[None]
    np.testing.assert_array_equal(
        forward(apart, tokens, config)[0], forward(params, tokens, config)[0]
    )
