"""Serving any checkpoint: an engine over pages of keys and values, and what it asks of a request.

A request (`SamplingParams` from `from_fields`, checked by `resolve`) becomes a `Request`; the
`Scheduler` plans each step over a `PagePool`; `TextOut` turns what was sampled into text.
"""

from serving.checks import ParameterError
from serving.fields import checkpoint_defaults, from_fields
from serving.pages import Node, PagePool
from serving.plan import ScheduledSequence, StepPlan
from serving.request import UNREAD, Kind, Request, State
from serving.sampling_params import Limits, SamplingParams, banned_sequences, resolve, truncate
from serving.scheduler import QueueFullError, Scheduler, SchedulerConfig
from serving.text_out import Piece, TextOut

__all__ = [
    "UNREAD",
    "Kind",
    "Limits",
    "Node",
    "PagePool",
    "ParameterError",
    "Piece",
    "QueueFullError",
    "Request",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "State",
    "StepPlan",
    "TextOut",
    "banned_sequences",
    "checkpoint_defaults",
    "from_fields",
    "resolve",
    "truncate",
]
