"""A request inside the engine: its tokens, how far they are computed, and why it ended."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.sampling_params import SamplingParams

UNREAD = -1
"""Stands for a sampled token that is still on the device."""


class State(enum.StrEnum):
    """Where a request is; the values of finished ones are the label of the metrics."""

    WAITING = "waiting"
    WAITING_GRAMMAR = "waiting_grammar"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOP = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORT = "abort"
    FINISHED_ERROR = "error"

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self in FINISHED


FINISHED = (State.FINISHED_STOP, State.FINISHED_LENGTH, State.FINISHED_ABORT, State.FINISHED_ERROR)


class Kind(enum.StrEnum):
    """What a request wants: text, log-probabilities of its prompt, or a vector."""

    GENERATE = "generate"
    SCORE = "score"
    EMBED = "embed"


@dataclass(eq=False)
class Request:
    """One sequence that the engine works on.

    id: unique among live requests. prompt: ids. params: resolved, so with `max_tokens` and `seed`.
    max_model_len: most tokens of prompt and answer. end_ids: the model's end-of-text tokens.
    arrival: seconds on any clock. adapter: the adapter's name. adapter_id: its number, 0 for none.
    cache_key: only requests with the same one share pages. choice: which of the `n` answers.

    There is no prefill phase and no decode phase: each step computes tokens so that `num_computed`
    catches up with `num_tokens`.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    max_model_len: int
    end_ids: frozenset[int] = frozenset()
    arrival: float = 0.0
    adapter: str | None = None
    adapter_id: int = 0
    cache_key: str = ""
    choice: int = 0
    kind: Kind = Kind.GENERATE
    state: State = State.WAITING

    output: list[int] = field(default_factory=list)
    """Generated ids that the host has read."""
    num_unread: int = 0
    """Tokens that steps under way sample."""
    num_computed: int = 0
    """Tokens of prompt and answer that have keys and values."""
    slot: int = -1
    """The row of the device's state, while it runs."""
    pages: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    """Hashes of its full pages."""
    num_published: int = 0
    """Its pages that can be found by others."""
    num_cached_tokens: int | None = None
    """Tokens of the prompt found in the cache when it first ran."""
    num_preemptions: int = 0
    stop_reason: str | int | None = None
    """The stop string or id that ended it; None for the end-of-text token."""
    max_new_tokens: int = field(init=False)
    """Most tokens to generate."""
    max_computed: int = field(init=False)
    """Most tokens that ever have keys and values: nothing follows the last generated one."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id}: the prompt is empty; it needs a token")
        if len(self.prompt) > self.max_model_len:
            raise ValueError(
                f"request {self.id}: the prompt has {len(self.prompt)} tokens; the model's "
                f"context is {self.max_model_len}"
            )
        if self.kind is Kind.GENERATE and self.params.max_tokens is None:
            raise ValueError(f"request {self.id}: max_tokens is None; resolve the parameters first")
        room = self.max_model_len - len(self.prompt)
        wanted = self.params.max_tokens if self.kind is Kind.GENERATE else 0
        self.max_new_tokens = min(wanted or 0, room)
        self.max_computed = len(self.prompt) + max(self.max_new_tokens - 1, 0)

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host has."""
        return len(self.prompt) + len(self.output)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, those that steps under way sample among them."""
        return self.num_known + self.num_unread

    @property
    def to_compute(self) -> int:
        """Tokens without keys and values that a step may compute now."""
        tokens = len(self.prompt) + len(self.output) + self.num_unread
        return min(tokens, self.max_computed) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether it asks for the log-probabilities of its prompt."""
        echoes = self.params.echo and self.params.logprobs is not None
        return self.kind is Kind.SCORE or echoes

    @property
    def reads_prompt(self) -> bool:
        """Whether it asks for what no cache stores: its prompt's log-probabilities, or a vector."""
        return self.kind is Kind.EMBED or self.scores_prompt

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, `abort` or `error`; None before the end."""
        return self.state.value if self.state.finished else None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids at positions `[start, stop)`; `UNREAD` where a step under way samples them."""
        length = len(self.prompt)
        known = self.output[max(start - length, 0) : max(stop - length, 0)]
        if start < length:
            known = [*self.prompt[start:stop], *known]
        return known + [UNREAD] * (stop - start - len(known))

    def stops_at(self, tokens: Sequence[int]) -> bool:
        """Whether one of the tokens is an end-of-text token or stop id."""
        return any(t in self.end_ids or t in self.params.stop_token_ids for t in tokens)

    def append(self, token: int) -> None:
        """Take a sampled token, and finish if it ends the answer."""
        token = int(token)
        self.output.append(token)
        if (end := self._end(token)) is not None:
            self.state, self.stop_reason = end

    def _end(self, token: int) -> tuple[State, int | None] | None:
        params, length = self.params, len(self.output)
        if length >= params.min_tokens:
            if token in self.end_ids and not params.ignore_eos:
                return State.FINISHED_STOP, None
            if token in params.stop_token_ids:
                return State.FINISHED_STOP, token
        if length >= self.max_new_tokens:
            return State.FINISHED_LENGTH, None
        return None
