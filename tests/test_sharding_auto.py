"""Rules derived for models nobody wrote rules for: trees named and shaped as published ones are."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import weights
from model import ModelConfig, abstract, rules
from sharding import (
    MeshConfig,
    check_heads,
    derive_rules,
    make_layout,
    make_mesh,
    match_rules,
    partition,
    rules_table,
)
from sharding.auto_graph import column_row_pairs


def _tree(shapes):
    return weights.from_flat(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    )


def _linear(path, d_in, d_out, bias=True):
    return {f"{path}/kernel": (d_in, d_out)} | ({f"{path}/bias": (d_out,)} if bias else {})


def _norm(path, size, bias=True):
    return {f"{path}/scale": (size,)} | ({f"{path}/bias": (size,)} if bias else {})


def _gptj():
    d, ff, vocab = 4096, 16384, 50400
    tree = {"transformer/wte/embedding": (vocab, d)} | _linear("lm_head", d, vocab)
    tree |= _norm("transformer/ln_f", d)
    for layer in range(2):
        h = f"transformer/h/{layer}"
        tree |= _norm(f"{h}/ln_1", d)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tree |= _linear(f"{h}/attn/{name}", d, d, bias=False)
        tree |= _linear(f"{h}/mlp/fc_in", d, ff) | _linear(f"{h}/mlp/fc_out", ff, d)
    return tree


def _llama(d=4096, kv=1024, ff=14336, vocab=128256, mixture=False):
    tree = {"model/embed_tokens/embedding": (vocab, d)} | _linear("lm_head", d, vocab, bias=False)
    tree |= _norm("model/norm", d, bias=False)
    for layer in range(2):
        h = f"model/layers/{layer}"
        tree |= _norm(f"{h}/input_layernorm", d, bias=False)
        for name, width in {"q_proj": d, "k_proj": kv, "v_proj": kv}.items():
            tree |= _linear(f"{h}/self_attn/{name}", d, width, bias=False)
        tree |= _linear(f"{h}/self_attn/o_proj", d, d, bias=False)
        if mixture:
            tree |= _linear(f"{h}/block_sparse_moe/gate", d, 8, bias=False)
            names = [(f"block_sparse_moe/experts/{e}/", "w1", "w2", "w3") for e in range(8)]
        else:
            names = [("mlp/", "gate_proj", "down_proj", "up_proj")]
        for prefix, gate, down, up in names:
            tree |= _linear(f"{h}/{prefix}{gate}", d, ff, bias=False)
            tree |= _linear(f"{h}/{prefix}{up}", d, ff, bias=False)
            tree |= _linear(f"{h}/{prefix}{down}", ff, d, bias=False)
    return tree


def _t5():
    d, inner, ff = 1024, 1024, 2816
    tree = {"shared/embedding": (32128, d)} | _linear("lm_head", d, 32128, bias=False)
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        tree |= {f"{stack}/final_layer_norm/weight": (d,)}
        for index in range(layers - 1):
            names = ["SelfAttention", "EncDecAttention"][: layers - 1]
            for place, name in enumerate(names):
                h = f"{stack}/block/{index}/layer/{place}"
                for which in "qkv":
                    tree |= _linear(f"{h}/{name}/{which}", d, inner, bias=False)
                tree |= _linear(f"{h}/{name}/o", inner, d, bias=False)
                tree |= {f"{h}/layer_norm/weight": (d,)}
            h = f"{stack}/block/{index}/layer/{len(names)}/DenseReluDense"
            tree |= _linear(f"{h}/wi_0", d, ff, bias=False) | _linear(
                f"{h}/wi_1", d, ff, bias=False
            )
            tree |= _linear(f"{h}/wo", ff, d, bias=False)
        bias = f"{stack}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
        tree |= {bias: (32, 16)}
    return tree


def _opt(vocab=50272, d=2048, ff=8192):
    tree = {"model/decoder/embed_tokens/embedding": (vocab, d)}
    tree |= {"model/decoder/embed_positions/embedding": (2050, d)}
    for layer in range(2):
        tree |= _opt_layer(f"model/decoder/layers/{layer}", d, ff, ["self_attn"])
    return tree


def _opt_layer(h, d, ff, attentions):
    tree = _norm(f"{h}/final_layer_norm", d)
    for name in attentions:
        tree |= _norm(f"{h}/{name}_layer_norm", d)
        for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tree |= _linear(f"{h}/{name}/{which}", d, d)
    return tree | _linear(f"{h}/fc1", d, ff) | _linear(f"{h}/fc2", ff, d)


def _bart():
    d, ff = 1024, 4096
    tree = {"model/shared/embedding": (50264, d), "final_logits_bias": (1, 50264)}
    for stack, attentions in (
        ("encoder", ["self_attn"]),
        ("decoder", ["self_attn", "encoder_attn"]),
    ):
        tree |= {f"model/{stack}/embed_positions/embedding": (1026, d)}
        tree |= _norm(f"model/{stack}/layernorm_embedding", d)
        for layer in range(2):
            tree |= _opt_layer(f"model/{stack}/layers/{layer}", d, ff, attentions)
    return tree


FAMILIES = {
    "gpt-j": (_gptj, 16, 16),
    "llama": (_llama, 32, 8),
    "mixtral": (lambda: _llama(vocab=32000, mixture=True), 32, 8),
    "t5": (_t5, 16, 16),
    "opt": (_opt, 32, 32),
    "bart": (_bart, 16, 16),
}
ROW = ("out_proj", "o_proj", "/o", "fc_out", "down_proj", "wo", "w2", "fc2")


@pytest.mark.parametrize("family", FAMILIES)
def test_published_models_split_every_matrix_in_megatron_pairs_and_attention_by_heads(family):
    build, heads, kv_heads = FAMILIES[family]
    shapes = build()
    params = _tree(shapes)
    derived = derive_rules(params, "tensor", 8, num_heads=heads, kv_heads=kv_heads)
    layout = make_layout(make_mesh(MeshConfig(tensor=8)))
    placed = weights.flatten(partition(params, derived, layout))
    for path, shape in shapes.items():
        spec = placed[path].spec
        module, _, leaf = path.rpartition("/")
        row = module.endswith(ROW)
        if leaf == "kernel" and not module.endswith("moe/gate"):
            assert spec[int(not row)] == "tensor", (path, spec)
            assert spec[int(row)] is None
            if "bias" in path or f"{module}/bias" in placed:
                assert tuple(placed[f"{module}/bias"].spec) == ((None,) if row else ("tensor",))
        elif leaf == "embedding" and "position" not in path and "relative" not in path:
            assert spec[0] == "tensor", path
        elif len(shape) == 1 and leaf != "bias":
            assert tuple(spec) == (None,), path
    assert len(derived) < len(shapes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rules_derived_for_our_own_llama_place_it_as_its_own_rules_do(tied, fsdp, kv_heads):
    config = ModelConfig(
        vocab_size=64,
        d_model=32,
        num_layers=3,
        num_heads=8,
        kv_heads=kv_heads,
        d_ff=48,
        tied_embeddings=tied,
        qkv_bias=True,
        output_bias=True,
    )
    params = abstract(config)
    layout = check_heads(make_layout(make_mesh(MeshConfig(fsdp=fsdp, tensor=4))), 8, kv_heads)
    derived = derive_rules(params, "tensor", 4, fsdp=fsdp, num_heads=8, kv_heads=kv_heads)
    mine = partition(params, derived, layout)
    theirs = partition(params, rules(config), layout)
    assert weights.flatten(mine) == weights.flatten(theirs)


def test_key_heads_that_do_not_divide_stay_whole():
    params = _tree(_llama(kv=256))
    derived = match_rules(
        derive_rules(params, "tensor", 8, num_heads=32, kv_heads=2), weights.paths(params)
    )
    assert derived["model/layers/0/self_attn/k_proj/kernel"].axes == ("d_model", None)
    assert derived["model/layers/0/self_attn/q_proj/kernel"].axes == ("d_model", "heads")


def test_scanned_flax_modules_with_heads_as_an_axis_split_that_axis():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            y = linen.LayerNorm(name="norm")(x)
            x = x + linen.MultiHeadDotProductAttention(num_heads=4, name="attention")(y)
            return x + linen.Dense(16, name="down")(linen.Dense(64, name="up")(x)), None

    stack = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = jax.eval_shape(stack().init, jax.random.key(0), jnp.ones((1, 2, 16)), None)["params"]
    derived = match_rules(derive_rules(params, "tensor", 2), weights.paths(params))
    axes = {path: rule.axes for path, rule in derived.items()}
    assert axes["attention/query/kernel"] == ("layers", "d_model", "heads", None)
    assert axes["attention/key/bias"] == ("layers", "kv_heads", None)
    assert axes["attention/out/kernel"] == ("layers", "heads", None, "d_model")
    assert axes["up/kernel"] == ("layers", "d_model", "d_ff")
    assert axes["norm/scale"] == ("layers", None)
    assert axes["down/bias"] == ("layers", None)


def test_experts_are_split_over_experts_and_the_router_is_whole():
    params = _tree(
        {
            "layers/000-002/moe/experts/up/kernel": (2, 8, 16, 64),
            "layers/000-002/moe/experts/down/kernel": (2, 8, 64, 16),
            "layers/000-002/moe/experts/down/bias": (2, 8, 16),
            "layers/000-002/moe/gate/kernel": (2, 16, 8),
        }
    )
    derived = {
        rule.pattern.split("moe/")[1]: rule.axes for rule in derive_rules(params, "tensor", 4)
    }
    assert derived == {
        "experts/down/kernel": ("experts", "d_ff", "d_model"),
        "experts/up/kernel": ("experts", "d_model", "d_ff"),
        "experts/down/bias": ("experts", None),
        "gate/kernel": ("d_model", None),
    }


def _nameless(params, x):
    hidden = jax.nn.gelu(x @ params["zeta"]["kernel"]) * 2
    y = x + hidden @ params["alpha"]["kernel"]
    y = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
    return y @ params["omega"]["kernel"]


def test_names_that_say_nothing_are_paired_by_the_graph_and_else_alternate():
    params = _tree({"alpha/kernel": (64, 16), "omega/kernel": (16, 32), "zeta/kernel": (16, 64)})
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    assert column_row_pairs(_nameless, params, x) == (("zeta/kernel", "alpha/kernel"),)
    traced = derive_rules(params, "tensor", 8, apply=_nameless, inputs=(x,))
    assert {rule.pattern: rule.axes for rule in traced} == {
        "alpha/kernel": ("d_ff", "d_model"),
        "omega/kernel": ("d_model", "d_ff"),
        "zeta/kernel": ("d_model", "d_ff"),
    }
    alternating = {rule.pattern: rule.axes for rule in derive_rules(params, "tensor", 8)}
    assert alternating["alpha/kernel"] == ("d_model", "d_ff")
    assert alternating["omega/kernel"] == ("d_ff", "d_model")


def test_the_graph_is_read_inside_scans_and_compiled_functions():
    def scanned(params, x):
        def layer(x, kernels):
            first, second = kernels
            return x + jax.jit(jax.nn.relu)(x @ first.astype(x.dtype)) @ second, None

        return jax.lax.scan(layer, x, (params["b"], params["a"]))[0]

    params = _tree({"a": (3, 64, 16), "b": (3, 16, 64)})
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    assert ("b", "a") in column_row_pairs(scanned, params, x)


def test_fused_projections_are_not_cut_across_queries_and_keys():
    params = _tree(_linear("h/0/attn/c_attn", 64, 192) | _linear("h/0/attn/c_proj", 64, 64))
    derived = match_rules(derive_rules(params, "tensor", 4), weights.paths(params))
    assert "heads" not in derived["h/0/attn/c_attn/kernel"].axes
    assert derived["h/0/attn/c_proj/kernel"].axes == ("heads", "d_model")


def test_a_flax_nnx_state_gets_rules_for_its_variables():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(64, 16, rngs=rngs)
            self.up = nnx.Linear(16, 64, rngs=rngs)
            self.down = nnx.Linear(64, 16, rngs=rngs)

    state = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    layout = make_layout(make_mesh(MeshConfig(tensor=8)))
    for tree in (state, nnx.to_pure_dict(state)):
        placed = partition(tree, derive_rules(tree, "tensor", 8), layout)
        specs = {path.removesuffix("/value"): s.spec for path, s in weights.flatten(placed).items()}
        assert tuple(specs["down/kernel"]) == ("tensor", None)
        assert tuple(specs["up/bias"]) == ("tensor",)


def test_when_nothing_divides_the_error_names_degrees_that_would_work():
    params = _tree(_linear("mlp/up", 6, 12) | _linear("mlp/down", 12, 6))
    with pytest.raises(ValueError, match=r"5 ways over mesh axis 'tensor'.*: 2, 3, 4, 6, 12"):
        derive_rules(params, "tensor", 5)


def test_the_derived_table_is_logged_as_rules_to_edit(caplog):
    with caplog.at_level("INFO", "sharding"):
        derived = derive_rules(_tree(_linear("mlp/up", 6, 12)), "tensor", 2)
    assert rules_table(derived) in caplog.text
