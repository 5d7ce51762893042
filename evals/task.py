"""What an evaluation asks and gets (seam 7): requests, responses, and the task that makes them.

A task is a coroutine per example plus an aggregate over the rows, and never calls a model:

    def run(example, context):
        [answer] = yield [Generate(example["question"], until=("\\n",))]
        return {"score": float(answer.texts[0].strip() == example["answer"])}

The runner keeps all coroutines alive, batches what they yield by kind over examples and tasks, and
resumes them; a task that needs earlier answers yields again. Each request is addressed to a role.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from evals.taxonomy import Place

Role = Literal["subject", "judge", "embedder", "sandbox"]
Messages = tuple[Mapping[str, Any], ...]
Example = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Loglikelihood:
    """How likely is `continuation` after `context`?

    Trailing white space of the context counts as the beginning of the continuation, and both are
    encoded as one text.
    """

    context: str
    continuation: str
    to: Role = "subject"


@dataclass(frozen=True)
class Rolling:
    """How likely is a whole document, each token after up to a window of those before it?

    window: tokens of context at most, the model's own limit if None. stride: tokens that a later
    window predicts; None is `window`, a smaller one gives them more context at more cost.
    """

    text: str
    window: int | None = None
    stride: int | None = None
    to: Role = "subject"


@dataclass(frozen=True)
class Generate:
    """Go on with a prompt, given as text or as tokens, or answer messages; exactly one of these.

    until: texts that end an answer; they are not part of it. temperature: 0 is greedy.
    n: answers. seed: of sampled answers; None leaves them to chance, and they are not stored.
    """

    prompt: str = ""
    messages: Messages = ()
    until: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    to: Role = "subject"
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.prompt, self.messages, self.tokens))) != 1:
            raise ValueError(
                "Generate takes a prompt, tokens or messages, exactly one of them, not empty"
            )
        if self.max_tokens < 1 or self.n < 1:
            raise ValueError(
                f"Generate: max_tokens is {self.max_tokens} and n {self.n}; both must be 1 or more"
            )


@dataclass(frozen=True)
class Hidden:
    """The residual stream over a prompt, and what attention looks at.

    layers: 0 is the embedding, i what layer i - 1 gives. positions: tokens, counted from the end
    if negative. attention: layers, from 0, of which the weights are wanted.
    """

    prompt: str
    layers: tuple[int, ...]
    positions: tuple[int, ...] = (-1,)
    attention: tuple[int, ...] = ()
    to: Role = "subject"


@dataclass(frozen=True)
class Embed:
    """The vectors of texts."""

    texts: tuple[str, ...]
    to: Role = "embedder"


@dataclass(frozen=True)
class Execute:
    """Run a Python program where it can harm nothing.

    files: `(name, text)` of each beside it.
    check: trusted source with a function `check(candidate)`; the program then stands in a process
        of its own, and the check calls its `entry_point` from another, through literals.
    inline: let check and program share a process; for results that are no literals.
    seconds, memory_bytes: limits.
    """

    program: str
    files: tuple[tuple[str, str], ...] = ()
    check: str = ""
    entry_point: str = ""
    inline: bool = False
    seconds: float = 10.0
    memory_bytes: int = 512 << 20
    to: Role = "sandbox"


@dataclass(frozen=True)
class Scored:
    """Of a `Loglikelihood`: natural log of the probability; whether each token of the continuation
    was the likeliest; the tokens of the continuation; context tokens that were cut from the left.
    """

    logprob: float
    greedy: bool
    tokens: int
    cut: int = 0


@dataclass(frozen=True)
class RollingScored:
    """Of a `Rolling`: the sum of log-probabilities, and what it is a sum over."""

    logprob: float
    tokens: int
    bytes: int
    words: int


@dataclass(frozen=True)
class Generated:
    """Of a `Generate`: each answer, and why it ended (`stop`, `length`, or what went wrong).

    ids: the tokens of each answer to a prompt of tokens; a server does not tell them.
    """

    texts: tuple[str, ...]
    finish: tuple[str, ...]
    prompt_tokens: int = 0
    tokens: int = 0
    ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class HiddenStates:
    """Of a `Hidden`: `float32[positions, layers, d_model]`, and of each layer of `attention` what
    the positions give to each token of the prompt, `float32[positions, layers, heads, tokens]`.
    """

    values: np.ndarray
    attention: np.ndarray | None = None


@dataclass(frozen=True)
class Embedded:
    """Of an `Embed`: `float32[texts, d]`."""

    values: np.ndarray


@dataclass(frozen=True)
class Executed:
    """Of an `Execute`: `passed`, or how it failed; what it wrote; how long it took; walls that
    the sandbox lacked.
    """

    status: str
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    weaker: tuple[str, ...] = ()


Request = Loglikelihood | Rolling | Generate | Hidden | Embed | Execute
Response = Scored | RollingScored | Generated | HiddenStates | Embedded | Executed
ANSWERS: dict[type, type] = {
    Loglikelihood: Scored,
    Rolling: RollingScored,
    Generate: Generated,
    Hidden: HiddenStates,
    Embed: Embedded,
    Execute: Executed,
}
"""Request -> its response."""
Coroutine = Generator[Sequence[Request], Any, Row]


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    se: standard error. low, high: ends of the 95 % interval. n: what it is computed from.
    method: how se and interval were made. unit: of the value; "" is a plain number.
    """

    value: float
    se: float
    low: float
    high: float
    n: int
    method: str
    unit: str = ""


@dataclass(frozen=True)
class Context:
    """What a coroutine knows beside its example.

    task: name. seed: of the evaluation. index: the example's place in the whole task, whatever
    `limit` is. fewshot: examples to show. chat: ask in messages instead of plain prompts.
    """

    task: str
    seed: int = 0
    index: int = 0
    fewshot: tuple[Example, ...] = ()
    chat: bool = False

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Random numbers of this example alone: no other task or example shifts them."""
        path = (zlib.crc32(self.task.encode()), self.index, stream)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=path))

    def sample_seed(self, sample: int = 0) -> int:
        """The seed of one of this example's generations, in [0, 2^31)."""
        return int(self.rng(1 + sample).integers(2**31))

    def ask(self, prompt: str, **options: Any) -> Generate:
        """A `Generate` of the prompt, as one message of a user if models are asked by chat."""
        if self.chat:
            return Generate(messages=({"role": "user", "content": prompt},), **options)
        return Generate(prompt, **options)


class RequestError(ValueError):
    """A request that cannot be answered; `place` is where it stood among those asked."""

    def __init__(self, place: int, reason: BaseException | str) -> None:
        super().__init__(str(reason))
        self.place = place


def no_examples() -> Sequence[Example]:
    """The few-shot split of a task that has none."""
    return ()


@dataclass(frozen=True)
class Task:
    """A measurement on any model.

    name, version: the version changes when scores no longer compare. licence: of the data.
    place: in the taxonomy.
    examples: rows, each with a unique `id`; read when the task runs.
    run: the coroutine of an example; its row holds what is scored, as JSON has it.
    aggregate: from rows, which also have their `id`, to named estimates.
    fewshot: rows to show before a question. shots: how many, unless the run says so.
    settings: what it was built with, for the record.
    """

    name: str
    version: str
    licence: str
    place: Place
    examples: Callable[[], Sequence[Example]]
    run: Callable[[Example, Context], Coroutine]
    aggregate: Callable[[Sequence[Row]], dict[str, Estimate]]
    fewshot: Callable[[], Sequence[Example]] = no_examples
    shots: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
