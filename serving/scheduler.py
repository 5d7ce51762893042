"""Which tokens of which requests the next step computes: continuous batching over pages.

Every step gives each running request the tokens that it lacks, within a budget: one to those that
decode, a chunk to those whose prompt is long, so that no prompt stalls the others (Sarathi-Serve,
Agrawal et al. 2024). Requests that wait are admitted while room is left. If pages run out, the last
request loses its own and is computed again later, mostly from the cache of prefixes.

    plan = scheduler.schedule()
    finished = scheduler.update(plan, tokens)    # one token for each of plan.sampling

A plan may be made before the last one's tokens are read: what is not read is `UNREAD` in it. The
calls of `update` come in the order of those of `schedule`. No JAX here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serving.pages import PagePool, chain_root, extend_chain
from serving.plan import ScheduledSequence, StepPlan, step_tokens
from serving.queue import POLICIES, Policy, WaitingQueue, rank
from serving.request import Kind, Request, State

SHARED_WORTH_WAITING = 32
"""Under `lpm`: tokens that are worth waiting for while another request computes them."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    max_num_batched_tokens: most tokens of a step. max_num_seqs: most requests that run at once.
    long_prefill_token_threshold: most tokens of one request in a step; 0 is no limit.
    watermark: the fraction of pages that admissions leave free.
    policy: who goes first, "fcfs", "priority" (lower number) or "lpm" (longest cached prefix).
    max_waiting: most requests in the queue. prefix_caching: share pages of equal prefixes.
    step_sizes: that steps with prompts are padded to, rising to max_num_batched_tokens; none is no
        matter. step_floor: tokens that the smallest step costs as much as.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 16
    long_prefill_token_threshold: int = 0
    watermark: float = 0.01
    policy: Policy = "fcfs"
    max_waiting: int = 1024
    prefix_caching: bool = True
    step_sizes: tuple[int, ...] = ()
    step_floor: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs, {self.max_num_seqs}, so that each running request gets a token"
            )
        if self.long_prefill_token_threshold < 0:
            raise ValueError(
                f"long_prefill_token_threshold is {self.long_prefill_token_threshold}; it must be "
                "0 (no limit) or more"
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark is {self.watermark}; it must be in [0, 1)")
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")


class QueueFullError(Exception):
    """As many requests wait as may; a server answers 429."""


@dataclass
class Counters:
    """What the metrics count; tokens, except preemptions and steps."""

    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Scheduler:
    """The requests of an engine and their pages; `schedule` plans a step, `update` takes its
    tokens. Owned by one thread.

    cache_key: what besides adapter and salt decides the content of a page: the kind and settings
    of the cache, the revision of the model.
    """

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, cache_key: Sequence[str] = ()
    ) -> None:
        self.config, self.pool = config, pool
        self.waiting = WaitingQueue(config.policy)
        self.running: list[Request] = []
        self.counters = Counters()
        self._cache_key = tuple(cache_key)
        self._slots = list(range(config.max_num_seqs))
        self._roots: dict[str, bytes] = {}
        self._live: dict[str, Request] = {}
        self._reserve = math.floor(config.watermark * pool.num_pages)

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a new request. Raises `QueueFullError`, and `ValueError` for one that could never
        run: longer than all pages together.
        """
        if request.id in self._live:
            raise ValueError(f"request {request.id} is here already; ids must be unique")
        if len(self.waiting) >= self.config.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests wait, as many as may")
        if self.pool.pages_for(request.max_computed) > self.pool.num_pages:
            longest = self.pool.num_pages * self.pool.page_size
            raise ValueError(
                f"request {request.id} may need keys and values of {request.max_computed} tokens; "
                f"all pages together hold {longest}: shorten its prompt or max_tokens"
            )
        self._live[request.id] = request
        self._roots[request.id] = chain_root(
            (*self._cache_key, request.adapter or "", request.cache_key),
            request.params.cache_salt,
        )
        self.waiting.add(request)

    def finish(self, request: Request, state: State, reason: str | int | None = None) -> None:
        """End a request for a reason that its tokens do not show: a stop string, a time limit, a
        client that left. What steps under way still sample for it is dropped.

        A stop string in the last token that the length allowed still makes it a stop.
        """
        live = self._live.get(request.id) is request
        if live or (request.state, state) == (State.FINISHED_LENGTH, State.FINISHED_STOP):
            request.state, request.stop_reason = state, reason
        if live:
            self._leave(request)

    def abort(self, request_id: str) -> bool:
        """Drop a request whose client left; whether it was here."""
        request = self._live.get(request_id)
        if request is not None:
            self.finish(request, State.FINISHED_ABORT)
        return request is not None

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Raises `ValueError` while requests run."""
        self.pool.reset()

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._live)

    # -- one step

    def schedule(self) -> StepPlan:
        """The next step; without sequences if nothing can be computed now."""
        sequences: list[ScheduledSequence] = []
        budget = self._budget()
        preempted = self._continue_running(sequences, budget)
        if not preempted:
            self._admit(sequences, budget)
        self.counters.steps += bool(sequences)
        return StepPlan(tuple(sequences), tuple(preempted))

    def update(self, plan: StepPlan, tokens: Sequence[int]) -> list[Request]:
        """Take the tokens that a step sampled, one for each of `plan.sampling`; gives the requests
        that advanced or finished, in order.

        Tokens of requests that ended meanwhile are dropped.
        """
        sampled = iter(tokens)
        if len(tokens) != len(plan.sampling):
            raise ValueError(f"{len(tokens)} tokens came for {len(plan.sampling)} sequences")
        advanced = []
        for sequence in plan.sequences:
            request = sequence.request
            token = next(sampled) if sequence.samples else None
            request.num_unread -= sequence.samples
            if request.state.finished or not (sequence.samples or sequence.ends):
                continue
            advanced.append(request)
            self._take(request, token)
        return advanced

    def _take(self, request: Request, token: int | None) -> None:
        if token is None:
            ends = State.FINISHED_STOP if request.kind is not Kind.GENERATE else None
            request.state = ends or State.FINISHED_LENGTH
        else:
            request.append(token)
            self.counters.generation_tokens += 1
            self._publish(request)
        if request.state.finished:
            self._leave(request)

    def _budget(self) -> int:
        """Most tokens of the next step."""
        most, sizes = self.config.max_num_batched_tokens, self.config.step_sizes
        wanted = [self._chunk(request, most) for request in self.running]
        decodes = wanted.count(1)
        if self._slots and len(self.waiting):
            first = self.waiting.in_order(self._num_cached)[: len(self._slots)]
            wanted += [request.num_known - self._num_cached(request) for request in first]
        if not sizes or sum(wanted) <= decodes:
            return most
        return step_tokens(sum(wanted), decodes, sizes, self.config.step_floor)

    # -- running requests

    def _continue_running(self, sequences: list[ScheduledSequence], budget: int) -> list[Request]:
        """Give running requests their tokens; gives those that were preempted."""
        preempted: list[Request] = []
        at = 0
        while at < len(self.running):
            request = self.running[at]
            count = request.to_compute
            if count > 1 or budget < 1:
                count = self._chunk(request, budget - self._needed_behind(at))
            if count > 0:
                if not self._make_room(request, count, preempted):
                    break
                sequences.append(self._advance(request, count))
                budget -= count
            at += 1
        return preempted

    def _needed_behind(self, at: int) -> int:
        """Tokens of the budget that a long prompt leaves: one for each request behind it."""
        return sum(other.to_compute > 0 for other in self.running[at + 1 :])

    def _chunk(self, request: Request, budget: int) -> int:
        """How many of its tokens a request computes in a step with so many left."""
        most = self.config.long_prefill_token_threshold or budget
        return max(min(request.to_compute, most, budget), 0)

    def _make_room(self, request: Request, count: int, preempted: list[Request]) -> bool:
        """Get pages for a running request's next tokens, from the last ones if need be; false if it
        was the last itself.
        """
        while not self._grow(request, request.num_computed + count):
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        return True

    def _grow(self, request: Request, num_tokens: int) -> bool:
        missing = self.pool.pages_for(num_tokens) - len(request.pages)
        if missing <= 0:
            return True
        if missing > self.pool.num_free:
            return False
        request.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self._stop_running(request)
        request.num_computed = request.num_published = 0
        request.num_preemptions += 1
        request.state = State.PREEMPTED
        self.counters.preemptions += 1
        self.waiting.put_back(request)

    # -- admission

    def _admit(self, sequences: list[ScheduledSequence], budget: int) -> None:
        budget -= sum(sequence.stop - sequence.start for sequence in sequences)
        soon = self._soon_cached()
        for request in self.waiting.in_order(self._num_cached):
            if not (budget > 0 and self._slots) or request.num_unread:
                break
            hits = self._hits(request)
            if self._worth_waiting(request, len(hits), soon):
                continue
            if not self._fits(request, hits):
                break
            self._start(request, hits)
            count = self._chunk(request, budget)
            self._grow(request, request.num_computed + count)
            sequences.append(self._advance(request, count))
            budget -= count
            soon.update(request.chain[request.num_published :])

    def _hits(self, request: Request) -> list[int]:
        """Cached pages of a request's prefix; never of its last token, whose logits are needed."""
        if not self.config.prefix_caching or request.reads_prompt:
            return []
        self._extend(request)
        return self.pool.lookup(request.chain[: (request.num_known - 1) // self.pool.page_size])

    def _num_cached(self, request: Request) -> int:
        return len(self._hits(request)) * self.pool.page_size

    def _soon_cached(self) -> set[bytes]:
        """Under `lpm`: the pages that running requests are about to fill."""
        if self.config.policy != "lpm":
            return set()
        return {h for request in self.running for h in request.chain[request.num_published :]}

    def _worth_waiting(self, request: Request, num_hits: int, soon: set[bytes]) -> bool:
        """Under `lpm`: whether much of what a request lacks will soon be found in the cache."""
        if self.config.policy != "lpm" or request.reads_prompt:
            return False
        following = request.chain[num_hits:]
        shared = next((i for i, h in enumerate(following) if h not in soon), len(following))
        return shared * self.pool.page_size >= SHARED_WORTH_WAITING

    def _fits(self, request: Request, hits: list[int]) -> bool:
        """Whether all tokens that it has so far find pages, with some left for those that run."""
        reserve = self._reserve if self.running else 0
        missing = self.pool.pages_for(request.num_known) - len(hits)
        return missing + reserve <= self.pool.available(hits)

    def _start(self, request: Request, hits: list[int]) -> None:
        self.waiting.remove(request)
        self.pool.hold(hits)
        request.pages = list(hits)
        request.num_published = len(hits)
        request.num_computed = len(hits) * self.pool.page_size
        request.slot = self._slots.pop(0)
        request.state = State.RUNNING
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed, len(request.prompt))
            self.counters.prompt_tokens += len(request.prompt)
        if self.config.prefix_caching and not request.reads_prompt:
            self.counters.prefix_queries += request.num_known
            self.counters.prefix_hits += request.num_computed
        self.running.append(request)
        if self.config.policy == "priority":
            self.running.sort(key=rank)

    # -- what both share

    def _advance(self, request: Request, count: int) -> ScheduledSequence:
        """Plan the next tokens of a request that has the pages for them."""
        start, stop = request.num_computed, request.num_computed + count
        generates = request.max_new_tokens > 0
        done = stop == request.num_tokens
        planned = ScheduledSequence(
            request=request,
            slot=request.slot,
            start=start,
            stop=stop,
            tokens=tuple(request.tokens(start, stop)),
            pages=tuple(request.pages),
            samples=done and generates,
            ends=done and not generates,
            reads=request.reads_prompt and start < len(request.prompt),
        )
        request.num_computed = stop
        request.num_unread += planned.samples
        self._publish(request)
        return planned

    def _extend(self, request: Request) -> None:
        size = self.pool.page_size
        first = len(request.chain) * size
        if request.num_known - first >= size:
            known = request.tokens(first, request.num_known)
            extend_chain(request.chain, self._roots[request.id], known, size, first)

    def _publish(self, request: Request) -> None:
        """Let others find the pages that are full and whose tokens are known."""
        next_end = (request.num_published + 1) * self.pool.page_size
        if request.num_computed < next_end or not self.config.prefix_caching:
            return
        full = min(request.num_computed, request.num_known) // self.pool.page_size
        if full <= request.num_published:
            return
        self._extend(request)
        for page in range(request.num_published, full):
            parent = request.chain[page - 1] if page else self._roots[request.id]
            self.pool.publish(request.pages[page], request.chain[page], parent)
        request.num_published = full

    def _stop_running(self, request: Request) -> None:
        """Give back its place and pages."""
        self.running.remove(request)
        self.pool.release(request.pages)
        request.pages = []
        self._slots.append(request.slot)
        self._slots.sort()
        request.slot = -1

    def _leave(self, request: Request) -> None:
        if request.slot >= 0:
            self._stop_running(request)
        else:
            self.waiting.remove(request)
        del self._live[request.id], self._roots[request.id]
