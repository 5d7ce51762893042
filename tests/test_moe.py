"""Mixtures of experts against a loop over tokens and experts in float64 NumPy: routing, ties,
capacity, padding, statistics, gradients; and against transformers' blocks.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharded_step import fast_compile
from tiny import write_text

from model import (
    FEED_FORWARDS,
    MIXERS,
    ModelConfig,
    Runtime,
    count_parameters,
    forward,
    init,
    init_cache,
)
from model.context import Context
from model.moe.router import capacity_of_row, route, statistics
from model.parameters import describe
from model.positions import PositionEncoder
from training import run_config, train_language_model
from training.command_line import apply_overrides
from training.config import load_config
from training.json_lines import read
from training.objectives import language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.run_folder import RunFolder
from training.throughput import flops_per_token
from weights import from_flat

__all__ = ["fast_compile"]
pytestmark = pytest.mark.usefixtures("fast_compile")

BATCH, LENGTH = 3, 11


def _config(**fields):
    sizes = {"vocab_size": 48, "d_model": 16, "num_layers": 2, "num_heads": 4, "kv_heads": 2}
    mixture = {"feed_forward": "experts", "num_experts": 5, "expert_d_ff": 12, "init_std": 0.3}
    return ModelConfig(**{**sizes, "d_ff": 20, "max_length": 32, **mixture, **fields})


def _params(config, part, seed=0):
    """Random arrays of one part of a layer, biases too."""
    rng = np.random.default_rng(seed)
    arrays = part.arrays(config.layer(0))
    return from_flat(
        {path: rng.normal(0, 0.4, spec.shape).astype(np.float32) for path, spec in arrays.items()}
    )


def _input(seed=0, batch=BATCH, width=16):
    return np.random.default_rng(seed).normal(size=(batch, LENGTH, width)).astype(np.float32)


def _segments():
    """The last row is half padding, the first two none."""
    return jnp.asarray(np.where((np.arange(BATCH)[:, None] < 2) | (np.arange(LENGTH) < 5), 1, 0))


def _context(config, segment_ids=None, batch=BATCH, layout=None):
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (batch, LENGTH))
    encoder = PositionEncoder(config.layer(0)).prepared(positions)
    return Context(positions, segment_ids, encoder, Runtime(layout=layout))


@functools.partial(jax.jit, static_argnums=2)
def _experts(params, x, config, segment_ids=None):
    layer = config.layer(0)
    context = _context(config, segment_ids, x.shape[0])
    y, _, aux = FEED_FORWARDS["experts"].apply(params, x, layer, context, {})
    return y, aux


_forward = jax.jit(forward, static_argnums=(2, 3))


# The reference: a loop over rows, slots and positions, in float64.


def _chosen(logits, k):
    """The k largest, the lower index first among equals."""
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]


def _gates(logits, chosen, renormalise):
    powers = np.exp(logits - logits.max())
    return powers[chosen] / (powers[chosen].sum() if renormalise else powers.sum())


def _silu(x):
    return x / (1 + np.exp(-x))


def _gated(params, x):
    kernels = {name: np.asarray(params[name]["kernel"], np.float64) for name in params}
    return (_silu(x @ kernels["gate"]) * (x @ kernels["up"])) @ kernels["down"]


def _assignments(logits, config, valid):
    """`{(row, position, slot): (expert, gate)}` of all that is not dropped, first choices of a row
    first.
    """
    k, factor, found = config.experts_per_token, config.capacity_factor, {}
    room = np.inf
    if factor is not None:
        room = np.ceil(factor * k * logits.shape[1] / config.num_experts)
    for row in range(logits.shape[0]):
        taken = np.zeros(config.num_experts)
        for slot in range(k):
            for position in np.flatnonzero(valid[row]):
                scores = logits[row, position]
                chosen = _chosen(scores, k)
                gates = _gates(scores, chosen, config.router_renormalise)
                expert = chosen[slot]
                if taken[expert] < room:
                    found[row, position, slot] = (expert, gates[slot])
                taken[expert] += 1
    return found


def _reference(params, x, config, valid):
    x = np.asarray(x, np.float64)
    logits = x @ np.asarray(params["router"]["kernel"], np.float64)
    y = np.zeros_like(x)
    for (row, position, _), (expert, gate) in _assignments(logits, config, valid).items():
        own = jax.tree.map(lambda leaf, expert=expert: leaf[expert], params["experts"])
        y[row, position] += gate * _gated(own, x[row, position])
    if "shared" in params:
        weight = 1.0
        if "shared_gate" in params:
            weight = 1 / (1 + np.exp(-x @ np.asarray(params["shared_gate"]["kernel"], np.float64)))
        y = y + weight * _gated(params["shared"], x)
    return y + np.asarray(params.get("bias", 0.0), np.float64)


VARIANTS = {
    "mixtral": {},
    "one_of_many": {"experts_per_token": 1, "num_experts": 9},
    "all": {"experts_per_token": 5},
    "not_renormalised": {"router_renormalise": False, "experts_per_token": 3},
    "shared": {"shared_expert_d_ff": 7},
    "qwen2_moe": {
        "shared_expert_d_ff": 7,
        "shared_expert_gate": True,
        "router_renormalise": False,
    },
    "jetmoe": {"expert_bias": True},
    "capacity": {"capacity_factor": 0.7},
    "little_capacity": {"capacity_factor": 0.1, "expert_bias": True},
}


@pytest.mark.parametrize(
    ("variant", "padded"),
    [("mixtral", False), ("capacity", False), *((name, True) for name in VARIANTS)],
)
def test_a_mixture_equals_a_loop_over_its_experts(variant, padded):
    config = _config(**VARIANTS[variant])
    params = _params(config, FEED_FORWARDS["experts"])
    segments = _segments() if padded else None
    valid = np.ones((BATCH, LENGTH), bool) if segments is None else np.asarray(segments) > 0
    x = _input()
    y, aux = _experts(params, x, config, segments)
    expected = _reference(params, x, config, valid)
    np.testing.assert_allclose(np.asarray(y)[valid], expected[valid], rtol=1e-4, atol=1e-5)
    kept = len(_assignments(x @ params["router"]["kernel"], config, valid))
    total = valid.sum() * config.experts_per_token
    np.testing.assert_allclose(aux["dropped"], 1 - kept / total, atol=1e-6)
    assert (kept < total) == ("capacity" in variant)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "capacity"])
def test_gradients_are_those_of_the_loop_over_experts(variant):
    config = _config(**VARIANTS[variant])
    params = _params(config, FEED_FORWARDS["experts"])
    x, segments = _input(), _segments()
    ct = jnp.asarray(_input(1)) * (segments > 0)[..., None]

    def sparse(params, x):
        return jnp.sum(_experts(params, x, config, segments)[0] * ct)

    def dense(params, x):
        """Every expert on every token, weighted by a table of gates."""
        logits = x @ params["router"]["kernel"]
        valid = np.asarray(segments) > 0
        kept = np.zeros((*logits.shape, 1))
        for (row, position, _), (expert, _) in _assignments(logits_now, config, valid).items():
            kept[row, position, expert] = 1
        chosen = np.stack(
            [
                [np.isin(range(5), _chosen(t, config.experts_per_token)) for t in r]
                for r in logits_now
            ]
        )
        norm = jax.nn.logsumexp(
            logits, axis=-1, where=chosen if config.router_renormalise else None, keepdims=True
        )
        gates = jnp.exp(logits - norm) * kept[..., 0]
        kernels = {name: value["kernel"] for name, value in params["experts"].items()}
        up = jnp.einsum("btd,edf->btef", x, kernels["up"])
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, kernels["gate"])) * up
        y = jnp.einsum("btef,efd,bte->btd", hidden, kernels["down"], gates)
        if "shared" in params:
            shared = {name: value["kernel"] for name, value in params["shared"].items()}
            own = (jax.nn.silu(x @ shared["gate"]) * (x @ shared["up"])) @ shared["down"]
            y = y + jax.nn.sigmoid(x @ params["shared_gate"]["kernel"]) * own
        return jnp.sum(y * ct)

    logits_now = x @ params["router"]["kernel"]
    ours = jax.jit(jax.grad(sparse, (0, 1)))(params, x)
    theirs = jax.grad(dense, (0, 1))(params, x)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _route(logits, k, valid, capacity):
    return route(logits, k, renormalise=True, valid=valid, capacity=capacity)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.sampled_from([1, 3, 6]),
    k=st.sampled_from([1, 2]),
    levels=st.integers(1, 3),
    capacity=st.sampled_from([None, 2]),
    seed=st.integers(0, 999),
)
def test_ties_go_to_the_lower_index_and_room_to_first_choices(experts, k, levels, capacity, seed):
    """Logits of few levels are full of exact ties."""
    k = min(k, experts)
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, levels, (2, 6, experts)).astype(np.float32)
    valid = rng.random((2, 6)) < 0.8
    routing = jax.tree.map(np.asarray, _route(logits, k, valid, capacity))
    for row in range(2):
        for position in range(6):
            chosen = _chosen(logits[row, position], k)
            assert routing.index[row, position].tolist() == chosen
            gates = _gates(logits[row, position].astype(np.float64), chosen, True)
            np.testing.assert_allclose(routing.gate[row, position], gates, rtol=1e-5)
        taken = np.zeros(experts)
        for slot in range(k):
            for position in range(6):
                expert = int(routing.index[row, position, slot])
                fits = bool(valid[row, position]) and (capacity is None or taken[expert] < capacity)
                assert bool(routing.kept[row, position, slot]) == fits
                taken[expert] += valid[row, position]


def test_what_a_router_reports_has_its_closed_forms():
    even = jnp.tile(jnp.eye(4) * 3.0, (2, 2, 1))
    routing = route(even, 1, renormalise=True)
    found = statistics(even, routing, None)
    np.testing.assert_allclose(found["load_balance"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["expert_load"], [0.25] * 4)
    np.testing.assert_allclose(found["router_z"], np.log(np.exp(3) + 3) ** 2, rtol=1e-6)
    collapsed = jnp.broadcast_to(jnp.asarray([50.0, 50, 0, 0]), (2, 8, 4))
    found = statistics(collapsed, route(collapsed, 2, renormalise=True), None, "attention_")
    np.testing.assert_allclose(found["attention_load_balance"], 4 / 2, rtol=1e-6)
    np.testing.assert_allclose(found["attention_expert_load"], [0.5, 0.5, 0, 0])
    assert capacity_of_row(1.0, 2, 11, 5) == 5  # ceil(4.4)


def test_padding_is_routed_nowhere_and_counted_nowhere():
    config = _config(capacity_factor=0.8)
    params = _params(config, FEED_FORWARDS["experts"])
    x = _input()
    other = np.where(np.asarray(_segments())[..., None] > 0, x, 100 * x + 1)
    y, aux = _experts(params, x, config, _segments())
    y2, aux2 = _experts(params, other, config, _segments())
    valid = np.asarray(_segments()) > 0
    np.testing.assert_array_equal(np.asarray(y)[valid], np.asarray(y2)[valid])
    assert not np.any(np.asarray(y)[~valid])
    for name in set(aux) - {"taps"}:
        np.testing.assert_array_equal(aux[name], aux2[name], err_msg=name)
    nothing = statistics(
        aux["taps"]["router_logits"],
        route(
            aux["taps"]["router_logits"],
            2,
            renormalise=True,
            valid=jnp.zeros((BATCH, LENGTH), bool),
        ),
        jnp.zeros((BATCH, LENGTH), bool),
    )
    assert all(np.all(np.isfinite(value)) for value in nothing.values())
    assert nothing["dropped"] == 0


HEADS = {"mixer": "attention_experts", "expert_bias": True, "head_dim": 6}


def _heads_reference(params, x, config):
    """JetMoE's attention by definition: query head `slot * K + j` meets key head j."""
    x, kv, h = np.asarray(x, np.float64), config.kv_heads, config.head_dim
    logits = x @ np.asarray(params["router"]["kernel"], np.float64)
    experts = {
        name: np.asarray(params["experts"][name]["kernel"], np.float64)
        for name in ("query", "output")
    }
    keys, values = (
        (x @ np.asarray(params[name]["kernel"], np.float64)).reshape(*x.shape[:2], kv, h)
        for name in ("key", "value")
    )
    y = np.zeros_like(x) + np.asarray(params["bias"], np.float64)
    for row, position in np.ndindex(*x.shape[:2]):
        chosen = _chosen(logits[row, position], config.experts_per_token)
        gates = _gates(logits[row, position], chosen, True)
        for expert, gate in zip(chosen, gates, strict=True):
            q = (x[row, position] @ experts["query"][expert]).reshape(kv, h)
            scores = np.einsum("jd,sjd->js", q, keys[row, : position + 1]) * h**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out = np.einsum("js,sjd->jd", weights, values[row, : position + 1])
            y[row, position] += gate * (out.reshape(-1) @ experts["output"][expert])
    return y


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_mixture_of_heads_tiles_its_key_heads_over_the_slots(k):
    config = _config(**HEADS, experts_per_token=k, num_heads=2 * k, positions="none")
    params = _params(config, MIXERS["attention_experts"])
    x = _input()
    apply = MIXERS["attention_experts"].apply
    y, _, aux = jax.jit(lambda params, x: apply(params, x, config.layer(0), _context(config), {}))(
        params, x
    )
    np.testing.assert_allclose(y, _heads_reference(params, x, config), rtol=1e-4, atol=1e-5)
    assert {"attention_load_balance", "attention_expert_load"} <= set(aux)


def test_one_expert_of_heads_and_feed_forward_is_a_plain_decoder():
    single = _config(
        **{**HEADS, "expert_bias": False},
        num_experts=1,
        experts_per_token=1,
        num_heads=2,
        expert_d_ff=20,
    )
    plain = dataclasses.replace(single, mixer="attention", feed_forward="gated")
    params = init(single, jax.random.key(0))
    layers = params["layers"]["000-002"]
    attention, experts = layers["attention"], layers["feed_forward"]["experts"]
    inner = {name: {"kernel": value["kernel"][:, 0]} for name, value in experts.items()}
    heads = {
        name: {"kernel": value["kernel"][:, 0]} for name, value in attention["experts"].items()
    }
    heads |= {name: attention[name] for name in ("key", "value")}
    norms = {name: value for name, value in layers.items() if name.endswith("_norm")}
    same = {**params, "layers": {"000-002": {**norms, "attention": heads, "feed_forward": inner}}}
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    np.testing.assert_allclose(
        _forward(params, tokens, single)[0], _forward(same, tokens, plain)[0], atol=1e-5
    )


@pytest.mark.parametrize("fields", [HEADS, {**HEADS, "sliding_window": 4}], ids=["all", "window"])
def test_decoding_step_by_step_equals_the_whole_pass(fields):
    config = _config(**fields)
    params = init(config, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 48)
    whole, _ = _forward(params, tokens, config)
    tight = dataclasses.replace(config, capacity_factor=0.01)  # nothing is dropped with a cache
    cache = init_cache(config, 2, LENGTH, chunk=4)
    step = jax.jit(lambda tokens, cache: forward(params, tokens, tight, cache=cache))
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 10), (10, 11)):
        out, aux = step(tokens[:, start:stop], cache)
        cache = aux["cache"]
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_dense_and_mixed_layers_stand_in_one_model():
    """The first layer dense, the last with fewer experts."""
    config = _config(
        num_layers=3, layer_overrides=((0, "feed_forward", "gated"), (2, "num_experts", 3))
    )
    assert [segment.name for segment in config.segments] == ["000-001", "001-002", "002-003"]
    logits, aux = _forward(init(config, jax.random.key(0)), jnp.ones((1, 7), jnp.int32), config)
    assert np.all(np.isfinite(logits))
    assert aux["load_balance"].shape == (2,)
    assert aux["expert_load"].shape == (2, 5)
    np.testing.assert_allclose(aux["expert_load"].sum(-1), 1.0, rtol=1e-6)


def test_rematerialisation_leaves_gradients_as_they_are():
    config = _config(**HEADS, capacity_factor=0.9, num_layers=1)
    params = init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 48)

    def loss(params, runtime):
        logits, aux = forward(params, tokens, config, runtime)
        return jnp.mean(logits**2) + jnp.sum(aux["load_balance"]) + jnp.sum(aux["router_z"])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for one, other in zip(
        jax.tree.leaves(grad(params, Runtime(remat="dots"))),
        jax.tree.leaves(grad(params, Runtime())),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_auxiliary_losses_are_summed_over_layers_and_reports_are_logged():
    config = _config(capacity_factor=1.0)
    params = init(config, jax.random.key(0))
    batch = {"tokens": jnp.arange(12).reshape(2, 6), "targets": jnp.ones((2, 6), jnp.int32)}

    def apply(params, batch, rng):
        return _forward(params, batch["tokens"], config)

    _, aux = apply(params, batch, None)
    plain, _ = language_model().loss(apply, params, batch, None)
    objective = language_model(
        auxiliary=(("load_balance", 0.5), ("router_z", 0.25)), report=("dropped", "expert_load")
    )
    loss, metrics = objective.loss(apply, params, batch, None)
    extra = 0.5 * aux["load_balance"].sum() + 0.25 * aux["router_z"].sum()
    np.testing.assert_allclose(loss, plain + extra, rtol=1e-6)
    np.testing.assert_allclose(metrics["load_balance"], aux["load_balance"].sum())
    np.testing.assert_allclose(metrics["dropped"], aux["dropped"].mean())
    np.testing.assert_allclose(metrics["expert_load_min"], aux["expert_load"].min())
    np.testing.assert_allclose(metrics["expert_load_max"], aux["expert_load"].max())
    with pytest.raises(ValueError, match="the report 'load', which the model does not give; it gi"):
        language_model(report=("load",)).loss(apply, params, batch, None)


@pytest.mark.slow
def test_the_recipe_trains_on_a_mesh_and_logs_what_its_routers_report(tmp_path):
    values = load_config(Path(__file__).parent.parent / "configs" / "moe_small.py")
    small = {
        "data.path": str(write_text(tmp_path)),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.tokenizer.kind": "bytes",
        "data.length": "32",
        "data.batch_size": "8",
        "mesh.data": "2",
        "mesh.expert": "4",
        "data.validation_fraction": "0.2",
        "model.vocab_size": "264",
        "model.d_model": "32",
        "model.num_layers": "2",
        "model.num_heads": "2",
        "model.kv_heads": "1",
        "model.expert_d_ff": "16",
        "train.auxiliary": "(('load_balance', 0.01),)",
        "train.scan_unroll": "1",
        "train.steps": "3",
        "sample.tokens": "3",
    }
    apply_overrides(values, small)
    result = train_language_model(run_config(values), tmp_path / "run", quiet=True)
    rows = read(RunFolder(result.workdir).metrics)
    assert len(rows) == 3
    for row in (*rows, result.evaluation):
        assert 0 <= row["expert_load_min"] < 1 / 8 < row["expert_load_max"] < 1
        assert row["load_balance"] > 1.9  # the sum over two layers
        assert row["dropped"] == 0


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon", "adamw"])
def test_an_optimizer_takes_each_expert_for_a_matrix_of_its_own(name):
    rng = np.random.default_rng(0)
    whole, gradient = (rng.normal(size=(2, 3, 8, 6)).astype(np.float32) for _ in range(2))
    scale = np.asarray([1.0, 10.0, 0.1], np.float32)[:, None, None]
    whole, gradient = whole * scale, gradient * scale[::-1]

    def updates(place, value, gradient):
        params = {"layers": {"000-002": {place: {"experts": {"up": {"kernel": value}}}}}}
        if place == "dense":
            params = {"layers": {"000-002": {"up": {"kernel": value}}}}
        config = OptimizerConfig(name=name, weight_decay=0.1, factor_from=4)
        optimizer = make_optimizer(config, params)
        gradients = jax.tree.map(lambda _: gradient, params)
        found, _ = optimizer.update(gradients, optimizer.init(params), params)
        return jax.tree.leaves(found)[0]

    together = updates("feed_forward", whole, gradient)
    for expert in range(3):
        alone = updates("dense", whole[:, expert], gradient[:, expert])
        np.testing.assert_allclose(together[:, expert], alone, rtol=1e-4, atol=1e-6)


JETMOE_8B = ModelConfig(
    vocab_size=32000,
    d_model=2048,
    num_layers=24,
    num_heads=32,
    kv_heads=16,
    head_dim=128,
    d_ff=5632,
    mixer="attention_experts",
    feed_forward="experts",
    expert_bias=True,
    tied_embeddings=True,
)


def test_active_parameters_are_those_one_token_meets():
    assert count_parameters(JETMOE_8B) == 8_522_237_952
    assert count_parameters(JETMOE_8B, active=True) == 2_331_445_248
    attention = 12 * 24 * 32 * 128 * (4096 + 1) / 2
    assert flops_per_token(JETMOE_8B, 4096) == 6 * 2_331_445_248 + attention


WRONG = {
    "model.experts_per_token is 6; it may be at most model.num_experts, 5": {
        "experts_per_token": 6
    },
    r"kv_heads \* experts_per_token = 2 \* 2 = 4 of them": {**HEADS, "num_heads": 6},
    "model.qk_norm is 'head'; a mixture of attention heads takes 'none' only": {
        **HEADS,
        "qk_norm": "head",
    },
    "model.shared_expert_gate needs model.shared_expert_d_ff": {"shared_expert_gate": True},
    "model.capacity_factor is 0.0; it must be above 0": {"capacity_factor": 0.0},
    "model.expert_bias adds one": {"feed_forward_bias": True},
    "model.num_experts is 0; it must be at least 1": {"num_experts": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_fields_that_do_not_go_together_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        _config(**WRONG[message])


def test_the_arrays_of_a_mixture_stand_at_their_paths():
    config = _config(**HEADS, shared_expert_d_ff=7, shared_expert_gate=True)
    shapes = {
        path.removeprefix("layers/000-002/"): spec.shape
        for path, (spec, segment) in describe(config).items()
        if segment is not None
    }
    assert shapes == {
        "attention_norm/scale": (16,),
        "feed_forward_norm/scale": (16,),
        "attention/router/kernel": (16, 5),
        "attention/experts/query/kernel": (5, 16, 12),
        "attention/experts/output/kernel": (5, 12, 16),
        "attention/key/kernel": (16, 12),
        "attention/value/kernel": (16, 12),
        "attention/bias": (16,),
        "feed_forward/router/kernel": (16, 5),
        "feed_forward/experts/gate/kernel": (5, 16, 12),
        "feed_forward/experts/up/kernel": (5, 16, 12),
        "feed_forward/experts/down/kernel": (5, 12, 16),
        "feed_forward/shared/gate/kernel": (16, 7),
        "feed_forward/shared/up/kernel": (16, 7),
        "feed_forward/shared/down/kernel": (7, 16),
        "feed_forward/shared_gate/kernel": (16, 1),
        "feed_forward/bias": (16,),
    }
