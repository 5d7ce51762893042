"""What the server needs of an engine: the one seam between HTTP and the device.

`serving.Engine` is one. Answers, outputs and log-probabilities are those of `serving.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data.chat import ChatTemplate
from data.tokenizers import Tokenizer
from serving.outputs import Answer
from serving.request import Kind
from serving.sampling_params import Limits, SamplingParams


class Engine(Protocol):
    """An engine, started by the server and stopped by it.

    model_name, tokenizer, template (of chats) and limits are the model's. adapters: names of those
    that a request may choose in place of the model.
    """

    model_name: str
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    limits: Limits
    adapters: tuple[str, ...]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Fields of requests that the checkpoint sets, by name."""
        ...

    @property
    def ready(self) -> bool:
        """Whether requests are answered without compiling first."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether the engine lives; asked only after its start."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What ended it."""
        ...

    def start(self) -> None:
        """Begin to get ready, and return."""
        ...

    async def stop(self, drain_seconds: float = 0.0) -> bool:
        """End what runs, and the engine."""
        ...

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        adapter: str | None = None,
        kind: Kind = Kind.GENERATE,
    ) -> Answer:
        """Queue a request for a text, a score or a vector; raises `ParameterError`,
        `QueueFullError`, `EngineStoppedError`, and `ValueError` for what can never run.
        """
        ...

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes; blocks. Raises `ValueError` while requests run."""
        ...

    def stats(self) -> Any:
        """Numbers for the metrics, `serving.stats.EngineStats`; those that are absent are not
        shown.
        """
        ...
