"""Which hosts a supervised run uses: who passes the check of itself, and who stands where."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from training.health_report import slow_hosts
from training.launchers import kill, python
from training.supervisor_config import SupervisorConfig


def choose(
    before: Sequence[str], pool: Sequence[str], suspects: Collection[str], sizes: Sequence[int]
) -> tuple[str, ...]:
    """The hosts of the next attempt, by process number; empty if too few are left.

    Who worked `before` and is in the `pool` of good hosts keeps its place. Suspects give way to
    spares while there are any, and are the first to be left out where fewer hosts are used.
    """
    size = next((size for size in sizes or (len(pool),) if 0 < size <= len(pool)), 0)
    good = [host for host in before if host in pool and host not in suspects]
    spares = [host for host in pool if host not in before and host not in suspects]
    doubtful = [host for host in pool if host in suspects]
    return tuple(_in_place(before, [*good, *spares, *doubtful][:size]))


def _in_place(before: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The chosen hosts with those that stay at the number that they had, where it still exists."""
    slots: list[str | None] = [
        before[i] if i < len(before) and before[i] in chosen else None for i in range(len(chosen))
    ]
    others = iter(host for host in chosen if host not in slots)
    return [host if host is not None else next(others) for host in slots]


def checked(config: SupervisorConfig, hosts: Sequence[str], folder: Path) -> dict[str, str]:
    """`{host: reason}` of those that fail the check of themselves, all checked side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    started = {host: _start(config, host, folder) for host in hosts}
    deadline = time.monotonic() + config.health_seconds
    failed: dict[str, str] = {}
    reports: dict[str, dict[str, Any]] = {}
    for host, process in started.items():
        try:
            status = process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            failed[host] = f"its health check did not end within {config.health_seconds:.0f} s"
            continue
        finally:
            kill(process)
        report = _read(folder / f"{host}.json")
        if status or not report:
            failed[host] = _reason(status, report, folder / f"{host}.log")
        else:
            reports[host] = report
    return failed | slow_hosts(reports)


def _start(config: SupervisorConfig, host: str, folder: Path) -> subprocess.Popen[bytes]:
    report = folder / f"{host}.json"
    report.unlink(missing_ok=True)
    argv = [python(), "-m", "training", "health", f"--json={report}", *(config.health or ())]
    return config.launcher.start(host, argv, {"SHEAF_HOST": host}, folder / f"{host}.log")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _reason(status: int, report: dict[str, Any], log: Path) -> str:
    if report:
        return "health check: " + "; ".join(report["problems"])
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    return f"its health check ended with status {status}: {last}"
