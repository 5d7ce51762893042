"""The device side of an engine: its weights, its state, and steps sent ahead of their being read.

Owned by the engine's thread. Steps run in the order in which they are sent, and each takes the
state of the one before, so a slot or a page may be given on as soon as the host knows that it is
free: what was sent for its last owner is done before.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.target import current_target
from model import ModelConfig, Runtime
from model.layers_apart import can_be_apart, layers_apart
from serving.memory import Model, choose_pages, make_state, page_bytes
from serving.outputs import TokenLogprob
from serving.plan import ScheduledSequence, StepPlan
from serving.programs import ProgramStore, shapes_of
from serving.prompt_out import PromptPart
from serving.request import Request
from serving.sampling import Sampled, Variant
from serving.sampling_params import SamplingParams
from serving.sampling_settings import Settings, settings_of
from serving.settings import EngineSettings, Resolved
from serving.shapes import Shapes
from serving.step import State, Step, admit, mask_shape, run_step
from sharding import Layout
from weights import map_with_path, prepare

ALL = 0xFFFFFFFF
MOST_THREADS = 8
"""Programs that are compiled at a time: each takes memory, and one core or more."""
Shape = tuple[int, int, int, bool, bool, Variant]
Progress = Callable[[int, int, Shape, float], None]
"""`(programs ready, programs in all, shape of the last, its seconds)`."""


@dataclass(frozen=True)
class Sent:
    """A step under way."""

    plan: StepPlan
    sampled: Sampled
    began: float


@dataclass(frozen=True)
class Outcome:
    """What a step gave.

    tokens: sampled ones, one for each of `plan.sampling`. logprobs: theirs, if asked for.
    parts: what it tells of prompts.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    parts: list[tuple[ScheduledSequence, PromptPart]]


class Device:
    """Weights and state on the device.

    model: with params prepared for its platform. num_pages, page_bytes: pages, and bytes of one.
    compilations: programs compiled, by phase; those that lay on disk are not.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ModelConfig,
        settings: EngineSettings,
        resolved: Resolved,
        shapes: Shapes,
        layout: Layout | None = None,
    ) -> None:
        runtime = Runtime(compute_dtype=resolved.compute_dtype, layout=layout)
        self.model = Model(prepared(params, layout), config, runtime)
        self._shapes, self._room = shapes, settings.room
        self._devices = jax.local_devices()[:1] if layout is None else [*layout.mesh.devices.flat]
        self.page_bytes = page_bytes(self.model, resolved)
        self.num_pages = choose_pages(settings, resolved, self.model, shapes, self._devices[0])
        self._resolved = resolved
        self._state = self._make_state()
        self._tenants: dict[int, tuple[Request, int]] = {}
        self._ready: set[Shape] = set()
        self._programs: dict[Shape, Any] = {}
        self._unmasked: dict[tuple[int, int], jax.Array] = {}
        self.compilations = {"warmup": 0, "serving": 0}

    def _make_state(self) -> State:
        model = self.model
        state = make_state(model.params, model, self._resolved, self.num_pages, self._room)
        # What steps give back has a place, and arrays without one would make programs of their own.
        return state if model.runtime.layout else jax.device_put(state, self._devices[0])

    def warm_up(
        self, progress: Progress | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Compile every program, or read it from disk, several at a time; then run each once, on a
        step in which nothing is computed. Once it is `stopped` no more are begun.
        """
        steps = {_shape(*program): program for program in self._shapes.all()}
        model, self._state = self.model, self._with_a_request(self._state)
        told = (model.config, model.runtime, shapes_of((model.params, self._state)))
        store = ProgramStore.beside_jax(self._devices, told)
        threads = min(os.cpu_count() or 1, MOST_THREADS)
        with store.without_jaxs(), ThreadPoolExecutor(threads, "compile") as pool:
            try:
                making = {pool.submit(self._make, store, *steps[shape]): shape for shape in steps}
                for index, done in enumerate(as_completed(making), 1):
                    seconds = self._take(making[done], *done.result())
                    if progress is not None:
                        progress(index, len(steps), making[done], seconds)
                    if stopped():
                        return
            finally:
                pool.shutdown(cancel_futures=True)
        for step, variant in steps.values():
            self._try(store, step, variant)

    def _make(self, store: ProgramStore, step: Step, variant: Variant) -> tuple[Any, bool, float]:
        """A program, whether it was compiled for it, and the seconds that it took."""
        began, shape = time.monotonic(), _shape(step, variant)
        found = store.get(shape)
        program = found or self._compiled(step, variant)
        if found is None:
            store.put(shape, program)
        return program, found is None, time.monotonic() - began

    def _take(self, shape: Shape, program: Any, is_new: bool, seconds: float) -> float:
        self._programs[shape] = program
        self._ready.add(shape)
        self.compilations["warmup"] += is_new
        return seconds

    def _compiled(self, step: Step, variant: Variant) -> Any:
        arrays, static = self._arguments(step, variant)
        return run_step.lower(*arrays, **static).compile()

    def _try(self, store: ProgramStore, step: Step, variant: Variant) -> None:
        """Run a program once; one from disk that does not run is compiled in its place."""
        try:
            jax.block_until_ready(self._run(step, variant, "warmup"))
        except Exception as error:  # Whatever a program that is not what it says it is raises.
            shape = _shape(step, variant)
            if not store.drop(shape, error):
                raise
            del self._state  # The program has taken it, whole or not.
            self._state = self._with_a_request(self._make_state())
            self._take(shape, self._compiled(step, variant), True, 0.0)
            jax.block_until_ready(self._run(step, variant, "warmup"))

    def _with_a_request(self, state: State) -> State:
        row = settings_of(SamplingParams(temperature=0.0), self._vocab, room=self._room)
        return admit(state, 0, [0], row)

    def _arguments(
        self, step: Step, variant: Variant, masks: np.ndarray | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `run_step` takes: arrays, and what is static."""
        model, masked = self.model, (self._shapes.full, self._shapes.reads)
        grammar = self._mask(step, masks) if variant in masked else None
        static = {"config": model.config, "runtime": model.runtime, "variant": variant}
        return (model.params, self._state, step, grammar), static

    def send(
        self,
        plan: StepPlan,
        row_of: Callable[[Request], Settings],
        masks: np.ndarray | None = None,
    ) -> Sent:
        """Start a step; requests that are new in their slot are admitted first, with settings of
        `row_of`.

        masks: `uint32[sequences, words]` of the ids that each may sample; None if any.
        """
        began = time.monotonic()
        for sequence in plan.sequences:
            self._admit(sequence, row_of)
        step, variant = self._shapes.pack(plan.sequences)
        sampled = _asked_for(plan, self._run(step, variant, "serving", masks))
        for leaf in jax.tree.leaves(sampled):
            leaf.copy_to_host_async()
        return Sent(plan, sampled, began)

    def read(self, sent: Sent) -> Outcome:
        """What a step gave, once it is done."""
        rows = [row for row, sequence in enumerate(sent.plan.sequences) if sequence.samples]
        sampled: Sampled = jax.device_get(sent.sampled)
        tokens = sampled.tokens[rows].tolist()
        told = sampled.logprobs is not None
        found = [logprob_of(sampled, row) for row in rows] if told else None
        read = sampled.read
        parts = [] if read is None else list(_parts(sent.plan.sequences, read))
        return Outcome(tokens, found, parts)

    @property
    def _vocab(self) -> int:
        return self.model.config.vocab_size

    def _admit(self, sequence: ScheduledSequence, row_of: Callable[[Request], Settings]) -> None:
        request = sequence.request
        tenant = (request, request.num_preemptions)
        if self._tenants.get(sequence.slot) != tenant:
            self._tenants[sequence.slot] = tenant
            known = request.tokens(0, request.num_known)
            self._state = admit(self._state, sequence.slot, known, row_of(request))

    def _run(
        self, step: Step, variant: Variant, phase: str, masks: np.ndarray | None = None
    ) -> Sampled:
        shape = _shape(step, variant)
        if shape not in self._ready:
            self._ready.add(shape)
            self.compilations[phase] += 1
        arrays, static = self._arguments(step, variant, masks)
        program = self._programs.get(shape)
        self._state, sampled = program(*arrays) if program else run_step(*arrays, **static)
        return sampled

    def _mask(self, step: Step, masks: np.ndarray | None) -> Any:
        """A mask for each row of a step; where none is given, one that lies on the device."""
        shape = mask_shape(step, self._vocab)
        if masks is None:
            if shape not in self._unmasked:
                self._unmasked[shape] = jnp.full(shape, ALL, jnp.uint32)
            return self._unmasked[shape]
        rows = np.full(shape, ALL, np.uint32)
        rows[: len(masks)] = masks
        return rows


def prepared(params: Mapping[str, Any], layout: Layout | None = None) -> Mapping[str, Any]:
    """Params in the form that is multiplied fastest on the device, layers apart on one CPU."""
    platform = current_target().platform
    ready = map_with_path(lambda _, weight: prepare(weight, platform), params)
    return layers_apart(ready) if layout is None and can_be_apart(ready) else ready


def choice_row(row: Settings, choice: int) -> Settings:
    """The settings of another of a request's answers."""
    return dataclasses.replace(row, choice=np.int32(choice))


def _asked_for(plan: StepPlan, sampled: Sampled) -> Sampled:
    """What of a step anybody asked for: the rest stays on the device."""
    read = sampled.read if any(sequence.reads for sequence in plan.sequences) else None
    if all(each.request.params.logprobs is None for each in plan.sampling):
        return Sampled(sampled.tokens, read=read)
    return dataclasses.replace(sampled, read=read)


def _shape(step: Step, variant: Variant) -> Shape:
    sequences, width = step.page_table.shape
    return step.tokens, sequences, width, step.decodes, step.token_by_token, variant


def _parts(
    sequences: Sequence[ScheduledSequence], read: Any
) -> Iterator[tuple[ScheduledSequence, PromptPart]]:
    """What a step tells of each prompt that it reads; its tokens lie one after another."""
    at = 0
    for row, sequence in enumerate(sequences):
        first, at = at, at + sequence.stop - sequence.start
        if sequence.reads:
            known = min(sequence.stop, len(sequence.request.prompt) - 1) - sequence.start
            scored = range(first, first + known) if sequence.request.scores_prompt else ()
            logprobs = [logprob_of(read.following, token) for token in scored]
            yield sequence, PromptPart(sequence.start, logprobs, read.sums[row], read.lasts[row])


def logprob_of(sampled: Any, row: int) -> TokenLogprob:
    """A row of a `Sampled` that came with log-probabilities, on the host."""
    ids, values = sampled.top_tokens[row].tolist(), sampled.top_logprobs[row].tolist()
    return TokenLogprob(
        int(sampled.tokens[row]),
        float(sampled.logprobs[row]),
        int(sampled.ranks[row]),
        tuple(zip(ids, values, strict=True)),
    )
