"""A process that keeps a run going: it starts the workers, watches them, and starts them again.

    RUN/supervisor/state.json     hosts that are never used again and why, attempts, effective time
    RUN/supervisor/lock           held while a supervisor lives
    RUN/supervisor/N/I.log        what worker I of attempt N said
    RUN/supervisor/N/heartbeats/  signs of life; renamed at the end, which ends who is still there

Workers are ordinary `train.py` processes, which resume the newest good checkpoint by themselves,
data and random keys included. What the supervisor adds is everything around: it tells a failure,
names the suspect (`training.blame`), lets every host check itself (`training.health`), leaves out
those that fail, puts spare hosts in the place of suspects, and goes on with fewer where there is
none. It never touches a device. After MegaScale (arXiv 2402.15627), section 4.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint_folder import problem, read_json, step_name, steps, write_json
from training import json_lines
from training.attempt import Attempt
from training.blame import Verdict
from training.errors import RunError
from training.fleet import checked, choose, linked
from training.run_folder import RunFolder, lock
from training.supervisor_config import SupervisorConfig

LAST_LINES = 12
"""Of a suspect's output, kept in the record."""
STRAGGLER_LOOKS = 3
"""Times that a host must have been named as a straggler before it gives way to a spare."""


class Supervisor:
    """The supervision of one run, from its first worker to its last."""

    def __init__(self, config: SupervisorConfig, script: Sequence[str], workdir: Path) -> None:
        """`script` is `train.py` with its flags, `workdir` the run's folder, seen by all hosts."""
        self.config, self.script = config, tuple(script)
        self.folder = RunFolder(Path(workdir).absolute())
        self.root = self.folder.supervisor
        self.stopping = ""
        self._state: dict[str, Any] = {"blocked": {}, "attempts": []}
        self._hosts: tuple[str, ...] = ()
        self._began = time.monotonic()
        self._first_step = self._incidents_before = 0

    def stop(self, reason: str) -> None:
        """Let the workers save and end, and start none again; safe in a signal's handler."""
        self.stopping = reason

    def run(self) -> int:
        """Supervise until the run is done: the exit status, 0 done, 3 stopped, 2 wrong input, 1
        given up. Raises `RunError` if another supervisor has this run, or all hosts are bad.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with lock(RunFolder(self.root)):
            self._take_up()
            return self._supervise()

    def _take_up(self) -> None:
        """Read what an earlier supervisor left, and end the workers that it may have left."""
        path = self.root / "state.json"
        if path.exists():
            self._state |= read_json(path)
        orphans = list(self.root.glob(f"*/{Attempt.HEARTBEATS}"))
        for folder in orphans:
            folder.rename(folder.with_name("ended"))
        if orphans:
            self.say("an earlier supervisor did not end; waiting for its workers to do so")
            time.sleep(3 * self.config.heartbeat_seconds)
        self._began, self._first_step = time.monotonic(), self._last_step()
        for host, reason in self._state["blocked"].items():
            self.say(f"{host} stays left out: {reason} (to use it again, edit {path})")

    def _supervise(self) -> int:
        verdict, fruitless = Verdict("start"), 0
        if self.config.check_first:
            self._check_hosts()
        while True:
            pool = self._pool()
            hosts = choose(self._hosts, pool, self._hosts_of(verdict), self.config.sizes)
            if not hosts:
                return self._give_up(f"{len(pool)} good hosts are left, too few")
            before = self._checkpoint()
            verdict = self._attempt(hosts)
            status = self._status(verdict)
            if status is not None:
                return status
            fruitless = fruitless + 1 if self._checkpoint() == before else 0
            if fruitless > self.config.max_restarts:
                return self._give_up(f"{fruitless} attempts in a row brought no new checkpoint")
            self._back_off(fruitless)
            if verdict.kind != "interrupted":
                self._check_hosts()

    def _status(self, verdict: Verdict) -> int | None:
        """The exit status after an attempt, None where there is to be another."""
        self._report()
        if verdict.kind == "done":
            return 0
        if self.stopping:
            self.say(f"stopped ({self.stopping}); the same command goes on")
            return 3
        if verdict.kind == "input":
            print("\n".join(self._words(0)), file=sys.stderr)
            return 2
        return None

    def _attempt(self, hosts: tuple[str, ...]) -> Verdict:
        """Run the workers until something happens; what did."""
        if hosts != self._hosts and self._hosts:
            self.say(f"hosts are now {', '.join(hosts)}, were {', '.join(self._hosts)}")
        self._hosts = hosts
        number = 1 + max((int(p.name) for p in self.root.iterdir() if p.name.isdigit()), default=-1)
        start, from_step = time.monotonic(), self._checkpoint() or 0
        self.say(f"attempt {number} from step {from_step} on {', '.join(hosts)}")
        self._incidents_before = len(json_lines.read(self.folder.incidents))
        attempt = Attempt(self.config, self.root / str(number), self.script, hosts, number)
        verdict = attempt.run(lambda: self.stopping)
        reached = self._last_step()
        row = {
            "number": number,
            "hosts": hosts,
            "from_step": from_step,
            "to_step": reached,
            "seconds": round(time.monotonic() - start, 1),
            "ended": verdict.kind,
        }
        self._state["attempts"].append(row)
        if verdict.kind not in ("done", "interrupted") and not self.stopping:
            self._failed(verdict, attempt, reached)
        return verdict

    def _failed(self, verdict: Verdict, attempt: Attempt, reached: int) -> None:
        kept = self._checkpoint() or 0
        facts = {
            "what": verdict.kind,
            "reason": verdict.reason,
            "suspects": [self._hosts[process] for process in verdict.suspects],
            "step": reached,
            "steps_lost": max(reached - kept, 0),
            "last_words": {process: self._words(process) for process in verdict.suspects},
            "heartbeats": attempt.heartbeats(),
        }
        self._note("failure", **facts)
        lost = facts["steps_lost"]
        self.say(f"{verdict.kind} at step {reached} ({lost} steps lost): {verdict.reason}")

    def _check_hosts(self) -> None:
        """Let every host check itself; those that fail are never used again.

        Raises `RunError` if all do: that is no fault of the hosts, so none is left out.
        """
        if self.config.health is None:
            return
        self.say(f"checking {len(self._pool())} hosts")
        failed = checked(self.config, self._pool(), self.root / "health")
        if failed and len(failed) == len(self._pool()):
            reasons = "; ".join(sorted(set(failed.values()))[:3])
            raise RunError(
                f"all {len(failed)} hosts fail their health check ({reasons}); what they said is "
                f"in {self.root / 'health'}; --health=never goes on without"
            )
        self._block(failed)
        if self.config.links and len(self._pool()) > 1:
            self.say("checking the links between them")
            problems, suspects = linked(self.config, self._pool(), self.root / "links")
            if problems:
                self._note("links", problems=problems, suspects=suspects)
                self.say("; ".join(problems))
            self._block({host: "; ".join(problems) for host in suspects})
        self._write_state()

    def _block(self, reasons: dict[str, str]) -> None:
        for host, reason in reasons.items():
            self._state["blocked"][host] = reason
            self._note("blocked", host=host, reason=reason)
            self.say(f"{host} is left out from now on: {reason}")

    def _pool(self) -> list[str]:
        return [host for host in self.config.hosts if host not in self._state["blocked"]]

    def _hosts_of(self, verdict: Verdict) -> set[str]:
        """Hosts that should give way to a spare: suspects, and those that held the others up."""
        rows = json_lines.read(self.folder.incidents)[self._incidents_before :]
        looks = [row["slow_process"] for row in rows if row["kind"] == "straggler"]
        slow = {i for i in set(looks) if looks.count(i) >= STRAGGLER_LOOKS}
        named = (set(verdict.suspects) | slow) & set(range(len(self._hosts)))
        return {self._hosts[process] for process in named}

    def _back_off(self, fruitless: int) -> None:
        seconds = self.config.backoff_seconds * 2 ** max(fruitless - 1, 0) if fruitless else 0.0
        end = time.monotonic() + min(seconds, 60.0)
        while time.monotonic() < end and not self.stopping:
            time.sleep(0.1)

    def _give_up(self, reason: str) -> int:
        self._note("given up", reason=reason)
        self.say(f"given up: {reason}")
        return 1

    def _report(self) -> None:
        """Say and keep what share of the time went into steps that counted."""
        rows = [r for r in json_lines.read(self.folder.metrics) if r["step"] > self._first_step]
        seconds = sorted(row["step_seconds"] for row in rows)
        useful = len(seconds) * seconds[len(seconds) // 2] if seconds else 0.0
        wall = time.monotonic() - self._began
        self._state["effective_time"] = round(useful / wall, 4)
        self._write_state()
        self.say(
            f"{len(rows)} steps kept in {len(self._state['attempts'])} attempts; effective time "
            f"{useful / wall:.1%} ({useful:.1f} of {wall:.1f} s)"
        )

    def _checkpoint(self) -> int | None:
        """The newest step that is complete; workers look at the checksums when they restore."""
        folder = self.folder.checkpoints
        whole = (s for s in reversed(steps(folder)) if _complete(folder / step_name(s)))
        return next(whole, None)

    def _last_step(self) -> int:
        rows = json_lines.read(self.folder.metrics)
        return rows[-1]["step"] if rows else 0

    def _words(self, process: int) -> list[str]:
        number = self._state["attempts"][-1]["number"]
        path = self.root / str(number) / f"{process}.log"
        return path.read_text(errors="replace").splitlines()[-LAST_LINES:]

    def _note(self, kind: str, **facts: Any) -> None:
        """A row of `incidents.jsonl`; `Incidents` would ask JAX who this is, and start devices."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"time": now, "kind": kind, "process": "supervisor", **facts}
        json_lines.append(self.folder.incidents, row, durable=True)

    def _write_state(self) -> None:
        write_json(self.root / "state.json", json_lines.plain(self._state))

    def say(self, text: str) -> None:
        """A line of the supervisor's own, among those of worker 0."""
        print(f"supervise: {text}", flush=True)


def _complete(checkpoint: Path) -> bool:
    return problem(checkpoint, read=False) is None
