"""QLoRA: adapters over a model in 4 bits (Dettmers et al., arXiv 2305.14314), by Guanaco's recipe.

    python -m surgery nf4 --checkpoint=A --out=nf4
    python -m surgery lora --checkpoint=nf4 --out=checkpoints/qlora --rank=64 --alpha=16
    python train.py --config=configs/qlora.py:checkpoints/qlora --config.data.path=TEXT

Only adapters have gradients and moments; the codes stay as they are, to the bit. The paper also
drops out adapters' inputs (`--dropout=0.1`). Claim: the first step's loss is that of the model in 4
bits, and a base stored in 4.127 bits a weight is all that is kept of it.
"""

from ml_collections import ConfigDict

from configs import continue_from


def get_config(checkpoint: str) -> ConfigDict:
    """The recipe for a checkpoint with adapters."""
    config = continue_from.get_config(checkpoint)
    config.name = config.name.replace("continue", "qlora", 1)
    config.train.trainable = ".*/(a|b)"
    config.train.steps = 1875
    config.train.clip_norm = 0.3
    config.data.batch_size = 16

    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "constant"
    config.schedule.warmup = 0.03
    return config
