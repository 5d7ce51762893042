"""When requests are sent: by clients that wait for their answers, or at given times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.load.client import model_of, send, tokens_per_word
from serving.load.http import Server
from serving.load.metrics import Counters, read_counters
from serving.load.record import Record
from serving.load.settings import LoadSettings
from serving.load.workload import Planned, draw


@dataclass
class Load:
    """What a load has brought so far; complete once `run` returns.

    records: of the requests that ended, in that order. seconds: of all; busy_seconds: of the
    client's processor. before, after: the server's own counts, where it has them.
    """

    settings: LoadSettings
    model: str = ""
    planned: Sequence[Planned] = ()
    records: list[Record] = field(default_factory=list)
    under_way: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    before: Counters | None = None
    after: Counters | None = None


async def run(load: Load, api_key: str | None, on_record: Callable[[Load], None]) -> None:
    """Put the load on its server; `load` holds what there is even if this is cancelled.

    on_record: called after each request. Raises `ServerError` for one that cannot be measured.
    """
    settings = load.settings
    server = Server(settings.url, api_key)
    try:
        load.model = await model_of(server, settings)
        drawn = settings.ids == 0 and settings.prompts is None
        per_word = await tokens_per_word(server, settings, load.model) if drawn else 1.0
        load.planned = draw(settings, per_word)
        load.before = await read_counters(server)
        await _drive(load, server, on_record)
        load.after = await read_counters(server)
    finally:
        server.close()


async def _drive(load: Load, server: Server, on_record: Callable[[Load], None]) -> None:
    began, busy = time.perf_counter(), time.process_time()

    async def one(planned: Planned) -> None:
        load.under_way += 1
        try:
            record = await send(server, planned, load.settings, load.model, began)
        finally:
            load.under_way -= 1
            load.seconds = time.perf_counter() - began
            load.busy_seconds = time.process_time() - busy
        load.records.append(record)
        on_record(load)

    if load.settings.rate is None:
        await _closed(load, one)
    else:
        await _open(load, one, began)


async def _closed(load: Load, one: Callable) -> None:
    """Each client takes the next request once its last one is answered."""
    todo = iter(load.planned)

    async def client() -> None:
        for planned in todo:
            await one(planned)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(load.settings.clients, len(load.planned))):
            group.create_task(client())


async def _open(load: Load, one: Callable, began: float) -> None:
    """Requests go out at their times, whatever is under way."""
    async with asyncio.TaskGroup() as group:
        for planned in load.planned:
            assert planned.at is not None
            await asyncio.sleep(began + planned.at - time.perf_counter())
            group.create_task(one(planned))
