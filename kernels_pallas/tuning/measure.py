"""Time candidates against each other on the device at hand.

Every candidate is compiled under `use`, the way a user sets block sizes, and must agree with the
plain function before its time counts. Then rounds of all candidates follow each other, so that what
slows the machine for a while slows all of them; candidates are compared by the median over rounds
of their time against the default's in the same round. A CPU runs other programs as well, so there a
round's time is that of the fastest of a few calls; elsewhere calls follow each other unawaited.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kernels_pallas.tuning.key import Key, code_version
from kernels_pallas.tuning.lookup import use
from kernels_pallas.tuning.store import Blocks, Choice
from kernels_pallas.tuning.tunable import Case

ROUNDS = 15
ENOUGH = 3
"""Rounds that decide if there is no time for more, and after which slow candidates drop out."""
SLOW = 1.5
"""Times the fastest candidate's median, beyond which a candidate drops out."""
GAIN = 0.05
"""Part of the default's time that a candidate must save, in three rounds of four, to be chosen."""
SAMPLE_SECONDS = 0.005
"""Calls shorter than this are repeated within a sample."""
FEWEST_CALLS = 3
"""Calls of a sample on a CPU."""


@dataclass(frozen=True)
class Limits:
    """How long to measure.

    deadline: in `clock`'s seconds; what has been timed by then decides.
    rounds: of timing, at most.
    clock: gives seconds.
    say: takes a word on how far it is.
    """

    deadline: float = float("inf")
    rounds: int = ROUNDS
    clock: Callable[[], float] = time.perf_counter
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Measured:
    """What came of it.

    choice: None if there was no time to decide, or no candidate was right.
    times: candidate that stayed to the end -> seconds of each round.
    discarded: candidate -> why it was not in question.
    interrupted: by Ctrl-C, after enough rounds.
    """

    choice: Choice | None = None
    times: Mapping[str, list[float]] = field(default_factory=dict)
    discarded: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


def measure(
    key: Key,
    case: Case,
    candidates: Sequence[Blocks],
    default: Blocks,
    limits: Limits = Limits(),
) -> Measured:
    """Choose among candidates, the default included, whether or not it is listed.

    Raises what the plain function raises, and `KeyboardInterrupt` if Ctrl-C comes before there are
    enough rounds to decide.
    """
    expected = jax.device_get(jax.jit(case.plain)(*case.arguments))
    named = {name_of(blocks): blocks for blocks in (default, *candidates)}
    alive: dict[str, _Candidate] = {}
    discarded: dict[str, str] = {}
    for number, (name, blocks) in enumerate(named.items()):
        if limits.clock() > limits.deadline:
            return Measured(discarded=discarded)
        limits.say(f"compiling {number + 1} of {len(named)}")
        try:
            alive[name] = _prepared(key, case, blocks, expected, limits.clock)
        except Exception as error:  # whatever a compiler or a device raises
            discarded[name] = in_a_line(error)
    interrupted = False
    try:
        _race(alive, name_of(default), case.arguments, limits)
    except KeyboardInterrupt:
        interrupted = True
        if _rounds(alive) < ENOUGH:
            raise
    choice = _chosen(key, alive, name_of(default), discarded)
    times = {name: one.times for name, one in alive.items()}
    return Measured(choice, times, discarded, interrupted)


def name_of(blocks: Blocks) -> str:
    """Block sizes as a line of text, the same in any order."""
    return " ".join(f"{name}={value}" for name, value in sorted(blocks.items()))


def in_a_line(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@dataclass
class _Candidate:
    """shared: whether its device runs other programs as well."""

    blocks: Blocks
    call: Callable[..., Any]
    repeats: int
    shared: bool
    times: list[float] = field(default_factory=list)

    def sample(self, arguments: tuple[Any, ...], clock: Callable[[], float]) -> None:
        if self.shared:
            self.times.append(min(self._seconds(arguments, clock, 1) for _ in range(self.repeats)))
        else:
            self.times.append(self._seconds(arguments, clock, self.repeats) / self.repeats)

    def _seconds(
        self, arguments: tuple[Any, ...], clock: Callable[[], float], repeats: int
    ) -> float:
        began = clock()
        for _ in range(repeats):
            out = self.call(*arguments)
        jax.block_until_ready(out)
        return clock() - began


def _prepared(
    key: Key, case: Case, blocks: Blocks, expected: Any, clock: Callable[[], float]
) -> _Candidate:
    """Compiled, held to the plain function and warm; raises what makes it unfit."""
    with use({key.kernel: blocks}):
        call = jax.jit(case.function).lower(*case.arguments).compile()
    apart = difference(jax.device_get(call(*case.arguments)), expected)
    if not apart <= case.tolerance:
        raise ValueError(f"differs from the plain function by {apart:.1e} of its largest value")
    began = clock()
    jax.block_until_ready(call(*case.arguments))
    repeats = min(int(SAMPLE_SECONDS / max(clock() - began, 1e-7)) + 1, 1000)
    shared = jax.default_backend() == "cpu"
    return _Candidate(blocks, call, max(repeats, FEWEST_CALLS) if shared else repeats, shared)


def difference(found: Any, expected: Any) -> float:
    """Largest absolute difference of two pytrees of arrays, as a part of the largest finite of
    the second; infinite where only one has a NaN, an infinity or a shape.
    """
    largest, apart = 1e-30, 0.0
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        if a.shape != b.shape:
            return float("inf")
        finite = np.isfinite(b)
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        if not same or not np.isfinite(a[finite]).all():
            return float("inf")
        largest = max(largest, np.abs(b[finite]).max(initial=0.0))
        apart = max(apart, np.abs(a[finite] - b[finite]).max(initial=0.0))
    return float(apart / largest)


def _race(
    alive: dict[str, _Candidate], default: str, arguments: tuple[Any, ...], limits: Limits
) -> None:
    """Rounds over the candidates; slow ones drop out of `alive`, the default never."""
    for number in range(limits.rounds):
        if limits.clock() > limits.deadline or len(alive) < min(number + 1, 2):
            return
        limits.say(f"round {number + 1} of {limits.rounds}, {len(alive)} candidates")
        order = list(alive.values())
        turn = number % len(order)
        for one in order[turn:] + order[:turn]:
            one.sample(arguments, limits.clock)
        if number + 1 == ENOUGH:
            medians = {name: np.median(one.times) for name, one in alive.items()}
            limit = SLOW * min(medians.values())
            for name in [name for name, median in medians.items() if median > limit]:
                if name != default:
                    del alive[name]


def _rounds(alive: Mapping[str, _Candidate]) -> int:
    """Rounds that every candidate has run."""
    return min((len(one.times) for one in alive.values()), default=0)


def _chosen(
    key: Key, alive: Mapping[str, _Candidate], default: str, discarded: Mapping[str, str]
) -> Choice | None:
    rounds = _rounds(alive)
    if rounds < (ENOUGH if len(alive) > 1 else 1):
        return None
    times = {name: np.asarray(one.times[:rounds]) for name, one in alive.items()}
    ratios = {name: taken / times.get(default, np.ones(rounds)) for name, taken in times.items()}
    faster = [
        name
        for name, ratio in ratios.items()
        if default not in times or np.quantile(ratio, 0.75) <= 1 - GAIN
    ]
    best = min(faster, key=lambda name: np.median(ratios[name]), default=default)
    return Choice(
        blocks=dict(alive[best].blocks),
        code=code_version(key.kernel),
        source="measured",
        seconds=_rounded(times[best]),
        default_seconds=_rounded(times[default]) if default in times else None,
        device=device_in_words(),
        jax=jax.__version__,
        discarded=dict(discarded),
    )


def _rounded(times: np.ndarray) -> float:
    return float(f"{np.median(times):.4g}")


def device_in_words() -> str:
    """The device that measures; of a CPU, whose `device_kind` is just "cpu", model and cores."""
    kind = jax.local_devices()[0].device_kind
    if kind != "cpu":
        return kind
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"
