"""What one pass of a model computes and moves, operator by operator: the one table from which
rooflines, latencies and plans are read.

Operators follow from the model's own description of its arrays (`model.parameters.describe`), so
every family and mixture is counted with no code here. Norms, residual sums and activations are left
out: under 2 % of a pass. Bytes are those of perfect reuse: what must be moved once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model import ModelConfig
from model.arrays import ArraySpec
from model.config import Segment
from model.parameters import describe

SPLIT = ("heads", "kv_heads", "d_ff", "vocab")
"""Logical axes that tensor parallelism divides."""


@dataclass(frozen=True)
class Bits:
    """Bits of a stored value.

    weights: of the layers' matrices; may be a mean, scales and zeros counted (4.25). head: of
    embeddings and head, which quantizers leave as they are.
    """

    weights: float = 16
    head: float = 16
    activations: float = 16
    cache: float = 16


@dataclass(frozen=True)
class Work:
    """What a pass does.

    batch: sequences. query: new tokens of each. context: tokens that each of the last ones attends
    to, itself included. causal: count only the scores below the diagonal, as a kernel that skips
    masked blocks computes; otherwise all of them, as published tables do.
    all_logits: the head runs for every token (training), not for the last of each sequence.
    """

    batch: int = 1
    query: int = 1
    context: int = 1
    causal: bool = True
    all_logits: bool = False

    def __post_init__(self) -> None:
        for field in ("batch", "query", "context"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; at least 1")
        if self.context < self.query:
            raise ValueError(f"context={self.context} holds fewer tokens than query={self.query}")

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.query


def prefill(batch: int, length: int, *, causal: bool = True) -> Work:
    """Prompts of `length` tokens, nothing cached."""
    return Work(batch, length, length, causal)


def decode(batch: int, context: int) -> Work:
    """One token for each sequence, attending to `context` tokens, its own included."""
    return Work(batch, 1, context)


@dataclass(frozen=True)
class Op:
    """One operator on one device, `count` times in the pass.

    name: path of the array that it multiplies by, without its layer; or "attention".
    flops: twice the multiply-adds. weight_bytes, activation_read, activation_write, cache_read,
    cache_write: bytes moved. reduced: bytes of a result that tensor parallelism must sum over
    devices; 0 if none.
    """

    name: str
    flops: float
    weight_bytes: float = 0.0
    activation_read: float = 0.0
    activation_write: float = 0.0
    cache_read: float = 0.0
    cache_write: float = 0.0
    reduced: float = 0.0
    count: int = 1

    @property
    def bytes(self) -> float:
        """All bytes that it moves."""
        return (
            self.weight_bytes
            + self.activation_read
            + self.activation_write
            + self.cache_read
            + self.cache_write
        )

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else math.inf


def operators(
    config: ModelConfig, work: Work, bits: Bits | None = None, tensor: int = 1
) -> list[Op]:
    """The operators of one forward pass, in order, as one of `tensor` devices runs them.

    Heads and inner widths are divided over `tensor` devices, rounded up; what is not divided
    (routers, projections of the embedding) every device computes.
    """
    bits = bits or Bits()
    found: list[Op] = []
    head: list[Op] = []
    for path, (spec, segment) in describe(config).items():
        if path.endswith("/kernel"):
            op = _product(path, spec, segment, work, bits, tensor)
            (head if path.startswith("head") else found).append(op)
            if path.endswith("attention/value/kernel"):
                assert segment is not None
                found.append(_attention(segment, work, bits, tensor))
    if config.tied_embeddings:
        spec = ArraySpec(
            (config.d_embed or config.d_model, config.vocab_size), ("d_model", "vocab")
        )
        head.append(_product("head/kernel", spec, None, work, bits, tensor))
    return found + head


def total_flops(ops: list[Op]) -> float:
    """FLOPs of the pass on one device."""
    return sum(op.flops * op.count for op in ops)


def total_bytes(ops: list[Op]) -> float:
    """Bytes that the pass moves on one device."""
    return sum(op.bytes * op.count for op in ops)


def training_flops_per_token(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """FLOPs of a trained token, forward and backward (three forwards), nothing recomputed."""
    work = Work(1, length, length, causal, all_logits=True)
    return 3 * total_flops(operators(config, work)) / length


def cache_bytes_per_token(config: ModelConfig, bits: Bits | None = None) -> float:
    """Bytes that a token takes in the caches of all layers."""
    width = (bits or Bits()).cache / 8
    layers = (config.layer(index) for index in range(config.num_layers))
    return sum(2 * (layer.kv_heads or 0) * (layer.head_dim or 0) * width for layer in layers)


def model_flops_utilization(
    tokens_per_second: float, devices: int, peak: float, flops_per_token: float
) -> float:
    """MFU in [0, 1]; peak is one device's FLOP/s."""
    return tokens_per_second * flops_per_token / (devices * peak)


def distinct_experts(num_experts: int, per_token: int, tokens: int) -> float:
    """Experts that a batch of tokens is expected to meet, each sent to `per_token` at random:
    E (1 - (1 - k / E)^B).
    """
    return num_experts * (1 - (1 - per_token / num_experts) ** tokens)


def _product(
    path: str, spec: ArraySpec, segment: Segment | None, work: Work, bits: Bits, tensor: int
) -> Op:
    *experts, rows, columns = spec.shape
    *_, row_axis, column_axis = spec.axes
    rows = -(-rows // tensor) if row_axis in SPLIT else rows
    columns = -(-columns // tensor) if column_axis in SPLIT else columns
    name = path.split("/", 2)[2] if segment is not None else path
    outside = segment is None and path.startswith("head")
    tokens = float(work.batch if outside and not work.all_logits else work.tokens)
    matrices = 1.0
    if experts:
        assert segment is not None
        matrices = distinct_experts(experts[0], segment.layer.experts_per_token, work.tokens)
        tokens *= segment.layer.experts_per_token
    activation, written = bits.activations / 8, tokens * columns
    stored = bits.head if segment is None else bits.weights
    into_cache = name in ("attention/key/kernel", "attention/value/kernel")
    return Op(
        name=name.removesuffix("/kernel"),
        flops=2.0 * rows * columns * tokens,
        weight_bytes=matrices * rows * columns * stored / 8,
        activation_read=tokens * rows * activation,
        activation_write=0.0 if into_cache else written * activation,
        cache_write=written * bits.cache / 8 if into_cache else 0.0,
        reduced=written * activation if row_axis in SPLIT and tensor > 1 else 0.0,
        count=1 if segment is None else len(segment),
    )


def _attention(segment: Segment, work: Work, bits: Bits, tensor: int) -> Op:
    """Scores, softmax and the weighted sum in one kernel: scores are never written."""
    layer = segment.layer
    heads, kv_heads = -(-layer.num_heads // tensor), -(-(layer.kv_heads or 0) // tensor)
    head_dim, window = layer.head_dim or 0, layer.sliding_window
    seen = float(work.context)
    if work.causal and work.query > 1:  # query i of n sees context - n + i tokens
        seen = work.context - (work.query - 1) / 2
    if window is not None:
        seen = _windowed(work, window)
    kept = work.context if window is None else min(work.context, window + work.query - 1)
    rows = work.tokens * heads * head_dim * bits.activations / 8
    return Op(
        name="attention",
        flops=4.0 * work.tokens * heads * head_dim * seen,
        activation_read=rows,
        activation_write=rows,
        cache_read=2.0 * work.batch * kept * kv_heads * head_dim * bits.cache / 8,
        count=len(segment),
    )


def _windowed(work: Work, window: int) -> float:
    """Mean tokens that a query sees through a sliding window."""
    if not work.causal:
        return float(min(work.context, window))
    first = work.context - work.query + 1
    growing = max(0, min(work.context + 1, window) - first)  # queries that see less than the window
    total = growing * (2 * first + growing - 1) / 2 + (work.query - growing) * window
    return min(total / work.query, float(work.context))
