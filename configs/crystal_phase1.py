"""Crystal 7B, phase 1 (LLM360, arXiv 2411.04156).

    python train.py --config=configs/crystal_phase1.py --config.data.path=TEXT

Claim: 6,575,278,720 parameters; the published rates and batch; its data are the first half of
SlimPajama, and the run was stopped at step 79,721.
"""

from ml_collections import ConfigDict

from training import default_config


def get_config() -> ConfigDict:
    """The model and its recipe."""
    config = default_config()
    config.name = "crystal-phase1"

    config.model.vocab_size = 32032
    config.model.d_model = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.d_ff = 10922
    config.model.max_length = 2048
    config.model.norm = "layernorm"
    config.model.rotary_dim = 32
    config.model.rotary_layout = "interleaved"
    config.model.qkv_bias = True
    config.model.output_bias = True
    config.model.feed_forward_bias = True
    config.model.tied_embeddings = True
    config.model.attention_scale = 1 / 128
    config.model.embedding_scale = 14.6
    config.model.logit_scale = 2.22 * 0.0625
    config.model.base_d_model = 256
    config.model.init_std = 0.073

    config.data.length = 2048
    config.data.batch_size = 2112
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.steps = 294337

    config.optimizer.learning_rate = 0.012
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-09
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "linear"
    config.schedule.warmup = 0.000292182
    config.schedule.floor = 0.01034
    return config
