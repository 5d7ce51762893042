"""Does a function written by a model pass its tests? A verdict that the function cannot forge.

An exit code proves nothing (the function may exit with 0), and neither does an assertion evaluated
beside it (the result may define an `__eq__` that is always true, or the function may rewrite the
check). So the candidate runs in one sandbox and the check in another. Calls and results cross
between them as plain values ([wire.py](wire.py)); the check compares values that its own process
made, and its report is believed for a nonce that only its sandbox was given.

What cannot cross (functions, classes, arrays) needs `inline=True`: both share a process, the
nonce still catches an early exit, but nothing catches a determined cheat, and the verdict says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import wire
from sandbox.pool import Pool, crowded_out, execution, request
from sandbox.program import Execution, Limits, Program

TEST_LIMITS = Limits(cpu_seconds=3, wall_seconds=10.0)
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class FunctionTest:
    """A function and the check it should pass.

    program: untrusted source that defines `entry_point`. check: trusted source that defines
    `check(candidate)`; the entry point's name is bound in it, too. files: for the program.
    inline: let both share a process, see above. packages: as in `Program`, for both.
    """

    program: str
    entry_point: str
    check: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    inline: bool = False
    packages: bool = False

    def __post_init__(self) -> None:
        if not self.entry_point.isidentifier():
            raise ValueError(
                f"FunctionTest.entry_point is {self.entry_point!r}; it must be a function's name"
            )
        taken = {"solution.py", "wire.py", "check.py"} & set(self.files)
        if taken:
            raise ValueError(f"FunctionTest.files has {sorted(taken)}, names that the sandbox uses")


@dataclass(frozen=True)
class Verdict:
    """Whether a function passed.

    reason: why not, or "". cheatable: whether check and function shared a process.
    candidate: how the function's process ended; None where it had none of its own.
    checker: how the check's process ended.
    """

    passed: bool
    reason: str
    cheatable: bool
    candidate: Execution | None
    checker: Execution

    @property
    def status(self) -> str:
        """`passed`, a limit that was hit, or `failed`."""
        ends = [run.status for run in (self.candidate, self.checker) if run is not None]
        hit = [end for end in ends if end in ("timeout", "memory", "output", "killed")]
        return "passed" if self.passed else hit[0] if hit else "failed"

    @property
    def seconds(self) -> float:
        """Wall time of both together."""
        return max(run.seconds for run in (self.candidate, self.checker) if run is not None)


def check(pool: Pool, test: FunctionTest, limits: Limits = TEST_LIMITS) -> Verdict:
    """Run one function against its check."""
    answer = pool.ask("pair", *_requests(test, limits))
    checker = execution(answer["checker"], limits, pool.isolation)
    candidate = (
        execution(answer["candidate"], limits, pool.isolation) if answer["candidate"] else None
    )
    reason = _reason(answer["report"], candidate, checker)
    return Verdict(not reason, reason, test.inline, candidate, checker)


def check_all(
    pool: Pool, tests: Sequence[FunctionTest], limits: Limits = TEST_LIMITS
) -> list[Verdict]:
    """Check side by side, and once more alone those whose wall time ran out on a busy machine."""
    first = pool.map(lambda test: check(pool, test, limits), tests)
    return [
        check(pool, test, limits) if _crowded_out(verdict, limits) else verdict
        for test, verdict in zip(tests, first, strict=True)
    ]


def _crowded_out(verdict: Verdict, limits: Limits) -> bool:
    runs = [run for run in (verdict.candidate, verdict.checker) if run is not None]
    return any(crowded_out(run, limits) for run in runs)


def counts(results: Iterable[tuple[str, Verdict]]) -> dict[str, tuple[int, int]]:
    """`task -> (samples, passed)`, what pass@k is estimated from, in the order of the tasks."""
    table: dict[str, tuple[int, int]] = {}
    for task, verdict in results:
        samples, passed = table.get(task, (0, 0))
        table[task] = (samples + 1, passed + verdict.passed)
    return table


def _requests(test: FunctionTest, limits: Limits) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two sandboxes hold: only the checker's has the check."""
    shared = {"wire.py": _source("wire.py")}
    solution = {**test.files, "solution.py": test.program}
    candidate = Program(
        _source("candidate_side.py"),
        files={**shared, **solution},
        arguments=(test.entry_point,),
        packages=test.packages,
    )
    checker = Program(
        _source("checker_side.py"),
        files={**shared, "check.py": test.check, **(solution if test.inline else {})},
        arguments=(test.entry_point, "inline" if test.inline else "apart"),
        packages=test.packages,
    )
    return ({} if test.inline else request(candidate, limits)), request(checker, limits)


def _source(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _reason(report: bytes, candidate: Execution | None, checker: Execution) -> str:
    """Why a function fails; empty if a report with the nonce says that nothing was wrong."""
    for run in (candidate, checker):
        if run is not None and run.status in ("timeout", "memory", "output"):
            return f"{run.status}: {run.detail}"
    try:
        said = wire.decode(report)
    except ValueError:
        return f"no verdict: the check ended early ({checker.status} {checker.detail})"
    if not isinstance(said, str):
        return "no verdict: the report is not text"
    if said or candidate is None or candidate.status != "killed":
        return said
    return f"the candidate was killed {candidate.detail}"
