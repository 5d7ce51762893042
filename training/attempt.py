"""One attempt of a supervised run: its workers, from their start until something has happened."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.blame import Seen, Verdict, judge
from training.heartbeat import FOLDER, PROCESS, SECONDS, STOP
from training.launchers import PORTS, free_port, joining, kill, python
from training.supervisor_config import SupervisorConfig


class Attempt:
    """Workers on hosts, one on each, and what their supervisor knows of them."""

    HEARTBEATS = "heartbeats"

    def __init__(
        self,
        config: SupervisorConfig,
        folder: Path,
        script: Sequence[str],
        hosts: Sequence[str],
        number: int,
    ) -> None:
        self.config, self.folder, self.script, self.hosts = config, folder, script, hosts
        self.beats = folder / self.HEARTBEATS
        self._last: dict[int, tuple[float, dict[str, Any]]] = {}
        self._ended: dict[int, float] = {}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._shown = 0
        self._port = free_port() if config.launcher.local else config.port + number % PORTS

    def run(self, stopping: Callable[[], str]) -> Verdict:
        """Start the workers and watch them; returns when none runs any more."""
        self.beats.mkdir(parents=True)
        try:
            for process, host in enumerate(self.hosts):
                self._start(process, host)
            asked = False
            while (verdict := self._look()) is None:
                if stopping() and not asked:
                    asked = True
                    (self.beats / STOP).touch()
                time.sleep(min(0.5, self.config.heartbeat_seconds / 2))
            return verdict
        finally:
            self._end()

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """The last heartbeat of each worker."""
        return {process: beat for process, (_, beat) in self._last.items()}

    def _start(self, process: int, host: str) -> None:
        flags = joining(self.config.launcher, self.hosts, process, self._port)
        argv = [python(), *self.script, *flags]
        environment = {
            FOLDER: str(self.beats),
            SECONDS: str(self.config.heartbeat_seconds),
            PROCESS: str(process),
            "SHEAF_HOST": host,
        }
        output = self.folder / f"{process}.log"
        self._workers.append(self.config.launcher.start(host, argv, environment, output))
        self._last[process] = (time.monotonic(), {})

    def _look(self) -> Verdict | None:
        self._show()
        now, seen = time.monotonic(), []
        for process, (host, worker) in enumerate(zip(self.hosts, self._workers, strict=True)):
            status = worker.poll()
            if status is not None:
                self._ended.setdefault(process, now)
            beat = self._read(process)
            if beat and beat != self._last[process][1]:
                self._last[process] = (now, beat)
            since, beat = self._last[process]
            ended = self._ended.get(process, 0.0)
            seen.append(Seen(process, host, status, ended, now - since, beat))
        return judge(seen, self.config.timeout_seconds, now)

    def _read(self, process: int) -> dict[str, Any]:
        try:
            return json.loads((self.beats / f"{process}.json").read_text())
        except (OSError, ValueError):
            return {}

    def _end(self) -> None:
        """End what still runs: workers see that their folder is gone; who does not, is killed."""
        self.beats.rename(self.folder / "ended")
        deadline = time.monotonic() + 3 * self.config.heartbeat_seconds
        while time.monotonic() < deadline and any(w.poll() is None for w in self._workers):
            time.sleep(0.05)
        for worker in self._workers:
            kill(worker)
        self._show()

    def _show(self) -> None:
        """Pass on what worker 0 has said since."""
        path = self.folder / "0.log"
        with open(path, "rb") as file:
            file.seek(self._shown)
            text = file.read()
        self._shown += len(text)
        if text:
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
