"""Mixtures against the modules of transformers with the same weights: outputs, gates, auxiliary
losses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import FEED_FORWARDS, MIXERS, ModelConfig, Runtime
from model.context import Context
from model.moe.router import route, statistics
from model.positions import PositionEncoder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

D, F, E, K, HEAD, BATCH, LENGTH = 32, 24, 6, 2, 8, 2, 9


def _config(**fields):
    return ModelConfig(
        vocab_size=40,
        d_model=D,
        num_layers=2,
        num_heads=4,
        kv_heads=2,
        head_dim=HEAD,
        feed_forward="experts",
        num_experts=E,
        expert_d_ff=F,
        **fields,
    )


def _randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return module.eval()


def _array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def _turned(tensor):
    """`[…, out, in] -> […, in, out]`."""
    return {"kernel": jnp.swapaxes(_array(tensor), -1, -2)}


def _halves(tensor):
    """The gate's and the up projection's rows of a packed `[E, 2 F, D]`."""
    gate, up = tensor.chunk(2, dim=1)
    return {"gate": _turned(gate), "up": _turned(up)}


def _input(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, D)).astype(np.float32)


def _apply(part, params, x, config):
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))
    layer = config.layer(0)
    context = Context(positions, None, PositionEncoder(layer).prepared(positions), Runtime())
    y, _, aux = jax.jit(lambda params, x: part.apply(params, x, layer, context, {}))(params, x)
    return y, aux


@functools.cache
def _mixtral(duplicates=1):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    block = _randomise(
        MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=D,
                intermediate_size=F,
                num_local_experts=E,
                num_experts_per_tok=K,
                experts_implementation="eager",
            )
        )
    )
    with torch.no_grad():  # neighbours of the same weights, whose logits are tied exactly
        for value in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
            value.copy_(value[torch.arange(E) // duplicates])
    experts = {**_halves(block.experts.gate_up_proj), "down": _turned(block.experts.down_proj)}
    return block, {"router": _turned(block.gate.weight), "experts": experts}


@pytest.mark.parametrize("duplicates", [1, 2], ids=["distinct", "tied"])
def test_mixtral(duplicates):
    """With every expert twice each token's two best are tied, and the choice changes nothing."""
    block, params = _mixtral(duplicates)
    x = _input()
    y, aux = _apply(FEED_FORWARDS["experts"], params, x, _config(experts_per_token=K))
    with torch.no_grad():
        theirs = block(torch.tensor(x))
        _, gates, index = block.gate(torch.tensor(x))
    np.testing.assert_allclose(y, theirs, atol=1e-4)
    routing = route(aux["taps"]["router_logits"], K, renormalise=True)
    if duplicates == 1:
        np.testing.assert_array_equal(routing.index.reshape(-1, K), index)
    np.testing.assert_allclose(routing.gate.reshape(-1, K), gates, rtol=1e-5)


@pytest.mark.parametrize("renormalise", [False, True])
def test_qwen2_moe(renormalise):
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    block = _randomise(
        Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(
                hidden_size=D,
                moe_intermediate_size=F,
                shared_expert_intermediate_size=20,
                num_experts=E,
                num_experts_per_tok=3,
                norm_topk_prob=renormalise,
                experts_implementation="eager",
            )
        )
    )
    shared = block.shared_expert
    params = {
        "router": _turned(block.gate.weight),
        "experts": {
            **_halves(block.experts.gate_up_proj),
            "down": _turned(block.experts.down_proj),
        },
        "shared": {
            name: _turned(getattr(shared, f"{name}_proj").weight) for name in ("gate", "up", "down")
        },
        "shared_gate": _turned(block.shared_expert_gate.weight),
    }
    config = _config(
        experts_per_token=3,
        router_renormalise=renormalise,
        shared_expert_d_ff=20,
        shared_expert_gate=True,
    )
    x = _input()
    with torch.no_grad():
        theirs = block(torch.tensor(x))
    np.testing.assert_allclose(
        _apply(FEED_FORWARDS["experts"], params, x, config)[0], theirs, atol=1e-4
    )


@functools.cache
def _jetmoe():
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=40,
        hidden_size=D,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=HEAD,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=K,
        attn_implementation="eager",
    )
    return _randomise(JetMoeForCausalLM(config))


def test_jetmoe_feed_forward():
    block = _jetmoe().model.layers[0].mlp
    params = {
        "router": _turned(block.router.layer.weight),
        "experts": {
            **_halves(block.input_linear.weight),
            "down": _turned(block.output_linear.weight),
        },
        "bias": _array(block.bias),
    }
    x = _input()
    with torch.no_grad():
        theirs = block(torch.tensor(x))
    y, _ = _apply(FEED_FORWARDS["experts"], params, x, _config(expert_bias=True))
    np.testing.assert_allclose(y, theirs, atol=1e-4)


def test_jetmoe_mixture_of_attention_heads():
    model = _jetmoe().model
    block = model.layers[0].self_attention
    key, value = block.kv_proj.weight.chunk(2)
    params = {
        "router": _turned(block.experts.router.layer.weight),
        "experts": {
            "query": _turned(block.experts.input_linear.weight),
            "output": _turned(block.experts.output_linear.weight),
        },
        "key": _turned(key),
        "value": _turned(value),
        "bias": _array(block.experts.bias),
    }
    x = _input()
    hidden = torch.tensor(x)
    places = torch.arange(LENGTH)[None].expand(BATCH, -1)
    causal = torch.full((LENGTH, LENGTH), -1e30).triu(1)[None, None]
    with torch.no_grad():
        theirs, _, _ = block(hidden, causal, model.rotary_emb(hidden, places))
    config = _config(mixer="attention_experts", expert_bias=True)
    y, _ = _apply(MIXERS["attention_experts"], params, x, config)
    np.testing.assert_allclose(y, theirs, atol=1e-4)


def _stacked(logits, k, valid):
    """What the layers of a model would report, stacked."""
    reports = []
    for layer in logits:
        layer = jnp.asarray(layer.reshape(BATCH, LENGTH, E))
        routing = route(layer, k, renormalise=True, valid=valid)
        reports.append(statistics(layer, routing, valid))
    return {name: jnp.stack([report[name] for report in reports]) for name in reports[0]}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_mixtrals_and_jetmoes_auxiliary_loss_follow_from_the_statistics_of_the_layers(padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(0).normal(size=(4, BATCH * LENGTH, E)).astype(np.float32)
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[1, 5:] = 0 if padded else 1
    given = torch.tensor(mask) if padded else None
    theirs = load_balancing_loss_func(tuple(torch.tensor(layer) for layer in logits), E, K, given)
    aux = _stacked(logits, K, jnp.asarray(mask) > 0)
    joint = E * K * jnp.sum(aux["expert_load"].mean(0) * aux["expert_probability"].mean(0))
    np.testing.assert_allclose(joint, theirs, rtol=1e-5)


def test_jetmoes_own_auxiliary_loss_is_a_weighted_sum_of_what_layers_report():
    """E sum_e f_e P_e + 0.1 mean(logsumexp^2), f and P divided by their sums."""
    logits = np.random.default_rng(1).normal(size=(2, BATCH * LENGTH, E)).astype(np.float32)
    theirs = 0.0
    for layer in torch.tensor(logits):
        _, chosen = layer.topk(K, dim=1)
        frequency = torch.zeros_like(layer).scatter(1, chosen, 1).sum(0)
        probability = torch.softmax(layer, dim=1).sum(0)
        switch = E * (frequency / frequency.sum() * (probability / probability.sum())).sum()
        theirs += switch + 0.1 * (torch.logsumexp(layer, dim=1) ** 2).mean()
    aux = _stacked(logits, K, None)
    ours = jnp.sum(aux["load_balance"]) + 0.1 * jnp.sum(aux["router_z"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
