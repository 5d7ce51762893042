"""Logs, one JSON object a line; what people wrote and got is in them only if asked for."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.server.job import Job
    from serving.server.service import Service

LEFT = 499
"""What the log says of a client that left before its answer was complete, as nginx does."""
logger = logging.getLogger("sheaf.server")


@dataclass
class Note:
    """What is known of one HTTP request, for its line in the log.

    id: of the request. status: of the answer, once it began. complete: all of it was sent.
    """

    id: str
    method: str
    path: str
    status: int | None = None
    complete: bool = False
    job: Job | None = None
    _began: float = field(default_factory=time.monotonic)

    def write(self, service: Service) -> None:
        """Log the request."""
        fields: dict[str, Any] = {
            "request_id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.monotonic() - self._began, 6),
        }
        if self.job is not None:
            fields |= self._of_job(self.job, service)
        quiet = self.path in ("/health", "/ready", "/metrics")
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})

    @staticmethod
    def _of_job(job: Job, service: Service) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "answer_id": job.id,
            "prompt_tokens": sum(len(prompt.tokens) for prompt in job.prompts),
            "completion_tokens": job.completion_tokens,
            "finish_reasons": [reason for _, reason in sorted(job.finish_reasons.items())],
        }
        if service.settings.log_requests:
            decode = service.tokenizer.decode
            fields["prompts"] = [decode(prompt.tokens) for prompt in job.prompts]
            fields["answers"] = ["".join(parts) for _, parts in sorted(job.texts.items())]
        return fields


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write the server's and uvicorn's logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, least in (
        ("sheaf", level),
        ("serving", level),
        ("uvicorn", max(level, logging.WARNING)),
    ):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(least)


async def log_stats(service: Service) -> None:
    """Say every `stats_every_s` what the engine does, for ever; nothing while it does nothing."""
    seconds = service.settings.stats_every_s
    before = service.engine.stats()
    while True:
        await asyncio.sleep(seconds)
        now = service.engine.stats()
        if fields := _progress(before, now, seconds):
            logger.info("engine", extra={"fields": fields})
        before = now


def _progress(before: Any, now: Any, seconds: float) -> dict[str, Any]:
    """What happened between two `stats`; empty if nothing did."""
    prompt = now.prompt_tokens - before.prompt_tokens
    generated = now.generation_tokens - before.generation_tokens
    if not (prompt or generated or now.running or now.waiting):
        return {}
    return {
        "prompt_tokens_per_second": round(prompt / seconds, 1),
        "generation_tokens_per_second": round(generated / seconds, 1),
        "running": now.running,
        "waiting": now.waiting,
        "kv_cache_usage": round(now.kv_cache_usage, 4),
        "prefix_hit_rate": round(now.prefix_hits / max(now.prefix_queries, 1), 4),
    }
