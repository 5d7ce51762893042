"""The same weights give the same logits as transformers, one family for each topology."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig, RopeScaling, abstract, forward

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "feed_forward/gate": "mlp.gate_proj",
    "feed_forward/up": "mlp.up_proj",
    "feed_forward/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
QK_NORM = {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}
OLMO2 = {
    **{ours: theirs for ours, theirs in LLAMA.items() if not ours.endswith("_norm")},
    **QK_NORM,
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
GEMMA2 = {
    **LLAMA,
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
GPT2 = {
    "attention/output": "attn.c_proj",
    "feed_forward/up": "mlp.c_fc",
    "feed_forward/down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
}
GPTJ = {
    "attention/query": "attn.q_proj",
    "attention/key": "attn.k_proj",
    "attention/value": "attn.v_proj",
    "attention/output": "attn.out_proj",
    "feed_forward/up": "mlp.fc_in",
    "feed_forward/down": "mlp.fc_out",
    "attention_norm": "ln_1",
}
NEOX = {
    "attention/output": "attention.dense",
    "feed_forward/up": "mlp.dense_h_to_4h",
    "feed_forward/down": "mlp.dense_4h_to_h",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
STABLELM = {**{k: v for k, v in LLAMA.items() if k != "feed_forward_norm"}, **QK_NORM}
OUTER = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
BASE = ModelConfig(vocab_size=40, d_model=32, num_layers=3, num_heads=4, kv_heads=2, d_ff=48)
GPT = dataclasses.replace(
    BASE,
    kv_heads=4,
    d_ff=128,
    norm="layernorm",
    feed_forward="plain",
    activation="gelu_tanh",
    feed_forward_bias=True,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A transformers config, our config, and where our arrays lie in its state dict."""

    theirs: object
    ours: ModelConfig
    inner: dict
    outer: dict = dataclasses.field(default_factory=lambda: OUTER)
    layers: str = "model.layers"
    kernel_transposed: bool = True
    fused: str | None = None
    renamed: Callable[[dict], dict] = dict


def heads_joined(state):
    """StableLM's norms of single heads, joined under Qwen3's names."""
    joined = {}
    for name, value in state.items():
        before, found, _ = name.partition("_layernorm.norms.")
        key = f"{before}_norm.weight" if found else name
        joined[key] = np.concatenate([joined[key], value]) if key in joined else value
    return joined


def rows_split(state):
    """Phi-3's fused matrices, split under Llama's names."""
    parts = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), [32, 48])}
    parts["gate_up_proj"] = (("gate_proj", "up_proj"), [48])
    split = {}
    for name, value in state.items():
        fused = next((part for part in parts if part in name), None)
        names, cuts = parts[fused] if fused else ((None,), [])
        for part, rows in zip(names, np.split(value, cuts), strict=True):
            split[name.replace(fused, part) if fused else name] = rows
    return split


def families():
    return {
        "llama": Family(
            transformers.LlamaConfig(**SIZES, **HEADS, rms_norm_eps=1e-5, head_dim=8), BASE, LLAMA
        ),
        "mistral": Family(
            transformers.MistralConfig(**SIZES, **HEADS, rms_norm_eps=1e-5, sliding_window=5),
            dataclasses.replace(BASE, sliding_window=5),
            LLAMA,
        ),
        "qwen3": Family(
            transformers.Qwen3Config(**SIZES, **HEADS, rms_norm_eps=1e-5, head_dim=16),
            dataclasses.replace(BASE, head_dim=16, qk_norm="head"),
            {**LLAMA, **QK_NORM},
        ),
        "olmo2": Family(
            transformers.Olmo2Config(**SIZES, **HEADS, rms_norm_eps=1e-5),
            dataclasses.replace(BASE, norm_position="output", qk_norm="full"),
            OLMO2,
        ),
        "gemma2": Family(
            transformers.Gemma2Config(
                **SIZES,
                **HEADS,
                rms_norm_eps=1e-5,
                head_dim=8,
                query_pre_attn_scalar=16,
                sliding_window=5,
                attn_logit_softcapping=0.5,
                final_logit_softcapping=0.5,
            ),
            dataclasses.replace(
                BASE,
                norm="rmsnorm_plus_one",
                norm_position="sandwich",
                activation="gelu_tanh",
                attention_scale=16**-0.5,
                attention_soft_cap=0.5,
                logit_soft_cap=0.5,
                tied_embeddings=True,
                embedding_scale=32**0.5,
                layer_overrides=((0, "sliding_window", 5), (2, "sliding_window", 5)),
            ),
            GEMMA2,
        ),
        "gpt2": Family(
            transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=16),
            dataclasses.replace(
                GPT,
                positions="learned",
                max_length=16,
                tied_embeddings=True,
                qkv_bias=True,
                output_bias=True,
            ),
            GPT2,
            {
                "embed": "transformer.wte",
                "positions": "transformer.wpe",
                "final_norm": "transformer.ln_f",
            },
            "transformer.h",
            kernel_transposed=False,
            fused="attn.c_attn",
        ),
        "gptj": Family(
            transformers.GPTJConfig(vocab_size=40, n_embd=32, n_layer=3, n_head=4, rotary_dim=4),
            dataclasses.replace(
                GPT,
                residual="parallel_one_norm",
                rotary_dim=4,
                rotary_layout="interleaved",
                head_bias=True,
            ),
            GPTJ,
            {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"},
            "transformer.h",
        ),
        "gpt_neox": Family(
            transformers.GPTNeoXConfig(
                **SIZES,
                num_attention_heads=4,
                intermediate_size=128,
                hidden_act="gelu_new",
                rotary_pct=0.5,
            ),
            dataclasses.replace(
                GPT, residual="parallel_two_norms", rotary_dim=4, qkv_bias=True, output_bias=True
            ),
            NEOX,
            {
                "embed": "gpt_neox.embed_in",
                "final_norm": "gpt_neox.final_layer_norm",
                "head": "lm_head",
            },
            "gpt_neox.layers",
            fused="attention.query_key_value",
        ),
        "stablelm": Family(
            transformers.StableLmConfig(
                **SIZES,
                **HEADS,
                qk_layernorm=True,
                use_parallel_residual=True,
                partial_rotary_factor=0.5,
            ),
            dataclasses.replace(
                BASE,
                norm="layernorm",
                qk_norm="each_head",
                residual="parallel_one_norm",
                rotary_dim=4,
            ),
            STABLELM,
            renamed=heads_joined,
        ),
        "phi3_short": phi3(original_length=12),
        "phi3_long": phi3(original_length=11),
    }


def phi3(original_length):
    """Phi-3 trained up to `original_length`; 12 tokens are at hand."""
    factors = {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.5, 2.5, 4.0, 8.0]}
    return Family(
        transformers.Phi3Config(
            **SIZES,
            **HEADS,
            pad_token_id=0,
            max_position_embeddings=64,
            original_max_position_embeddings=original_length,
            rope_scaling={"rope_type": "longrope", "factor": 64 / original_length, **factors},
        ),
        dataclasses.replace(
            BASE,
            rope_scaling=RopeScaling(
                "longrope",
                64 / original_length,
                original_length,
                **{name: tuple(values) for name, values in factors.items()},
            ),
        ),
        LLAMA,
        renamed=rows_split,
    )


def read(family, state, name, leaf):
    """One array of the state dict in our orientation."""
    value = state[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"]
    transposed = family.kernel_transposed or name in family.outer.values()
    return value.T if leaf == "kernel" and transposed else value


def read_fused(family, state, name, part, leaf):
    """A slice of a fused query-key-value matrix: by thirds (GPT-2), or by thirds of each head
    (GPT-NeoX).
    """
    whole = read(family, state, name, leaf)
    thirds = (3, 4, 8) if not family.kernel_transposed else (4, 3, 8)
    split = whole.reshape(*whole.shape[:-1], *thirds)
    which = ("query", "key", "value").index(part)
    taken = split[..., which, :, :] if thirds[0] == 3 else split[..., which, :]
    return taken.reshape(*whole.shape[:-1], 32)


def copy_weights(family, model):
    """Our params from a transformers model."""
    state = family.renamed({name: value.numpy() for name, value in model.state_dict().items()})
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract(family.ours))

    def fetch(keys):
        *parents, leaf = (key.key for key in keys)
        if parents[0] != "layers":
            return read(family, state, family.outer[parents[0]], leaf)
        start, stop = (int(number) for number in parents[1].split("-"))
        inner = "/".join(parents[2:])
        return np.stack(
            [fetch_layer(f"{family.layers}.{n}.", inner, leaf) for n in range(start, stop)]
        )

    def fetch_layer(prefix, inner, leaf):
        if inner in family.inner:
            return read(family, state, prefix + family.inner[inner], leaf)
        return read_fused(family, state, prefix + family.fused, inner.split("/")[-1], leaf)

    return jax.tree.unflatten(structure, [jnp.asarray(fetch(keys)) for keys, _ in leaves])


@pytest.mark.parametrize("name", families())
def test_logits_equal_transformers(name):
    family = families()[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        family.theirs, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.randint(0, 40, (2, 12))
        expected = model(tokens).logits.numpy()
    params = copy_weights(family, model)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract(family.ours))
    assert jax.tree.map(jnp.shape, params) == shapes
    logits, _ = jax.jit(forward, static_argnames="config")(
        params, jnp.asarray(tokens.numpy()), config=family.ours
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)
