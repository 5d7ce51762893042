"""Calibration: statistics against NumPy, on one device and on a mesh; windows and their record."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ByteTokenizer, open_source
from model import ModelConfig, Runtime, init
from sharding import MeshConfig, make_layout, make_mesh
from surgery import blocks, calibration, consecutive, draw, experts, windows

CONFIG = ModelConfig(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=32)


def of(x, valid=None):
    return calibration.update(calibration.empty(x.shape[-1]), jnp.asarray(x), valid)


@settings(max_examples=5, deadline=None)
@given(sizes=st.tuples(*[st.sampled_from((0, 1, 8))] * 3), width=st.sampled_from((1, 4)))
def test_statistics_are_sums_whatever_the_order(sizes, width):
    rng = np.random.default_rng(width)
    a, b, c = (rng.normal(size=(size, width)).astype(np.float32) for size in sizes)
    left = calibration.merge(calibration.merge(of(a), of(b)), of(c))
    right = calibration.merge(of(a), calibration.merge(of(b), of(c)))
    x = np.concatenate([a, b, c]).astype(np.float64)
    for stats in (left, right):
        np.testing.assert_allclose(stats.gram, x.T @ x, atol=1e-4)
        assert int(stats.count) == len(x)
        if len(x):
            np.testing.assert_allclose(stats.mean, x.mean(0), atol=1e-5)
            np.testing.assert_allclose(stats.absmean, abs(x).mean(0), atol=1e-5)
            np.testing.assert_array_equal(stats.absmax, abs(x).max(0).astype(np.float32))
            np.testing.assert_allclose(stats.hessian(), 2 * x.T @ x / len(x), atol=1e-4)


def test_padding_is_left_out_and_a_scaled_input_has_scaled_statistics():
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    valid = np.arange(6) < np.asarray([[6], [2]])
    found, expected = of(x, jnp.asarray(valid)), of(x[valid])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    s = np.asarray([0.5, 2, 4], np.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found.scaled(jnp.asarray(s)),
        of(x[valid] * s),
    )


def test_a_gram_matrix_in_bfloat16_is_no_longer_positive_definite():
    """Why products are summed in full precision: a site with a 50 x outlier channel."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(512, 1)) + 0.05 * rng.normal(size=(512, 32))).astype(np.float32)
    x[:, 3] *= 50
    full = np.asarray(of(x).gram, np.float64)
    rough = np.asarray(jnp.asarray(x.T @ x).astype(jnp.bfloat16), np.float64)
    assert np.linalg.eigvalsh(full)[0] > 0
    assert np.all(np.isfinite(jnp.linalg.cholesky(jnp.asarray(full, jnp.float32))))
    assert np.linalg.eigvalsh(rough)[0] < 0
    assert not np.all(np.isfinite(jnp.linalg.cholesky(jnp.asarray(rough, jnp.float32))))


def test_a_mesh_gathers_what_one_device_does():
    params = jax.tree.map(lambda leaf: leaf[0], init(CONFIG, jax.random.key(0)))["layers"][
        "000-001"
    ]
    hidden = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
    layer = CONFIG.layer(0)
    sites = blocks.sites(params, layer, Runtime())
    assert [site.name for site in sites] == [
        "attention/query+key+value",
        "attention/output",
        "feed_forward/up+gate",
        "feed_forward/down",
    ]

    def gather(layout, parts):
        stats = {s.name: calibration.empty(32 if "down" in s.name else 16, parts) for s in sites}
        places = {name: calibration.shardings(one, layout) for name, one in stats.items()}
        stats = jax.device_put(stats, places)
        _, stats = blocks.accumulate(
            params, hidden, stats, layer, Runtime(layout=layout), sites, False
        )
        return stats

    layout = make_layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    spread = gather(layout, 4)
    gram = spread["feed_forward/down"].gram
    assert gram.addressable_shards[0].data.shape == (1, 32, 16)
    alone = gather(None, 1)
    for name, stats in spread.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            calibration.finish(stats),
            calibration.finish(alone[name]),
        )


@pytest.mark.parametrize("parts", [1, 4])
def test_experts_see_the_tokens_that_the_router_sends_them(parts):
    config = dataclasses.replace(
        CONFIG, feed_forward="experts", num_experts=4, expert_d_ff=8, experts_per_token=2
    )
    stack = init(config, jax.random.key(0))["layers"]["000-001"]
    params = jax.tree.map(lambda leaf: np.array(leaf[0]), stack)
    params["attention"]["output"]["kernel"][:] = 0  # the mixture then reads the normed input
    hidden = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
    sites = blocks.sites(params, config.layer(0), Runtime())[-2:]
    stats = {
        site.name: calibration.empty(width, parts, 4)
        for site, width in zip(sites, (16, 8), strict=True)
    }
    _, stats = blocks.accumulate(params, hidden, stats, config.layer(0), Runtime(), sites, False)
    outer, middle = (calibration.finish(stats[site.name]) for site in sites)

    mixture = params["feed_forward"]
    x = hidden.reshape(-1, 16).astype(np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + config.norm_eps)
    sent = np.argsort(-(x @ mixture["router"]["kernel"]), axis=1)[:, :2]
    for expert in range(4):
        mine = x[np.any(sent == expert, axis=1)]
        gate, up = (mine @ mixture["experts"][name]["kernel"][expert] for name in ("gate", "up"))
        inside = gate / (1 + np.exp(-gate)) * up
        assert int(outer.count[expert]) == int(middle.count[expert]) == len(mine)
        np.testing.assert_allclose(outer.gram[expert], mine.T @ mine, atol=1e-4)
        np.testing.assert_allclose(middle.gram[expert], inside.T @ inside, rtol=1e-3, atol=1e-9)


def test_an_expert_without_tokens_takes_what_all_have():
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(40, 4)), rng.normal(size=(1, 4))
    own = [of(x.astype(np.float32)), of(other.astype(np.float32)), calibration.empty(4)]
    found = experts.pooled(jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))
    np.testing.assert_allclose(found.gram[0], own[0].gram, rtol=1e-6)
    both = np.concatenate([x, other])
    last = jax.tree.map(lambda leaf: leaf[2], found)
    np.testing.assert_allclose(last.hessian(), 2 * both.T @ both / 41, rtol=1e-4)
    np.testing.assert_allclose(found.absmax[2], abs(both).max(0), rtol=1e-6)
    np.testing.assert_allclose(experts.pooled_share(jnp.asarray([0, 1, 2, 9]), 8), [1, 0.5, 0, 0])


def text(folder, documents):
    path = folder / "text.jsonl"
    path.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    return str(path)


def test_windows_say_where_they_come_from(tmp_path):
    documents = [f"{n} " * 60 for n in ("one", "two", "three")]
    source, tokenizer = open_source(text(tmp_path, documents)), ByteTokenizer()
    drawn = draw(source, tokenizer, count=5, length=32, seed=3)
    assert drawn.tokens.shape == (5, 32)
    rows = [row.row_id for row in source.rows()]
    for (document, place), tokens in zip(drawn.record["rows"], drawn.tokens, strict=True):
        begun = (documents[rows.index(document)] + "\n\n")[place : place + 8]
        assert tokenizer.decode(tokens).startswith(begun)
    again = draw(source, tokenizer, count=5, length=32, seed=3)
    assert again.record == drawn.record
    assert (
        draw(source, tokenizer, count=5, length=32, seed=4).record["sha256"]
        != again.record["sha256"]
    )


def test_evaluation_cuts_all_of_the_text_without_gaps(tmp_path):
    documents = ["abcdef" * 5, "ghij" * 7]
    found = consecutive(text(tmp_path, documents), ByteTokenizer(), length=20)
    joint = "\n\n".join(documents)
    assert ByteTokenizer().decode(found.tokens.reshape(-1)) == joint[: len(joint) // 20 * 20]


def test_text_that_is_too_short_is_refused_with_what_would_fit(tmp_path):
    source = text(tmp_path, ["a few words"])
    with pytest.raises(
        ValueError, match=r"11 tokens are too few for 4 windows of 8 .* at most 1 such"
    ):
        draw(source, ByteTokenizer(), count=4, length=8)
    assert draw(source, ByteTokenizer(), count=1, length=11).record["rows"] == [[0, 0]]
    with pytest.raises(ValueError, match="fewer than one window of 64"):
        consecutive(source, ByteTokenizer(), length=64)
    with pytest.raises(ValueError, match=r"float32\[2, 3\]"):
        windows.from_tokens(np.zeros((2, 3), np.float32))
