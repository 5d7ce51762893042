"""GPT-3 175B (arXiv 2005.14165), in the sizes that Megatron, MegaScale and Frontier measured.

    python train.py --config=configs/gpt3_175b.py --config.data.path=TEXT

Claim: 174,615,846,912 parameters: 96 layers of width 12,288, and a vocabulary of 51,200, GPT-2's
filled up as Megatron does; rate, warm-up, decay and 300B tokens are the paper's, all
layers attend fully.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gpt3-175b"

    config.model.vocab_size = 51200
    config.model.d_model = 12288
    config.model.num_layers = 96
    config.model.num_heads = 96
    config.model.d_ff = 49152
    config.model.max_length = 2048
    config.model.feed_forward = "plain"
    config.model.activation = "gelu_tanh"
    config.model.norm = "layernorm"
    config.model.feed_forward_bias = True
    config.model.positions = "learned"
    config.model.tied_embeddings = True
    config.model.qkv_bias = True
    config.model.output_bias = True

    config.data.length = 2048
    config.data.batch_size = 1536
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.steps = 95367

    config.optimizer.learning_rate = 0.00006
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup = 0.00125
    config.schedule.floor = 0.1
    return config
