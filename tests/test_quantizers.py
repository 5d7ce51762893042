"""AWQ, SmoothQuant, LLM.int8() and FineQuant: against figures known before and NumPy; transforms
leave the function as it was.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization_fixtures import fixture_m

from model import ModelConfig, forward, init
from surgery import InMemory, blocks, calibration, inject_outliers, quantize
from surgery.quantize import awq, transforms
from surgery.quantize.awq import AWQ
from surgery.quantize.finequant import FineQuant, choose_group, mean_ranges
from surgery.quantize.llm_int8 import LLMInt8, with_outliers
from surgery.quantize.smoothquant import SmoothQuant, smoothing
from weights import bits_per_weight, flatten, from_flat, stack, trimmed, unstack

LLAMA = ModelConfig(
    vocab_size=64, d_model=32, num_layers=1, num_heads=4, kv_heads=4, d_ff=32, max_length=16
)
MODELS = {
    "llama": {},
    "shared values": {"kv_heads": 2},
    "one norm": {
        "residual": "parallel_one_norm",
        "norm": "layernorm",
        "feed_forward": "plain",
        "qkv_bias": True,
        "feed_forward_bias": True,
    },
    "gemma": {"norm": "rmsnorm_plus_one", "norm_position": "sandwich"},
    "experts": {"feed_forward": "experts", "num_experts": 4, "shared_expert_d_ff": 16},
}
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 12)).astype(np.int32)


def stats_of(x):
    return calibration.update(calibration.empty(x.shape[-1]), jnp.asarray(x, jnp.float32))


def model_of(changes):
    """A config and params whose norms and biases are not the initial ones."""
    config = dataclasses.replace(LLAMA, **changes)
    params = flatten(init(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    for path, leaf in params.items():
        if not path.endswith("kernel"):
            params[path] = leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    return config, from_flat(params)


def with_layer(params, layer):
    stacked = jax.tree.map(lambda leaf: leaf[None], layer)
    return {**params, "layers": {"000-001": stacked}}


@pytest.mark.parametrize("name", MODELS)
def test_scales_that_are_folded_leave_the_logits_as_they_were(name):
    config, params = model_of(MODELS[name])
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"]["000-001"])
    resolved, rng = config.layer(0), np.random.default_rng(2)
    before, folded = np.asarray(forward(params, TOKENS, config)[0]), []
    for site in blocks.sites(layer, resolved, blocks.Runtime()):
        fold = transforms.fold_of(layer, resolved, site)
        if fold is not None:
            width = flatten(layer)[site.linears[0]].shape[-2]
            s = jnp.asarray(np.exp(rng.normal(size=width)), jnp.float32)
            layer = transforms.scale(layer, fold, transforms.shared_scale(fold, s))
            folded.append(site.linears[0])
    after = np.asarray(forward(with_layer(params, layer), TOKENS, config)[0])
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert "attention/query/kernel" in folded
    assert ("feed_forward/down/kernel" in folded) == (name not in ("one norm", "experts"))
    assert ("attention/output/kernel" in folded) is True


@pytest.mark.parametrize(
    "changes",
    [{"norm_position": "output"}, {"norm_position": "post"}, {"norm": "layernorm_noaffine"}],
)
def test_norms_that_cannot_take_a_scale_are_left(changes):
    config, params = model_of(changes)
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"]["000-001"])
    sites = blocks.sites(layer, config.layer(0), blocks.Runtime())
    folds = [transforms.fold_of(layer, config.layer(0), site) for site in sites]
    assert [fold is None for fold in folds] == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group", "ratio", "expected"),
    [(4, 128, 0.40, 0.01125), (2, 128, 0.45, 0.22434), (3, 32, 0.45, 0.02415)],
)
def test_awq_finds_the_scale_of_the_float64_table(bits, group, ratio, expected):
    linear = fixture_m()
    stats, w = stats_of(linear.inputs), jnp.asarray(linear.w, jnp.float32)
    method = AWQ(bits, group)
    s, found = awq.search(method, w, stats.gram, stats.absmean)
    assert float(found) == pytest.approx(ratio)
    scaled = w * s[:, None]
    loss = linear.loss(method.round(scaled).dequantize() / s[:, None])
    assert loss == pytest.approx(expected, rel=0.02)
    weight, _ = method.linear(scaled, stats.scaled(1 / s))
    assert linear.loss(weight.dequantize() / s[:, None]) < 0.95 * loss


def test_awq_clips_each_group_where_its_output_loses_least():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 16)) * rng.uniform(0.2, 3, 16), rng.standard_t(3, size=(16, 3))
    method = AWQ(bits=3, group=8)
    found, _ = awq.clipped(method, jnp.asarray(w, jnp.float32), stats_of(x).gram)
    for g, n in np.ndindex(2, 3):
        rows, column = slice(8 * g, 8 * g + 8), w[8 * g : 8 * g + 8, n]
        most, losses, candidates = np.abs(column).max(), [], []
        for i in range(10):
            candidate = np.clip(column, -most * (1 - i / 20), most * (1 - i / 20))
            low, high = candidate.min(), candidate.max()
            scale = (high - low) / 7
            zero = np.clip(np.round(-low / scale), 0, 7)
            scale = np.float64(np.float16(scale))
            rounded = scale * (np.clip(np.round(candidate / scale) + zero, 0, 7) - zero)
            losses.append(np.sum((x[:, rows] @ (rounded - column)) ** 2))
            candidates.append(candidate)
        np.testing.assert_allclose(found[rows, n], candidates[np.argmin(losses)], rtol=1e-5)


def outlier_linear(c, size=512):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1024, size)), rng.normal(size=(size, size)) / size**0.5
    x[:, :4] *= c
    w[:4] /= c
    return x, w


def output_error(x, w, weight, s=None):
    inputs = jnp.asarray(x if s is None else x / s, jnp.float32)
    return float(np.linalg.norm(weight.matmul(inputs) - x @ w) / np.linalg.norm(x @ w))


@pytest.mark.parametrize(
    ("c", "plain", "dynamic"), [(1, 0.0105, 0.0105), (20, 0.073, 0.0167), (60, 0.216, 0.040)]
)
def test_outliers_in_16_bits_keep_the_error_of_a_layer_without_any(c, plain, dynamic):
    x, w = outlier_linear(c)
    narrow, stats = jnp.asarray(w, jnp.float32), stats_of(x)
    weight, _ = LLMInt8(outliers="none").linear(narrow, None)
    assert output_error(x, w, weight) == pytest.approx(plain, rel=0.05)
    weight, _ = LLMInt8(outliers="dynamic").linear(narrow, None)
    assert output_error(x, w, weight) == pytest.approx(dynamic, rel=0.1)
    weight, report = LLMInt8().linear(narrow, stats)
    assert output_error(x, w, weight) == pytest.approx(0.0105, rel=0.05)
    assert int(report["outliers"]) == (4 if c > 1 else 0)
    assert int(report["outliers_left"]) == 0
    s = smoothing(stats.absmax, [narrow], 0.5)
    weight, _ = SmoothQuant().linear(narrow * s[:, None], None)
    assert output_error(x, w, weight, np.asarray(s)) == pytest.approx(0.0105, rel=0.05)


def test_outliers_without_room_are_counted():
    x, w = outlier_linear(60, 32)
    weight, report = LLMInt8(capacity=3).linear(jnp.asarray(w, jnp.float32), stats_of(x))
    assert (int(report["outliers"]), int(report["outliers_left"])) == (3, 1)
    assert weight.outlier.w.shape == (3, 32)


def test_a_stack_has_room_for_the_outliers_of_its_layers_and_no_more():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((5, 64), (64, 16)))
    layers = [
        with_outliers(w, jnp.ones(64).at[10 : 10 + count].set(9.0), 6.0, 8)[0]
        for count in (1, 3, 0)
    ]
    whole = stack(layers)
    small = trimmed({"kernel": whole})["kernel"]
    assert (whole.outlier.w.shape, small.outlier.w.shape) == ((3, 8, 16), (3, 3, 16))
    np.testing.assert_array_equal(small.dequantize(), whole.dequantize())
    for before, after in zip(layers, unstack(small), strict=True):
        np.testing.assert_allclose(after.matmul(x), before.matmul(x), rtol=1e-5, atol=1e-5)
    assert trimmed(stack([layers[2]])).outlier is None
    config = dataclasses.replace(LLAMA, num_layers=2, d_model=64)
    params = inject_outliers(config, init(config, jax.random.key(0)), channels=2)
    found, rows = quantize(InMemory(config, params), LLMInt8(), TOKENS)
    room = {}
    for path, weight in flatten(found["layers"]["000-002"]).items():
        mine = [row for row in rows if row["path"] == path]
        if mine:
            room[path] = 0 if weight.outlier is None else weight.outlier.w.shape[1]
            assert room[path] == max(row["outliers"] for row in mine)
            assert all(row["bits"] == bits_per_weight(weight) for row in mine)
    assert (room["attention/query/kernel"], room["attention/output/kernel"]) == (2, 0)


def test_smoothing_moves_everything_to_one_side_at_the_ends():
    absmax = jnp.asarray([8.0, 0.5, 0.0])
    w = jnp.asarray([[0.5, -0.25], [2.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(smoothing(absmax, [w], 0.0), [2.0, 0.5, 1.0])
    np.testing.assert_allclose(smoothing(absmax, [w], 1.0), [8.0, 0.5, 1.0])
    np.testing.assert_allclose(smoothing(absmax, [w[:, :1], w[:, 1:]], 0.5)[:2], [4.0, 0.5])


def test_models_with_outliers_need_what_handles_them():
    plain_params = init(LLAMA, jax.random.key(0))
    params = inject_outliers(LLAMA, plain_params, channels=4, factor=60.0)
    exact = np.asarray(forward(params, TOKENS, LLAMA)[0])
    np.testing.assert_allclose(exact, forward(plain_params, TOKENS, LLAMA)[0], atol=1e-5)

    def off(method):
        found, rows = quantize(InMemory(LLAMA, params), method, TOKENS)
        return np.mean((np.asarray(forward(found, TOKENS, LLAMA)[0]) - exact) ** 2), rows

    plain, _ = off(LLMInt8(outliers="none"))
    apart, _ = off(LLMInt8())
    smooth, rows = off(SmoothQuant())
    assert apart < 0.1 * plain
    assert smooth < 0.1 * plain
    assert {row["path"] for row in rows if "smoothing" in row} == {
        f"{part}/kernel"
        for part in (
            "attention/query",
            "attention/key",
            "attention/value",
            "feed_forward/gate",
            "feed_forward/up",
        )
    }
    rounded, _ = off(AWQ(bits=3, group=16))
    none, _ = off(dataclasses.replace(NoScale(bits=3, group=16), clip=False))
    assert rounded < 0.6 * none


class NoScale(AWQ):
    """AWQ's grid by itself."""

    def transform(self, block, targets):
        return block, {}


def test_finequant_takes_fine_groups_where_rows_stand_out_and_only_there():
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(512, 64)).astype(np.float32)
    planted = smooth.copy()
    planted[[3, 100, 260, 400]] *= 30
    ranges = mean_ranges(jnp.asarray(planted), 32)
    by_hand = {
        g: np.mean(np.ptp(planted.reshape(512 // g, g, 64), axis=1))
        for g in (512, 256, 128, 64, 32)
    }
    assert ranges == pytest.approx(by_hand)
    assert choose_group(ranges, 1.15) == 32
    assert choose_group(mean_ranges(jnp.asarray(smooth), 32), 1.15) == 512
    layers = [{"up": smooth, "down": smooth}, {"up": smooth, "down": planted}]
    plan = FineQuant(min_group=32).plan(layers)
    assert (plan.at("up").group, plan.at("down").group) == (512, 32)
    weight, _ = plan.at("down").linear(jnp.asarray(planted), None)
    scale = np.asarray(weight.scale, np.float32)[:, None]
    largest = np.abs(planted.reshape(16, 32, 64)).max(1, keepdims=True)
    np.testing.assert_allclose(scale, largest / 7, rtol=1e-3)
    values = scale * np.clip(np.round(planted.reshape(16, 32, 64) / scale), -7, 7)
    np.testing.assert_allclose(weight.dequantize(), values.reshape(512, 64), rtol=1e-6)
    with pytest.raises(ValueError, match=r"alpha=1\.0; it must be above 1"):
        FineQuant(alpha=1.0)
