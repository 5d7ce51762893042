"""What a model is: config, params, forward pass, caches and generation (seams 2 and 3); pure
functions over pytrees.

    config = ModelConfig(vocab_size=256, d_model=128, num_layers=4, num_heads=4)
    params = init(config, jax.random.key(0))
    logits, aux = forward(params, tokens, config)
"""

from model.block import block
from model.caches import CACHES, Cache, DecoderCache, StepMeta, init_cache
from model.config import ModelConfig, RopeScaling, Segment, mup
from model.context import Context
from model.decoder import forward, hidden_states
from model.feed_forward import ACTIVATIONS
from model.feed_forwards import FEED_FORWARDS
from model.flax_module import Decoder
from model.generate import Generation, generate
from model.generation_config import GenerationConfig, read_generation_config
from model.head import logits
from model.mixers import MIXERS
from model.norms import NORMS
from model.parameters import abstract, count_parameters, init, rules
from model.positions import PositionEncoder
from model.remat import POLICIES
from model.runtime import Runtime
from model.sampling import Sampling, sample

__all__ = [
    "ACTIVATIONS",
    "CACHES",
    "FEED_FORWARDS",
    "MIXERS",
    "NORMS",
    "POLICIES",
    "Cache",
    "Context",
    "Decoder",
    "DecoderCache",
    "Generation",
    "GenerationConfig",
    "ModelConfig",
    "PositionEncoder",
    "RopeScaling",
    "Runtime",
    "Sampling",
    "Segment",
    "StepMeta",
    "abstract",
    "block",
    "count_parameters",
    "forward",
    "generate",
    "hidden_states",
    "init",
    "init_cache",
    "logits",
    "mup",
    "read_generation_config",
    "rules",
    "sample",
]
