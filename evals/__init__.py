"""Measuring any model: tasks, scores with error bars, and their comparison (seam 7).

    results = evaluate("runs/quickstart", ["needle"], out="out")

A `Task` yields requests and gets responses; it never calls a model. Backends answer: a checkpoint
in this process, or a server.
"""

from evals.backends import Backend, InProcess, Remote
from evals.comparing import Compared, compare_folders
from evals.evaluation import evaluate, open_backend
from evals.execution import Sandboxed
from evals.judges import Judge, Preference
from evals.registry import TASKS, build
from evals.runner import Options, TaskResult
from evals.scoring import Scorer
from evals.stats import Comparison, bootstrap, clustered, compare, mean, proportion, ratio
from evals.store import Store
from evals.task import (
    Context,
    Embed,
    Embedded,
    Estimate,
    Execute,
    Executed,
    Generate,
    Generated,
    Hidden,
    HiddenStates,
    Loglikelihood,
    Rolling,
    RollingScored,
    Scored,
    Task,
)
from evals.taxonomy import Place

__all__ = [
    "TASKS",
    "Backend",
    "Compared",
    "Comparison",
    "Context",
    "Embed",
    "Embedded",
    "Estimate",
    "Execute",
    "Executed",
    "Generate",
    "Generated",
    "Hidden",
    "HiddenStates",
    "InProcess",
    "Judge",
    "Loglikelihood",
    "Options",
    "Place",
    "Preference",
    "Remote",
    "Rolling",
    "RollingScored",
    "Sandboxed",
    "Scored",
    "Scorer",
    "Store",
    "Task",
    "TaskResult",
    "bootstrap",
    "build",
    "clustered",
    "compare",
    "compare_folders",
    "evaluate",
    "mean",
    "open_backend",
    "proportion",
    "ratio",
]
