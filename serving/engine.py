"""The engine: any checkpoint, answering many requests at once.

    with Engine.open("runs/quickstart") as engine:
        for result in engine.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
            print(result.text)

    answer = engine.submit(tokens, params)      # in an event loop
    async for output in answer: ...

Requests are checked where they are submitted; a thread of its own (`serving/loop.py`) runs them.
What a request gets does not depend on what else runs, but for rounding: a step of another size may
sum in another order, which in float32 changes no token in practice, and in bfloat16 now and then;
`EngineSettings.deterministic` rules that out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from kernels_pallas.target import current_target
from model.checkpoint import Checkpoint
from serving import loading
from serving.adapters import Adapters, with_adapters
from serving.checks import ParameterError
from serving.device import Device, choice_row
from serving.grammar import Grammars
from serving.loop import EngineLoop
from serving.outputs import Answer, EngineStoppedError, Result, TokenLogprob
from serving.pages import PagePool
from serving.prompt_out import POOLINGS
from serving.request import Kind, Request, State
from serving.sampling_params import (
    PROMPT_ONLY,
    Limits,
    SamplingParams,
    banned_sequences,
    resolve,
    truncate,
)
from serving.sampling_settings import Settings, settings_of
from serving.scheduler import QueueFullError, Scheduler
from serving.settings import EngineSettings, resolve_settings
from serving.shapes import choose_shapes
from serving.stats import EngineStats, Times, histograms
from serving.structured import StructuredOutputs
from serving.text_out import TextOut
from serving.tracking import Track
from sharding import Layout

Prompt = str | Sequence[int]
Asked = tuple[Prompt, SamplingParams, str | None]
"""A prompt, what is asked of it, and the adapter."""
RETRY_S, DRAIN_LOOK_S = 0.05, 0.02
logger = logging.getLogger(__name__)


class Engine:
    """A model with its memory, made ready to serve.

    model_name, config, tokenizer, template (of chats) are the checkpoint's; tokenizer and template
    are None where it has none. end_ids: tokens that end a text. defaults: fields of a request that
    the checkpoint sets. limits: what a request may ask for. settings: as given. adapters: names of
    those that a request may name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: EngineSettings | None = None,
        layout: Layout | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """Weights are prepared and pages allocated; nothing is compiled before `start`.

        layout: the one that the checkpoint was loaded with. adapters: name -> folder, of low-rank
        adapters on this checkpoint (`serving.adapters`). Raises `ValueError` for adapters that are
        none, and settings that do not fit the model or the memory.
        """
        self.settings = settings = settings or EngineSettings()
        self.config, files = checkpoint.config, checkpoint.files
        self.model_name = settings.model_name or loading.name_of(checkpoint)
        self.tokenizer = loading.tokenizer_of(files)
        self.template = loading.template_of(files)
        self.end_ids = loading.end_ids_of(files, self.tokenizer)
        self.defaults = loading.defaults_of(files)
        self._pooling = settings.pooling or loading.pooling_of(files)
        platform, vocab = current_target().platform, self.config.vocab_size
        if self.tokenizer is not None:
            vocab = min(vocab, self.tokenizer.vocab_size)
        resolved = resolve_settings(settings, self.config, platform)
        prioritises = settings.policy == "priority"
        self.limits = Limits(vocab, resolved.max_model_len, settings.max_logprobs, prioritises)
        shapes = choose_shapes(settings, resolved, platform, vocab)
        self.adapters, params = tuple(adapters or ()), checkpoint.params
        if adapters:
            params = with_adapters(checkpoint, adapters, resolved.compute_dtype, layout)
        self._device = Device(params, self.config, settings, resolved, shapes, layout)
        pool = PagePool(self._device.num_pages, resolved.page_size)
        scheduler = Scheduler(shapes.limits(resolved.scheduler), pool)
        counts = histograms(resolved.max_model_len)
        self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self.end_ids)
        self._loop = EngineLoop(settings, scheduler, self._device, counts, self._grammars)
        self._started = False

    @classmethod
    def open(
        cls,
        source: str | Path,
        settings: EngineSettings | None = None,
        layout: Layout | None = None,
        adapters: Adapters | None = None,
    ) -> Engine:
        """The engine of a checkpoint, run or Hugging Face folder, or of `hub:owner/name`."""
        return cls(loading.load_checkpoint(source, layout), settings, layout, adapters)

    # -- life

    def start(self) -> None:
        """Start the thread, which compiles first; requests that come meanwhile wait."""
        if not self._started:
            self._started = True
            self._loop.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until every program is compiled; whether it is so. Raises `EngineStoppedError` if
        the engine failed.
        """
        ready = self._loop.ready.wait(timeout)
        if self.failure is not None:
            raise EngineStoppedError(f"the engine has failed: {self.failure}") from self.failure
        return ready

    @property
    def ready(self) -> bool:
        """Whether every program is compiled and the engine works."""
        return self._loop.ready.is_set() and self.healthy

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and comes round."""
        return self._loop.healthy()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread."""
        return self._loop.failure

    async def stop(self, drain_seconds: float = 0.0) -> bool:
        """Take no more requests, let those that are here end for so long, abort the others, end the
        thread; whether all ended by themselves.
        """
        self._loop.refuse()
        deadline = time.monotonic() + drain_seconds
        while self._loop.num_live and time.monotonic() < deadline and self.healthy:
            await asyncio.sleep(DRAIN_LOOK_S)
        drained = not self._loop.num_live
        await asyncio.to_thread(self.close)
        return drained

    def close(self) -> None:
        """`stop` at once, from code without an event loop."""
        self._loop.stop()
        self._grammars.close()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stats(self) -> EngineStats:
        """The numbers as they are now."""
        return self._loop.stats()

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes; waits for the step under way. Raises `ValueError` while requests
        run.
        """
        self._loop.call(self._loop.reset_prefix_cache)

    # -- requests

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_key: str = "",
        adapter: str | None = None,
        kind: Kind = Kind.GENERATE,
    ) -> Answer:
        """Queue a request; its outputs come in the event loop of the caller.

        Args:
            tokens: ids of the prompt.
            params: what is asked for; what it leaves open is set here.
            request_id: unique among those that have not ended; None makes one.
            priority: lower goes first, under that policy; 0 leaves it to `params`.
            cache_key: only requests with the same one share cached pages.
            adapter: the name of one; None is the base. Cached pages are its own.
            kind: what is wanted; a score comes as `prompt_logprobs`, a vector as `vector`.

        Raises:
            ParameterError: this model or engine does not allow it; names the field. A grammar that
                cannot be used ends the answer with it.
            QueueFullError: as many wait as may.
            EngineStoppedError: the engine takes no more.
            ValueError: the id is here already.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        request_id = request_id or uuid.uuid4().hex
        adapter_id = self._adapter_id(adapter)
        if kind is Kind.EMBED and self._pooling not in POOLINGS:
            right = f"pooled by {' or '.join(POOLINGS)}, as the setting pooling may say"
            raise ParameterError("input", f"is to be pooled by {self._pooling}", right)
        if kind is not Kind.GENERATE:
            logprobs = params.logprobs or 0 if kind is Kind.SCORE else None
            params = dataclasses.replace(PROMPT_ONLY, logprobs=logprobs)
        prompt, params = self._resolved(tokens, params, priority)
        logger.debug("request %s has seed %s", request_id, params.seed)
        wanted = StructuredOutputs.of(params.structured_outputs)
        if wanted is not None:
            self._grammars.check(wanted)
        answer = Answer(request_id, params, self._loop.abort, loop)
        if params.candidates > params.n and params.logprobs is None:
            params = dataclasses.replace(params, logprobs=0)  # What candidates are ranked by.
        row = self._row(params, len(prompt))
        tracks = []
        for choice in range(params.candidates):
            request = Request(
                id=f"{choice}:{request_id}",
                prompt=prompt,
                params=params,
                max_model_len=self.limits.max_model_len,
                end_ids=self.end_ids,
                arrival=now,
                adapter=adapter,
                adapter_id=adapter_id,
                cache_key=cache_key,
                choice=choice,
                kind=kind,
                state=State.WAITING if wanted is None else State.WAITING_GRAMMAR,
            )
            text = None if self.tokenizer is None else TextOut(self.tokenizer, params, prompt)
            own = (choice_row(row, choice), text, Times(now), self._pooling)
            tracks.append(Track(request, answer, *own))
        self._loop.submit(tracks)
        if wanted is not None:
            self._loop.guide(tracks, self._grammars.compile(wanted))
        return answer

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answer prompts, texts or ids, and wait for all; starts the engine if need be.

        params: for all, or one a prompt; None is the defaults with the checkpoint's own on top.
        adapter: its name, for all, or one a prompt; None is the base.
        Works in a notebook too: the waiting happens in another thread's event loop.
        """
        if params is None:
            params = SamplingParams(**self.defaults)
        count = len(prompts)
        each = [params] * count if isinstance(params, SamplingParams) else list(params)
        names = [adapter] * count if isinstance(adapter, str | None) else list(adapter)
        for what, given in (("params", each), ("adapters", names)):
            if len(given) != count:
                raise ValueError(f"{len(given)} {what} for {count} prompts; one each, or one")
        return self._wait_for(list(zip(prompts, each, names, strict=True)), Kind.GENERATE)

    def _wait_for(self, asked: Sequence[Asked], kind: Kind) -> list[Result]:
        self.start()
        running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = []
        with ThreadPoolExecutor(1, "generate") as pool:
            results = pool.submit(asyncio.run, self._answers(asked, kind, running))
            try:
                return results.result()
            except BaseException:
                for loop, task in running:
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(task.cancel)
                raise

    async def _answers(self, asked: Sequence[Asked], kind: Kind, running: list) -> list[Result]:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        room = asyncio.Semaphore(self.settings.max_waiting)

        async def one(prompt: Prompt, params: SamplingParams, adapter: str | None) -> Result:
            async with room:
                tokens = self.encode(prompt) if isinstance(prompt, str) else prompt
                while True:
                    try:
                        return await self.submit(tokens, params, adapter=adapter, kind=kind).all()
                    except QueueFullError:  # Others fill it; there is time.
                        await asyncio.sleep(RETRY_S)

        return list(await asyncio.gather(*(one(*each) for each in asked)))

    # -- whole texts

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with what the model expects around it."""
        if self.tokenizer is None:
            raise ParameterError("prompt", "is a text", "ids: the checkpoint has no tokenizer")
        return self.tokenizer.encode_prompt(text).tolist()

    def score(
        self, tokens: Sequence[int], logprobs: int = 0, adapter: str | None = None
    ) -> list[TokenLogprob]:
        """Log-probability of each token but the first, given those before it, and of the likeliest
        `logprobs` in its place. For many texts at once: `generate` with `echo`, `logprobs` and
        `max_tokens=0`.
        """
        params = SamplingParams(logprobs=logprobs)
        result = self._wait_for([(tokens, params, adapter)], Kind.SCORE)[0]
        return list(result.choices[0].prompt_logprobs or ())

    def embed(self, texts: Sequence[Sequence[int]], adapter: str | None = None) -> np.ndarray:
        """`float32[texts, d_model]`, vectors of length 1 of the hidden states after the final norm,
        as `EngineSettings.pooling` says.
        """
        asked = [(text, SamplingParams(), adapter) for text in texts]
        results = self._wait_for(asked, Kind.EMBED)
        return np.stack([np.asarray(result.choices[0].vector) for result in results])

    # -- what they share

    def _resolved(
        self, tokens: Sequence[int], params: SamplingParams, priority: int
    ) -> tuple[list[int], SamplingParams]:
        prompt = self._checked(truncate(tokens, params, self.limits))
        if priority:
            params = dataclasses.replace(params, priority=priority)
        if self.tokenizer is None and (params.stop or params.bad_words):
            field = "stop" if params.stop else "bad_words"
            raise ParameterError(field, "is given", "empty: the checkpoint has no tokenizer")
        return prompt, resolve(params, len(prompt), self.limits)

    def _adapter_id(self, name: str | None) -> int:
        if name is None:
            return 0
        if name not in self.adapters:
            there = f"one of {', '.join(self.adapters)}, or none"
            right = there if self.adapters else "none: the engine has no adapters"
            raise ParameterError("adapter", f"is {name!r}", right)
        return self.adapters.index(name) + 1

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise ParameterError("prompt", "is empty", "at least one token")
        if len(ids) > self.limits.max_model_len:
            raise ParameterError(
                "prompt",
                f"has {len(ids)} tokens",
                f"at most the model's maximum context of {self.limits.max_model_len} tokens",
                code="context_length_exceeded",
            )
        wrong = next((i for i in ids if not 0 <= i < self.limits.vocab_size), None)
        if wrong is not None:
            raise ParameterError(
                "prompt", f"has id {wrong}", f"ids 0..{self.limits.vocab_size - 1}"
            )
        return ids

    def _row(self, params: SamplingParams, length: int) -> Settings:
        banned = ()
        if self.tokenizer is not None and params.bad_words:
            banned = banned_sequences(params.bad_words, self.tokenizer)
        return settings_of(
            params,
            self.config.vocab_size,
            prompt_length=length,
            end_ids=self.end_ids,
            banned=banned,
            room=self.settings.room,
        )
