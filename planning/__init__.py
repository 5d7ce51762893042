"""What a run will cost before it runs: operators, rooflines, estimates of serving, and the training
step compiled for a TPU slice that is not there.

    from planning import HARDWARE, decode, operators, seconds, timed

    seconds(timed(operators(config, decode(batch=8, context=2048)), HARDWARE["h100"]))

`planning.compile_ahead` is imported by its name, since it brings the training room with it.
"""

from planning.hardware import HARDWARE, Hardware, hardware, read_hardware
from planning.inference import Plan, Report, UseCase, best_batch, estimate, requirements
from planning.memory import Memory, Split, inference_memory, training_memory
from planning.operators import (
    Bits,
    Op,
    Work,
    decode,
    model_flops_utilization,
    operators,
    prefill,
    training_flops_per_token,
)
from planning.roofline import Efficiency, Timed, compute_bound_batch, seconds, timed

__all__ = [
    "HARDWARE",
    "Bits",
    "Efficiency",
    "Hardware",
    "Memory",
    "Op",
    "Plan",
    "Report",
    "Split",
    "Timed",
    "UseCase",
    "Work",
    "best_batch",
    "compute_bound_batch",
    "decode",
    "estimate",
    "hardware",
    "inference_memory",
    "model_flops_utilization",
    "operators",
    "prefill",
    "read_hardware",
    "requirements",
    "seconds",
    "timed",
    "training_flops_per_token",
    "training_memory",
]
