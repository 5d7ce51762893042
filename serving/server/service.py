"""The state of a server: its engine, the requests under way, whether it takes new ones."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.server.backend import Engine
from serving.server.errors import ApiError
from serving.server.logprobs import TokenTexts
from serving.server.metrics import Metrics
from serving.server.settings import ServerSettings

if TYPE_CHECKING:
    from serving.server.job import Job

LONGEST_RETRY_S, UNREADY_RETRY_S = 120.0, 5.0
RECENT = 64
logger = logging.getLogger("sheaf.server")


def version() -> str:
    """The installed package's version."""
    try:
        return importlib.metadata.version("sheaf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(eq=False)
class Service:
    """Owned by the event loop's thread.

    jobs: requests that the engine works on. is_up: the engine was started. draining: new requests
    are refused. created: when, in seconds since 1970.
    """

    engine: Engine
    settings: ServerSettings
    jobs: set[Job] = field(default_factory=set)
    is_up: bool = False
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def __post_init__(self) -> None:
        if self.engine.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer; a server needs one to read prompts")
        if twice := set(self.names) & set(self.engine.adapters):
            raise ValueError(f"{', '.join(twice)} is the name of the model and of an adapter")
        self.tokenizer = self.engine.tokenizer
        self.texts = TokenTexts(self.tokenizer)
        self.metrics = Metrics(self.engine, self.settings.metrics_prefix)
        self._idle.set()

    @property
    def fingerprint(self) -> str:
        """Names what computes the answers: this program's version."""
        return f"sheaf-{version()}"

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called in requests; the first is in answers."""
        return self.settings.served_names or (self.engine.model_name,)

    def check_ready(self) -> None:
        """Raise the error of a server that takes no requests."""
        if not self.engine.healthy:
            raise ApiError(503, "the engine has failed; the server's log says why")
        if self.draining:
            raise ApiError(503, "the server is shutting down", retry_after=UNREADY_RETRY_S)
        if not self.engine.ready:
            raise ApiError(503, "the engine is starting", retry_after=UNREADY_RETRY_S)

    def check_model(self, name: str | None) -> str | None:
        """The adapter that a model's name means; None for the model itself, whose name may be left
        out. Raises the error of a model that is not here.
        """
        if name is None or name in self.names:
            return None
        if name in self.engine.adapters:
            return name
        there = ", ".join((*self.names, *self.engine.adapters))
        message = f"the model {name!r} does not exist; there is {there}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def enter(self, job: Job) -> None:
        """A request begins."""
        self.check_ready()
        self.jobs.add(job)
        self._idle.clear()

    def leave(self, job: Job) -> None:
        """A request is done; nothing if it was before."""
        if job in self.jobs:
            self.jobs.remove(job)
            self._ends.append(time.monotonic())
            if not self.jobs:
                self._idle.set()

    def retry_after(self) -> float:
        """Seconds until those who wait now are likely served, by how fast requests ended lately."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(max(self.engine.stats().waiting / rate, 1.0), LONGEST_RETRY_S)

    async def drain(self) -> bool:
        """Refuse new requests and let the others end, for `drain_timeout_s`; whether all did. Those
        that did not end with an error.
        """
        self.draining = True
        try:
            async with asyncio.timeout(self.settings.drain_timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests had not ended after the time to drain", len(self.jobs))
            self.end_all(ApiError(503, "the server shut down before the answer was complete"))
            return False
        return True

    def end_all(self, error: ApiError) -> None:
        """End the requests under way with an error."""
        for job in list(self.jobs):
            job.fail(error)
