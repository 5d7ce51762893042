"""Train a model further from a checkpoint, an imported one for instance.

    python -m model import --from=HF_FOLDER --to=checkpoints/mine
    python train.py --config=configs/continue_from.py:checkpoints/mine --config.data.path=TEXT

The model and the tokenizer are those of the checkpoint; the recipe is a gentle one for all weights:
a peak rate of 2e-5, a tenth of it at the end. Claim: the first step's loss is the checkpoint's own.
"""

from ml_collections import ConfigDict

from model.checkpoint import read_model
from model.checkpoint_folder import locate
from training import default_config
from training.config import config_dict


def get_config(checkpoint: str) -> ConfigDict:
    """The recipe for the model in a checkpoint or run folder."""
    folder = locate(checkpoint)
    model, _, files = read_model(folder)
    config = default_config()
    config.name = f"continue-{folder.name}"
    with config.ignore_type():
        config.model.update(config_dict(model))
    config.train.start_from = str(folder)

    config.data.path = "stdlib:"
    config.data.length = min(model.max_length, 512)
    config.data.batch_size = 8
    if any(name.startswith("tokenizer") or name == "vocab.json" for name in files):
        config.data.tokenizer.kind = "file"
        config.data.tokenizer.path = str(folder)

    config.train.steps = 200
    config.optimizer.learning_rate = 2e-5
    config.schedule.warmup = 0.1
    config.schedule.floor = 0.1
    return config
