"""What answers requests: a checkpoint in this process, or any client.

A backend is asked for many requests of one kind and gives the answers back in groups, as they come.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp

from evals.gather import as_completed
from evals.hidden import hidden_of
from evals.scoring import Scorer
from evals.spans import pair_spans, prefix_token, rolling_spans
from evals.store import Store, canonical, code_fingerprint, model_fingerprint, sha256
from evals.task import (
    Embed,
    Embedded,
    Generate,
    Generated,
    Hidden,
    Loglikelihood,
    Request,
    RequestError,
    Response,
    Rolling,
    RollingScored,
    Scored,
)
from kernels_pallas.target import current_target
from model import Runtime
from model.checkpoint import Checkpoint
from serving import Engine, EngineSettings, SamplingParams
from serving.client import Client, Completion, EngineClient
from serving.device import prepared
from serving.loading import load_checkpoint, name_of, template_of, tokenizer_of
from serving.memory import Model
from sharding import Layout
from weights import flatten, is_format, nbytes, size

WAITING = 4096
"""Most texts that are gone on with at once."""
Answers = Iterator[list[tuple[int, Response]]]


class Backend(Protocol):
    """A model, or whatever else plays a role.

    name: what results are filed under. identity: all that its answers depend on, as JSON.
    """

    name: str
    identity: Mapping[str, Any]

    def answer(self, requests: Sequence[Request], known: Collection[int]) -> Answers:
        """Responses with the places of their requests, all of one kind. Those of `known` are not
        needed. Raises `RequestError` for what cannot be answered.
        """
        ...

    def work(self) -> dict[str, int]:
        """What was computed so far, by name."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def engine_settings(**changed: Any) -> EngineSettings:
    """The engine's settings for evaluations: nothing is warmed up, and few sizes of steps, so that
    few programs are compiled while examples wait.
    """
    few = {"decode_sizes": (16, 64), "chunk_sizes": (128, 512), "page_widths": (32, 128, 512)}
    if current_target().platform == "cpu":  # More tokens at once save it nothing.
        few["max_num_batched_tokens"] = 512
    return EngineSettings(**{"warm_up": False, "max_waiting": WAITING, **few, **changed})


class InProcess:
    """A checkpoint in this process: scored by `evals.scoring`, going on by the serving engine.

    Args:
        source: a checkpoint, or where it lies (a run, a folder, `hub:owner/name`).
        layout: mesh and tables; None is one device.
        dtype: of activations; None is float32 on a CPU, bfloat16 elsewhere.
        max_length: most tokens at once; None is the model's own limit.
        token_budget: tokens of a batch of scoring.
        engine: settings for generation; what is None here follows from the other arguments.
        store: where the fingerprint is kept.

    `scorer` and `client` do the work, for those who have tokens instead of texts.
    """

    def __init__(
        self,
        source: Checkpoint | str | Path,
        layout: Layout | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        token_budget: int | None = None,
        engine: EngineSettings | None = None,
        store: Store | None = None,
    ) -> None:
        given = isinstance(source, Checkpoint)
        self.checkpoint = source if given else load_checkpoint(source, layout)
        self.name = name_of(self.checkpoint)
        tokenizer = tokenizer_of(self.checkpoint.files)
        if tokenizer is None:
            raise ValueError(f"{self.checkpoint.folder} has no tokenizer; tasks are made of text")
        self.tokenizer, self._layout = tokenizer, layout
        on_cpu = current_target().platform == "cpu"
        dtype = str(jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16")))
        length = max_length or self.checkpoint.config.max_length
        params = prepared(self.checkpoint.params, layout)
        model = Model(params, self.checkpoint.config, Runtime(compute_dtype=dtype, layout=layout))
        self.scorer = Scorer(model, length, token_budget or (4096 if on_cpu else 65536))
        settings = engine or engine_settings()
        self._settings = dataclasses.replace(
            settings,
            compute_dtype=settings.compute_dtype or dtype,
            max_model_len=settings.max_model_len or length,
        )
        self._made = 0
        self.identity: Mapping[str, Any] = self._identity(store)

    def _identity(self, store: Store | None) -> dict[str, Any]:
        template = template_of(self.checkpoint.files)
        numerics = dataclasses.asdict(self._settings)
        return {
            "model": model_fingerprint(self.checkpoint, store),
            "tokenizer": self.tokenizer.fingerprint,
            "template": None if template is None else sha256(canonical(template.templates)),
            "code": code_fingerprint(),
            "platform": current_target().platform,
            "max_length": self.scorer.max_length,
            "dtype": self.scorer.model.runtime.compute_dtype,
            "cache": numerics["kv_dtype"],
        }

    def facts(self) -> dict[str, Any]:
        """What a report says of the checkpoint: how it was made, honest bits a weight (those of its
        provenance, else of what is stored), weights, and bytes of the stored form.
        """
        leaves = list(flatten(self.checkpoint.params).values())
        origin = self.checkpoint.provenance
        bits = dict(origin.get("summary") or {}).get("bits")
        counted = [leaf for leaf in leaves if is_format(leaf)] or leaves
        stored = 8 * sum(map(nbytes, counted)) / sum(map(size, counted))
        return {
            "method": origin.get("method"),
            "bits_per_weight": stored if bits is None else float(bits),
            "parameters": sum(map(size, leaves)),
            "bytes": sum(map(nbytes, leaves)),
        }

    @functools.cached_property
    def client(self) -> EngineClient:
        """The engine that goes on with texts; it starts with the first who asks."""
        return EngineClient(Engine(self.checkpoint, self._settings, self._layout))

    def answer(self, requests: Sequence[Request], known: Collection[int]) -> Answers:
        """See `Backend`."""
        kinds: dict[type, Callable[[Any, Collection[int]], Answers]] = {
            Loglikelihood: self._pairs,
            Rolling: self._documents,
            Generate: self._generate,
            Hidden: self._hidden,
            Embed: self._embed,
        }
        return kinds[type(requests[0])](requests, known)

    def work(self) -> dict[str, int]:
        """See `Backend`."""
        done = self.scorer.work
        return {
            "rows": done.rows,
            "tokens": done.tokens,
            "programs": len(done.programs),
            "generated_tokens": self._made,
        }

    def close(self) -> None:
        """See `Backend`."""
        if "client" in vars(self):
            self.client.engine.close()

    def _pairs(self, requests: Sequence[Loglikelihood], known: Collection[int]) -> Answers:
        pairs = [(each.context, each.continuation) for each in requests]
        spans = pair_spans(self.tokenizer, pairs, self.scorer.max_length)
        for group in self.scorer.score(spans, known):
            yield [
                (place, Scored(one.logprob, one.greedy, spans[place].count, spans[place].cut))
                for place, one in group
            ]

    def _documents(self, requests: Sequence[Rolling], known: Collection[int]) -> Answers:
        """Windows of all documents are batched together; a document is given when its last is."""
        prefix = prefix_token(self.tokenizer)
        encoded = self.tokenizer.encode([each.text for each in requests])
        spans, owners = [], []
        for place, (request, tokens) in enumerate(zip(requests, encoded, strict=True)):
            window = min(request.window or self.scorer.max_length, self.scorer.max_length)
            stride = None if request.stride is None else min(request.stride, window)
            found = rolling_spans(prefix, tokens, window, stride)
            spans += found
            owners += [place] * len(found)
        left = [owners.count(place) for place in range(len(requests))]
        sums: list[dict[int, float]] = [{} for _ in requests]

        def whole(place: int) -> tuple[int, Response]:
            # In the order of the windows, so that the batches make no difference to the sum.
            total = sum(value for _, value in sorted(sums[place].items()))
            return place, _rolled(requests[place].text, total, len(encoded[place]))

        yield [whole(place) for place, count in enumerate(left) if not count]
        skipped = {window for window, place in enumerate(owners) if place in known}
        for group in self.scorer.score(spans, skipped):
            finished = []
            for window, one in group:
                place = owners[window]
                sums[place][window] = one.logprob
                if len(sums[place]) == left[place]:
                    finished.append(whole(place))
            yield finished

    def _generate(self, requests: Sequence[Generate], known: Collection[int]) -> Answers:
        room = self._settings.max_model_len or self.scorer.max_length
        calls = {}
        for place, request in enumerate(requests):
            if place not in known:
                if request.max_tokens >= room:
                    raise RequestError(
                        place,
                        f"asks for {request.max_tokens} tokens; the model holds {room} with the "
                        "prompt",
                    )
                params = dataclasses.replace(
                    params_of(request), truncate_prompt_tokens=room - request.max_tokens
                )
                calls[place] = functools.partial(generate, self.client, request, params)
        for group in as_completed(calls, self._settings.max_waiting):
            self._made += sum(answer.tokens for _, answer in group)
            yield list(group)

    def _hidden(self, requests: Sequence[Hidden], known: Collection[int]) -> Answers:
        scorer = self.scorer
        return hidden_of(
            scorer.model, self.tokenizer, requests, known, scorer.max_length, scorer.token_budget
        )

    def _embed(self, requests: Sequence[Embed], known: Collection[int]) -> Answers:
        return embed(self.client, requests, known)


class Remote:
    """A model behind a client, such as a server with OpenAI's API.

    identity: what its answers are stored under; a server does not say which weights it has, so this
    is its name, and `revision`, which the caller changes when the weights do.
    """

    def __init__(self, client: Client, revision: str = "", parallel: int = 64) -> None:
        self.client, self.name, self._parallel = client, client.model_name, parallel
        self.identity: Mapping[str, Any] = {"server": client.model_name, "revision": revision}
        self._made = 0

    def answer(self, requests: Sequence[Request], known: Collection[int]) -> Answers:
        """See `Backend`. A server must score prompts (`echo` with `logprobs`) for likelihoods."""
        if isinstance(requests[0], Embed):
            yield from embed(self.client, requests, known)
            return
        kinds: dict[type, Callable[[Any], Awaitable[Response]]] = {
            Loglikelihood: self._pair,
            Rolling: self._document,
            Generate: lambda request: generate(self.client, request, params_of(request)),
        }
        kind = type(requests[0])
        if kind not in kinds:
            raise RequestError(0, f"a server cannot answer {kind.__name__}; use a checkpoint")
        calls = {
            place: functools.partial(kinds[kind], request)
            for place, request in enumerate(requests)
            if place not in known
        }
        for group in as_completed(calls, self._parallel):
            self._made += sum(getattr(answer, "tokens", 0) for _, answer in group)
            yield group

    def work(self) -> dict[str, int]:
        """See `Backend`."""
        return {"tokens": self._made}

    def close(self) -> None:
        """See `Backend`."""
        self.client.close()

    async def _pair(self, request: Loglikelihood) -> Response:
        """Tokens that begin in the continuation count, as the server cuts the whole text."""
        context = request.context.rstrip()
        tokens = await self.client.score(request.context + request.continuation)
        counted = [token for token in tokens if token.offset >= len(context)]
        if not counted or counted[0].logprob is None:
            raise ValueError(
                "the server gives no log-probability of a text's first token; it must put a BOS "
                "token in front, or the context must not be empty"
            )
        logprob = sum(token.logprob or 0.0 for token in counted)
        return Scored(logprob, all(token.greedy for token in counted), len(counted))

    async def _document(self, request: Rolling) -> Response:
        """In one piece: what is longer than the server reads at once it refuses."""
        if request.window is not None:
            raise ValueError("a server reads a document whole; windows need a checkpoint")
        scored = [token for token in await self.client.score(request.text) if token.logprob]
        return _rolled(request.text, sum(token.logprob or 0.0 for token in scored), len(scored))


def params_of(request: Generate) -> SamplingParams:
    """The engine's settings of a request."""
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        n=request.n,
        seed=request.seed,
        max_tokens=request.max_tokens,
        stop=request.until,
    )


async def generate(client: Client, request: Generate, params: SamplingParams) -> Generated:
    """Answers of a client."""
    if request.messages:
        found = await client.chat(request.messages, params)
    else:
        found = await client.complete(list(request.tokens) or request.prompt, params)
    return _generated(found, bool(request.tokens))


def _generated(found: Completion, with_ids: bool) -> Generated:
    texts = tuple(choice.text for choice in found.choices)
    reasons = tuple(choice.finish_reason for choice in found.choices)
    ids = tuple(choice.token_ids for choice in found.choices) if with_ids else ()
    return Generated(texts, reasons, found.prompt_tokens, found.completion_tokens, ids)


def _rolled(text: str, logprob: float, tokens: int) -> RollingScored:
    return RollingScored(logprob, tokens, len(text.encode()), len(text.split()))


def embed(client: Client, requests: Sequence[Any], known: Collection[int]) -> Answers:
    """Vectors of a client."""

    async def one(request: Embed) -> Embedded:
        return Embedded(await client.embed(request.texts))

    calls = {
        place: functools.partial(one, request)
        for place, request in enumerate(requests)
        if place not in known
    }
    return as_completed(calls, 16)
