"""Mixtures of experts are read and written exactly: Mixtral, Qwen 2 and 3 MoE, OLMoE, JetMoE."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from family_checks import (
    check_defaults,
    check_family,
    check_forward,
    close,
    our_logits,
    random_model,
    their_logits,
)

from model import count_parameters
from model.families import FamilyError, config_from_hf, config_to_hf, import_checkpoint
from model.families.jetmoe import JETMOE
from model.families.mixtral import MIXTRAL
from model.families.qwen2_moe import QWEN2_MOE
from model.families.qwen3_moe import QWEN3_MOE

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 4}
QWEN = {**SIZES, **HEADS, "num_experts": 4, "moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 20}


def kinds(config):
    return [config.layer(index).feed_forward for index in range(config.num_layers)]


def test_mixtral(tmp_path):
    """A window, and heads of their own width."""
    check_family(
        transformers.MixtralConfig(
            **SIZES, **HEADS, num_local_experts=4, sliding_window=4, head_dim=12
        ),
        tmp_path,
    )


def test_qwen2_moe_in_every_layer(tmp_path):
    """What is published: gates that do not sum to 1, a gated shared expert, biases."""
    config = transformers.Qwen2MoeConfig(**QWEN, **SHARED)
    assert kinds(check_family(config, tmp_path).config) == ["experts", "experts"]


def test_qwen2_moe_in_some_layers(tmp_path):
    """Dense layers between, windows in layers 0, 2, …, gates that sum to 1, no biases."""
    config = transformers.Qwen2MoeConfig(
        **QWEN,
        **SHARED,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=4,
    )
    found = check_family(config, tmp_path).config
    assert kinds(found) == ["gated", "experts"]
    assert [found.layer(index).sliding_window for index in (0, 1)] == [4, None]


def test_qwen3_moe(tmp_path):
    config = transformers.Qwen3MoeConfig(
        **QWEN,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        head_dim=12,
        use_sliding_window=True,
        sliding_window=4,
    )
    assert kinds(check_family(config, tmp_path).config) == ["experts", "gated"]


def test_olmoe(tmp_path):
    check_family(transformers.OlmoeConfig(**SIZES, **HEADS, num_experts=4), tmp_path)


@pytest.mark.parametrize(("k", "tied"), [(2, True), (3, False)])
def test_jetmoe(k, tied, tmp_path):
    """`rms_norm_eps` reaches the last norm only, and key heads are tiled over a token's experts."""
    sizes = {**SIZES, "num_experts_per_tok": k}
    config = transformers.JetMoeConfig(
        **sizes, kv_channels=8, num_local_experts=4, rms_norm_eps=0.1, tie_word_embeddings=tied
    )
    found = check_family(config, tmp_path).config
    assert (found.norm_eps, found.final_norm_eps) == (1e-6, 0.1)


def routers_and_experts(layer):
    """`(router weight, stacked expert weights)` of each mixture of a layer of transformers."""
    if hasattr(layer, "self_attention"):
        heads, mlp = layer.self_attention.experts, layer.mlp
        pairs = [(m.router.layer, (m.input_linear, m.output_linear)) for m in (heads, mlp)]
        return [(router.weight, [part.weight for part in parts]) for router, parts in pairs]
    experts = layer.mlp.experts
    return [(layer.mlp.gate.weight, [experts.gate_up_proj, experts.down_proj])]


MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=4),
    "jetmoe": lambda: transformers.JetMoeConfig(**SIZES, kv_channels=8, num_local_experts=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_ties_between_equal_experts(name, tmp_path):
    """Three of four experts are copies whose router logits tie, so it is open which are chosen and
    nothing but their order may depend on it.
    """
    model = random_model(MODELS[name]())
    with torch.no_grad():
        for layer in model.model.layers:
            for router, experts in routers_and_experts(layer):
                for weight in (router, *experts):
                    weight[1:3] = weight[0]
    model.save_pretrained(tmp_path)
    check_forward(model, import_checkpoint(tmp_path), SIZES["vocab_size"])


def room_for(index, capacity):
    """Which of `[batch, length, k]` choices an expert takes that has room for `capacity` of a row:
    all first choices in order, then all second ones.
    """
    taken = np.zeros(index.shape, bool)
    batch, length, k = index.shape
    for row in range(batch):
        room = collections.Counter()
        for slot, token in itertools.product(range(k), range(length)):
            expert = int(index[row, token, slot])
            taken[row, token, slot] = room[expert] < capacity
            room[expert] += 1
    return torch.tensor(taken).reshape(-1, k)


def drop_in_mixtral(capacity, batch, drops):
    def hook(gate, inputs, outputs):
        logits, scores, index = outputs
        taken = room_for(index.reshape(batch, -1, index.shape[-1]), capacity)
        drops.append(1.0 - taken.float().mean().item())
        return logits, scores * taken, index

    return hook


def drop_in_jetmoe(capacity, batch, drops):
    def hook(gate, inputs, outputs):
        order, tokens, gates, sizes, logits = outputs
        index = logits.topk(gate.top_k, dim=1).indices
        taken = room_for(index.reshape(batch, -1, gate.top_k), capacity)
        drops.append(1.0 - taken.float().mean().item())
        return order, tokens, gates * taken.reshape(-1)[order], sizes, logits

    return hook


@pytest.mark.parametrize("name", MODELS)
def test_tokens_beyond_an_experts_capacity_are_dropped(name, tmp_path):
    """transformers drops nothing; here hooks on its routers zero the gates of what has no room."""
    model = random_model(MODELS[name]())
    model.save_pretrained(tmp_path)
    found = import_checkpoint(tmp_path)
    tokens = np.random.default_rng(1).integers(3, 40, (2, 12)).astype(np.int32)
    hook, drops = {"mixtral": drop_in_mixtral, "jetmoe": drop_in_jetmoe}[name], []
    for module in model.modules():
        if type(module).__name__ in ("MixtralTopKRouter", "JetMoeTopKGating"):
            module.register_forward_hook(hook(3, len(tokens), drops))
    expected = their_logits(model, tokens)
    assert min(drops) > 0.1
    config = dataclasses.replace(found.config, capacity_factor=0.5)
    close(our_logits(found.params, tokens, None, config), expected)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "JetMoe"])
def test_defaults(name):
    check_defaults(getattr(transformers, f"{name}Config"))


JETMOE_8B = {
    "activation_function": "silu",
    "bias": True,
    "ffn_hidden_size": 5632,
    "glu": True,
    "hidden_size": 2048,
    "initializer_range": 0.01,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-05,
    "model_type": "jetmoe",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "n_positions": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "num_layers": 24,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rotary_percent": 1.0,
    "vocab_size": 32000,
}
"""The authors' file, whose keys transformers has renamed since."""


def test_the_published_jetmoe():
    config = config_from_hf(JETMOE, JETMOE_8B)
    assert count_parameters(config) == 8_522_237_952
    assert (config.norm_eps, config.final_norm_eps) == (1e-6, 1e-5)
    values = config_to_hf(JETMOE, config, JETMOE_8B)
    assert not {"glu", "moe_top_k", "n_positions", "ffn_hidden_size"} & set(values)
    assert config_from_hf(JETMOE, values).resolve() == config.resolve()


def test_the_published_mixtral():
    config = config_from_hf(MIXTRAL, {"model_type": "mixtral", "max_position_embeddings": 32768})
    assert count_parameters(config) == 46_702_792_704


def test_the_published_qwen3_moe():
    """30B-A3B, with keys that later versions of its config no longer have."""
    values = {
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "qkv_bias": False,
        "shared_expert_intermediate_size": 0,
        "sliding_window": None,
        "use_qk_norm": True,
        "use_sliding_window": False,
    }
    assert count_parameters(config_from_hf(QWEN3_MOE, values)) == 30_532_122_624


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (JETMOE, {"num_attention_heads": 16}, "num_attention_heads is 16; .* makes 32"),
        (JETMOE, {"glu": False}, "glu is False; only True"),
        (QWEN3_MOE, {"use_sliding_window": True, "max_window_layers": 2}, "max_window_layers is 2"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "experts_per_token is 9"),
        (MIXTRAL, {"router_temperature": 2.0}, "router_temperature = 2.0"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused_by_name(family, values, message):
    with pytest.raises(FamilyError, match=message):
        config_from_hf(family, values)


def test_mixtures_of_fine_experts_are_written_though_no_layer_has_d_ff():
    """`d_ff` is a default here, 1408; only `expert_d_ff` is a width of this model."""
    config = dataclasses.replace(config_from_hf(MIXTRAL, {}), d_ff=None, expert_d_ff=128)
    assert config_to_hf(MIXTRAL, config)["intermediate_size"] == 128


def test_dense_layers_are_written_whichever_kind_the_config_calls_the_rule():
    config = config_from_hf(QWEN2_MOE, {"num_hidden_layers": 3, "decoder_sparse_step": 2})
    turned = dataclasses.replace(
        config, feed_forward="gated", layer_overrides=((1, "feed_forward", "experts"),)
    )
    values = config_to_hf(QWEN2_MOE, turned)
    assert (values["decoder_sparse_step"], values["mlp_only_layers"]) == (1, [0, 2])
