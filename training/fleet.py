"""Which hosts a supervised run uses: who passes the check of itself, and who stands where."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.health_report import ends_of_bad_links, slow_hosts
from training.launchers import PORTS, free_port, joining, kill, python
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
    ended = _check(config, {host: [] for host in hosts}, folder)
    failed: dict[str, str] = {}
    reports: dict[str, dict[str, Any]] = {}
    for host, status in ended.items():
        report = _read(folder / f"{host}.json")
        if status or not report:
            failed[host] = _reason(config, status, report, folder / f"{host}.log")
        else:
            reports[host] = report
    return failed | slow_hosts(reports)


def linked(
    config: SupervisorConfig, hosts: Sequence[str], folder: Path
) -> tuple[list[str], list[str]]:
    """`(problems, suspects)` of a check that hosts make together, links included.

    A host that is an end of two bad links or more is a suspect; of one bad link, nobody knows.
    """
    launcher = config.launcher
    port = free_port() if launcher.local else config.port + PORTS
    flags = {host: joining(launcher, hosts, i, port) for i, host in enumerate(hosts)}
    ended = _check(config, flags, folder)
    report = _read(folder / f"{hosts[0]}.json")
    if report:
        return report["problems"], ends_of_bad_links(report)
    return [
        f"{host}: {_reason(config, status, {}, folder / f'{host}.log')}"
        for host, status in ended.items()
        if status
    ], []


def _check(
    config: SupervisorConfig, flags: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, int | None]:
    """Exit statuses of health checks on hosts, side by side; None for one that did not end."""
    folder.mkdir(parents=True, exist_ok=True)
    started = {host: _start(config, host, words, folder) for host, words in flags.items()}
    deadline = time.monotonic() + config.health_seconds
    ended: dict[str, int | None] = dict.fromkeys(started)
    for host, process in started.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended[host] = process.wait(max(deadline - time.monotonic(), 0.0))
    for process in started.values():
        kill(process)
    return ended


def _start(
    config: SupervisorConfig, host: str, flags: Sequence[str], folder: Path
) -> subprocess.Popen[bytes]:
    report = folder / f"{host}.json"
    report.unlink(missing_ok=True)
    argv = [python(), "-m", "training", "health", f"--json={report}"]
    argv += [*(config.health or ()), *flags]
    return config.launcher.start(host, argv, {"SHEAF_HOST": host}, folder / f"{host}.log")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _reason(config: SupervisorConfig, status: int | None, report: dict[str, Any], log: Path) -> str:
    if status is None:
        return f"its health check did not end within {config.health_seconds:.0f} s"
    if report:
        return "health check: " + "; ".join(report["problems"])
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    return f"its health check ended with status {status}: {last}"
