"""Many coroutines at once, from code without an event loop: results as they come."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from evals.task import RequestError


def as_completed(
    calls: Mapping[int, Callable[[], Awaitable[Any]]], parallel: int
) -> Iterator[list[tuple[int, Any]]]:
    """Results of coroutines with their places, in groups, as they come; they run in the event loop
    of a thread. Ends them all if the reader goes away, or one fails.
    """
    done: queue.SimpleQueue[tuple[int, Any] | BaseException | None] = queue.SimpleQueue()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task | None]] = []

    async def main() -> None:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        room = asyncio.Semaphore(parallel)

        async def one(place: int, call: Callable[[], Awaitable[Any]]) -> None:
            async with room:
                try:
                    done.put((place, await call()))
                except Exception as error:
                    raise RequestError(place, error) from error

        async with asyncio.TaskGroup() as group:
            for place, call in calls.items():
                group.create_task(one(place, call))

    def work() -> None:
        try:
            asyncio.run(main())
        except* BaseException as errors:
            done.put(_first(errors))
        finally:
            done.put(None)

    thread = threading.Thread(target=work, name="requests", daemon=True)
    thread.start()
    try:
        yield from _groups(done)
    finally:
        for loop, task in running:
            if thread.is_alive() and task is not None:
                with contextlib.suppress(RuntimeError):  # The loop has just ended.
                    loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _groups(done: queue.SimpleQueue) -> Iterator[list[tuple[int, Any]]]:
    """What is there, again and again, until there is None."""
    while True:
        group = [done.get()]
        with contextlib.suppress(queue.Empty):
            while group[-1] is not None:
                group.append(done.get_nowait())
        found = [each for each in group if isinstance(each, tuple)]
        if found:
            yield found
        failure = next((each for each in group if isinstance(each, BaseException)), None)
        if failure is not None:
            raise failure
        if group[-1] is None:
            return


def _first(errors: BaseExceptionGroup) -> BaseException:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
