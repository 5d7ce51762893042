"""The thread that drives the device: it plans a step, sends it, and while that runs reads the one
before and hands out its text.

    take what arrived -> plan -> send step t + 1 -> read step t -> hand out -> wait if all is done

The scheduler and the device are this thread's alone; others leave requests and functions for it.
Outputs go to the event loops that wait for them, all of a step at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from serving.device import Device, Sent
from serving.grammar import Compiling, Grammars
from serving.outputs import Answer, EngineStoppedError, Output, deliver_all
from serving.plan import StepPlan
from serving.request import Request, State
from serving.sampling import NOTHING
from serving.sampling_settings import Settings
from serving.scheduler import QueueFullError, Scheduler
from serving.settings import EngineSettings
from serving.stats import EngineStats, Histogram
from serving.tracking import Track

Delivery = tuple[Answer, Output | BaseException]
LOOK_EVERY_S, IDLE_S = 0.05, 1.0
"""How often time limits are looked at, and how often an idle thread shows that it lives."""

logger = logging.getLogger(__name__)


class EngineLoop:
    """The thread, with its scheduler and its device.

    ready: set once every program is compiled, or the thread has failed. failure: why it did.
    """

    def __init__(
        self,
        settings: EngineSettings,
        scheduler: Scheduler,
        device: Device,
        histograms: dict[str, Histogram],
        grammars: Grammars,
    ) -> None:
        self._settings, self._scheduler, self._device = settings, scheduler, device
        self._grammars = grammars
        self._histograms = histograms
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self._tracks: dict[str, Track] = {}
        self._sent: deque[Sent] = deque()
        self._outbox: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        self._wake = threading.Condition()
        self._arrived: list[Track] = []
        self._posted: list[Callable[[], None]] = []
        self._refusing, self._stopping = False, False
        self._next_look, self._last_turn = 0.0, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.ready = threading.Event()
        self.failure: BaseException | None = None

    # -- called from other threads

    def start(self) -> None:
        """Start the thread, which warms up first."""
        self._thread.start()

    def healthy(self) -> bool:
        """Whether the thread lives, and no step takes longer than the watchdog allows."""
        late = time.monotonic() - self._last_turn > self._settings.watchdog_s
        alive = self._thread.is_alive() and self.failure is None
        return alive and not (late and self.ready.is_set())

    def submit(self, tracks: Sequence[Track]) -> None:
        """Queue the sequences of a request.

        Raises `QueueFullError`, `EngineStoppedError`, and `ValueError` for an id that is here.
        """
        with self._wake:
            if self._refusing:
                raise EngineStoppedError(self._why())
            waiting = len(self._scheduler.waiting) + len(self._arrived)
            if waiting >= self._settings.max_waiting:
                raise QueueFullError(f"{waiting} requests wait, as many as may")
            here = {track.request.id for track in self._arrived}
            for track in tracks:
                if track.request.id in here or track.request.id in self._tracks:
                    raise ValueError(f"request {track.answer.request_id!r} is here already")
            self._arrived += tracks
            self._wake.notify()

    def abort(self, answer: Answer) -> None:
        """End a request whose reader goes away; nothing if it has ended."""
        self.post(lambda: self._abort(lambda track: track.answer is answer))

    def guide(self, tracks: Sequence[Track], compiling: Compiling) -> None:
        """Let sequences that were submitted run once their grammar is compiled."""
        for track in tracks:
            track.compiling = compiling
        compiling.done.add_done_callback(lambda _: self.post(lambda: self._guide(tracks)))

    def post(self, function: Callable[[], None]) -> bool:
        """Have the thread call a function between two steps; false if it has ended."""
        with self._wake:
            if not self._stopping:
                self._posted.append(function)
                self._wake.notify()
            return not self._stopping

    def call(self, function: Callable[[], None]) -> None:
        """Have the thread call a function between two steps, and wait; raises what it raised."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        if not self.post(run):
            raise EngineStoppedError(self._why())
        done.result(self._settings.watchdog_s)

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes; for `call`. Raises `ValueError` while requests run."""
        self._scheduler.reset_prefix_cache()

    def refuse(self) -> None:
        """Take no more requests; those that are here go on."""
        with self._wake:
            self._refusing = True

    @property
    def num_live(self) -> int:
        """Sequences that have not ended."""
        return len(self._tracks) + len(self._arrived)

    def stop(self) -> None:
        """End all requests with `abort`, and the thread; waits for that, but not for a step that
        takes longer than the watchdog allows.
        """
        with self._wake:
            self._refusing = self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            self._end_all()
        while self._thread.is_alive() and self.healthy():
            self._thread.join(LOOK_EVERY_S)
        if self._thread.is_alive() and self.failure is None:
            self._fail(TimeoutError(f"a step took longer than {self._settings.watchdog_s:g} s"))

    def stats(self) -> EngineStats:
        """The numbers as they are now."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        counters = scheduler.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arrived),
            pages_free=pool.num_free,
            pages_total=pool.num_pages,
            page_size=pool.page_size,
            page_bytes=self._device.page_bytes,
            steps=counters.steps,
            preemptions=counters.preemptions,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            finished=dict(self._finished),
            compilations=dict(self._device.compilations),
            histograms={name: each.copy() for name, each in self._histograms.items()},
            running_adapters=self._adapters(State.RUNNING),
            waiting_adapters=self._adapters(State.WAITING, State.WAITING_GRAMMAR, State.PREEMPTED),
        )

    def _adapters(self, *states: State) -> tuple[str, ...]:
        """Names of the adapters of requests in these states."""
        requests = [track.request for track in list(self._tracks.values())]
        return tuple(sorted({r.adapter for r in requests if r.adapter and r.state in states}))

    # -- the thread

    def _run(self) -> None:
        try:
            if self._settings.warm_up:
                self._device.warm_up(_log_progress, lambda: self._stopping)
            self._last_turn = time.monotonic()
            self.ready.set()
            while not self._stopping:
                self._turn()
            self._end_all()
        except BaseException as error:
            logger.exception("the engine's thread failed")
            self._fail(error)
        finally:
            self.ready.set()

    def _turn(self) -> None:
        self._last_turn = time.monotonic()
        self._take_arrived()
        self._end_overdue(self._last_turn)
        running = self._scheduler.running
        if any(request.num_unread and request.params.structured_outputs for request in running):
            # What may follow a token is known once that is read.
            while self._sent:
                self._read(self._sent.popleft())
        plan = self._scheduler.schedule()
        if plan.sequences:
            for sequence in plan.sequences:
                if sequence.stop <= len(sequence.request.prompt):
                    self._track(sequence.request).times.note_start(self._last_turn)
            self._sent.append(self._device.send(plan, self._row, self._masks(plan)))
        ahead = 1 if self._settings.async_scheduling else 0
        if self._sent and (len(self._sent) > ahead or not plan.sequences):
            self._read(self._sent.popleft())
        self._hand_out()
        if not self._sent and not plan.sequences:
            self._wait()

    def _take_arrived(self) -> None:
        with self._wake:
            arrived, self._arrived = self._arrived, []
            posted, self._posted = self._posted, []
            # Before the lock goes, so that every sequence is always found in one of both.
            self._tracks.update((track.request.id, track) for track in arrived)
        for track in arrived:
            self._scheduler.add(track.request)
        for function in posted:
            function()

    def _wait(self) -> None:
        limit = LOOK_EVERY_S if self._tracks else IDLE_S
        with self._wake:
            self._wake.wait_for(lambda: self._arrived or self._posted or self._stopping, limit)

    def _track(self, request: Request) -> Track:
        return self._tracks[request.id]

    def _row(self, request: Request) -> Settings:
        return self._track(request).row

    def _masks(self, plan: StepPlan) -> np.ndarray | None:
        """What the sequences of a step may sample; None if anything."""
        if not any(each.request.params.structured_outputs for each in plan.sampling):
            return None
        matchers = [
            self._track(each.request).matcher if each.samples else None for each in plan.sequences
        ]
        return self._grammars.masks(matchers)

    def _guide(self, tracks: Sequence[Track]) -> None:
        for track in tracks:
            if track.request.state is not State.WAITING_GRAMMAR or track.compiling is None:
                continue
            try:
                track.matcher = track.compiling.matcher(track.grammar_param)
                track.request.state = State.WAITING
            except Exception as error:
                self._refuse(track, error)

    def _refuse(self, track: Track, error: Exception) -> None:
        """End a sequence with an error that its reader gets."""
        self._scheduler.finish(track.request, State.FINISHED_ERROR)
        self._outbox.setdefault(track.answer.loop, []).append((track.answer, error))
        self._leave(track, State.FINISHED_ERROR)

    def _end_without_token(self, track: Track) -> None:
        """End a sequence for which every id was forbidden: complete, or in a dead end."""
        matcher, id = track.matcher, track.answer.request_id
        if matcher is not None and track.compiling is not None and matcher.failure:
            error = track.compiling.refusal(track.grammar_param, matcher.failure)
            logger.error("request %s: %s", id, error)
            self._refuse(track, error)
            return
        if matcher is None or not matcher.complete:
            logger.error("request %s is in a dead end: no token may follow, so it stops", id)
        self._end(track, State.FINISHED_STOP)

    def _follow(self, track: Track) -> None:
        """Go on in the grammar by the newest token; the answer ends where nothing may follow."""
        if track.matcher is not None and track.request.state is not State.FINISHED_STOP:
            track.matcher.accept(track.request.output[-1])
            if track.matcher.ended:
                self._scheduler.finish(track.request, State.FINISHED_STOP)

    def _read(self, sent: Sent) -> None:
        outcome = self._device.read(sent)
        now = time.monotonic()
        self._histograms["step_seconds"].observe(now - sent.began)
        self._histograms["iteration_tokens_total"].observe(sent.plan.num_tokens)
        for sequence, part in outcome.parts:
            track = self._tracks.get(sequence.request.id)
            if track is not None and track.request is sequence.request and track.prompt is not None:
                track.prompt.take(part, sequence.stop - sequence.start)
        sampling = [sequence.request for sequence in sent.plan.sampling]
        tokens, logprobs = outcome.tokens, outcome.logprobs
        of_request = dict(zip(sampling, logprobs or [None] * len(sampling), strict=True))
        if NOTHING in tokens:
            for request, token in zip(sampling, tokens, strict=True):
                if token == NOTHING and not request.state.finished:
                    self._end_without_token(self._track(request))
        for request in self._scheduler.update(sent.plan, tokens):
            track = self._tracks[request.id]
            if request in of_request:
                track.times.note_token(now, self._histograms)
                self._follow(track)
            piece = track.take(of_request.get(request))
            if piece.stop is not None:
                self._scheduler.finish(request, State.FINISHED_STOP, piece.stop)
            self._put(track, piece.text)

    def _end_overdue(self, now: float) -> None:
        """End what waited or ran too long: with what it has, or an error if that is nothing."""
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        queue, whole = self._settings.queue_timeout_s, self._settings.request_timeout_s
        for track in list(self._tracks.values()):
            age, request = now - track.times.arrival, track.request
            if queue is not None and age > queue and track.times.started is None:
                self._end(track, State.FINISHED_ERROR, "queue_timeout")
            elif whole is not None and age > whole:
                state = State.FINISHED_LENGTH if request.output else State.FINISHED_ERROR
                self._end(track, state, "timeout")
            elif track.compiling is not None and track.compiling.late(now):
                self._refuse(track, track.compiling.refusal(track.grammar_param))

    def _end_all(self) -> None:
        self._take_arrived()
        self._abort(lambda track: True)
        self._hand_out()

    def _abort(self, which: Callable[[Track], bool]) -> None:
        for track in list(self._tracks.values()):
            if which(track):
                self._end(track, State.FINISHED_ABORT)

    def _end(self, track: Track, state: State, reason: str | None = None) -> None:
        self._scheduler.finish(track.request, state, reason)
        self._put(track, track.take(None).text)

    def _put(self, track: Track, text: str) -> None:
        output = track.output(text)
        self._outbox.setdefault(track.answer.loop, []).append((track.answer, output))
        if output.finish_reason is not None:
            self._leave(track, output.finish_reason)

    def _leave(self, track: Track, reason: str) -> None:
        del self._tracks[track.request.id]
        self._finished[reason] += 1
        track.note_end(time.monotonic(), self._histograms)

    def _hand_out(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for loop, outputs in outbox.items():
            try:
                loop.call_soon_threadsafe(deliver_all, outputs)
            except RuntimeError:  # The loop is closed: nobody reads any more.
                self._abort(lambda track, loop=loop: track.answer.loop is loop)

    def _fail(self, error: BaseException) -> None:
        """Tell all readers; the scheduler may be in any state."""
        self.failure = error
        with self._wake:
            self._refusing = self._stopping = True
            tracks = [*self._tracks.values(), *self._arrived]
            self._tracks, self._arrived = {}, []
        for answer in {track.answer for track in tracks}:
            problem = EngineStoppedError(self._why())
            try:
                answer.loop.call_soon_threadsafe(answer.deliver, problem)
            except RuntimeError:
                continue

    def _why(self) -> str:
        if self.failure is not None:
            return f"the engine has failed: {type(self.failure).__name__}: {self.failure}"
        return "the engine is stopping and takes no more requests"


def _log_progress(done: int, total: int, shape: object, seconds: float) -> None:
    logger.info("program %d of %d: %s in %.2f s", done, total, shape, seconds)
