"""Crystal 7B (LLM360, arXiv 2411.04156), one of its three phases.

    python train.py --config=configs/crystal_7b.py:1 --config.data.path=TEXT

Claim: 6,575,278,720 parameters; the published rates, batch and steps. Phase 1 reads the first half
of SlimPajama and was stopped at step 79,721 of its schedule; phase 2 begins there
(`--config.train.start_from`) with StarCoder, its middles to fill in (62.8 %), and the second half
of SlimPajama; phase 3 reads Python, HTML, JavaScript and CSS with a little text.
"""

from ml_collections import ConfigDict

from training import default_config

PHASES = {
    "1": {"warmup": 86, "peak": 0.012, "end": 0.00012408, "steps": 294_337},
    "2": {"warmup": 86, "peak": 0.0087825, "end": 0.00013679, "steps": 214_387},
    "3": {"warmup": 276, "peak": 0.002, "end": 0.0002, "steps": 27_728},
}
"""Phase -> steps of warm-up, highest and last rate, steps of its schedule."""


def get_config(phase: str = "1") -> ConfigDict:
    """The model and the recipe of a phase."""
    config = default_config()
    config.name = f"crystal-7b-{phase}"

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

    settings = PHASES[phase]
    config.train.steps = settings["steps"]
    config.optimizer.learning_rate = settings["peak"]
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-9
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "linear"
    config.schedule.warmup = settings["warmup"] / settings["steps"]
    config.schedule.floor = settings["end"] / settings["peak"]
    return config
