"""The scoring core: log-probabilities of the ends of token rows, on a checkpoint in process.

`evals.batches` makes few shapes of rows, so few programs are compiled and what a row gets does not
depend on its neighbours. Logits exist only for the positions that count, a chunk at a time, in
float32. What rows share (the question before its options) goes through the model once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.batches import Batch, QuestionBatch, Room, plan
from evals.spans import Span
from model import ModelConfig, Runtime, hidden_states, init_cache, logits
from model.caches.attend import AXES
from model.sampling import most_likely
from model.segments import segments_of
from serving.memory import Model
from sharding import Layout, constrain
from training.cross_entropy import logit_statistics

Array = jax.Array
HEAD_ROWS = 1024
BY_LENGTH = ("dynamic", "longrope")
Found = tuple[np.ndarray, np.ndarray, np.ndarray, Any]
"""Of a job: log-probabilities of its scored tokens and whether each is the likeliest, those of the
tokens that may come last, and the likeliest of these.
"""
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

    def plan(self, spans: Sequence[Span]) -> list[Batch | QuestionBatch]:
        """The batches of spans."""
        layout, scaling = self.model.runtime.layout, self.model.config.rope_scaling
        shards = 1 if layout is None else layout.size("batch")
        # Frequencies that go by the longest row at hand must not depend on a row's neighbours.
        alone = scaling is not None and scaling.kind in BY_LENGTH and scaling.select == "length"
        hard = self.model.config.positions == "learned"
        room = Room(self.max_length, self.token_budget, shards, alone, hard)
        return plan(spans, room, contexts=not padding_shows(self.model.config))

    def _run(self, batch: Batch | QuestionBatch) -> list[tuple[int, SpanScore]]:
        self._count(batch)
        found = self._questions(batch) if isinstance(batch, QuestionBatch) else self._rows(batch)
        scores = []
        for job, (before, hits, options, best) in zip(batch.jobs, found, strict=True):
            logprob, all_hit = float(before.sum(dtype=np.float64)), bool(hits.all())
            for place, option in job.members:
                greedy = all_hit and int(best) == job.lasts[option]
                scores.append((place, SpanScore(logprob + float(options[option]), greedy)))
        return scores

    def _rows(self, batch: Batch) -> list[Found]:
        tokens = np.zeros((batch.rows, batch.length), np.int32)
        lengths = np.ones(batch.rows, np.int32)
        lasts = np.zeros((batch.rows, batch.lasts), np.int32)
        for row, job in enumerate(batch.jobs):
            lengths[row] = len(job.tokens)
            tokens[row, : len(job.tokens)] = job.tokens
            lasts[row, : len(job.lasts)] = job.lasts
        found = _score(
            self.model.params,
            tokens,
            lengths,
            lasts,
            config=self.model.config,
            runtime=self.model.runtime,
            forced=batch.forced,
        )
        logprobs, hits, options, best = jax.device_get(found)
        starts = [batch.forced - job.forced for job in batch.jobs]
        return [
            (logprobs[row, start:], hits[row, start:], options[row], best[row])
            for row, start in enumerate(starts)
        ]

    def _questions(self, batch: QuestionBatch) -> list[Found]:
        contexts = np.zeros((batch.rows, batch.length), np.int32)
        lengths = np.ones(batch.rows, np.int32)
        tails = np.zeros((batch.rows, batch.options, batch.forced), np.int32)
        counts = np.zeros((batch.rows, batch.options), np.int32)
        lasts = np.zeros((batch.rows, batch.options, batch.lasts), np.int32)
        places = []
        for row, question in enumerate(batch.questions):
            lengths[row] = len(question.context)
            contexts[row, : len(question.context)] = question.context
            for column, job in enumerate(question.options):
                places.append((row, column))
                counts[row, column] = job.forced
                tails[row, column, : job.forced] = job.tail
                lasts[row, column, : len(job.lasts)] = job.lasts
        found = _score_options(
            self.model.params,
            contexts,
            lengths,
            tails,
            counts,
            lasts,
            config=self.model.config,
            runtime=self.model.runtime,
        )
        logprobs, hits, options, best = jax.device_get(found)
        return [
            (logprobs[at][: counts[at]], hits[at][: counts[at]], options[at], best[at])
            for at in places
        ]

    def _count(self, batch: Batch | QuestionBatch) -> None:
        if batch.shape not in self.work.programs:
            self.work.programs.add(batch.shape)
            logger.info(
                "scoring program %d: %d rows of %d tokens",
                len(self.work.programs),
                *batch.shape[:2],
            )
        one = isinstance(batch, QuestionBatch)
        self.work.rows += len(batch.questions if one else batch.jobs)
        self.work.tokens += batch.tokens


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


@functools.partial(jax.jit, static_argnames=("config", "runtime"))
def _score_options(
    params: Mapping[str, Any],
    contexts: Array,
    lengths: Array,
    tails: Array,
    counts: Array,
    lasts: Array,
    *,
    config: ModelConfig,
    runtime: Runtime,
) -> tuple[Array, Array, Array, Array]:
    """As `_score`, of contexts `int32[rows, length]`, each before tails `int32[rows, options,
    forced]` of `counts` tokens: all results with the axes rows and options in front.
    """
    rows, options, forced = tails.shape
    layout = runtime.layout
    contexts = constrain(contexts, ("batch", "length"), layout)
    cache = init_cache(
        config,
        rows,
        contexts.shape[1] + forced,
        kind="dense",
        dtype=runtime.compute_dtype,
        layout=layout,
        segments=segments_of(params, config),
    )
    hidden, aux = hidden_states(params, contexts, config, runtime, cache=cache)
    before = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    cache = _repeated(aux["cache"], lengths, options, layout)
    tokens = constrain(tails.reshape(rows * options, forced), ("batch", "length"), layout)
    after, _ = hidden_states(params, tokens, config, runtime, cache=cache)
    hidden = jnp.concatenate([jnp.repeat(before, options, axis=0), after], axis=1)
    head = functools.partial(logits, params, config=config, runtime=runtime)
    logprobs, hits = _forced(head, hidden[:, :-1], tokens)
    last = head(jnp.take_along_axis(hidden, counts.reshape(-1, 1, 1), axis=1))
    lasts = lasts.reshape(rows * options, -1)
    log_z = logit_statistics(last, lasts[:, :1])[0]
    chosen = jnp.take_along_axis(last[:, 0], lasts, axis=1) - log_z
    found = (logprobs, hits, chosen, most_likely(last[:, 0]))
    return tuple(x.reshape(rows, options, *x.shape[1:]) for x in found)  # pyright: ignore


def _repeated(cache: Any, lengths: Array, times: int, layout: Layout | None) -> Any:
    """The cache of each row so many times, with that many tokens held: what padding left behind
    them is overwritten before anyone may look at it.
    """

    def repeat(leaf: Array) -> Array:
        return constrain(jnp.repeat(leaf, times, axis=1), AXES, layout)

    segments = jax.tree.map(repeat, cache.segments)
    return dataclasses.replace(cache, segments=segments, lengths=jnp.repeat(lengths, times))


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
