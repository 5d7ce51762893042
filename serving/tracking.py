"""One sequence of an engine from its arrival to its last output: what belongs to it beside its
`Request`, which the scheduler owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from serving.grammar import Compiling, Matcher
from serving.outputs import Answer, Output, TokenLogprob
from serving.prompt_out import PromptOut
from serving.request import Kind, Request, State
from serving.sampling_settings import Settings
from serving.stats import Histogram, Times
from serving.text_out import Piece, TextOut


@dataclass(eq=False)
class Track:
    """A sequence that is being answered.

    row: its sampling settings. text: None without a tokenizer. prompt: what it is told of its
    prompt, if it asks. num_sent: tokens given back so far.
    compiling, matcher: the grammar that it keeps to, and its place in it once that is compiled.
    """

    request: Request
    answer: Answer
    row: Settings
    text: TextOut | None
    times: Times
    pooling: str = "mean"
    prompt: PromptOut | None = field(init=False)
    num_sent: int = 0
    compiling: Compiling | None = None
    matcher: Matcher | None = None
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        request = self.request
        self.prompt = PromptOut(len(request.prompt)) if request.reads_prompt else None

    @property
    def grammar_param(self) -> str:
        """The field of the request that gives the grammar."""
        wanted = self.request.params.structured_outputs
        return getattr(wanted, "param", "structured_outputs")

    def take(self, logprob: TokenLogprob | None) -> Piece:
        """The text of what the request has generated since, and of its end; keeps the newest
        token's log-probability, if it is asked for.
        """
        wanted = self.request.params.logprobs
        if logprob is not None and wanted is not None:
            self._logprobs.append(logprob.cut(wanted))
        return Piece() if self.text is None else self.text.take(self.request)

    def output(self, text: str) -> Output:
        """What is new since the last call, with its text."""
        request, stop = self.request, len(self.request.output)
        if self.text is not None:
            # A stop string leaves out what was sampled after it.
            stop = self.text.num_tokens
        tokens = tuple(request.output[self.num_sent : stop])
        is_first, self.num_sent = not self.num_sent, self.num_sent + len(tokens)
        logprobs, self._logprobs = tuple(self._logprobs[: len(tokens)]), []
        return Output(
            request_id=self.answer.request_id,
            choice=request.choice,
            text=text,
            token_ids=tokens,
            logprobs=None if request.params.logprobs is None else logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.num_cached_tokens or 0,
            completion_tokens=self.num_sent,
            prompt_logprobs=self._of_prompt() if is_first else None,
            vector=self._vector(),
        )

    def _of_prompt(self) -> tuple[TokenLogprob, ...] | None:
        if self.prompt is None or not self.request.scores_prompt:
            return None
        return self.prompt.logprobs(self.request.params.logprobs or 0)

    def _vector(self) -> np.ndarray | None:
        asked = self.request.kind is Kind.EMBED and self.request.state is State.FINISHED_STOP
        return self.prompt.vector(self.pooling) if self.prompt is not None and asked else None

    def note_end(self, now: float, into: Mapping[str, Histogram]) -> None:
        """Count the sequence, which has ended."""
        request = self.request
        self.times.note_end(now, self.num_sent, into)
        into["request_prompt_tokens"].observe(len(request.prompt))
        into["request_generation_tokens"].observe(self.num_sent)
        into["request_params_max_tokens"].observe(request.params.max_tokens or 0)
        if request.choice == 0:
            into["request_params_n"].observe(request.params.n)
