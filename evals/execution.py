"""The role of the sandbox: untrusted programs, and functions with their checks.

It stands beside models: a task yields `Execute`, the runner asks this backend, and the results go
through the store under what isolates and runs them. Walls, limits and verdicts are those of the
room [sandbox/](../sandbox/__init__.py).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from evals.task import Execute, Executed, Request, RequestError, Response
from sandbox import (
    Execution,
    FunctionTest,
    Limits,
    Pool,
    Program,
    SandboxError,
    Verdict,
    check_all,
)

GROUP = 64
"""Programs whose results are kept together."""


class Sandboxed:
    """A backend for `Execute`.

    workers: programs at a time, None is as many as there are cores. allow_weaker: run although a
    wall is missing; it is part of the identity, and so of the results. The launchers start with the
    first request, which raises `RequestError` where this machine cannot isolate.
    """

    name = "sandbox"

    def __init__(self, workers: int | None = None, allow_weaker: bool = False) -> None:
        self._workers = workers or os.cpu_count() or 1
        self._allow_weaker = allow_weaker
        self._pool: Pool | None = None
        self._ran = 0
        self.identity: Mapping[str, Any] = {
            "sandbox": 1,
            "python": platform.python_version(),
            "allow_weaker": allow_weaker,
        }

    def answer(
        self, requests: Sequence[Request], known: Collection[int]
    ) -> Iterator[list[tuple[int, Response]]]:
        """See `evals.backends.Backend`."""
        if self._pool is None:
            try:
                self._pool = Pool(self._workers, self._allow_weaker)
            except SandboxError as error:
                raise RequestError(0, error) from error
        needed = [place for place in range(len(requests)) if place not in known]
        for start in range(0, len(needed), GROUP):
            places = needed[start : start + GROUP]
            yield list(zip(places, self._run(self._pool, requests, places), strict=True))

    def _run(self, pool: Pool, requests: Sequence[Any], places: list[int]) -> list[Executed]:
        """Those with equal limits go side by side."""
        answers: dict[int, Executed] = {}
        groups: dict[tuple[Limits, bool], list[int]] = {}
        for place in places:
            request = requests[place]
            groups.setdefault((limits_of(request), bool(request.check)), []).append(place)
        for (limits, checked), members in groups.items():
            chosen = [requests[place] for place in members]
            try:
                if checked:
                    results = map(_verdict, check_all(pool, [*map(_test, chosen)], limits))
                else:
                    programs = [Program(each.program, dict(each.files)) for each in chosen]
                    results = map(_execution, pool.run_all(programs, limits))
                answers.update(zip(members, results, strict=True))
            except (ValueError, SandboxError) as error:
                raise RequestError(members[0], error) from error
        self._ran += len(places)
        return [answers[place] for place in places]

    def work(self) -> dict[str, int]:
        """See `evals.backends.Backend`."""
        return {"programs": self._ran}

    def close(self) -> None:
        """End the launchers."""
        if self._pool is not None:
            self._pool.close()


def limits_of(request: Execute) -> Limits:
    """`seconds` of CPU time, which a busy machine does not change, and three times that to wait."""
    seconds = max(1, math.ceil(request.seconds))
    return Limits(
        cpu_seconds=seconds,
        wall_seconds=max(10.0, 3.0 * seconds),
        memory_bytes=request.memory_bytes,
    )


def _test(request: Execute) -> FunctionTest:
    return FunctionTest(
        request.program,
        request.entry_point,
        request.check,
        files=dict(request.files),
        inline=request.inline,
    )


def _verdict(verdict: Verdict) -> Executed:
    ran = verdict.candidate or verdict.checker
    said = verdict.reason or ran.stderr
    missing = ran.isolation.missing
    return Executed(verdict.status, ran.stdout, said, verdict.seconds, missing)


def _execution(run: Execution) -> Executed:
    status = "passed" if run.ok else run.status
    said = run.stderr or run.detail
    return Executed(status, run.stdout, said, run.seconds, run.isolation.missing)
