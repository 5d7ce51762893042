"""What has happened to a job, and which worker is the suspect: pure functions of what was seen.

In a synchronous job all workers stop when one does, so "no progress" says nothing about who. Three
things tell: who ended first, and by what; whose heartbeat has stopped; and, where all hearts beat,
who is not waiting for the others. The worker that says nothing is the suspect (MegaScale,
arXiv 2402.15627, section 4).
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from training.timeline import WAITING

INTERRUPTED = 3
"""Exit status of a worker that was asked to stop, and has saved."""
WRONG_INPUT = 2
"""Exit status of a worker whose input is wrong, which no restart will change."""
LONGER = 10
"""Times as long as in a step may a heartbeat fail to come while a worker starts or compiles."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A worker as its supervisor sees it.

    status: its exit status, None while it runs; of one ended by a signal minus its number.
    ended: by the watcher's clock. silent: seconds since its heartbeat last changed.
    heartbeat: the last one, empty before the first.
    """

    process: int
    host: str
    status: int | None = None
    ended: float = 0.0
    silent: float = 0.0
    heartbeat: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What has happened.

    kind: "done", "interrupted" (asked to stop, and saved), "input", "exit" or "hang".
    suspects: process numbers; none where nothing points at one.
    """

    kind: str
    suspects: tuple[int, ...] = ()
    reason: str = ""


def judge(workers: Sequence[Seen], timeout: float, now: float) -> Verdict | None:
    """What has happened, at `now`, to a job whose heartbeats may be silent for `timeout` seconds;
    None while it is well.
    """
    ended = [worker for worker in workers if worker.status is not None]
    if len(ended) == len(workers) and all(w.status in (0, INTERRUPTED) for w in ended):
        stopped = any(worker.status for worker in ended)
        return Verdict("interrupted" if stopped else "done")
    if any(worker.status not in (0, INTERRUPTED) for worker in ended):
        return _exit(workers, timeout / 3, now)
    running = [worker for worker in workers if worker.status is None]
    return _silent(running, timeout) or _late(running)


def signal_of(status: int | None) -> int:
    """The number of the signal that ended a process, 0 if none did; `srun` and shells add 128."""
    if status is None or 0 <= status <= 128:
        return 0
    return -status if status < 0 else status - 128


def _exit(workers: Sequence[Seen], settle: float, now: float) -> Verdict | None:
    """Whose end was the cause and whose but the loss of a peer, `settle` seconds after the first.

    Who was killed is a cause at once. Then who has fallen silent without ending, as a host does
    that has lost its power; then who has ended in some way of its own. JAX aborts a worker that has
    lost a peer, or raises what `train.py` takes for wrong input: effects, as long as there are
    others.
    """
    bad = [worker for worker in workers if worker.status not in (None, 0, INTERRUPTED)]
    hit = [w for w in bad if signal_of(w.status) not in (0, int(signal.SIGABRT))]
    everyone = len(bad) == len(workers)
    if not (hit or everyone or now - min(worker.ended for worker in bad) > settle):
        return None
    if everyone and all(worker.status == WRONG_INPUT for worker in bad):
        return Verdict("input", (), "all workers ended with status 2: their input is wrong")
    silent = [w for w in workers if w.status is None and w.heartbeat and w.silent > settle]
    own = [w for w in bad if w.status != WRONG_INPUT and signal_of(w.status) == 0]
    causes = hit or silent or own or bad
    first = min(worker.ended for worker in causes)
    suspects = [worker for worker in causes if worker.ended == first]
    what = ", ".join(f"process {w.process} on {w.host} {_how(w)}" for w in suspects)
    return Verdict("exit", tuple(worker.process for worker in suspects), what)


def _how(worker: Seen) -> str:
    if worker.status is None:
        return f"has said nothing for {worker.silent:.1f} s, and the others have lost it"
    number = signal_of(worker.status)
    if number in {int(known) for known in signal.Signals}:
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with status {worker.status}"


def _silent(running: Sequence[Seen], timeout: float) -> Verdict | None:
    """Workers whose heartbeat has stopped."""
    silent = [worker for worker in running if worker.silent > _allowed(worker, timeout)]
    if not silent:
        return None
    what = ", ".join(
        f"process {w.process} on {w.host} has said nothing for {w.silent:.1f} s" for w in silent
    )
    return Verdict("hang", tuple(worker.process for worker in silent), what)


def _allowed(worker: Seen, timeout: float) -> float:
    return timeout if worker.heartbeat.get("phase") == "step" else LONGER * timeout


def _late(running: Sequence[Seen]) -> Verdict | None:
    """Workers that hold up a job in which all hearts beat: behind the others, or not waiting."""
    if not any(worker.heartbeat.get("late") for worker in running):
        return None
    steps = {worker.process: worker.heartbeat.get("step", 0) for worker in running}
    behind = [w for w in running if steps[w.process] < max(steps.values())]
    busy = [w for w in running if w.heartbeat.get("span") not in WAITING]
    suspects = behind or (busy if len(busy) < len(running) else [])
    late = max(worker.heartbeat.get("waited", 0.0) for worker in running)
    what = f"no step for {late:.1f} s"
    for worker in suspects:
        span, stack = worker.heartbeat.get("span", "?"), worker.heartbeat.get("stack", ["?"])
        what += f"; process {worker.process} on {worker.host} is in {span!r}, at {stack[-1]}"
    return Verdict("hang", tuple(worker.process for worker in suspects), what)
