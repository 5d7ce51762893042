"""Serving any checkpoint: an engine over pages of keys and values, and what it asks of a request.

    with Engine.open("runs/quickstart") as engine:
        print(engine.generate(["Once upon a time"])[0].text)

A request (`SamplingParams` from `from_fields`, checked by `resolve`) becomes a `Request`; the
`Scheduler` plans each step over a `PagePool`; `TextOut` turns what was sampled into text.
"""

from serving.checks import ParameterError
from serving.engine import Engine
from serving.fields import checkpoint_defaults, from_fields
from serving.outputs import Answer, EngineStoppedError, Output, Result, TokenLogprob
from serving.pages import Node, PagePool
from serving.plan import ScheduledSequence, StepPlan
from serving.request import UNREAD, Kind, Request, State
from serving.sampling_params import Limits, SamplingParams, banned_sequences, resolve, truncate
from serving.scheduler import QueueFullError, Scheduler, SchedulerConfig
from serving.settings import EngineSettings
from serving.stats import EngineStats, Histogram
from serving.structured import StructuredOutputs
from serving.text_out import Piece, TextOut

__all__ = [
    "UNREAD",
    "Answer",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "EngineStoppedError",
    "Histogram",
    "Kind",
    "Limits",
    "Node",
    "Output",
    "PagePool",
    "ParameterError",
    "Piece",
    "QueueFullError",
    "Request",
    "Result",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "State",
    "StepPlan",
    "StructuredOutputs",
    "TextOut",
    "TokenLogprob",
    "banned_sequences",
    "checkpoint_defaults",
    "from_fields",
    "resolve",
    "truncate",
]
