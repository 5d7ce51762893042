"""The scoring core: log-probabilities of the ends of token rows, on a checkpoint in process.

Rows are sorted by length, padded on the right to a bucket, and batched to a budget of tokens, so
few programs are compiled and what a row gets does not depend on its neighbours. Logits exist only
for the positions that count, a chunk at a time, in float32. Rows that differ in their last token
only (options of a question) go through the model once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.spans import Span
from model import ModelConfig, Runtime, hidden_states, logits
from model.sampling import most_likely
from serving.memory import Model
from sharding import constrain
from training.cross_entropy import logit_statistics

Array = jax.Array
SMALLEST, HEAD_ROWS = 64, 1024
FORCED = (0, 16, 128)
FEWER = 8
BY_LENGTH = ("dynamic", "longrope")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpanScore:
    """Sum of the log-probabilities of a span's counted tokens, and whether each was the likeliest
    (of equals the lowest id counts).
    """

    logprob: float
    greedy: bool


@dataclass
class Work:
    """What was computed so far. tokens: real ones through the model. rows: of them. programs: one
    a shape.
    """

    tokens: int = 0
    rows: int = 0
    programs: set[tuple[int, ...]] = field(default_factory=set)


@dataclass
class Job:
    """One row of a batch: what the model reads, how many of its own tokens are scored, and the
    tokens that may come last. members: `(index of the span, which of the last tokens)`.
    """

    tokens: np.ndarray
    forced: int
    lasts: list[int]
    members: list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """Jobs of one shape: `rows` (some may be empty) of `length` tokens, `forced` of which count at
    most, and `lasts` tokens that may come last.
    """

    jobs: tuple[Job, ...]
    rows: int
    length: int
    forced: int
    lasts: int


class Scorer:
    """Scores spans with a model.

    Args:
        model: prepared params, config, and runtime with the layout they lie in.
        max_length: most tokens that the model reads at once.
        token_budget: tokens of a batch.
    """

    def __init__(self, model: Model, max_length: int, token_budget: int = 4096) -> None:
        if max_length < 1 or token_budget < 1:
            raise ValueError(
                f"max_length is {max_length} and token_budget {token_budget}; both must be 1 or "
                "more"
            )
        self.model, self.max_length, self.token_budget = model, max_length, token_budget
        self.work = Work()

    def score(
        self, spans: Sequence[Span], known: Collection[int] = ()
    ) -> Iterator[list[tuple[int, SpanScore]]]:
        """Scores with the places of their spans, a batch at a time, the longest rows first.

        known: places whose scores are not needed. They are planned for all the same, and batches
        of nothing else are passed over, so an evaluation that goes on computes just what it would
        have computed.
        """
        for batch in self.plan(spans):
            members = [place for job in batch.jobs for place, _ in job.members]
            if any(place not in known for place in members):
                yield self._run(batch)

    def plan(self, spans: Sequence[Span]) -> list[Batch]:
        """The batches of spans."""
        layout, scaling = self.model.runtime.layout, self.model.config.rope_scaling
        shards = 1 if layout is None else layout.size("batch")
        # Frequencies that go by the longest row at hand must not depend on a row's neighbours.
        alone = scaling is not None and scaling.kind in BY_LENGTH and scaling.select == "length"
        return plan(share(spans), self.max_length, self.token_budget, shards, alone)

    def _run(self, batch: Batch) -> list[tuple[int, SpanScore]]:
        tokens = np.zeros((batch.rows, batch.length), np.int32)
        lengths = np.ones(batch.rows, np.int32)
        lasts = np.zeros((batch.rows, batch.lasts), np.int32)
        for row, job in enumerate(batch.jobs):
            lengths[row] = len(job.tokens)
            tokens[row, : len(job.tokens)] = job.tokens
            lasts[row, : len(job.lasts)] = job.lasts
        self._count(batch)
        found = _score(
            self.model.params,
            tokens,
            lengths,
            lasts,
            config=self.model.config,
            runtime=self.model.runtime,
            forced=batch.forced,
        )
        forced, hits, options, best = jax.device_get(found)
        scores = []
        for row, job in enumerate(batch.jobs):
            start = batch.forced - job.forced
            before = float(forced[row, start:].sum(dtype=np.float64))
            all_hit = bool(hits[row, start:].all())
            for place, option in job.members:
                greedy = all_hit and int(best[row]) == job.lasts[option]
                scores.append((place, SpanScore(before + float(options[row, option]), greedy)))
        return scores

    def _count(self, batch: Batch) -> None:
        shape = (batch.rows, batch.length, batch.forced, batch.lasts)
        if shape not in self.work.programs:
            self.work.programs.add(shape)
            logger.info(
                "scoring program %d: %d rows of %d tokens", len(self.work.programs), *shape[:2]
            )
        self.work.rows += len(batch.jobs)
        self.work.tokens += sum(len(job.tokens) for job in batch.jobs)


def share(spans: Sequence[Span]) -> list[Job]:
    """One job for all spans that differ in their last token only, in order of the first."""
    jobs: dict[tuple[bytes, int], Job] = {}
    for place, span in enumerate(spans):
        tokens, last = span.tokens[:-1], int(span.tokens[-1])
        key = (tokens.tobytes(), span.count)
        if key not in jobs:
            jobs[key] = Job(tokens, span.count - 1, [], [])
        job = jobs[key]
        if last not in job.lasts:
            job.lasts.append(last)
        job.members.append((place, job.lasts.index(last)))
    return list(jobs.values())


def plan(
    jobs: Sequence[Job], max_length: int, token_budget: int, shards: int = 1, alone: bool = False
) -> list[Batch]:
    """Batches of jobs of one shape, the longest first.

    Rows are `token_budget // length`, a multiple of `shards`, or an eighth of it where so many
    would leave too many rows empty: two sizes, so that other jobs seldom need another program.
    alone: a batch holds one job.
    """
    groups: dict[tuple[int, int, int], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: -len(job.tokens)):
        length = min(_power(len(job.tokens), SMALLEST), max_length)
        forced = next((size for size in FORCED if job.forced <= size), None)
        shape = (length, forced if forced is not None else length, _power(len(job.lasts), 1))
        groups.setdefault(shape, []).append(job)
    batches = []
    for (length, forced, lasts), group in groups.items():
        rows = shards if alone else _rows(len(group), token_budget // length, shards)
        size = 1 if alone else rows
        batches += [
            Batch(tuple(group[start : start + size]), rows, length, min(forced, length), lasts)
            for start in range(0, len(group), size)
        ]
    return batches


def _rows(jobs: int, most: int, shards: int) -> int:
    """Rows of a batch, so that at most an eighth of all are empty if that many fill one at all."""
    many, few = (max(size // shards, 1) * shards for size in (most, most // FEWER))
    return many if -jobs % many * FEWER <= jobs else few


@functools.partial(jax.jit, static_argnames=("config", "runtime", "forced"))
def _score(
    params: Mapping[str, Any],
    tokens: Array,
    lengths: Array,
    lasts: Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
    forced: int,
) -> tuple[Array, Array, Array, Array]:
    """Of rows `int32[rows, length]`: log-probability `[rows, forced]` and being the likeliest of
    the last `forced` tokens, log-probability `[rows, lasts]` of what may follow, and the likeliest.
    """
    tokens = constrain(tokens, ("batch", "length"), runtime.layout)
    real = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    marked = real if padding_shows(config) else None
    hidden, _ = hidden_states(params, tokens, config, runtime, segment_ids=marked)
    places = lengths[:, None] - 1 - forced + jnp.arange(forced + 1)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(places, 0)[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, jnp.maximum(places[:, 1:], 0), axis=1)
    head = functools.partial(logits, params, config=config, runtime=runtime)
    logprobs, hits = _forced(head, hidden[:, :-1], targets)
    last = head(hidden[:, -1:])
    log_z = logit_statistics(last, lasts[:, :1])[0]
    options = jnp.take_along_axis(last[:, 0], lasts, axis=1) - log_z
    return logprobs, hits, options, most_likely(last[:, 0])


def padding_shows(config: ModelConfig) -> bool:
    """Whether what stands behind a row changes its values, so that it must be marked as padding.

    Attention looks back only, and masks of padding cost a CPU a third of a row's time. But tokens
    of padding would take the places of experts with a capacity, and make rows longer for rotary
    scalings that go by their length.
    """
    layers = [segment.layer for segment in config.segments]
    scalings = [layer.rope_scaling for layer in layers if layer.rope_scaling is not None]
    by_length = any(scaling.kind in BY_LENGTH for scaling in scalings)
    return by_length or any(layer.capacity_factor is not None for layer in layers)


def _forced(head: Any, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """`head_cross_entropy` without a gradient: pieces along the length, a few logits at a time."""
    rows, length = targets.shape
    if not length:
        return jnp.zeros((rows, 0)), jnp.zeros((rows, 0), bool)
    size = max(1, min(length, HEAD_ROWS // rows))
    pieces = next(n for n in range(-(-length // size), length + 1) if length % n == 0)

    def one(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = head(piece[0])
        log_z, chosen, _ = logit_statistics(scores, piece[1])
        return chosen - log_z, most_likely(scores) == piece[1]

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, pieces, length // pieces, *x.shape[2:]), 1, 0)

    found = jax.lax.map(one, (cut(hidden), cut(targets)))
    logprobs, hits = (jnp.moveaxis(x, 0, 1).reshape(rows, length) for x in found)
    return logprobs, hits


def _power(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())
