"""Measuring any model: tasks, scores with error bars, and their comparison (seam 7).

A `Task` yields requests and gets responses; it never calls a model.
"""

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
    "Loglikelihood",
    "Place",
    "Rolling",
    "RollingScored",
    "Scored",
    "Task",
]
