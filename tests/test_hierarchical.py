"""Roles on meshes of unequal links: the same training for every legal assignment, collectives that
round no more than they say, and refusals that name the field.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_sharded_step import fast_compile  # noqa: F401  a fixture
from tiny import tiny_config, write_text

from sharding import (
    Coding,
    MeshConfig,
    Rule,
    ShardingConfig,
    dequantize_block,
    gather,
    global_batch,
    make_layout,
    make_mesh,
    quantize_block,
    scatter,
    scatter_once,
    swizzle_index,
)
from training import train_language_model
from training.hierarchical import abstract_feedback, hierarchy
from training.objectives import three_functions
from training.state import abstract_state, init_state, place
from training.step import make_step
from training.trainable import everything
from weights import linear

AXES = ("data", "fsdp", "expert")
RULES = (
    Rule("layers/.*/norm", (None,)),
    Rule("layers/.*/kernel", ("d_model", "d_ff")),
    Rule("out/kernel", ("d_model", None)),
    Rule("out/bias", (None,)),
)
WIDTH, ROWS, STEPS = 64, 16, 10


SHAPES = [((3, 5, 8), 4, 2), ((2, 18), 9, -1), ((7, 12), 1, 1), ((16, 3), 8, 0), ((5, 4, 3), 0, 0)]
"""`(shape, block, axis)`; block 0 is one scale for all."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _coded(x, bits, block, axis):
    coded = quantize_block(x, bits, block, axis)
    return coded, dequantize_block(coded)


@hypothesis.given(
    case=st.sampled_from(SHAPES),
    bits=st.sampled_from([8, 4]),
    exponent=st.integers(-33, 30),
    seed=st.integers(0, 999),
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_an_array_comes_back_within_half_a_scale_and_empty_blocks_as_they_were(
    case, bits, exponent, seed
):
    shape, block, axis = case
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * rng.choice([0.0, 1.0, 1e3], shape)).astype(np.float32)
    x *= np.float32(10.0) ** exponent
    x[0] = 0
    coded, back = jax.tree.map(np.asarray, _coded(x, bits, block, axis))
    scale = np.asarray(coded.scales, np.float64)
    scale = np.repeat(scale, block, axis) if block else scale
    assert np.all(np.abs(np.float64(back) - x) <= scale / 2 * (1 + 1e-6))
    assert not back[0].any()
    assert np.abs(np.asarray(coded.codes, np.int32)).max() <= 2 ** (bits - 1) - 1


@pytest.fixture(autouse=True, scope="module")
def _cache_as_it_was():
    """Steps with collectives of their own turn the cache of programs off, on a CPU."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden_by_codes(value):
    x = jnp.ones((2, 8)).at[1, 3].set(value)
    back = np.asarray(dequantize_block(quantize_block(x, 4, 8)))
    assert not np.isfinite(back[1]).all()
    assert np.isfinite(back[0]).all()
    with pytest.raises(ValueError, match=r"blocks of 3 do not divide axis 1 of shape \(2, 8\)"):
        quantize_block(x, 8, 3)


def _on_devices(function, x, dims, sizes):
    """`function` of one device's `x[device]`, pieces put together as `dims` split them."""
    mesh = make_mesh(MeshConfig(**sizes))
    axes = tuple(axis for axis in AXES if sizes.get(axis, 1) > 1)
    split = jax.shard_map(
        lambda x: function(x[0]),
        mesh=mesh,
        in_specs=P(axes),
        out_specs=P(*dims),
        axis_names=set(axes),
        check_vma=False,
    )
    return np.asarray(jax.jit(split)(x))


LAYOUTS = [
    ((("data", "fsdp"), ()), {"data": 2, "fsdp": 4}),
    (((), ("fsdp", "data")), {"data": 4, "fsdp": 2}),
    ((("fsdp",), ("expert", "data")), {"data": 2, "fsdp": 2, "expert": 2}),
]


@pytest.mark.parametrize(("dims", "sizes"), LAYOUTS)
def test_hops_leave_the_pieces_of_one_reduction_and_round_once_each(dims, sizes):
    x = np.random.default_rng(0).integers(-99, 99, (8, 16, 16)).astype(np.float32)
    whole, largest = x.sum(0), 8 * 99 / 2
    on = functools.partial(_on_devices, x=x, dims=dims, sizes=sizes)
    # Sums of small integers are exact, so equality is of every piece's place.
    np.testing.assert_array_equal(on(lambda x: scatter(x, dims, Coding())), whole)
    for precision, steps in (("int8", 127), ("int4", 7)):
        coding = Coding(precision, 0, 2)
        hops = on(lambda x: scatter(x, dims, coding))
        assert 0 < np.abs(hops - whole).max() <= len(sizes) * largest / steps * 1.1

        def both(x):
            once, left = scatter_once(x, dims, coding, jnp.zeros_like(x))
            return jnp.stack([once, scatter(left, dims, Coding())])

        once, left = _on_devices(both, x, ((), *dims), sizes)
        assert np.abs(left).max() <= largest / steps * 1.01
        np.testing.assert_allclose(once + left, whole, atol=1e-3)


@pytest.mark.parametrize("secondary", [(), ("fsdp",)])
@pytest.mark.parametrize(("dims", "sizes"), LAYOUTS)
def test_pieces_are_gathered_to_what_they_were_cut_from(dims, sizes, secondary):
    x = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)

    def there_and_back(x, coding):
        piece = scatter(x / 8, dims, Coding())
        return gather(piece, dims, coding, secondary)

    copies = np.stack([x] * 8)
    exact = functools.partial(there_and_back, coding=Coding())
    found = _on_devices(exact, copies, (), sizes)
    np.testing.assert_allclose(found, x, rtol=1e-6)
    coarse = functools.partial(there_and_back, coding=Coding("int8", 0, 2))
    found = _on_devices(coarse, copies, (), sizes)
    assert np.abs(found - x).max() <= np.abs(x).max() / 127 / 2 * 1.01


def test_pieces_are_reordered_before_two_hops_as_published():
    assert swizzle_index(2, 4) == (0, 4, 1, 5, 2, 6, 3, 7)


def _loss(apply, params, batch, rng):
    y = apply(params, batch, rng)[0]
    error = jnp.sum(jnp.square(y - batch["y"]), -1) * batch["loss_mask"]
    return jnp.sum(error) / jnp.maximum(jnp.sum(batch["loss_mask"]), 1e-8), {}


def _apply(params, batch, rng):
    def layer(x, params):
        return jnp.tanh(linear(params, x) * params["norm"]), None

    x, _ = jax.lax.scan(layer, batch["x"], params["layers"]["0-2"])
    return linear(params["out"], x), {}


def _params(key):
    kernels = jax.random.normal(key, (2, WIDTH, WIDTH)) / 8
    layers = {"kernel": kernels, "norm": jnp.ones((2, WIDTH))}
    out = {"kernel": jax.random.normal(key, (WIDTH, 3)) / 8, "bias": jnp.zeros(3)}
    return {"layers": {"0-2": layers}, "out": out}


def _batches(count=STEPS):
    rng = np.random.default_rng(0)
    for _ in range(count):
        x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
        mask = (rng.random(ROWS) < 0.7).astype(np.float32)
        yield {"x": x, "y": x[:, :3] * x[:, 3:6], "loss_mask": mask}


def _roles(**roles):
    return {role: (("d_model", axes),) for role, axes in roles.items()}


def _run(layout, steps=STEPS, accumulation=1, formats=True, again=True, batches=None, spoil=None):
    """`(losses, params, state)` of a few steps."""
    params = jax.eval_shape(_params, jax.random.key(0))
    optimizer = optax.adam(1.0, eps=1e-3)
    optimizer = optax.chain(optimizer, optax.scale(-1.0))
    how = hierarchy(layout, params, RULES, everything, formats=formats, again=again)
    feedback = abstract_feedback(how, params, everything)
    placement = place(abstract_state(params, optimizer, feedback=feedback), RULES, layout)
    step = make_step(
        three_functions(lambda rows: rows, _loss),
        _apply,
        optimizer,
        lambda step: 1e-2,
        accumulation=accumulation,
        clip_norm=1.0,
        placement=placement,
        hierarchy=how,
    )
    state = init_state(
        _params, optimizer, jax.random.key(0), placement=placement, feedback=feedback
    )
    losses = []
    for batch in batches or _batches(steps):
        state, metrics = step(state, global_batch(batch, layout))
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "tokens")])
    return np.asarray(losses), jax.tree.map(np.asarray, state.params), state


@functools.cache
def _plain():
    return _run(make_layout(make_mesh(MeshConfig(data=8))))


def _layout(sizes=(2, 2, 2), **fields):
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    return make_layout(mesh, ShardingConfig(**fields))


def _assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for path, value in jax.tree.leaves_with_path(expected[1]):
        got = dict(jax.tree.leaves_with_path(found[1]))[path]
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-6, err_msg=str(path))


SCHEMES = {
    "zero 1": (_roles(weights=(), optimizer=AXES), {}, {}),
    "zero 3": (_roles(weights=AXES), {}, {"accumulation": 2}),
    "secondary": (_roles(weights=AXES), {"secondary": ("expert",)}, {}),
    "kept": (_roles(weights=AXES), {"secondary": ("fsdp",)}, {"again": False}),
    "whole": (_roles(weights=AXES), {}, {"formats": False}),
    "three levels": (
        _roles(weights=("expert",), gradients=("fsdp", "expert"), optimizer=AXES),
        {},
        {"accumulation": 2},
    ),
}


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_weights_gradients_and_state_lie_changes_no_parameter(scheme):
    roles, collectives, options = SCHEMES[scheme]
    layout = _layout(reduce="float32", **roles, **collectives)
    found = _run(layout, **options)
    _assert_equal(found, _plain())
    _, _, state = found
    spec = state.params["layers"]["0-2"]["kernel"].sharding.spec
    assert set(spec[1]) == set(AXES)  # masters lie where the optimizer state does
    assert state.opt_state[0][0].mu["layers"]["0-2"]["kernel"].sharding.spec == spec


def _chains():
    """Every way to place three axes, whatever their names: each on no role, on the last, the last
    two, or all.
    """
    for index, levels in enumerate(itertools.combinations_with_replacement(range(4), 3)):
        turned = (*levels[index % 3 :], *levels[: index % 3])
        yield [
            tuple(axis for axis, level in zip(AXES, turned, strict=True) if level >= least)
            for least in (3, 2, 1)
        ]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_every_assignment_within_the_rule_trains_like_plain_data_parallelism():
    chains = list(_chains())
    assert len(chains) == 20
    for weights, gradients, optimizer in chains:
        roles = _roles(weights=weights, gradients=gradients, optimizer=optimizer)
        _assert_equal(_run(_layout(reduce="float32", **roles)), _plain())


REFUSED = [
    (_roles(weights=("fsdp", "data"), gradients=("fsdp",)), "weights split 'd_model'"),
    (_roles(weights=(), gradients=("data",), optimizer=("fsdp",)), "gradients split 'd_model'"),
    ({"secondary": ("tensor",)}, "secondary ⊂ weights"),
    ({"secondary": ("fsdp",)}, r"not all, of the mesh axes .* which are \('fsdp',\)"),
    ({"secondary": ("fdsp",)}, "unknown mesh axis 'fdsp'; nearest: fsdp"),
    ({"reduce": "int5"}, "sharding.reduce is 'int5'.*nearest: int8, int4"),
    ({"gather": "int4"}, "sharding.gather is 'int4'"),
    ({"block": -1}, "sharding.block=-1"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_assignments_that_break_the_rule_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _layout((2, 4, 1), **{"reduce": "float32", **fields})


UNFIT = [
    ({"reduce": "int4", "zero": 0}, {"data": 8}, "nothing splits the optimizer state"),
    ({"error_feedback": True}, {"fsdp": 8}, "no gradient is rounded once a step"),
    ({"reduce": "int8"}, {"fsdp": 4, "stage": 2}, "mesh.stage=2: sharding.gather"),
    ({"reduce": "int8"}, {"fsdp": 2, "context": 2, "tensor": 2}, "mesh.context=2 and mesh.tensor"),
]


@pytest.mark.parametrize(("fields", "sizes", "message"), UNFIT)
def test_meshes_that_explicit_collectives_do_not_fit_are_refused(fields, sizes, message):
    layout = make_layout(make_mesh(MeshConfig(**sizes)), ShardingConfig(**fields))
    params = jax.eval_shape(_params, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        hierarchy(layout, params, RULES, everything, formats=True, again=True)


ROUNDED = _roles(weights=("expert",), gradients=("fsdp", "expert"), optimizer=AXES)


@pytest.mark.usefixtures("fast_compile")
def test_rounded_gradients_train_alike_and_a_step_that_is_not_finite_leaves_no_trace():
    fields = {"gather": "int8", "reduce": "int4", "block": 32, **ROUNDED}
    layout = _layout(error_feedback=True, **fields)
    losses, params, state = _run(layout)
    np.testing.assert_allclose(losses[:, 0], _plain()[0][:, 0], rtol=0.1)
    assert not np.array_equal(losses, _plain()[0])
    left = state.feedback["layers"]["0-2"]["kernel"]
    assert left.shape == (2, 2, WIDTH, WIDTH)
    assert left.sharding.spec[:3] == ("data", None, ("expert", "fsdp"))
    assert state.feedback["layers"]["0-2"]["norm"] is None
    assert np.asarray(left).any()
    poisoned = [*_batches()]
    poisoned.append({**poisoned[0], "x": np.full_like(poisoned[0]["x"], np.nan)})
    again = _run(layout, batches=poisoned)
    assert int(again[2].skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, again[1], params)
    np.testing.assert_array_equal(again[2].feedback["layers"]["0-2"]["kernel"], left)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_a_language_model_trains_in_int4_and_goes_on_bit_for_bit_after_a_stop(tmp_path):
    fields = {"gather": "int8", "reduce": "int4", "error_feedback": True, "block": 32}
    tables = {"optimizer": (("d_model", ("fsdp", "data")),)}
    config = tiny_config(
        write_text(tmp_path),
        mesh__data=4,
        mesh__fsdp=2,
        train__accumulation=1,
        **{f"sharding__{name}": value for name, value in {**fields, **tables}.items()},
    )
    whole = train_language_model(config, tmp_path / "whole", quiet=True)
    train_language_model(config, tmp_path / "cut", stop_at=3, quiet=True)
    cut = train_language_model(config, tmp_path / "cut", quiet=True)
    jax.tree.map(np.testing.assert_array_equal, cut.state, whole.state)
    assert any(np.asarray(left).any() for left in jax.tree.leaves(whole.state.feedback))
    assert whole.evaluation["loss"] < 4.5 < np.log(264)
