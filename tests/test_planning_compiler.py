"""The operator table against what the compiler counts in programs whose layers are written out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from model import ModelConfig, Runtime, abstract, forward
from planning.operators import Bits, Work, operators, total_bytes, total_flops
from training.decoders import decoder
from training.objectives import language_model

SIZES = {"vocab_size": 1024, "d_model": 512, "num_layers": 2, "num_heads": 4, "d_ff": 1536}
MODELS = {
    "llama, few key heads": ModelConfig(**SIZES, kv_heads=2),
    "gpt": ModelConfig(
        **SIZES, feed_forward="plain", norm="layernorm", positions="learned", max_length=64,
        tied_embeddings=True, qkv_bias=True, output_bias=True,
    ),
}  # fmt: skip
WRITTEN_OUT = Runtime(scan_unroll=0)


def counted(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().cost_analysis()


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("name", MODELS)
def test_training_takes_the_flops_that_the_compiler_counts(name):
    config = MODELS[name]
    apply, objective = decoder(config, WRITTEN_OUT), language_model()

    def loss(params, batch):
        return objective.loss(apply, params, batch, None)[0]

    batch = {"tokens": ids(4, 64), "targets": ids(4, 64)}
    compiler = counted(jax.grad(loss), abstract(config), batch)["flops"]
    work = Work(4, 64, 64, causal=False, all_logits=True)  # the CPU computes masked scores too
    assert 3 * total_flops(operators(config, work)) == pytest.approx(compiler, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_moves_the_bytes_that_the_compiler_counts(name):
    config = MODELS[name]
    apart = [  # a CPU would cut each layer's arrays out of a stack, and so move them three times
        dataclasses.replace(segment, start=layer, stop=layer + 1)
        for segment in config.segments
        for layer in range(segment.start, segment.stop)
    ]
    compiler = counted(
        lambda params, x: forward(params, None, config, WRITTEN_OUT, inputs_embeds=x)[0],
        abstract(config, segments=apart),
        jax.ShapeDtypeStruct((1, 1, config.d_model), jnp.float32),
    )["bytes accessed"]
    bits, work = Bits(weights=32, head=32, activations=32, cache=32), Work(all_logits=True)
    assert total_bytes(operators(config, work, bits)) == pytest.approx(compiler, rel=0.02)
