"""Running tasks: all coroutines stay alive, what they ask is answered in batches, they go on.

A round collects the requests of all examples of all tasks, answers those of one kind and role
together, and resumes the coroutines. Answers go through the store, so what was computed before
is not computed again, and a killed evaluation goes on to the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evals.backends import Backend
from evals.progress import Progress
from evals.store import Store, canonical, key_of, sha256, storable
from evals.task import (
    Context,
    Coroutine,
    Estimate,
    Example,
    Generated,
    Request,
    RequestError,
    Response,
    Role,
    RollingScored,
    Row,
    Scored,
    Task,
)

SHOWN_CHARACTERS = 4000
"""Of a prompt in the records, half from each end; the hash is of the whole."""


@dataclass(frozen=True)
class Options:
    """What holds for a whole evaluation.

    seed: of few-shot examples, generated data and sampled texts.
    limit: examples of each task at most; those that remain are asked as they would be without it.
    shots: examples shown before a question; None is what each task says.
    fewshot: the `first` ones of the task's split, or `random` ones for each question.
    chat: ask in messages, by the model's chat template.
    """

    seed: int = 0
    limit: int | None = None
    shots: int | None = None
    fewshot: Literal["first", "random"] = "first"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1, or None")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots is {self.shots}; it must be 0 or more, or None")
        if self.fewshot not in ("first", "random"):
            raise ValueError(f'fewshot is {self.fewshot!r}; it must be "first" or "random"')


@dataclass(frozen=True)
class TaskResult:
    """What a task gave: estimates by name, rows in order of the examples, and what it ran on.

    data: SHA-256 of the examples. shots: examples shown before each question.
    """

    task: Task
    estimates: Mapping[str, Estimate]
    rows: Sequence[Row]
    data: str
    shots: int


@dataclass
class Counts:
    """Requests answered, and those of them that were computed rather than found."""

    answered: int = 0
    computed: int = 0


@dataclass
class Live:
    """An example whose coroutine waits for answers."""

    task: int
    place: int
    identity: str
    coroutine: Coroutine
    asked: list[Request]
    records: list[tuple[Request, Response]]


def run(
    tasks: Sequence[Task],
    backends: Mapping[Role, Backend],
    store: Store,
    options: Options | None = None,
    progress: Progress | None = None,
    counts: Counts | None = None,
) -> list[TaskResult]:
    """Run tasks to their end.

    Args:
        tasks: with names of their own.
        backends: who answers, by role.
        store: of answers.
        options: of the evaluation.
        progress: told of every answer; counts: added to.

    Raises:
        ValueError: two tasks or examples have one name, a role has nobody, or an example cannot be
            asked; names task and example.
    """
    options, progress = options or Options(), progress or Progress(None)
    counts = counts if counts is not None else Counts()
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"two tasks are called {_twice(names)!r}; label one of them, NAME@LABEL")
    loaded = [list(task.examples()) for task in tasks]
    rows: list[list[Row | None]] = [[None] * len(examples) for examples in loaded]
    waiting: list[Live] = []
    for number, (task, examples) in enumerate(zip(tasks, loaded, strict=True)):
        _check_examples(task, examples)
        rows[number] = rows[number][: options.limit]
        for live in _start(number, task, examples, options):
            _advance(live, None, waiting, rows, tasks)
    while waiting:
        asked = [(live, request) for live in waiting for request in live.asked]
        answers = iter(_answer(asked, tasks, backends, store, progress, counts))
        live_now, waiting = waiting, []
        for live in live_now:
            responses = [next(answers) for _ in live.asked]
            live.records += zip(live.asked, responses, strict=True)
            _advance(live, responses, waiting, rows, tasks)
    return [_result(*each, options) for each in zip(tasks, loaded, rows, strict=True)]


def _check_examples(task: Task, examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError(f"task {task.name}: has no examples")
    for place, example in enumerate(examples):
        if "id" not in example:
            raise ValueError(f"task {task.name}: example {place} has no id")
    identities = [str(example["id"]) for example in examples]
    if len(set(identities)) < len(identities):
        raise ValueError(f"task {task.name}: two examples have the id {_twice(identities)!r}")


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _start(
    number: int, task: Task, examples: Sequence[Example], options: Options
) -> Iterator[Live]:
    shots = task.shots if options.shots is None else options.shots
    split = list(task.fewshot()) if shots else []
    if len(split) < shots:
        raise ValueError(f"task {task.name}: {shots} shots of {len(split)} few-shot examples")
    for place, example in enumerate(examples[: options.limit]):
        plain = Context(task.name, options.seed, place, (), options.chat)
        shown = _shots(example, split, shots, plain, options.fewshot)
        context = Context(task.name, options.seed, place, shown, options.chat)
        yield Live(number, place, str(example["id"]), task.run(example, context), [], [])


def _shots(
    example: Example, split: Sequence[Example], shots: int, context: Context, way: str
) -> tuple[Example, ...]:
    """Never the example itself, which is known by its id."""
    others = [other for other in split if other.get("id") != example["id"]]
    if not shots or way == "first":
        return tuple(others[:shots])
    chosen = context.rng().choice(len(others), shots, replace=False)
    return tuple(others[i] for i in chosen)


def _advance(
    live: Live,
    responses: list[Response] | None,
    waiting: list[Live],
    rows: list[list[Row | None]],
    tasks: Sequence[Task],
) -> None:
    """Resume a coroutine; it asks again, or its row is there."""
    where = f"task {tasks[live.task].name}, example {live.identity}"
    try:
        live.asked = list(live.coroutine.send(responses))
        waiting.append(live)
    except StopIteration as stop:
        if not isinstance(stop.value, dict):
            raise ValueError(f"{where}: gave {type(stop.value).__name__}, not a row") from None
        rows[live.task][live.place] = {"id": live.identity, **stop.value, **_record(live.records)}
    except (ValueError, KeyError, TypeError) as error:
        text = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: {text}") from error


def _answer(
    asked: Sequence[tuple[Live, Request]],
    tasks: Sequence[Task],
    backends: Mapping[Role, Backend],
    store: Store,
    progress: Progress,
    counts: Counts,
) -> list[Response]:
    """The response to each request, those of one role and kind computed together."""
    answers: list[Response | None] = [None] * len(asked)
    groups: dict[tuple[Role, type], list[int]] = {}
    for place, (_, request) in enumerate(asked):
        groups.setdefault((request.to, type(request)), []).append(place)
    for (role, kind), places in groups.items():
        if role not in backends:
            live = asked[places[0]][0]
            raise ValueError(
                f"task {tasks[live.task].name}, example {live.identity}: asks for a {role}, and "
                "none was given"
            )
        found = _Group(backends[role], store, [asked[place][1] for place in places])
        progress.expect(f"{backends[role].name} {kind.__name__}", found.size, len(found.known))
        try:
            for group in found.compute():
                progress.advance(group)
        except RequestError as error:
            live = asked[places[found.first_of(error.place)]][0]
            name = tasks[live.task].name
            raise ValueError(f"task {name}, example {live.identity}: {error}") from error
        counts.answered += found.size
        counts.computed += found.size - len(found.known)
        for place, response in zip(places, found.responses(), strict=True):
            answers[place] = response
    return [answer for answer in answers if answer is not None]


class _Group:
    """Requests of one kind to one backend; equal ones count once."""

    def __init__(self, backend: Backend, store: Store, requests: Sequence[Request]) -> None:
        self._backend, self._store = backend, store
        self._keys = [
            key_of(request, backend.identity) if storable(request) else f"drawn {place}"
            for place, request in enumerate(requests)
        ]
        unique = dict(zip(self._keys, requests, strict=True))
        self._unique, self._requests = list(unique), list(unique.values())
        self._found = store.get(self._unique)
        self.known = {place for place, key in enumerate(self._unique) if key in self._found}
        self.size = len(self._unique)

    def compute(self) -> Iterator[int]:
        """Compute what is missing and keep it; how many came, group by group."""
        if len(self.known) == self.size:
            return
        for group in self._backend.answer(self._requests, self.known):
            fresh = {
                self._unique[place]: answer
                for place, answer in group
                if self._unique[place] not in self._found
            }
            self._found.update(fresh)
            kept = {key: each for key, each in fresh.items() if not key.startswith("drawn")}
            if kept:
                self._store.put(kept)
            yield len(fresh)

    def responses(self) -> list[Response]:
        """One for each request that was given."""
        return [self._found[key] for key in self._keys]

    def first_of(self, place: int) -> int:
        """Which of the given requests a unique one stands for."""
        return self._keys.index(self._unique[place])


def _record(records: Sequence[tuple[Request, Response]]) -> dict[str, Any]:
    """What the example's page shows: its first prompt, and every answer in short."""
    if not records:
        return {}
    prompt = _prompt(records[0][0])
    shown, half = prompt, SHOWN_CHARACTERS // 2
    if len(prompt) > SHOWN_CHARACTERS:
        shown = f"{prompt[:half]}\n[{len(prompt) - 2 * half} characters]\n{prompt[-half:]}"
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    outputs = [_output(request, response) for request, response in records]
    cut = sum(response.cut > 0 for _, response in records if isinstance(response, Scored))
    return {"prompt": shown, "prompt_sha256": digest, "outputs": outputs, "cut": cut}


def _prompt(request: Request) -> str:
    fields = vars(request)
    if fields.get("messages"):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in fields["messages"])
    names = ("context", "prompt", "text", "program")
    return str(next((fields[name] for name in names if fields.get(name)), ""))


def _output(request: Request, response: Response) -> Any:
    if isinstance(response, Scored):
        text = vars(request)["continuation"][:SHOWN_CHARACTERS]
        return {"continuation": text, "logprob": response.logprob, "greedy": response.greedy}
    if isinstance(response, Generated):
        return {"texts": response.texts, "finish": response.finish}
    if isinstance(response, RollingScored):
        return vars(response)
    return type(response).__name__


def _result(
    task: Task, examples: Sequence[Example], rows: Sequence[Row | None], options: Options
) -> TaskResult:
    done = [row for row in rows if row is not None]
    shots = task.shots if options.shots is None else options.shots
    return TaskResult(task, task.aggregate(done), done, data_hash(examples), shots)


def data_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of a task's examples."""
    return sha256(canonical([dict(example) for example in examples]))
