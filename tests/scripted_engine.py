"""An engine whose answers are known in advance, with a server around it; no model.

It answers a prompt with what its script says of it, a byte a token, and does the rest as the real
engine does: the same checks, the same text and the same `Answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import uvicorn

from data.chat import ChatTemplate
from data.tokenizers import ByteTokenizer
from serving.outputs import Answer, EngineStoppedError, Output, TokenLogprob
from serving.request import Kind, Request, State
from serving.sampling_params import Limits, resolve, truncate
from serving.scheduler import QueueFullError
from serving.server import ServerSettings, create_app
from serving.server.run import listen
from serving.stats import Histogram
from serving.text_out import TextOut

TEMPLATE = """
{%- for tool in tools or [] %}{{ '<tool>' + tool.function.name + '</tool>' }}{% endfor %}
{%- for m in messages %}
    {{- '<|bos|>' + m.role + ': ' + (m.content or '') }}
    {%- for call in m.tool_calls or [] %}{{ call.function.name ~ call.function.arguments.city }}
    {%- endfor %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|bos|>assistant: ' }}{% endif %}"""


@dataclass
class ScriptedEngine:
    """script: answers by what a prompt ends with; any other prompt is told its number of tokens.

    pause: seconds a token. slots: requests at once. most_waiting: others. breaks_at: the token of
    an answer at which the engine fails, or the request alone if `breaks_alone`.
    """

    script: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    slots: int = 64
    most_waiting: int = 1024
    max_model_len: int = 2048
    breaks_at: int | None = None
    breaks_alone: bool = False
    ready: bool = True
    adapters: tuple[str, ...] = ()
    template: ChatTemplate | None = field(default_factory=lambda: ChatTemplate(TEMPLATE))

    model_name = "scripted"

    def __post_init__(self):
        self.tokenizer = ByteTokenizer()
        self.limits = Limits(258, self.max_model_len)
        self.defaults = {"temperature": 0.0}
        self.failure = None
        self.running = 0
        self.waiting = 0
        self.finished = Counter()
        self.generated = 0
        self.seen, self.asked = [], []
        self._tasks = {}
        self._refuses = False

    @property
    def healthy(self):
        return self.failure is None

    def start(self):
        self._slots = asyncio.Semaphore(self.slots)

    async def stop(self, drain_seconds=0.0):
        self._refuses = True
        return not self._tasks

    def submit(self, tokens, params, *, request_id=None, adapter=None, kind=Kind.GENERATE):
        if self._refuses or self.failure is not None:
            raise EngineStoppedError("the engine is stopping and takes no more requests")
        if self.waiting >= self.most_waiting:
            raise QueueFullError(f"{self.waiting} requests wait, as many as may")
        prompt = [int(token) for token in truncate(tokens, params, self.limits)]
        params = resolve(params, len(prompt), self.limits)
        self.seen.append((prompt, params))
        self.asked.append(adapter)
        answer = Answer(request_id, params, self._abort, asyncio.get_running_loop())
        works = [self._work(answer, prompt, params, c, kind) for c in range(params.candidates)]
        self._tasks[answer] = [asyncio.ensure_future(work) for work in works]
        return answer

    def _abort(self, answer):
        for task in self._tasks.get(answer, ()):
            task.cancel()

    async def _work(self, answer, prompt, params, choice, kind):
        ends = frozenset([257])
        request = Request(
            answer.request_id, prompt, params, self.max_model_len, ends, choice=choice, kind=kind
        )
        text = TextOut(self.tokenizer, params, prompt)
        self.waiting += 1
        try:
            try:
                await self._slots.acquire()
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                await self._answer(answer, request, text)
            finally:
                self.running -= 1
                self._slots.release()
        except asyncio.CancelledError:
            request.state = State.FINISHED_ABORT
        except RuntimeError as error:
            self.failure = error
            self._refuses = True
            answer.deliver(EngineStoppedError("the engine has failed"))
        finally:
            self.finished[str(request.finish_reason)] += 1
            self._tasks[answer].remove(asyncio.current_task())
            if not self._tasks[answer]:
                del self._tasks[answer]

    async def _answer(self, answer, request, text):
        if not request.max_new_tokens:
            request.state = State.FINISHED_LENGTH
            answer.deliver(self._output(answer, request, 0, text.take(request).text))
        while not request.state.finished:
            await asyncio.sleep(self.pause)
            sent = len(request.output)
            if sent == self.breaks_at and not self.breaks_alone:
                raise RuntimeError("planted")
            if sent == self.breaks_at:
                request.state, request.stop_reason = State.FINISHED_ERROR, "queue_timeout"
            else:
                request.append(self._reply(request)[sent])
                self.generated += 1
            piece = text.take(request)
            if piece.stop is not None:
                request.state, request.stop_reason = State.FINISHED_STOP, piece.stop
            answer.deliver(self._output(answer, request, sent, piece.text))

    def _reply(self, request):
        prompt = self.tokenizer.decode(request.prompt)
        default = f"{len(request.prompt)} tokens, choice {request.choice}. é"
        said = next((v for k, v in self.script.items() if k in prompt), default)
        return [*said.encode(), *[257] * self.max_model_len]

    def _output(self, answer, request, sent, text):
        new = tuple(request.output[sent:])
        wanted = request.params.logprobs
        return Output(
            request_id=answer.request_id,
            choice=request.choice,
            text=text,
            token_ids=new,
            logprobs=None if wanted is None else tuple(logprob(t, wanted) for t in new),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            prompt_tokens=len(request.prompt),
            cached_tokens=1,
            completion_tokens=len(request.output),
            prompt_logprobs=self._scores(request) if not sent else None,
            vector=self._vector(request),
        )

    def _scores(self, request):
        if not request.scores_prompt:
            return None
        return tuple(logprob(token, request.params.logprobs or 0) for token in request.prompt[1:])

    def _vector(self, request):
        if request.kind is not Kind.EMBED:
            return None
        row = np.bincount(request.prompt, minlength=258)[:258]
        return (row / np.linalg.norm(row)).astype(np.float32)

    def reset_prefix_cache(self):
        if self.running:
            raise ValueError(f"the prefix cache cannot be emptied: {self.running} pages are in use")

    def stats(self):
        return SimpleNamespace(
            running=self.running,
            waiting=self.waiting,
            kv_cache_usage=0.25,
            page_size=16,
            pages_total=64,
            preemptions=0,
            prefix_queries=10,
            prefix_hits=5,
            prompt_tokens=sum(len(prompt) for prompt, _ in self.seen),
            generation_tokens=self.generated,
            finished=dict(self.finished),
            compilations={"warmup": 3, "serving": 0},
            histograms={"step_seconds": Histogram((0.1, 1.0), [2, 1, 1], 5.5)},
            running_adapters=("law",),
            waiting_adapters=(),
        )


def logprob(token, count):
    """The likeliest is always the token itself, then those after it."""
    likely = [(token + i) % 256 for i in range(count)]
    top = tuple((t, -0.125 * (i + 1)) for i, t in enumerate(likely))
    return TokenLogprob(token, -0.125, 1, top)


@contextlib.contextmanager
def serving(engine, **settings):
    """A real server on the loopback interface, in a thread; gives its URL and its service."""
    app = create_app(engine, ServerSettings(port=0, **settings))
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def wait_until(condition, seconds=30.0):
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def connect(url, **options):
    """OpenAI's client of a server."""
    import openai

    options = {"api_key": "any", "max_retries": 0, "timeout": 120.0} | options
    return openai.OpenAI(base_url=f"{url}/v1", **options)


def post(url, path, body, **headers):
    """Status, headers and JSON of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | headers
    request = urllib.request.Request(url + path, data, headers)
    return read(request)


def read(request):
    """Status, headers and JSON of an answer."""
    try:
        answer = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, dict(answer.headers), json.loads(answer.read())
