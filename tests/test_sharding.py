"""Mesh, rules and layouts: what is placed where, and the errors a user gets for what cannot be."""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import weights
from sharding import (
    AXES,
    Layout,
    MeshConfig,
    Rule,
    ShardingConfig,
    check_heads,
    constrain,
    gather_rows,
    make_layout,
    make_mesh,
    match_rules,
    override_axes,
    partition,
    prefixed,
    rules_table,
    sharded_init,
    state_shardings,
)
from sharding.mesh import arrange

RULES = (
    Rule("embed/table", ("vocab", "d_model")),
    Rule(r"layers/.*/query/kernel", ("d_model", "heads")),
    Rule(r".*/scale", ("hidden",), init="ones", weight_decay=0.0),
)


def _params(vocab=16, d_model=8, heads=8, make=jax.ShapeDtypeStruct):
    return {
        "embed": {"table": make((vocab, d_model), jnp.float32)},
        "layers": {"000-003": {"query": {"kernel": make((3, d_model, heads), jnp.float32)}}},
        "final_norm": {"scale": make((d_model,), jnp.float32)},
    }


def _layout(sharding=None, **sizes):
    return make_layout(make_mesh(MeshConfig(**sizes)), sharding)


@given(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=5, max_size=5), st.integers(1, 512))
def test_the_filled_axis_takes_exactly_the_devices_left_over(inner, devices):
    config = MeshConfig(-1, *inner)
    if devices % math.prod(inner) == 0:
        assert math.prod(config.sizes(devices).values()) == devices
        return
    with pytest.raises(
        ValueError, match=f"{devices} devices.*a mesh that would work: (.*)"
    ) as error:
        config.sizes(devices)
    advice = dict(item.split("=") for item in str(error.value).rsplit(": ", 1)[1].split())
    advised = MeshConfig(**{"data": 1, **{axis: int(size) for axis, size in advice.items()}})
    assert math.prod(advised.sizes(devices).values()) == devices


def test_a_mesh_has_all_axes_in_order_with_tensor_between_neighbours():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == (2, 2, 1, 1, 1, 2)
    assert [device.id for device in mesh.devices[0, 0, 0, 0, 0]] == [0, 1]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a device says of its place."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "described"


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1, 1, 4), (2, 4, 1, 1, 1, 2), (1, 1, 1, 4, 1, 4)])
def test_over_several_slices_only_outer_axes_cross_the_slow_network(sizes):
    chips = [Chip(index, slice_index=index % 4) for index in range(16)]
    placed = arrange(sizes, chips)
    assert placed.shape == sizes
    for group in placed.reshape(-1, sizes[-1]):
        assert len({chip.slice_index for chip in group}) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: MeshConfig(data=-1, tensor=-1),
            "only one mesh axis may be -1, not data and tensor",
        ),
        (lambda: MeshConfig(tensor=0), "1 or more, or -1 to fill: tensor=0"),
        (lambda: make_mesh(MeshConfig(tensor=3)), "tensor=3 does not fit 8 devices"),
        (lambda: make_mesh(MeshConfig(data=2, fsdp=2)), "mesh that would work: data=4 fsdp=2"),
        (lambda: ShardingConfig(rules="atuo"), "sharding.rules is 'atuo'.*nearest: auto"),
        (lambda: _layout().spec(("d_modle",)), "unknown logical axis 'd_modle'.*d_model"),
        (
            lambda: _layout(fsdp=8).spec(("d_model", "d_model")),
            "mesh axis 'fsdp' twice.*'d_model' and 'd_model'",
        ),
        (
            lambda: _layout(ShardingConfig(weights=(("vocab", ("tensr",)),))),
            "unknown mesh axis 'tensr'; nearest: tensor",
        ),
        (
            lambda: _layout(ShardingConfig(optimizer=(("d_ff", ()),))),
            "gradients split 'd_ff' over .'tensor'. but optimizer only over",
        ),
        (lambda: Rule("layers/(", ()), r"rule 'layers/\(' is not a regular expression"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_every_array_goes_where_its_logical_axes_say():
    shardings = partition(_params(), RULES, _layout(fsdp=2, tensor=4))
    specs = {path: sharding.spec for path, sharding in weights.flatten(shardings).items()}
    assert specs == {
        "embed/table": P("tensor", "fsdp"),
        "final_norm/scale": P(None),
        "layers/000-003/query/kernel": P(None, "fsdp", "tensor"),
    }


def test_zero_stages_split_state_before_gradients_before_weights():
    axes = ("d_model", "heads")
    for zero in range(4):
        layout = _layout(ShardingConfig(zero=zero), fsdp=4, tensor=2)
        roles = ("optimizer", "gradients", "weights")
        split = [layout.spec(axes, role) == P("fsdp", "tensor") for role in roles]
        assert split == [zero >= 1, zero >= 2, zero >= 3]
        assert layout.spec(("batch",)) == P("fsdp")


def test_the_table_can_be_changed_for_one_role_and_later_roles_follow():
    layout = _layout(ShardingConfig(gradients=(("hidden", "fsdp"),)), fsdp=8)
    assert layout.spec(("hidden",)) == P(None)
    assert (
        layout.spec(("hidden",), "gradients") == layout.spec(("hidden",), "optimizer") == P("fsdp")
    )


def test_an_array_without_a_rule_and_a_rule_without_an_array_are_errors():
    params = weights.paths(_params())
    with pytest.raises(ValueError, match=r"(?s)no sharding rule.*final_norm/scale .nearest patt"):
        match_rules(RULES[1:2], params)
    with pytest.raises(
        ValueError, match=r"'layers/.\*/qeury/kernel' matches no array.*query/kernel"
    ):
        match_rules((*RULES, Rule("layers/.*/qeury/kernel", ())), params)
    with pytest.raises(
        ValueError, match=r"never applies: layers/000-003/query/kernel.*earlier rule"
    ):
        match_rules((*RULES, Rule("layers/000-003/query/kernel", ())), params)
    with pytest.raises(ValueError, match=r"embed/table: shape \(16, 8\) has 2 axes but.*gives 1"):
        partition(_params(), (Rule("embed/table", ("vocab",)), *RULES[1:]), _layout())


def test_an_indivisible_axis_names_array_axis_sizes_and_a_mesh_that_works_for_all():
    params = _params(vocab=20, heads=6)
    with pytest.raises(ValueError, match="would work") as error:
        partition(params, RULES, _layout(tensor=8))
    message = str(error.value)
    assert "embed/table (20, 8): axis 0 (vocab) of size 20 does not divide over tensor=8" in message
    assert "layers/000-003/query/kernel (3, 8, 6): axis 2 (heads) of size 6" in message
    advice = dict(item.split("=") for item in message.rsplit(": ", 1)[1].split())
    partition(params, RULES, _layout(**{axis: int(size) for axis, size in advice.items()}))


def test_heads_are_never_split_and_few_key_heads_are_kept_whole_with_a_note(caplog):
    layout = _layout(tensor=4)
    with pytest.raises(ValueError, match=r"6 attention heads do not divide over 4.*tensor=2"):
        check_heads(layout, 6, 6)
    with caplog.at_level(logging.INFO, "sharding"):
        fitted = check_heads(layout, 8, 2)
    assert "2 key/value heads do not divide over mesh axis 'tensor' (4)" in caplog.text
    assert fitted.spec(("heads", "kv_heads")) == P("tensor", None)
    assert check_heads(layout, 8, 4) is layout


def test_rules_of_a_model_hold_below_a_prefix_and_stacked_layers_keep_their_axis():
    tree = {"student": _params(), "teacher": _params()}
    rules = (*prefixed(RULES, "student"), *prefixed(RULES, "teacher"))
    shardings = partition(tree, rules, _layout(tensor=8))
    for name in tree:
        kernel = shardings[name]["layers"]["000-003"]["query"]["kernel"]
        assert kernel.spec == P(None, None, "tensor")


def test_axes_can_be_changed_by_pattern_while_multipliers_stay():
    paths = weights.paths(_params())
    changed = override_axes(RULES, [("embed/.*", (None, "d_model"))], paths)
    rule = match_rules(changed, paths)
    assert rule["embed/table"].axes == (None, "d_model")
    everywhere = override_axes(RULES, [(".*/scale", ("d_model",))], paths)
    scale = match_rules(everywhere, paths)["final_norm/scale"]
    assert (scale.axes, scale.init, scale.weight_decay) == (("d_model",), "ones", 0.0)
    with pytest.raises(ValueError, match=r"'embd/table' matches no array; nearest.*embed/table"):
        override_axes(RULES, [("embd/table", ())], paths)


def test_rules_print_as_python_that_reads_back():
    scope = {"Rule": Rule}
    exec(rules_table(RULES), scope)
    assert scope["RULES"] == RULES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A format in miniature: int8 `[d_in, d_out]` with a scale for each column."""

    data: jax.Array
    scale: jax.Array

    def matmul(self, x, rng=None):
        return x @ self.data * self.scale

    def dequantize(self, dtype=jnp.float32):
        return (self.data * self.scale).astype(dtype)

    def nbytes(self):
        return self.data.size + 4 * self.scale.size

    def prepare(self, backend):
        return self

    def specs(self, spec):
        return Scaled(data=spec, scale=P(spec[1]))


def test_a_weight_format_is_placed_by_the_rule_of_the_matrix_it_stands_for():
    params = _params()
    kernel = Scaled(
        jax.ShapeDtypeStruct((3, 8, 8), jnp.int8), jax.ShapeDtypeStruct((3, 8), jnp.float32)
    )
    params["layers"]["000-003"]["query"]["kernel"] = kernel
    shardings = partition(params, RULES, _layout(fsdp=2, tensor=4))
    placed = shardings["layers"]["000-003"]["query"]["kernel"]
    assert (placed.data.spec, placed.scale.spec) == (P(None, "fsdp", "tensor"), P(None, "tensor"))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)


def test_optimizer_state_follows_its_parameters_and_the_rest_is_replicated():
    layout = _layout(fsdp=4, tensor=2)
    params = _params()
    mask = {"embed": True, "layers": False, "final_norm": False}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), mask), optax.adafactor()
    )
    state = jax.eval_shape(optimizer.init, params)
    shardings = state_shardings(state, params, partition(params, RULES, layout, role="optimizer"))
    adam = shardings[1].inner_state[0]
    assert adam.mu["embed"]["table"].spec == adam.nu["embed"]["table"].spec == P("tensor", "fsdp")
    assert adam.count.spec == P()
    assert jax.tree.structure(shardings) == jax.tree.structure(state)


def test_initial_values_are_made_in_place_and_do_not_depend_on_the_mesh():
    def init(rng):
        return _params(make=lambda shape, dtype: jax.random.normal(rng, shape, dtype))

    rng = jax.random.key(0)
    shardings = partition(_params(), RULES, _layout(fsdp=2, tensor=4))
    params = sharded_init(init, shardings, rng)
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(init)(rng))
    kernel = params["layers"]["000-003"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 4, 2)}


def test_constraints_place_activations_and_leave_what_does_not_divide_whole():
    layout = _layout(data=2, context=2, tensor=2)
    place = jax.jit(lambda x: constrain(x * 2, ("batch", "length", "d_ff"), layout))
    for shape, spec in [
        ((4, 6, 8), P("data", "context", "tensor")),
        ((4, 1, 8), P("data", None, "tensor")),
    ]:
        x = place(jnp.ones(shape))
        assert x.sharding.is_equivalent_to(jax.NamedSharding(layout.mesh, spec), 3)
    assert constrain(x, ("batch", "length", "d_ff"), None) is x
    with pytest.raises(ValueError, match=r"2 logical axes .* shape \(4, 1, 8\)"):
        constrain(x, ("batch", "length"), layout)


def test_tokens_are_looked_up_in_a_table_split_both_ways_without_gathering_its_vocabulary():
    layout = _layout(data=2, fsdp=2, tensor=2)
    table = jnp.arange(160.0 * 32).reshape(160, 32)
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, 160)

    def look_up(table, tokens):
        x = weights.embed({"table": gather_rows(table, layout)}, tokens, jnp.float32)
        return constrain(x, ("batch", "length", "hidden"), layout)

    placed = jax.device_put(table, layout.sharding(("vocab", "d_model")))
    rows = jax.device_put(tokens, layout.sharding(("batch", "length")))
    compiled = jax.jit(look_up).lower(placed, rows).compile()
    np.testing.assert_array_equal(compiled(placed, rows), table[tokens])
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert len(gathers) == 1
    assert "f32[80,32]" in gathers[0]
    assert gather_rows(table, _layout(tensor=8)) is table
    assert gather_rows(table, None) is table


def test_layouts_are_static_arguments_of_a_compiled_function():
    traced = []

    @jax.jit
    def plain(x):
        return x

    def twice(x, layout: Layout):
        traced.append(layout)
        return constrain(x, ("batch",), layout) * 2

    compiled = jax.jit(twice, static_argnums=1)
    for _ in range(2):
        compiled(plain(jnp.ones(8)), _layout(data=8))
    assert len(traced) == 1
