"""Training: a task made of functions, and the loop that owns everything else (seam 4).

`train_language_model(config, workdir)` is what `train.py` runs. Another kind of run is three
functions: `train(from_functions(init, apply, batch, loss, predict), RunConfig(...), workdir)`.
"""

from training.checkpoints import CheckpointConfig, Checkpoints
from training.config import (
    ConfigError,
    EvaluationConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    default_config,
    load_config,
    run_config,
)
from training.decoders import decoder
from training.errors import RunError
from training.evaluation import evaluate, make_evaluation_step
from training.faults import FaultConfig, SpikeDetector
from training.language_model import language_model_task, train_language_model
from training.loop import Result, train
from training.objectives import OBJECTIVES, Objective, three_functions
from training.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer
from training.schedules import SCHEDULES, ScheduleConfig, make_schedule
from training.setup import run_layout
from training.state import TrainState, init_state, new_state
from training.step import make_step
from training.task import FunctionStream, Task, from_functions, predict

__all__ = [
    "OBJECTIVES",
    "OPTIMIZERS",
    "SCHEDULES",
    "CheckpointConfig",
    "Checkpoints",
    "ConfigError",
    "EvaluationConfig",
    "FaultConfig",
    "FunctionStream",
    "Objective",
    "OptimizerConfig",
    "Result",
    "RunConfig",
    "RunError",
    "SampleConfig",
    "ScheduleConfig",
    "SpikeDetector",
    "Task",
    "TrainConfig",
    "TrainState",
    "decoder",
    "default_config",
    "evaluate",
    "from_functions",
    "init_state",
    "language_model_task",
    "load_config",
    "make_evaluation_step",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "new_state",
    "predict",
    "run_config",
    "run_layout",
    "three_functions",
    "train",
    "train_language_model",
]
