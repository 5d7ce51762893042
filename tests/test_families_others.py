"""Families whose code is their authors': InternLM 2, Baichuan 2, and GEB with ChatGLM's layout.

They are held to NumPy decoders written from that code; ChatGLM's also to transformers' GLM.
"""

import functools
import json

import numpy as np
import pytest
from family_checks import close, our_logits, random_model, their_logits
from numpy_decoder import (
    Decoder,
    Layer,
    check_reference,
    random_tensors,
    rotate_half,
    rotate_pairs,
)
from safetensors.numpy import save_file

from model import count_parameters
from model.families import FAMILIES, FamilyError, config_from_hf, find, import_checkpoint
from model.families.baichuan import BAICHUAN
from model.families.geb import GEB
from model.families.internlm2 import INTERNLM2

D, F, V, LAYERS = 32, 48, 40, 2
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}


def shapes_of(layer, outer):
    """`{name: shape}` with the layer's names for each layer."""
    named = {name.format(i=i): shape for i in range(LAYERS) for name, shape in layer.items()}
    return {**named, **outer}


INTERNLM2_SHAPES = shapes_of(
    {
        "model.layers.{i}.attention_norm.weight": (D,),
        "model.layers.{i}.attention.wqkv.weight": (64, D),
        "model.layers.{i}.attention.wqkv.bias": (64,),
        "model.layers.{i}.attention.wo.weight": (D, D),
        "model.layers.{i}.attention.wo.bias": (D,),
        "model.layers.{i}.ffn_norm.weight": (D,),
        "model.layers.{i}.feed_forward.w1.weight": (F, D),
        "model.layers.{i}.feed_forward.w2.weight": (D, F),
        "model.layers.{i}.feed_forward.w3.weight": (F, D),
    },
    {
        "model.tok_embeddings.weight": (V, D),
        "model.norm.weight": (D,),
        "output.weight": (V, D),
    },
)


def internlm2(wide, length):
    """`wqkv` is, key head after key head, two queries, the key and the value; trained at 8 tokens,
    the base grows with the length.
    """
    base = 500.0 * (2.0 * max(length, 8) / 8 - 1.0) ** (8 / 6)
    layers = []
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        weights = wide[f"{at}.attention.wqkv.weight"].reshape(2, 4, 8, D)
        biases = wide[f"{at}.attention.wqkv.bias"].reshape(2, 4, 8)
        w_query, w_key, w_value = weights[:, :2], weights[:, 2], weights[:, 3]
        b_query, b_key, b_value = biases[:, :2], biases[:, 2], biases[:, 3]
        layers.append(
            Layer(
                attention_norm=wide[f"{at}.attention_norm.weight"],
                query=w_query.reshape(-1, D),
                key=w_key.reshape(-1, D),
                value=w_value.reshape(-1, D),
                output=wide[f"{at}.attention.wo.weight"],
                feed_forward_norm=wide[f"{at}.ffn_norm.weight"],
                gate=wide[f"{at}.feed_forward.w1.weight"],
                up=wide[f"{at}.feed_forward.w3.weight"],
                down=wide[f"{at}.feed_forward.w2.weight"],
                biases=(
                    *(b.reshape(-1) for b in (b_query, b_key, b_value)),
                    wide[f"{at}.attention.wo.bias"],
                ),
            )
        )
    embed, norm = wide["model.tok_embeddings.weight"], wide["model.norm.weight"]
    rotate = functools.partial(rotate_half, base=base)
    return Decoder(embed, layers, norm, wide["output.weight"], 8, 1e-5, rotate)


def test_internlm2(tmp_path):
    values = {
        **SIZES,
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "bias": True,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    written = {**values, "rope_scaling": {**values["rope_scaling"], "rope_type": "dynamic"}}
    check_reference(written, random_tensors(INTERNLM2_SHAPES), internlm2, tmp_path)
    assert config_from_hf(INTERNLM2, values) == config_from_hf(INTERNLM2, written)


BAICHUAN_SHAPES = shapes_of(
    {
        "model.layers.{i}.input_layernorm.weight": (D,),
        "model.layers.{i}.self_attn.W_pack.weight": (3 * D, D),
        "model.layers.{i}.self_attn.o_proj.weight": (D, D),
        "model.layers.{i}.post_attention_layernorm.weight": (D,),
        "model.layers.{i}.mlp.gate_proj.weight": (F, D),
        "model.layers.{i}.mlp.up_proj.weight": (F, D),
        "model.layers.{i}.mlp.down_proj.weight": (D, F),
    },
    {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)},
)


def baichuan(wide, length, rotates):
    """Rows of the head have length one; the slopes of four heads are 1/4, 1/16, 1/64, 1/256."""
    layers = []
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        query, key, value = np.split(wide[f"{at}.self_attn.W_pack.weight"], 3)
        layers.append(
            Layer(
                attention_norm=wide[f"{at}.input_layernorm.weight"],
                query=query,
                key=key,
                value=value,
                output=wide[f"{at}.self_attn.o_proj.weight"],
                feed_forward_norm=wide[f"{at}.post_attention_layernorm.weight"],
                gate=wide[f"{at}.mlp.gate_proj.weight"],
                up=wide[f"{at}.mlp.up_proj.weight"],
                down=wide[f"{at}.mlp.down_proj.weight"],
            )
        )
    head = wide["lm_head.weight"]
    head = head / np.linalg.norm(head, axis=1, keepdims=True)
    embed, norm = wide["model.embed_tokens.weight"], wide["model.norm.weight"]
    if rotates:
        return Decoder(embed, layers, norm, head, 8, 1e-6, rotate=rotate_half)
    return Decoder(embed, layers, norm, head, 8, 1e-6, slopes=0.25 ** np.arange(1.0, 5.0))


@pytest.mark.parametrize("rotates", [True, False])
def test_baichuan2(rotates, tmp_path):
    """The 7B rotates; the 13B, whose file has no `max_position_embeddings`, has ALiBi."""
    values = {
        **SIZES,
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "rms_norm_eps": 1e-6,
        "model_max_length": 64,
        "z_loss_weight": 0,
        **({"max_position_embeddings": 64} if rotates else {}),
    }
    decoder = functools.partial(baichuan, rotates=rotates)
    check_reference(values, random_tensors(BAICHUAN_SHAPES), decoder, tmp_path)


GEB_SHAPES = shapes_of(
    {
        "transformer.encoder.layers.{i}.input_layernorm.weight": (D,),
        "transformer.encoder.layers.{i}.self_attention.query_key_value.weight": (64, D),
        "transformer.encoder.layers.{i}.self_attention.dense.weight": (D, D),
        "transformer.encoder.layers.{i}.post_attention_layernorm.weight": (D,),
        "transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight": (2 * F, D),
        "transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight": (D, F),
    },
    {
        "transformer.embedding.word_embeddings.weight": (V, D),
        "transformer.encoder.final_layernorm.weight": (D,),
        "transformer.output_layer.weight": (V, D),
    },
)
GEB_VALUES = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "padded_vocab_size": V,
    "vocab_size": V,
    "hidden_size": D,
    "ffn_hidden_size": F,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "seq_length": 64,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "original_rope": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": True,
}


def geb(wide, length):
    layers = []
    for i in range(LAYERS):
        at = f"transformer.encoder.layers.{i}"
        packed = wide[f"{at}.self_attention.query_key_value.weight"]
        gate, up = np.split(wide[f"{at}.mlp.dense_h_to_4h.weight"], 2)
        layers.append(
            Layer(
                attention_norm=wide[f"{at}.input_layernorm.weight"],
                query=packed[:32],
                key=packed[32:48],
                value=packed[48:],
                output=wide[f"{at}.self_attention.dense.weight"],
                feed_forward_norm=wide[f"{at}.post_attention_layernorm.weight"],
                gate=gate,
                up=up,
                down=wide[f"{at}.mlp.dense_4h_to_h.weight"],
            )
        )
    embed = wide["transformer.embedding.word_embeddings.weight"]
    norm = wide["transformer.encoder.final_layernorm.weight"]
    head = wide["transformer.output_layer.weight"]
    return Decoder(embed, layers, norm, head, 8, 1e-5, rotate_pairs)


def test_geb(tmp_path):
    check_reference(GEB_VALUES, random_tensors(GEB_SHAPES), geb, tmp_path)


@pytest.mark.interop
def test_chatglm_computes_what_transformers_glm_does(tmp_path):
    """The later GLM is the same model under other names; here with ChatGLM's biases."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GlmConfig(
        **{**SIZES, "rms_norm_eps": 1e-5},
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = random_model(config)
    theirs = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    tensors = {
        "transformer.embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": theirs["model.norm.weight"],
        "transformer.output_layer.weight": theirs["lm_head.weight"],
    }
    for i in range(LAYERS):
        at, to = f"model.layers.{i}", f"transformer.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [theirs[f"{at}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{to}.self_attention.query_key_value.{kind}"] = np.concatenate(parts)
        for name, new in (
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            tensors[f"{to}.{new}.weight"] = theirs[f"{at}.{name}.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**GEB_VALUES, "add_qkv_bias": True}))
    found = import_checkpoint(tmp_path)
    tokens = np.random.default_rng(1).integers(3, V, (2, 12)).astype(np.int32)
    close(our_logits(found.params, tokens, None, found.config), their_logits(model, tokens))


PUBLISHED = {
    "internlm2.5-7b": (
        7_737_708_544,
        {
            "model_type": "internlm2",
            "bias": False,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_theta": 1000000,
            "vocab_size": 92544,
        },
    ),
    "baichuan2-7b": (
        7_505_973_248,
        {
            "_from_model_config": True,
            "model_type": "baichuan",
            "architectures": ["BaichuanForCausalLM"],
            "max_position_embeddings": 4096,
            "model_max_length": 4096,
            "z_loss_weight": 0,
            "vocab_size": 125696,
        },
    ),
    "baichuan2-13b": (
        13_896_668_160,
        {
            "model_type": "baichuan",
            "hidden_size": 5120,
            "intermediate_size": 13696,
            "model_max_length": 4096,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "vocab_size": 125696,
        },
    ),
    "geb-1.3b": (
        1_348_044_800,
        {
            "model_type": "geb",
            "num_layers": 24,
            "hidden_size": 2048,
            "ffn_hidden_size": 5632,
            "num_attention_heads": 16,
            "multi_query_group_num": 4,
            "kv_channels": 128,
            "padded_vocab_size": 64896,
            "seq_length": 4096,
            "layernorm_epsilon": 1e-5,
            "add_bias_linear": False,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_understood_and_have_the_published_sizes(name):
    parameters, values = PUBLISHED[name]
    assert count_parameters(config_from_hf(find(values, name), values)) == parameters


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (INTERNLM2, {"head_dim": 16}, "head_dim = 16"),
        (BAICHUAN, {"vocab_size": 64000}, "vocab_size is 64000.*the first Baichuan"),
        (BAICHUAN, {"architectures": ["BaiChuanForCausalLM"]}, "the first Baichuan"),
        (BAICHUAN, {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        (GEB, {"rmsnorm": False}, "rmsnorm is False"),
        (GEB, {"rope_ratio": 50}, "rope_ratio is 50"),
        (GEB, {"add_bias_linear": True}, "add_bias_linear is True"),
        (GEB, {"multi_query_group_num": 3}, "num_heads 32 is not a multiple of model.kv_heads 3"),
        (GEB, {"vocab_size": 5}, "vocab_size is 5, padded_vocab_size 65024"),
    ],
)
def test_what_these_cannot_be_is_refused_by_name(family, values, message):
    with pytest.raises(FamilyError, match=message):
        config_from_hf(family, values)


def test_a_geb_with_other_names_is_refused_with_the_names(tmp_path):
    """The names of the published GEB are not known; others than ChatGLM's must not half load."""
    tensors = {
        name.replace("query_key_value", "qkv"): value
        for name, value in random_tensors(GEB_SHAPES).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**GEB_VALUES, "model_type": "geb"}))
    with pytest.raises(FamilyError, match=r"missing .*query_key_value.*unexpected .*\.qkv\."):
        import_checkpoint(tmp_path)


def test_old_files_without_a_model_type_are_found_by_their_architecture():
    values = {"architectures": ["MiniCPMForCausalLM"]}
    assert find(values, "old") is FAMILIES["minicpm"]
    with pytest.raises(FamilyError, match="model_type None is no family"):
        find({"architectures": ["MiniCPM3ForCausalLM"]}, "old")
