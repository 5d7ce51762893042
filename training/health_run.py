"""A health check from its start to its exit status: `python -m training health`."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from model.checkpoint_folder import write_json
from training.health import Row, check_devices, check_exchange, sizes
from training.health_links import check_links, check_ring
from training.health_report import problems, table
from training.timeline import host_name

MESSAGE_BYTES = 2**16
"""Room for one process's results when all exchange theirs."""


def run(
    settings: dict[str, int], tolerance: float | None, out: str | None, limit: float = 60.0
) -> int:
    """Check this process's devices and, with several processes, their links; 1 for a problem.

    A check that takes longer than `limit` seconds ends the process, with the stack of every thread.
    All processes of a run come to the same result; the first prints it, each writes its `out`.
    """
    config = dataclasses.replace(sizes(), **settings)
    seconds: dict[str, float] = {}

    def measured(name: str, check: Callable[[], Any]) -> Any:
        print(f"health: {name}", file=sys.stderr, flush=True)
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
        start = time.perf_counter()
        result = check()
        seconds[name] = round(time.perf_counter() - start, 2)
        faulthandler.cancel_dump_traceback_later()
        return result

    mine: Row = {"host": host_name()}
    mine["devices"] = measured("devices", lambda: check_devices(config))
    mine["exchange"] = measured("exchange", lambda: check_exchange(config))
    mine["links"], mine["ring"] = [], {"gb_s": 0.0, "wrong": []}
    if jax.process_count() > 1:
        mine["links"] = measured("links", lambda: check_links(config.exchange_bytes))
        mine["ring"] = measured("ring", lambda: check_ring(config.exchange_bytes))
    report = combined(measured("gather", lambda: gathered(mine)), seconds)
    report["problems"] = problems(report, tolerance)
    if out:
        write_json(Path(out), report)
    if jax.process_index() == 0:
        print(table(report))
        print("all is well" if not report["problems"] else f"{len(report['problems'])} problems")
    return 1 if report["problems"] else 0


def gathered(row: Row) -> list[Row]:
    """The rows of all processes; all must call this together."""
    if jax.process_count() == 1:
        return [row]
    text = json.dumps(row).encode()
    if len(text) > MESSAGE_BYTES:
        raise ValueError(f"results of {len(text)} bytes do not fit in {MESSAGE_BYTES}")
    message = np.zeros(MESSAGE_BYTES, np.uint8)
    message[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(message)).reshape(-1, MESSAGE_BYTES)
    return [json.loads(bytes(line).rstrip(b"\0")) for line in everyone]


def combined(rows: list[Row], seconds: dict[str, float]) -> Row:
    """One report of the rows of all processes."""
    hosts = [row["host"] for row in rows]
    named = [
        link | {"hosts": [hosts[i] for i in link["ends"]]} for r in rows for link in r["links"]
    ]
    return {
        "platform": jax.default_backend(),
        "devices": [device | {"host": row["host"]} for row in rows for device in row["devices"]],
        "exchanges": [row["exchange"] | {"host": row["host"]} for row in rows],
        "links": named,
        "rings": [row["ring"] | {"host": row["host"]} for row in rows],
        "seconds": seconds,
    }
