"""Rounding with error feedback: against the authors' loop in float64, and figures known before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_fixtures import fixture_m

from surgery.quantize import obs
from surgery.quantize.gptq import GPTQ
from weights import Permuted

SOLVE = jax.jit(lambda method, w, h: method.solve(w, h), static_argnums=0)

TABLE = [
    ({"bits": 4, "group": 128}, 0.00967),
    ({"bits": 2, "group": 128}, 0.25975),
    ({"bits": 3, "group": 128, "act_order": True, "static_groups": False}, 0.01754),
    ({"bits": 3, "group": 128, "act_order": True}, 0.01763),
    ({"bits": 3, "group": 32, "statistics": "live"}, 0.02149),
    ({"bits": 3, "group": 32}, 0.02105),
    ({"bits": 3, "group": -1}, 0.07776),
]


def problem(rows, columns, seed=0):
    """A matrix and a Hessian of correlated inputs, float64."""
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=(4 * rows, rows))
        @ rng.normal(size=(rows, rows))
        * rng.uniform(0.2, 3, rows)
    )
    return rng.normal(size=(rows, columns)), 2 * x.T @ x / len(x)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "expected"), TABLE)
def test_losses_are_those_of_the_float64_table(options, expected):
    linear = fixture_m()
    w, h = jnp.asarray(linear.w, jnp.float32), jnp.asarray(linear.hessian, jnp.float32)
    weight, report = SOLVE(GPTQ(**options), w, h)
    assert linear.loss(weight.dequantize()) == pytest.approx(expected, rel=0.01)
    assert float(report["damping"]) == pytest.approx(0.01)


def authors_loop(w, h, bits, group, act_order, static_groups, damping=0.01):
    """GPTQ as its authors run it, column by column of `[N, K]`, in float64: the matrix `[K, N]`.

    Groups are fitted when they are reached; blocks of 128 columns.
    """
    w, h = w.T.copy(), h.copy()
    columns = w.shape[1]
    group = columns if group == -1 else group
    most = 2**bits - 1

    def fit(block):
        low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
        scale = (high - low) / most
        zero = np.round(-low / scale)
        return np.float64(np.float16(scale)), zero

    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    fitted = [fit(w[:, g : g + group]) for g in range(0, columns, group)]
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(columns)
    w, h = w[:, order], h[np.ix_(order, order)]
    h[np.diag_indices(columns)] += damping * np.mean(np.diag(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for first in range(0, columns, 128):
        last = min(first + 128, columns)
        piece, errors = w[:, first:last].copy(), np.zeros((w.shape[0], last - first))
        for i in range(last - first):
            k = first + i
            if group == columns or (act_order and static_groups):
                scale, zero = fitted[order[k] // group if act_order else 0]
            elif k % group == 0:
                scale, zero = fit(w[:, k : k + group])
            code = np.clip(np.round(piece[:, i] / scale) + zero, 0, most)
            out[:, k] = scale * (code - zero)
            errors[:, i] = (piece[:, i] - out[:, k]) / u[k, k]
            piece[:, i:] -= np.outer(errors[:, i], u[k, first + i : last])
        w[:, last:] -= errors @ u[first:last, last:]
    back = np.empty_like(out)
    back[:, order] = out
    return back.T


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_codes_are_those_of_the_authors_loop(act_order, group):
    w, h = problem(96, 96)
    h[5] = h[:, 5] = 0
    expected = authors_loop(w, h, 4, group, act_order, static_groups=True)
    method = GPTQ(bits=4, group=group, act_order=act_order)
    with jax.enable_x64(True):
        weight, _ = SOLVE(method, jnp.asarray(w), jnp.asarray(h))
        found = np.asarray(weight.dequantize(jnp.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_an_order_of_rounding_is_stored_with_groups_that_follow_it():
    w, h = problem(64, 24)
    weight, _ = SOLVE(
        GPTQ(group=32, act_order=True, static_groups=False), jnp.float32(w), jnp.float32(h)
    )
    assert isinstance(weight, Permuted)
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    np.testing.assert_allclose(weight.matmul(x), x @ weight.dequantize(), rtol=1e-4, atol=1e-4)
    h_kk = np.diag(h)[np.asarray(weight.perm)]
    assert np.all(h_kk[:-1] >= h_kk[1:])


@pytest.mark.parametrize(
    ("tile", "rows", "columns", "group", "live"),
    [
        (128, 200, 5, None, False),
        (16, 18, 1, 1, True),
        (16, 17, 2, 1, False),
        (16, 21, 3, 7, True),
        (16, 18, 4, 18, False),
    ],
)
def test_the_loop_gives_back_what_is_on_the_grid_and_counts_its_loss(
    tile, rows, columns, group, live, monkeypatch
):
    monkeypatch.setattr(obs, "TILE", tile)  # tiles of 128 rows take as many programs to compile
    w, h = problem(rows, columns, rows)
    w, h = jnp.float32(w), jnp.float32(h)
    factor, _ = obs.inverse_factor(h, 0.01)
    begun = jnp.zeros(rows // (group or rows), jnp.int32)

    def begin(state, index, values):
        assert values.shape == (group, columns)
        return state.at[index].add(1)

    def to_tenths(state, k, row):
        return jnp.round(row * 10) / 10, state

    given_begin = None if group is None else begin
    loop = functools.partial(
        obs.column_loop, quantize=to_tenths, begin=given_begin, group=group, live=live
    )
    out, state, loss = jax.jit(loop)(w, factor, begun)
    np.testing.assert_allclose(np.round(out * 10) / 10, out, atol=1e-5)
    if group is not None:
        np.testing.assert_array_equal(state, 1)
    damped = np.asarray(h, np.float64) + 0.01 * np.mean(np.diag(h)) * np.eye(rows)
    delta = np.asarray(out, np.float64) - np.asarray(w, np.float64)
    np.testing.assert_allclose(loss, np.sum(delta * (damped @ delta), axis=0), rtol=2e-2)


def test_damping_grows_until_the_factorization_succeeds():
    h = np.diag([1.0, 1.0, 1.0, -0.05]).astype(np.float32)
    factor, used = obs.inverse_factor(jnp.asarray(h), 0.01)
    assert float(used) == pytest.approx(0.1)
    inverse = np.linalg.inv(h + 0.1 * np.mean(np.diag(h)) * np.eye(4))
    np.testing.assert_allclose(factor.T @ factor, inverse, rtol=1e-5)
    factor, used = obs.inverse_factor(-jnp.eye(4), 0.01)
    assert not np.all(np.isfinite(factor))


def test_columns_may_be_split_over_devices():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("n",))
    w, h = problem(64, 32)
    w, h = jnp.float32(w), jnp.float32(h)
    split = jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, "n")))
    whole = jax.device_put(h, jax.NamedSharding(mesh, jax.P()))
    alone, _ = SOLVE(GPTQ(group=32), w, h)
    together, _ = SOLVE(GPTQ(group=32), split, whole)
    jax.tree.map(np.testing.assert_array_equal, alone, together)
