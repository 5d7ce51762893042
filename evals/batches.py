"""How spans are batched: what goes through the model once, and in which few shapes.

Rows are sorted by length, padded on the right to a bucket, and batched to a budget of tokens. Spans
that differ in their last token only are one row. Spans that share all before what counts (options
of a question, each of several tokens) are one context, which goes through the model once, and one
short tail each. `evals.scoring` runs the batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.spans import Span

SMALLEST, SMALLEST_TAIL = 64, 8
FORCED = (0, 16, 128)
FEWER = 8
WORTH = 32
"""Tokens that sharing a context must save to be worth a program of its own."""


@dataclass
class Job:
    """One row of a batch: what the model reads, how many of its own tokens are scored, and the
    tokens that may come last. members: `(index of the span, which of the last tokens)`.
    """

    tokens: np.ndarray
    forced: int
    lasts: list[int]
    members: list[tuple[int, int]]

    @property
    def context(self) -> np.ndarray:
        """What stands before the scored tokens."""
        return self.tokens[: len(self.tokens) - self.forced]

    @property
    def tail(self) -> np.ndarray:
        """The scored tokens, without the last one."""
        return self.tokens[len(self.tokens) - self.forced :]


@dataclass(frozen=True)
class Question:
    """Jobs of one context."""

    options: tuple[Job, ...]

    @property
    def context(self) -> np.ndarray:
        """What stands before all options."""
        return self.options[0].context

    @property
    def longest(self) -> int:
        """Tokens of the longest tail."""
        return max(option.forced for option in self.options)


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

    @property
    def shape(self) -> tuple[int, ...]:
        """What its program is compiled for."""
        return (self.rows, self.length, self.forced, self.lasts)

    @property
    def tokens(self) -> int:
        """Real ones that the model reads."""
        return sum(len(job.tokens) for job in self.jobs)


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of one shape: `rows` contexts (some may be empty) of `length` tokens, to each at
    most `options` of `forced` tokens, and `lasts` tokens that may come last in each.
    """

    questions: tuple[Question, ...]
    rows: int
    length: int
    options: int
    forced: int
    lasts: int

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Of all questions."""
        return tuple(option for question in self.questions for option in question.options)

    @property
    def shape(self) -> tuple[int, ...]:
        """What its program is compiled for."""
        return (self.rows, self.length, self.options, self.forced, self.lasts)

    @property
    def tokens(self) -> int:
        """Real ones that the model reads."""
        contexts = sum(len(question.context) for question in self.questions)
        return contexts + sum(job.forced for job in self.jobs)


@dataclass(frozen=True)
class Room:
    """What a model's batches must keep to.

    max_length: most tokens that it reads at once. token_budget: tokens of a batch. shards: devices
    that rows are split over. alone: a batch holds one job, and nothing is shared. hard: positions
    from `max_length` on do not exist, not even for padding.
    """

    max_length: int
    token_budget: int
    shards: int = 1
    alone: bool = False
    hard: bool = False


def plan(spans: Sequence[Span], room: Room, contexts: bool = True) -> list[Batch | QuestionBatch]:
    """The batches of spans, of each shape the longest first. contexts: whether they are shared."""
    jobs = share(spans)
    if room.alone or not contexts:
        return list(_plan_jobs(jobs, room))
    questions, others = _questions(jobs, room)
    return [*_plan_questions(questions, room), *_plan_jobs(others, room)]


def share(spans: Sequence[Span]) -> list[Job]:
    """One job for all spans that differ in their last token only, in order of the first."""
    jobs: dict[tuple[bytes, int], Job] = {}
    for place, span in enumerate(spans):
        tokens, last = span.tokens[:-1], int(span.tokens[-1])
        key = (tokens.tobytes(), span.count)
        if key not in jobs:
            jobs[key] = Job(tokens, int(span.count) - 1, [], [])
        job = jobs[key]
        if last not in job.lasts:
            job.lasts.append(last)
        job.members.append((place, job.lasts.index(last)))
    return list(jobs.values())


def _questions(jobs: Sequence[Job], room: Room) -> tuple[list[Question], list[Job]]:
    """Jobs whose context is worth sharing, by context, and all others."""
    by_context: dict[bytes, list[Job]] = {}
    for job in jobs:
        by_context.setdefault(job.context.tobytes(), []).append(job)
    questions, others = [], []
    for found in by_context.values():
        question = Question(tuple(found))
        if _worth_sharing(question, room):
            questions.append(question)
        else:
            others += found
    return questions, others


def _worth_sharing(question: Question, room: Room) -> bool:
    """Whether options follow a context that is longer than each, and find room behind it."""
    length, _, forced, _ = _shape(question, room)
    count, context = len(question.options), len(question.context)
    saves = (count - 1) * context >= WORTH and 0 < question.longest <= context
    fits = length + count * forced <= room.token_budget
    return saves and fits and not (room.hard and length + forced > room.max_length)


def _shape(question: Question, room: Room) -> tuple[int, int, int, int]:
    """Tokens of the context, options, tokens of each, and tokens that may come last in each."""
    return (
        _bucket(len(question.context), room),
        _power(len(question.options), 2),
        _power(question.longest, SMALLEST_TAIL),
        _power(max(len(option.lasts) for option in question.options), 1),
    )


def _plan_questions(questions: Sequence[Question], room: Room) -> list[QuestionBatch]:
    groups: dict[tuple[int, int, int, int], list[Question]] = {}
    for question in sorted(questions, key=lambda question: -len(question.context)):
        groups.setdefault(_shape(question, room), []).append(question)
    batches = []
    for (length, options, forced, lasts), group in groups.items():
        rows = _rows(len(group), room.token_budget // (length + options * forced), room.shards)
        batches += [
            QuestionBatch(tuple(group[start : start + rows]), rows, length, options, forced, lasts)
            for start in range(0, len(group), rows)
        ]
    return batches


def _plan_jobs(jobs: Sequence[Job], room: Room) -> list[Batch]:
    """Rows are `token_budget // length`, a multiple of `shards`, or an eighth of it where so many
    would leave too many rows empty: two sizes, so that other jobs seldom need another program.
    """
    groups: dict[tuple[int, int, int], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: -len(job.tokens)):
        length = _bucket(len(job.tokens), room)
        forced = next((size for size in FORCED if job.forced <= size), None)
        shape = (length, forced if forced is not None else length, _power(len(job.lasts), 1))
        groups.setdefault(shape, []).append(job)
    batches = []
    for (length, forced, lasts), group in groups.items():
        most = room.token_budget // length
        rows = room.shards if room.alone else _rows(len(group), most, room.shards)
        size = 1 if room.alone else rows
        batches += [
            Batch(tuple(group[start : start + size]), rows, length, min(forced, length), lasts)
            for start in range(0, len(group), size)
        ]
    return batches


def _bucket(length: int, room: Room) -> int:
    """A power of two, or the middle between two."""
    whole = _power(length, SMALLEST)
    middle = 3 * whole // 4
    return min(middle if whole > SMALLEST and length <= middle else whole, room.max_length)


def _rows(jobs: int, most: int, shards: int) -> int:
    """Rows of a batch, so that at most an eighth of all are empty if that many fill one at all."""
    many, few = (max(size // shards, 1) * shards for size in (most, most // FEWER))
    return many if -jobs % many * FEWER <= jobs else few


def _power(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())
