"""Bytes that a run holds on one device, by what they are for, in closed form.

`planning.compile_ahead` asks the compiler for the same; this is for ranking many plans at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from model import ModelConfig, count_parameters
from model.parameters import describe
from planning.operators import Bits, cache_bytes_per_token
from sharding import Schedule


@dataclass(frozen=True)
class Stored:
    """Bytes of one parameter in each role; the defaults are Adam in mixed precision.

    weights: what is multiplied. gradients. master: float32 copy of the weights. moments: optimizer.
    """

    weights: float = 2
    gradients: float = 4
    master: float = 4
    moments: float = 8


@dataclass(frozen=True)
class Split:
    """Devices that a run is divided over.

    data, fsdp, tensor, stage, context, expert: sizes of the mesh's axes. zero: roles that are
    divided over data and fsdp too: 0 none, 1 master and moments, 2 gradients too, 3 weights too;
    fsdp always divides all.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    stage: int = 1
    context: int = 1
    expert: int = 1
    zero: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < (0 if field.name == "zero" else 1):
                raise ValueError(f"{field.name}={getattr(self, field.name)}; at least 1")

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor * self.stage * self.context * self.expert


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))


@functools.cache
def parameters_of(config: ModelConfig) -> int:
    """Trained values of a model; counted once."""
    return count_parameters(config)


def training_memory(
    config: ModelConfig,
    split: Split,
    *,
    micro_batch: int,
    length: int,
    remat: bool = True,
    schedule: Schedule | None = None,
    stored: Stored | None = None,
) -> Memory:
    """Bytes on the fullest device.

    micro_batch: sequences on each data shard in one pass. schedule: of the pipeline, if any. remat:
    only a block's input is kept; else what Megatron counts without scores (arXiv 2205.05198, eq.
    2): 34 s b d_model bytes. What stands outside the layers is on every stage.
    """
    stored = stored or Stored()
    share = stage_parameters(config, split.stage) / (split.tensor * split.fsdp * split.expert)
    divided = [split.data if split.zero >= level else 1 for level in (3, 2, 1)]
    tokens = micro_batch * length / split.context
    layers = -(-config.num_layers // split.stage)
    block = 34 * tokens * config.d_model / split.tensor
    kept_input = 2 * tokens * config.d_model / split.tensor
    kept = kept_input if remat else block
    return Memory(
        weights=share * stored.weights / divided[0],
        gradients=share * stored.gradients / divided[1],
        optimizer=share * (stored.master + stored.moments) / divided[2],
        activations=_held(schedule, layers * kept, kept_input) + (block if remat else 0.0),
        logits=6 * tokens * config.vocab_size / (split.tensor * split.stage),
    )


def stage_parameters(config: ModelConfig, stages: int) -> float:
    """Trained values on one pipeline stage: its layers, and all that stands outside the layers."""
    outside = outside_parameters(config)
    return (parameters_of(config) - outside) / stages + outside


def _held(schedule: Schedule | None, one_pass: float, one_input: float) -> float:
    """Bytes of activations that wait for their backward pass. `sharding.pipeline` keeps what every
    tick of a forward loop keeps, the idle ones too; or, where passes alternate, inputs only, and
    what one backward pass computes anew.
    """
    if schedule is None:
        return one_pass
    ticks = schedule.forward_ticks
    if schedule.first_first:
        return one_pass + min(ticks, 2 * schedule.stages - 1) * one_input
    return ticks * one_pass / schedule.repeats


@functools.cache
def outside_parameters(config: ModelConfig) -> int:
    """Trained values that stand outside the layers: embedding, head, final norm."""
    return sum(math.prod(spec.shape) for spec, segment in describe(config).values() if not segment)


def inference_memory(
    config: ModelConfig, batch: int, length: int, bits: Bits | None = None, devices: int = 1
) -> tuple[float, float]:
    """`(weights, cache)` in bytes on one of `devices` that share the model: all experts, and
    `batch` sequences of `length` tokens (of a sliding window no more than it sees).
    """
    bits = bits or Bits()
    outside = outside_parameters(config)
    weights = (parameters_of(config) - outside) * bits.weights / 8 + outside * bits.head / 8
    cache = 0.0
    for segment in config.segments:
        layer = segment.layer
        kept = min(length, layer.sliding_window or length)
        one = dataclasses.replace(layer, num_layers=1, layer_overrides=())
        cache += len(segment) * batch * kept * cache_bytes_per_token(one, bits)
    return weights / devices, cache / devices
