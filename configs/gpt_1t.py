"""A GPT of a trillion parameters, in the sizes that Megatron (arXiv 2104.04473) and Frontier (arXiv
2312.12705) measured.

    python train.py --config=configs/gpt_1t.py --config.data.path=TEXT

Claim: 1,008,038,758,400 parameters: 128 layers of width 25,600 and 160 heads, and GPT-2's
vocabulary filled up to 51,200; the batch is Frontier's, the rest of the recipe that of GPT-3.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "gpt-1t"

    config.model.vocab_size = 51200
    config.model.d_model = 25600
    config.model.num_layers = 128
    config.model.num_heads = 160
    config.model.d_ff = 102400
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
    config.data.batch_size = 1600
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
