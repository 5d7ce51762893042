"""What a model is: config, params, forward pass, caches and generation (seams 2 and 3); pure
functions over pytrees.

config = ModelConfig(vocab_size=256, d_model=128, num_layers=4, num_heads=4, tied_embeddings=True)
params = init(config, jax.random.key(0))
logits, aux = forward(params, tokens, config)
"""

from model.block import block
from model.config import ModelConfig, RopeScaling, Segment, mup
from model.context import Context
from model.decoder import forward, hidden_states, logits
from model.feed_forward import ACTIVATIONS, FEED_FORWARDS
from model.mixers import MIXERS
from model.norms import NORMS
from model.parameters import abstract, count_parameters, init, rules
from model.remat import POLICIES
from model.runtime import Runtime

__all__ = [
    "ACTIVATIONS",
    "FEED_FORWARDS",
    "MIXERS",
    "NORMS",
    "POLICIES",
    "Context",
    "ModelConfig",
    "RopeScaling",
    "Runtime",
    "Segment",
    "abstract",
    "block",
    "count_parameters",
    "forward",
    "hidden_states",
    "init",
    "logits",
    "mup",
    "rules",
]
